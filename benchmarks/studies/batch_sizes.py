# SPDX-License-Identifier: Apache-2.0
"""Batch-norm preconditioning beside batch normalization and a plain network, at batch sizes down to 1.

python -m benchmarks batch_sizes

The network is that of `digits_bn(model=mlp)`, 64-128-64-10 with batch norm after each layer but the last, or without.
All three are trained by SGD; each has five learning rates on seed TUNING_SEED, and the best of them on seeds 1, 2, ...
Batch norm is evaluated with its running statistics.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, environment
from benchmarks.engine.report import Table, number
from benchmarks.engine.session import prepare, run
from benchmarks.hyperparameters import TUNING_SEED
from benchmarks.studies.cost import save

EPOCHS = {128: 20, 16: 8, 4: 4, 1: 2}  # by batch size: between 240 and 2876 steps
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
CONTESTANTS = {"plain": ("none", "sgd"), "batch norm": ("batch", "sgd"), "BNP": ("none", "bnp")}


def typed(optimizer: str, rate: float) -> str:
  return f"{optimizer}(learning_rate={rate})"


def compare(norm: str, optimizer: str, batch_size: int, seeds: Sequence[int], **options: Any) -> dict[str, Any]:
  """One cell: the best of RATES on the tuning seed, and the final metrics of its runs."""

  def race(rates: Sequence[float], seeds: Sequence[int]) -> Results:
    labels = ",".join(typed(optimizer, rate) for rate in rates)
    settings = dict(batch_size=batch_size, epochs=EPOCHS[batch_size], evaluations=4) | options
    with TemporaryDirectory() as folder:
      built, plan, entered = prepare(f"digits_bn(norm={norm}, model=mlp)", "tuned", labels, **settings)
      return run(built, plan, entered, seeds, Path(folder) / "batch_sizes.json")

  trials = race(RATES, [TUNING_SEED])
  final = {rate: trials.of(typed(optimizer, rate))[0].final() for rate in RATES}
  rate = min(final, key=lambda rate: final[rate])
  runs = race([rate], seeds).of(typed(optimizer, rate))
  metrics = ("train_loss", "test_loss", "test_accuracy")
  return {
    "learning_rate": rate,
    "trials": {f"{rate:g}": value for rate, value in final.items()},
    **{name: [run.final(name) for run in runs] for name in metrics},
  }


def measure(seeds: int, **options: Any) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for size in EPOCHS:
    say(f"batch size {size}, {EPOCHS[size]} epochs")
    cells = {name: compare(*what, size, range(1, 1 + seeds), **options) for name, what in CONTESTANTS.items()}
    found[str(size)] = cells
  return {"environment": environment(), "epochs": {str(k): v for k, v in EPOCHS.items()}, "batch_sizes": found}


def spread(values: Sequence[float | None]) -> str:
  """Median [quartiles]; a run that broke off counts as infinite."""
  low, median, high = np.percentile([np.inf if x is None else x for x in values], [25, 50, 75], method="nearest")
  return f"{number(median)} [{number(low)}, {number(high)}]"


def table(document: dict[str, Any]) -> Table:
  rows = [
    (f"{size}", name, f"{cell['learning_rate']:g}", spread(cell["train_loss"]), spread(cell["test_loss"]))
    for size, cells in document["batch_sizes"].items()
    for name, cell in cells.items()
  ]
  count = len(next(iter(document["batch_sizes"].values()))["plain"]["train_loss"])
  return Table(
    f"An MLP on the digits, SGD: median [quartiles] over {count} seeds",
    ("batch size", "network", "learning rate", "train loss", "test loss"),
    rows,
  )


def run_all(out: Path, seeds: int) -> None:
  """Measure, show, save."""
  document = measure(seeds)
  table(document).show()
  save(document, out / "batch_sizes.json")
