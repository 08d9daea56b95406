# SPDX-License-Identifier: Apache-2.0
"""Tune, then race: the one way in which a study compares contestants that each have a learning rate of their own.

Every contestant has the same number of trials, all of them on a seed that the race does not use; the best rate of each
then races on the others. A winner at the edge of its grid is reported: its best rate may lie outside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.engine.progress import say

TUNING_SEED = 0  # the races use seeds 1, 2, ...

Entry = tuple[str, float]  # a contestant and its learning rate
Play = Callable[[Sequence[Entry], Sequence[int]], Mapping[Entry, Sequence[Any]]]  # entries, seeds -> a run per seed


class Raced(NamedTuple):
  """One contestant: the rate of its lowest loss, the loss of every trial, and its runs at that rate, one per seed."""

  learning_rate: float
  losses: dict[float, float]
  runs: Sequence[Any]

  @property
  def trials(self) -> dict[str, float]:
    """The losses, as the documents have them."""
    return {f"{rate:g}": loss for rate, loss in self.losses.items()}

  def finals(self, *curves: str) -> dict[str, list[float]]:
    """The last value of each curve, by run."""
    return {name: [run.final(name) for run in self.runs] for name in curves}


def best(losses: Mapping[float, float]) -> float:
  """The learning rate of the lowest loss."""
  return min(losses, key=losses.__getitem__)


def at_edge(losses: Mapping[float, float]) -> bool:
  """Whether the best rate is the smallest or the largest that was tried."""
  return best(losses) in (min(losses), max(losses))


def tune_then_race(
  grids: Mapping[str, Sequence[float]],
  play: Play,
  seeds: Sequence[int],
  loss: Callable[[Any], float] = lambda run: run.final(),
) -> dict[str, Raced]:
  """The trials of all contestants in one race on TUNING_SEED, then the best rate of each on the seeds.

  Raises:
    ValueError: if the grids differ in size, or if the tuning seed is among those of the race.
  """
  if len({len(grid) for grid in grids.values()}) > 1 or TUNING_SEED in seeds:
    raise ValueError(
      f"every contestant needs as many trials as the others and other seeds than {TUNING_SEED} to race on, got "
      f"{ {label: len(grid) for label, grid in grids.items()} } trials and the seeds {list(seeds)}."
    )
  trials = play([(label, rate) for label, grid in grids.items() for rate in grid], [TUNING_SEED])
  losses = {label: {rate: loss(trials[label, rate][0]) for rate in grid} for label, grid in grids.items()}
  chosen = {label: best(found) for label, found in losses.items()}
  if edges := [label for label, found in losses.items() if at_edge(found)]:
    say(f"  at the edge of the grid: {', '.join(edges)}")
  runs = play(list(chosen.items()), seeds)
  return {label: Raced(rate, losses[label], runs[label, rate]) for label, rate in chosen.items()}
