# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization (PPO) on the environments of gymnax, with any optimizer of the table.

python -m benchmarks rl                                  ENVIRONMENTS, every optimizer tuned alike
python -m benchmarks rl Acrobot-v1 --optimizers "adam(clip=0.5),psgd_whiten(b1=0.9)"

Needs the extra `rl`. Each optimizer has its five learning rates on one seed; the one of the highest return over the
whole run is run on seeds 1, 2, ... The final return is the mean over the episodes that ended in the last tenth.
"""

import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.engine import arguments
from benchmarks.engine.analysis import spread
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment, load_average
from benchmarks.engine.report import Table, number, publish, quartiles
from benchmarks.engine.tune_then_race import tune_then_race
from benchmarks.hyperparameters import GRIDS
from benchmarks.optimizers import contestants, parse, split
from benchmarks.studies._ppo import USUAL, Episodes, Recipe, World, initial, trainer, world

ENVIRONMENTS = {"CartPole-v1": 60, "Acrobot-v1": 60, "Pendulum-v1": 200}  # iterations; DEFAULT of any other
DEFAULT = 300
OPTIMIZERS = "adam(clip=0.5),muon(clip=0.5),psgd_whiten(b1=0.9),soap,psgd_newton(every=10),dpsgd"


@dataclass
class Outcome:
  """One run: the mean return of each tenth of it, NaN where no episode ended, and the seconds it took."""

  returns: list[float]
  seconds: float

  @property
  def final(self) -> float:
    """Of the last tenth; minus infinity if nothing ended there."""
    return self.returns[-1] if math.isfinite(self.returns[-1]) else -math.inf

  @property
  def whole(self) -> float:
    """Of the run, every tenth counting alike; minus infinity if nothing ended at its end."""
    return float(np.nanmean(self.returns)) if math.isfinite(self.final) else -math.inf


def tenths(ended: Episodes) -> list[float]:
  total, count = (np.array([part.sum() for part in np.array_split(np.asarray(x), 10)]) for x in ended)
  return [float(t / n) if n else math.nan for t, n in zip(total, count, strict=True)]


def runner(place: World, recipe: Recipe, iterations: int, contestant: Contestant) -> Callable[[float, int], Outcome]:
  """(learning rate, seed) → a run. Compiled once: the rate is a number in the optimizer's state."""

  def transform(rate: float, seed: int) -> optax.GradientTransformationExtraArgs:
    return replace(contestant, options=contestant.options | {"learning_rate": rate}).build(1.0, 1, seed)

  def start(rate: float, seed: int) -> tuple:
    params = initial(place, recipe, seed)
    return params, transform(rate, seed).init(params), jax.random.key(1000 + seed)

  train = trainer(place, recipe, iterations, transform(1.0, 0)).lower(*start(1.0, 0)).compile()

  def play(rate: float, seed: int) -> Outcome:
    arguments = start(rate, seed)
    begin = time.perf_counter()
    _, _, ended = jax.block_until_ready(train(*arguments))
    return Outcome(tenths(ended), time.perf_counter() - begin)

  return play


def compare(
  name: str, optimizers: str, seeds: Sequence[int], iterations: int, recipe: Recipe, place: World
) -> dict[str, Any]:
  """One environment: tune each optimizer, then run it."""
  defaults = {parse(part)[0]: {"learning_rate": 1.0} for part in split(optimizers)}
  found: dict[str, Any] = {}
  for contestant in contestants(optimizers, defaults, name):
    one = runner(place, recipe, iterations, contestant)
    play = lambda entries, seeds, one=one: {entry: [one(entry[1], seed) for seed in seeds] for entry in entries}
    grids = {contestant.label: GRIDS[contestant.name]}
    raced = tune_then_race(grids, play, seeds, loss=lambda run: -run.whole)[contestant.label]
    found[contestant.label] = {
      "learning_rate": raced.learning_rate,
      "trials": {rate: -loss for rate, loss in raced.trials.items()},
      **{name: [getattr(run, name) for run in raced.runs] for name in ("whole", "final", "returns", "seconds")},
    }
    finals = ", ".join(number(run.final) for run in raced.runs)
    say(f"{name}, {contestant.label}: rate {raced.learning_rate:g}, final returns {finals}")
  return found


def table(name: str, document: dict[str, Any]) -> Table:
  """A row per optimizer, the best first."""
  rows = []
  for label, entry in sorted(document["optimizers"].items(), key=lambda item: -spread(item[1]["whole"]).median):
    seconds = number(spread(entry["seconds"]).median)
    rows.append((label, f"{entry['learning_rate']:g}", quartiles(entry["whole"]), quartiles(entry["final"]), seconds))
  return Table(
    f"PPO on {name}, {document['steps']} steps: mean return, median [quartiles] over {len(document['seeds'])} seeds",
    ("optimizer", "learning rate", "whole run", "last tenth", "seconds"),
    rows,
  )


def plot(name: str, document: dict[str, Any], path: Path) -> None:
  """Return against steps: median and quartiles."""
  from benchmarks.engine.plots import panels

  with panels(path, 1, 1, 4) as [[axes]]:
    steps = document["steps"] * np.arange(1, 11) / 10
    for i, (label, entry) in enumerate(document["optimizers"].items()):
      low, median, high = np.nanpercentile(np.array(entry["returns"], float), [25, 50, 75], axis=0)
      axes.plot(steps, median, color=f"C{i}", label=label)
      axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
    axes.set(title=f"PPO on {name}", xlabel="steps of the environment", ylabel="mean return")


def add_arguments(parser: ArgumentParser) -> None:
  names = ", ".join(ENVIRONMENTS)
  parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"of gymnax (default: {names})")
  parser.add_argument("--optimizers", default=OPTIMIZERS, help="comma-separated (default: %(default)s)")
  arguments.add(parser, seeds=5)


def run(args: Namespace, make: Callable[[str], World] = world, recipe: Recipe = USUAL) -> None:
  """Every environment: train, show, save rl-NAME.json and a picture beside it."""
  worlds = {name: make(name) for name in args.environments or ENVIRONMENTS}
  for name, place in worlds.items():
    iterations, seeds, load = ENVIRONMENTS.get(name, DEFAULT), range(1, 1 + args.seeds), load_average()
    document = {
      "environment": environment(),
      "recipe": asdict(recipe),
      "steps": iterations * recipe.horizon * recipe.actors,
      "seeds": list(seeds),
      "optimizers": compare(name, args.optimizers, seeds, iterations, recipe, place),
      "load_average": [load, load_average()],
    }
    publish(document, args.out / f"rl-{name}.json", table(name, document))
    plot(name, document, args.out / f"rl-{name}.png")
