# SPDX-License-Identifier: Apache-2.0
"""What a claim is, and how a committed figure judges it.

A claim is a sentence of a source, in our own words, with its cases. A case is a figure with the bound that the sentence
asks for, a law that is a test, or the reason why it is not checked here. The verdict of a figure follows from its
quartiles over the seeds and from nothing else:

  confirmed    the whole box, from quartile to quartile, is on the claimed side of the bound
  refuted      the whole box is on the other side, or on the bound: "lower" is refuted by a tie
  undecided    the box lies across the bound

A sentence that speaks of several problems is refuted by one of them, confirmed by all, and otherwise undecided.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engine import analysis
from benchmarks.engine.analysis import Spread
from benchmarks.engine.calls import file_name
from benchmarks.engine.records import Results, load
from benchmarks.engine.report import between

CONFIRMED, REFUTED, UNDECIDED, UNCHECKED = "confirmed", "refuted", "undecided", "not checked here"
VERDICTS = (CONFIRMED, REFUTED, UNDECIDED, UNCHECKED)


class Measured(NamedTuple):
  """A figure: its spread, over how many of what it is taken, and the command that makes it."""

  spread: Spread
  over: str  # "5 seeds"
  command: str


class Verdict(NamedTuple):
  """What a case comes to, and the cells that say why."""

  word: str
  evidence: str
  figure: str = ""
  over: str = ""
  command: str = ""


@dataclass(frozen=True)
class Rule:
  """Where a figure has to lie: beyond a bound, or from one to another, both of which belong to it."""

  low: float = -math.inf
  high: float = math.inf

  @property
  def closed(self) -> bool:
    return math.isfinite(self.low) and math.isfinite(self.high)

  def __str__(self) -> str:
    if self.closed:
      return f"{self.low:g} to {self.high:g}"
    return f"< {self.high:g}" if math.isfinite(self.high) else f"> {self.low:g}"

  def judge(self, spread: Spread) -> str:
    """The word for a figure; one that could not be formed, NaN, decides nothing."""
    if any(math.isnan(x) for x in spread):
      return UNDECIDED
    sides = [self._side(x) for x in (spread.lower, spread.upper)]
    if sides == [0, 0]:
      return CONFIRMED
    return REFUTED if sides[0] == sides[1] else UNDECIDED

  def _side(self, x: float) -> int:
    """0 where the sentence wants it, -1 below and 1 above that."""
    if self.closed:
      return int(x > self.high) - int(x < self.low)
    if math.isfinite(self.high):
      return int(x >= self.high)
    return -int(x <= self.low)


def below(bound: float) -> Rule:
  return Rule(high=bound)


def above(bound: float) -> Rule:
  return Rule(low=bound)


@dataclass(frozen=True)
class Figure:
  """A case that committed JSON decides."""

  what: str  # the quantity, and on which problem
  rule: Rule
  measure: Callable[[Path], Measured]

  def verdict(self, results: Path) -> Verdict:
    what = f"{self.what}: {self.rule}"
    try:
      found = self.measure(results)
    except (FileNotFoundError, KeyError, IndexError) as missing:
      return Verdict(UNCHECKED, f"{what}. Not in the committed results: {missing}")
    figure = between(found.spread) if math.isfinite(found.spread.median) else "not reached"
    return Verdict(self.rule.judge(found.spread), what, figure, found.over, f"`{found.command}`")


@dataclass(frozen=True)
class Law:
  """A case that a test holds; a law that contradicts the sentence is a refutation."""

  test: str  # file::function under tests/
  what: str
  word: str = CONFIRMED

  def verdict(self, results: Path) -> Verdict:
    del results
    return Verdict(self.word, self.what, command=f"`pytest tests/{self.test}`")


@dataclass(frozen=True)
class Not:
  """A case that is not checked here, and why."""

  why: str

  def verdict(self, results: Path) -> Verdict:
    del results
    return Verdict(UNCHECKED, self.why)


Case = Figure | Law | Not


@dataclass(frozen=True)
class Claim:
  """A sentence in our own words, and its cases."""

  says: str
  cases: tuple[Case, ...]

  def word(self, results: Path) -> str:
    """Refuted by one case, confirmed if all that were checked are, undecided otherwise."""
    words = [case.verdict(results).word for case in self.cases]
    checked = [word for word in words if word != UNCHECKED]
    if not checked:
      return UNCHECKED
    return REFUTED if REFUTED in checked else UNDECIDED if UNDECIDED in checked else CONFIRMED


def claim(says: str, *cases: Case) -> Claim:
  return Claim(says, cases)


# Where figures come from.


@cache
def _results(path: Path, changed: int) -> Results:
  del changed
  return load(path)


def results_of(folder: Path, name: str) -> Results:
  path = folder / f"{name}.json"
  return _results(path, path.stat().st_mtime_ns)


def document(folder: Path, name: str) -> dict[str, Any]:
  return json.loads((folder / f"{name}.json").read_text())


def command_of(found: Results) -> str:
  """What was typed: from the plan and the contestants."""
  plan, labels = found.plan, ",".join(found.contestants)
  quoted = lambda text: f'"{text}"' if "(" in text else text
  own_name = found.name == f"{file_name(plan.problem)}-{plan.setting}"
  parts = [f"python -m benchmarks {quoted(plan.problem)} --setting {plan.setting}"]
  parts += [f"--optimizers {quoted(labels)}", f"--epochs {plan.epochs:g}"]
  if "; the first" in plan.data:
    parts.append(f"--train-size {plan.train_size}")
  if not own_name:
    parts.append(f"--name {found.name}")
  return " ".join([*parts, f"--seeds {len(found.seeds())}"])


def counted(number: int, unit: str) -> str:
  """5, "seeds" -> "5 seeds"; 1, "seeds" -> "1 seed"."""
  return f"{number} {unit if number != 1 else unit.removesuffix('s')}"


def measured(found: Results, values: Sequence[float]) -> Measured:
  if not values:
    raise KeyError(f"no seed of {found.name} has both runs")
  return Measured(analysis.spread(values), counted(len(values), "seeds"), command_of(found))


def _finals(found: Results, label: str, curve: str) -> dict[int, float]:
  """The last values by seed; of a run that broke off an infinite loss, and an accuracy of zero."""
  if label not in found.contestants:
    raise KeyError(f"{found.name} has no {label}")
  lost = {"seconds": math.nan, "test_accuracy": 0.0}.get(curve, math.inf)
  return {run.seed: run.final(curve) if run.finished else lost for run in found.of(label)}


def final(name: str, label: str, curve: str = "train_loss") -> Callable[[Path], Measured]:
  """The last value of a curve."""
  return lambda folder: measured(found := results_of(folder, name), [*_finals(found, label, curve).values()])


def final_error(name: str, label: str) -> Callable[[Path], Measured]:
  """The test error in the end, in per cent."""

  def measure(folder: Path) -> Measured:
    found = results_of(folder, name)
    return measured(found, [100 * (1 - x) for x in _finals(found, label, "test_accuracy").values()])

  return measure


def compared(name: str, label: str, other: str, curve: str, by: Callable[[float, float], float]) -> Any:
  """Seed by seed, the last values of two contestants, combined."""

  def measure(folder: Path) -> Measured:
    found = results_of(folder, name)
    ours, theirs = (_finals(found, who, curve) for who in (label, other))
    return measured(found, [by(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])

  return measure


def final_ratio(name: str, label: str, other: str, curve: str = "train_loss") -> Callable[[Path], Measured]:
  return compared(name, label, other, curve, lambda ours, theirs: ours / theirs)


def final_difference(name: str, label: str, other: str, curve: str) -> Callable[[Path], Measured]:
  return compared(name, label, other, curve, lambda ours, theirs: ours - theirs)


def to_psgd(name: str, label: str, axis: str = "seconds") -> Callable[[Path], Measured]:
  """Seconds or steps to the final training loss of PSGD, over what PSGD takes to it."""

  def measure(folder: Path) -> Measured:
    found = results_of(folder, name)
    _finals(found, label, "train_loss")
    return measured(found, analysis.ratios(found, label, axis, analysis.psgd_targets(found)))

  return measure


def per_step(name: str, label: str, other: str = "psgd") -> Callable[[Path], Measured]:
  """Seconds of a step, over those of the other's."""
  return final_ratio(name, label, other, "seconds")


def of_quartiles(name: str, command: str, keys: Sequence[str], rounds: Sequence[str] = ("rounds",)) -> Callable:
  """A figure that the document has under `keys` as [lower, median, upper], and under `rounds` of how many rounds."""

  def measure(folder: Path) -> Measured:
    found = document(folder, name)
    at = lambda path: reduce(lambda inner, key: inner[key], path, found)
    lower, median, upper = at(keys)
    return Measured(Spread(median, lower, upper), counted(at(rounds), "rounds"), command)

  return measure


def of_lists(name: str, command: str, form: Callable[[dict], Iterable[float]], unit: str = "seeds") -> Callable:
  """A figure whose values, one for each of `unit`, are made from the document."""

  def measure(folder: Path) -> Measured:
    values = [*form(document(folder, name))]
    return Measured(analysis.spread(values), counted(len(values), unit), command)

  return measure
