# SPDX-License-Identifier: Apache-2.0
"""Train optimizers on problems, side by side; the study that is meant if the first word is a problem.

python -m benchmarks mnist curves --setting author     the paper's runs, in the author's setting
python -m benchmarks mnist --optimizers ablation       the four cells: damping and averaging, each on and off
python -m benchmarks mnist --optimizers "psgd,dpsgd(average=0.5, judge_every=10)"
python -m benchmarks "xor(length=55, cell=lstm)"       a problem with options

Writes NAME.json and, beside it, a picture of the curves. With --save also what the studies of kept runs need.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks import hyperparameters
from benchmarks.engine import arguments
from benchmarks.engine.calls import file_name
from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, load
from benchmarks.engine.report import tables
from benchmarks.engine.session import run as run_session
from benchmarks.optimizers import prepare
from benchmarks.problems.table import PROBLEMS


def add_options(parser: ArgumentParser) -> None:
  """All arguments but the problems."""
  add, known = parser.add_argument, ", ".join([*hyperparameters.GRIDS, *hyperparameters.GROUPS])
  add("--optimizers", default="", help=f"comma-separated: {known}")
  add("--setting", choices=("author", "tuned"), default="tuned", help="whose hyper-parameters")
  add("--name", help="name of the files (default: PROBLEM-SETTING)")
  add("--save", action="store_true", help="keep final variables and predictions in --out")
  add("--seeds", **arguments.COUNT, help="how many, from 1 on (default: 5 on small problems, 3 on large ones)")
  arguments.add(parser, *arguments.PLAN, "target", "resume")


def add_arguments(parser: ArgumentParser) -> None:
  names = arguments.known("problem", PROBLEMS)
  parser.add_argument("problems", nargs="+", type=names, metavar="PROBLEM", help=f"any of {', '.join(PROBLEMS)}")
  add_options(parser)


def run(args: Namespace) -> None:
  for name in args.problems:
    train(name, args)


def train(name: str, args: Namespace) -> None:
  problem, plan, entered = prepare(name, args.setting, args.optimizers, **arguments.plan_of(args))
  path = args.out / f"{args.name or f'{file_name(name)}-{args.setting}'}.json"
  seeds = range(1, 1 + (args.seeds or problem.default_seeds))
  try:
    results = run_session(problem, plan, entered, seeds, path, args.resume, args.save)
  except KeyboardInterrupt:
    done = load(path) if path.exists() else None
    say(f"\nstopped; seeds kept in {path}: {done.seeds() if done else 'none'}. Go on with --resume.")
    if done:
      show(done, args.out, args.target)
    raise
  show(results, args.out, args.target)


def show(results: Results, out: Path, targets: list[float]) -> None:
  """Tables, and the picture beside the JSON."""
  from benchmarks.engine.plots import plot  # matplotlib is slow to import

  for table in tables(results, targets or hyperparameters.targets(results.plan.problem)):
    table.show()
  if results.seeds():
    picture = out / f"{results.name}.png"
    plot(results, picture)
    say(f"wrote {out / results.name}.json and {picture}")
