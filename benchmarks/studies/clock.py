# SPDX-License-Identifier: Apache-2.0
"""Who is lowest when the seconds are over: every optimizer tuned in as many trials over the same kinds of freedom.

python -m benchmarks clock                                 all problems, some hours
python -m benchmarks clock digits --seconds 1 --seeds 10   one of them

Rate, period of the fits, schedule, mean of the iterates and clipping are searched as `engine/search.py` says, on seed
0 and for the same seconds; the best of each contestant then races on seeds 1, 2, … . A run ends after so many CPU
seconds of training with one thread, so that a cheap method takes as many steps as it can. The targets are the final
losses of PSGD as in its papers (a fit on every step, the rate alone tuned), of Adam and of Muon. Controls: PSGD with
the freedoms of DPSGD, and with its damping and its averaging alone. `default` is DPSGD as it comes: nothing is tuned.

Writes clock-PROBLEM.json and .png, and all trials to search-PROBLEM.json.
"""

import json
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.engine import analysis, arguments
from benchmarks.engine.analysis import Spread
from benchmarks.engine.calls import Options, file_name
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.problem import Problem
from benchmarks.engine.progress import say
from benchmarks.engine.records import Plan, Results, ResumeError, environment, load_average, rounded, write
from benchmarks.engine.report import Table, between, number
from benchmarks.engine.runner import Evaluator, Racer, compiled, race
from benchmarks.engine.search import Trial, best, bracketed, search
from benchmarks.engine.session import run as run_session
from benchmarks.engine.tune_then_race import TUNING_SEED
from benchmarks.optimizers import contestant, prepare

SECONDS = {"digits": 0.4, "mnist": 2.0, "addition": 2.0, "charlm": 4.0, "curves": 3.0, "fashion_mnist": 2.0}
SMALL = {"logistic": 0.5, "rosenbrock": 0.2}  # where the two Newton methods are compared, besides
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
EVALUATIONS = 12
CLOCKS = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}


class Entrant(NamedTuple):
  """A row of the table of optimizers, where its search starts, and its freedoms: option -> other values."""

  optimizer: str
  start: Options
  freedoms: Mapping[str, Sequence[Any]] = {}


ALL = {"schedule": ("linear",), "iterates": (0.95,), "clip": (1.0,)}
FITS = {"every": (1, 20)} | ALL
NEWTON: Options = {"learning_rate": 0.1, "every": 5}
FAST: Options = NEWTON | {"step_size": 0.3}  # as the default of DPSGD has it
AVERAGED: Options = FAST | {"average": 0.8}
ENTRANTS = {
  "momentum": Entrant("momentum", {"learning_rate": 0.1}, ALL),
  "adam": Entrant("adam", {"learning_rate": 3e-3}, ALL),
  "muon": Entrant("muon", {"learning_rate": 0.03}, ALL),
  "psgd of the papers": Entrant("psgd", {"learning_rate": 0.1, "every": 1}),
  "psgd": Entrant("psgd", FAST, FITS),
  "psgd+damping": Entrant("psgd+damping", FAST, FITS),
  "psgd+averaging": Entrant("psgd+averaging", AVERAGED, FITS),
  "dpsgd": Entrant("dpsgd_default", NEWTON, FITS),
  "whitening kron": Entrant("psgd_whiten", {"learning_rate": 3e-3, "b1": 0.9}, {"every": (1, 20)} | ALL),
  "newton kron": Entrant("psgd_newton", NEWTON, FITS),
  "soap": Entrant("soap", {"learning_rate": 3e-3}, ALL),
  "soap newton": Entrant("soap_newton", NEWTON, FITS),
  "gls": Entrant("gls", {"learning_rate": 0.2}, ALL),
  "bnp": Entrant("bnp", {"learning_rate": 0.1}, ALL),
}
DEFAULT = {"default dpsgd": Entrant("dpsgd_default", {"learning_rate": 0.1})}
FIELD = ENTRANTS | DEFAULT
LAYERED = ("digits", "mnist", "fashion_mnist")  # where gls and bnp apply
PAPER = "psgd of the papers"
TARGETS = {"PSGD's": PAPER, "Adam's": "adam", "Muon's": "muon"}


def entrants(problem: str, only: str = "") -> dict[str, Entrant]:
  """Who races where; `only`: labels with commas."""
  found = ENTRANTS if problem in LAYERED else {label: e for label, e in ENTRANTS.items() if label not in ("gls", "bnp")}
  return {label: e for label, e in found.items() if not only or label in only.split(",")}


def entered(label: str, entrant: Entrant, options: Options) -> Contestant:
  """The contestant with these options."""
  return contestant(label, entrant.optimizer, options)


class Course(NamedTuple):
  """Where all run: a contestant is compiled once for all its trials and for the race."""

  problem: Problem
  plan: Plan
  train: Any
  evaluate: Evaluator
  known: dict[Any, Racer]


def tuned(course: Course, label: str, entrant: Entrant, trials: int) -> list[Trial]:
  """The trials of one contestant on the tuning seed."""
  problem, plan, train, evaluate, known = course
  plan = replace(plan, evaluate_every=plan.steps)  # the end is all that a trial is asked for

  def play(options: Options) -> float:
    tried = entered(label, entrant, options)
    if (kind := tried.compilation()) not in known:
      known[kind] = compiled(problem, tried, plan, train)
    racer = Racer(problem, tried, plan, known[kind].steps, known[kind].compile_seconds)
    (run,) = race(problem, [racer], plan, train, evaluate, TUNING_SEED)
    say(f"    {label} {options}: {number(run.final())}")
    return run.final()

  return search(dict(entrant.start), entrant.freedoms, trials, play)


