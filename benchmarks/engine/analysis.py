# SPDX-License-Identifier: Apache-2.0
"""From curves to figures: when a target is reached, what a budget buys, medians and quartiles.

Between two evaluations the logarithm of the loss is taken as linear.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.engine.records import Results, Run

TINY = float(np.finfo(np.float32).tiny)  # stands for a loss of zero, whose logarithm is needed


class Spread(NamedTuple):
  """Median and quartiles over seeds; infinite where too few seeds got there."""

  median: float
  lower: float
  upper: float


def quantile(values: Sequence[float], q: float) -> float:
  """Linear between order statistics, and infinite as soon as an infinite one is needed."""
  ordered = sorted(values)
  place = q * (len(ordered) - 1)
  low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
  return low if low == high else low + (place % 1) * (high - low)


def spread(values: Iterable[float | None]) -> Spread:
  """Quartiles of the values; NaN counts as infinite, and so does None, which stands for both in a document."""
  known = [math.inf if value is None or math.isnan(value) else value for value in values]
  return Spread(*(quantile(known, q) for q in (0.5, 0.25, 0.75))) if known else Spread(*[math.inf] * 3)


def reached(xs: Sequence[float], losses: Sequence[float], target: float) -> float:
  """The x at which the loss first falls to the target; infinite if it never does."""
  for i, loss in enumerate(losses):
    if loss <= target:
      if i == 0:
        return xs[0]
      above, goal, below = (math.log(max(value, TINY)) for value in (losses[i - 1], target, loss))
      share = (above - goal) / (above - below) if above > below else 1.0
      return xs[i - 1] + share * (xs[i] - xs[i - 1])
  return math.inf


def loss_at(run: Run, axis: str, budget: float) -> float:
  """The training loss when `budget` steps or seconds are used up; infinite for a run that broke off before."""
  xs, losses = run.curves[axis], run.curves["train_loss"]
  if not run.finished and budget >= xs[-1]:
    return math.inf
  logs = [math.log(max(loss, TINY)) if math.isfinite(loss) else math.inf for loss in losses]
  return math.exp(min(float(np.interp(budget, xs, logs)), 700.0))


def psgd_targets(results: Results) -> dict[int, float]:
  """seed -> PSGD's final training loss, the target of the paper; empty if PSGD did not run."""
  return {run.seed: run.final() for run in results.of("psgd") if run.finished}


def to_target(results: Results, label: str, axis: str, targets: dict[int, float]) -> dict[int, float]:
  """seed -> steps, seconds or gradient evaluations until the target of that seed."""
  return {
    run.seed: reached(run.curves[axis], run.curves["train_loss"], targets[run.seed])
    for run in results.of(label)
    if run.seed in targets
  }


def ratios(results: Results, label: str, axis: str, targets: dict[int, float], to: str = "psgd") -> list[float]:
  """Per seed: what `label` needs to the target over what `to` needs, where `to` gets there and needs anything."""
  ours, theirs = (to_target(results, name, axis, targets) for name in (label, to))
  return [ours[seed] / theirs[seed] for seed in sorted(ours) if 0 < theirs.get(seed, 0) < math.inf]


def time_budget(results: Results) -> dict[int, float]:
  """seed -> the smallest total training time of the contestants that finished."""
  finished = [run for run in results.runs if run.finished]
  return {
    seed: min(run.curves["seconds"][-1] for run in finished if run.seed == seed)
    for seed in {run.seed for run in finished}
  }


def losses_at_equal(results: Results, axis: str) -> dict[str, Spread]:
  """label -> training loss at equal steps (the end of the run) or equal seconds (the fastest contestant's total)."""
  budget = time_budget(results) if axis == "seconds" else dict.fromkeys(results.seeds(), float(results.plan.steps))
  return {
    label: spread([loss_at(run, axis, budget[run.seed]) for run in results.of(label) if run.seed in budget])
    for label in results.contestants
  }


def ranks(losses: dict[str, Spread]) -> dict[str, int]:
  """label -> its place by median, 1 for the lowest."""
  return {label: place for place, label in enumerate(sorted(losses, key=lambda name: losses[name].median), 1)}
