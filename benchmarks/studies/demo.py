# SPDX-License-Identifier: Apache-2.0
"""The digits with every usual optimizer, for half a second each: a table and two pictures, in a few minutes.

Every run ends by the clock, so that a cheap method takes as many steps as it can. Each contestant stands at what
`clock` chose for it on these digits, in as many trials as the others had: results/search-digits.json. With
`--optimizers` or `--epochs` the runs end by steps, as those of any problem do.
"""

from argparse import ArgumentParser, Namespace

from benchmarks.engine import arguments
from benchmarks.engine.session import run as run_session
from benchmarks.optimizers import prepare
from benchmarks.studies import clock, train

SHOWN = ("momentum", "adam", "muon", "psgd of the papers", "psgd", "dpsgd", "default dpsgd", "whitening kron", "soap")
SECONDS, SEEDS, EVALUATIONS = 0.5, 3, 20


def add_arguments(parser: ArgumentParser) -> None:
  train.add_options(parser)


def run(args: Namespace) -> None:
  args.name = args.name or "demo"
  if args.optimizers or args.epochs:
    args.optimizers = args.optimizers or "demo"
    train.train("digits", args)
    return
  options = arguments.plan_of(args)
  options |= {"seconds": args.seconds or SECONDS, "evaluations": args.evaluations or EVALUATIONS}
  problem, plan, _ = prepare("digits", "tuned", "sgd(learning_rate=0.1)", **options)
  field, path = clock.chosen("digits"), args.out / f"{args.name}.json"
  entered = [clock.entered(label, clock.FIELD[label], field[label]) for label in SHOWN]
  clock.show(run_session(problem, plan, entered, range(1, 1 + (args.seeds or SEEDS)), path, args.resume), path)