def add_arguments(parser: ArgumentParser) -> None:
  names = arguments.known("problem", SECONDS | SMALL)
  parser.add_argument("problems", nargs="*", type=names, metavar="PROBLEM", help=f"any of {', '.join(SECONDS | SMALL)}")
  parser.add_argument("--seconds", **arguments.NUMBER, help="CPU seconds of a run (default: by problem, 0.2 to 4)")
  parser.add_argument("--trials", **arguments.COUNT, default=10, help="of each contestant (default: 10)")
  parser.add_argument("--only", default="", help=f"contestants, with commas: {', '.join(ENTRANTS)} (default: all)")
  arguments.add(parser, "data_dir", "resume", seeds=5)


def run(args: Namespace) -> None:
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
  for name in args.problems or SECONDS | SMALL:
    seconds = args.seconds or (SECONDS | SMALL)[name]
    options = {"seconds": seconds, "clock": "cpu_seconds", "evaluations": EVALUATIONS, "data_dir": args.data_dir}
    problem, plan, _ = prepare(name, "tuned", "sgd(learning_rate=0.1)", **options)
    field = entrants(name, args.only)
    train, known = jax.tree.map(jnp.asarray, problem.arrays.train), {}
    picked = choose(Course(problem, plan, train, Evaluator(problem), known), field, args)
    everyone = [entered(label, field[label], options) for label, options in picked.items()]
    everyone += [entered(label, entrant, entrant.start) for label, entrant in DEFAULT.items()]
    path = args.out / f"clock-{file_name(name)}.json"
    results = run_session(problem, plan, everyone, range(1, 1 + args.seeds), path, args.resume, known=known)
    show(results, path)


def choose(course: Course, field: Mapping[str, Entrant], args: Namespace) -> dict[str, Options]:
  """Label -> the options of its best trial; all trials are written as soon as they are there."""
  name = course.problem.name
  path = args.out / f"search-{file_name(name)}.json"
  document: dict[str, Any] = {"plan": vars(course.plan), "environment": environment(), "trials": {}, "chosen": {}}
  document |= {"bracketed": {}, "load_average": {}}
  if args.resume and path.exists():
    earlier = json.loads(path.read_text())
    if earlier["plan"] != rounded(document["plan"]):
      raise ResumeError(f"{path} has trials under another plan. Give the same arguments, or leave out `--resume`.")
    document = earlier
  for label, entrant in field.items():
    if label in document["chosen"]:
      continue
    trials = tuned(course, label, entrant, args.trials)
    document["trials"][label] = [[trial.point, trial.loss] for trial in trials]
    document["chosen"][label], document["bracketed"][label] = best(trials).point, bracketed(trials)
    document["load_average"][label] = load_average()
    write(document, path)
    say(f"  {name}, {label}: {best(trials).point}{'' if bracketed(trials) else ' (rate not bracketed)'}")
  return {label: document["chosen"][label] for label in field}


def chosen(problem: str) -> dict[str, Options]:
  """What was chosen on a problem, as it is committed, and the default."""
  document = json.loads((arguments.RESULTS / f"search-{file_name(problem)}.json").read_text())
  return document["chosen"] | {label: entrant.start for label, entrant in DEFAULT.items()}


def losses(results: Results, label: str) -> list[float]:
  return [run.final() for run in results.of(label)]


def beside(results: Results, label: str, target: str) -> Spread:
  """Seconds to the final loss of `target` on the same seed, in units of the seconds that it had; infinite: never."""
  clock, seconds = results.plan.clock, results.plan.seconds
  goals = {run.seed: run.final() for run in results.of(target)}
  found = analysis.to_target(results, label, clock, {seed: goal for seed, goal in goals.items() if math.isfinite(goal)})
  assert seconds is not None
  return analysis.spread([value / seconds for value in found.values()])


def how(options: Mapping[str, Any]) -> str:
  """The options of a contestant, short."""
  return ", ".join(f"{name.replace('learning_rate', 'rate')} {value}" for name, value in options.items())


def table(results: Results) -> Table:
  """One row a contestant: final loss, and the seconds to the final losses of PSGD, Adam and Muon."""
  plan = results.plan
  order = sorted(results.contestants, key=lambda label: analysis.spread(losses(results, label)).median)
  steps = lambda label: analysis.spread([run.final("step") for run in results.of(label)]).median
  aims = {name: label for name, label in TARGETS.items() if label in results.contestants}
  rows = [
    (
      label,
      between(analysis.spread(losses(results, label))),
      number(analysis.spread([run.final("test_loss") for run in results.of(label)]).median),
      *(between(beside(results, label, target)) for target in aims.values()),
      f"{steps(label):.0f}",
      how(results.contestants[label]["options"]),
    )
    for label in order
  ]
  header = ("contestant", "training loss", "test loss", *(f"to {name}" for name in aims), "steps", "chosen")
  notes = (
    f"Data: {plan.data}. Median [quartiles] over {len(results.seeds())} seeds. “To Adam's”: seconds until the final "
    "loss of Adam on the same seed, in units of the budget; –: not within it.",
  )
  return Table(f"{plan.problem}: after {plan.seconds:g} {CLOCKS[plan.clock]} of training", header, rows, notes)


def show(results: Results, path: Path) -> None:
  """The table and the picture."""
  from benchmarks.engine.plots import plot  # matplotlib is slow to import

  table(results).show()
  plot(results, path.with_suffix(".png"))
  say(f"wrote {path} and {path.with_suffix('.png')}")
