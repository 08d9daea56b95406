# SPDX-License-Identifier: Apache-2.0
"""A search over several kinds of freedom in a given number of trials, the same for whoever is compared.

The learning rate first: it climbs by factors of √10 for as long as that helps, so that the best one lies between two
that were tried, and no grid has an edge. Then each other freedom, one value after the other, kept where it helps. Then
the rate again in steps of half the size, and so on until the trials are used up: who has fewer kinds of freedom has
more trials for its rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Point = dict[str, Any]  # option -> value
RATE = "learning_rate"


class Trial(NamedTuple):
  """What was tried, and what it led to; infinite where training broke off."""

  point: Point
  loss: float


class _Spent(Exception):
  """No trial is left."""


def best(trials: Sequence[Trial]) -> Trial:
  """The trial of the lowest loss."""
  return min(trials, key=lambda trial: trial.loss)


def bracketed(trials: Sequence[Trial]) -> bool:
  """Whether a smaller rate and a larger one than the best were tried."""
  rates, chosen = [trial.point[RATE] for trial in trials], best(trials).point[RATE]
  return min(rates) < chosen < max(rates)


def search(
  start: Point, freedoms: Mapping[str, Sequence[Any]], trials: int, play: Callable[[Point], float]
) -> list[Trial]:
  """The trials, in their order. ``freedoms``: option -> values besides that of the start."""
  done: dict[tuple, Trial] = {}

  def loss(point: Point) -> float:
    key = tuple(sorted((name, repr(value)) for name, value in point.items()))
    if key not in done:
      if len(done) == trials:
        raise _Spent
      found = play(point)
      done[key] = Trial(point, found if math.isfinite(found) else math.inf)
    return done[key].loss

  def climbed(point: Point, factor: float) -> Point:
    for towards in (factor, 1 / factor):
      moved = point
      while loss(further := moved | {RATE: float(f"{moved[RATE] * towards:.4g}")}) < loss(moved):
        moved = further
      if moved is not point:
        return moved
    return point

  factor = math.sqrt(10)
  try:
    while factor > 1 + 1e-3:
      start = climbed(start, factor)
      for name, values in freedoms.items():
        for value in values:
          if loss(other := start | {name: value}) < loss(start):
            start = other
      factor = math.sqrt(factor)
  except _Spent:
    pass
  return list(done.values())
