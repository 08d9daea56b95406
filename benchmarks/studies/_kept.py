# SPDX-License-Identifier: Apache-2.0
"""Analyses of a run that was kept with `--save`: what forgetting, entropy, sharpness and plasticity share.

python -m benchmarks fashion_mnist --save --optimizers sgd,psgd --epochs 5 --evaluations 5
python -m benchmarks forgetting fashion_mnist-tuned

An analysis is a function of one saved run. All are from the paper on PSGD for deep learning, arXiv:2402.04553.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import arguments
from benchmarks.engine.calls import SpecError
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.problem import Problem, limit
from benchmarks.engine.records import Plan, Results, environment, load
from benchmarks.engine.report import Table, number, publish
from benchmarks.engine.runner import EVALUATED_SAMPLES
from benchmarks.engine.saved import Saved, load_saved
from benchmarks.optimizers import contestant
from benchmarks.problems.table import build

Found = dict[str, float]


@dataclass(frozen=True)
class Kept:
  """One run of one contestant, with all that an analysis may need."""

  saved: Saved
  problem: Problem
  plan: Plan
  contestant: Contestant

  def array(self, name: str) -> np.ndarray:
    """One of the arrays that were kept."""
    if name not in self.saved.arrays:
      raise SpecError(f"the run of {self.saved.label} has no `{name}`: this analysis is of classifiers.")
    return self.saved.arrays[name]


def forgotten(correct: np.ndarray) -> np.ndarray:
  """How often each sample was right at one point and wrong at the next, (samples,): forgetting events.

  The point before training does not count.
  """
  trained = correct[1:]
  return np.sum(trained[:-1] & ~trained[1:], axis=0)


def problem_of(results: Results, data_dir: str | None) -> Problem:
  """The problem of a document."""
  plan = results.plan
  built = limit(build(plan.problem, data_dir, plan.folded_biases), plan.train_size, plan.test_size)
  return replace(built, batch_size=plan.batch_size)


def study(name: str, analysis: Callable[[Kept], Found], run: str, out: Path, data_dir: str | None) -> dict[str, Any]:
  """One analysis of all contestants and seeds of a run."""
  if not (path := out / f"{run}.json").exists():
    raise SpecError(f"there is no run {path}. Make it, with `--save`, and give the name of its JSON without .json.")
  results = load(path)
  problem = problem_of(results, data_dir)
  found: dict[str, list[Found]] = {}
  for saved in load_saved(out, run, problem, results.contestants, results.seeds()):
    about = results.contestants[saved.label]
    entered = contestant(saved.label, about["name"], about["options"])
    found.setdefault(saved.label, []).append(analysis(Kept(saved, problem, results.plan, entered)))
  return {
    "study": name,
    "run": run,
    "plan": vars(results.plan),
    "seeds": results.seeds(),
    "evaluated": EVALUATED_SAMPLES,
    "environment": environment(),
    "found": found,
  }


def table(document: dict[str, Any]) -> Table:
  """Medians over the seeds."""
  names = list(next(iter(document["found"].values()))[0])
  rows = [
    (label, *(number(float(np.median([entry[name] for entry in entries]))) for name in names))
    for label, entries in document["found"].items()
  ]
  header = ("optimizer", *(name.replace("_", " ") for name in names))
  return Table(f"{document['run']}: {document['study']}, median of {len(document['seeds'])} seeds", header, rows)


def add_arguments(parser: ArgumentParser) -> None:
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a run made with --save, for example digits-tuned")
  arguments.add(parser, "data_dir")


def run_all(analysis: Callable[[Kept], Found], args: Namespace) -> None:
  """Every run that was named, to study-ANALYSIS-RUN.json."""
  name = analysis.__name__
  for run in args.runs:
    document = study(name, analysis, run, args.out, args.data_dir)
    publish(document, args.out / f"study-{name}-{run}.json", table(document))
