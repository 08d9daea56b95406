# SPDX-License-Identifier: Apache-2.0
"""Batch-norm preconditioning beside batch normalization and a plain network, at batch sizes down to 1.

python -m benchmarks batch_sizes

The network is that of `digits_bn(model=mlp)`, 64-128-64-10 with batch norm after each layer but the last, or without.
All three are trained by SGD; each has five learning rates on seed TUNING_SEED, and the best of them on seeds 1, 2, ...
Batch norm is evaluated with its running statistics.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.engine import arguments
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, quartiles, study
from benchmarks.engine.tune_then_race import tune_then_race
from benchmarks.optimizers import Races, typed

EPOCHS = {128: 20, 16: 8, 4: 4, 1: 2}  # by batch size: between 240 and 2876 steps
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
CONTESTANTS = {"plain": ("none", "sgd"), "batch norm": ("batch", "sgd"), "BNP": ("none", "bnp")}


def compare(norm: str, optimizer: str, batch_size: int, seeds: Sequence[int], **options: Any) -> dict[str, Any]:
  """One cell: the best of RATES on the tuning seed, and the final metrics of its runs."""
  settings = dict(batch_size=batch_size, epochs=EPOCHS[batch_size], evaluations=4) | options
  races = Races(f"digits_bn(norm={norm}, model=mlp)", lambda name, rate: typed(name, {}, rate), settings)
  found = tune_then_race({optimizer: RATES}, races, seeds)[optimizer]
  finals = found.finals("train_loss", "test_loss", "test_accuracy")
  return {"learning_rate": found.learning_rate, "trials": found.trials, **finals}


def measure(seeds: int) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for size in EPOCHS:
    say(f"batch size {size}, {EPOCHS[size]} epochs")
    found[str(size)] = {name: compare(*what, size, range(1, 1 + seeds)) for name, what in CONTESTANTS.items()}
  return {"environment": environment(), "epochs": {str(k): v for k, v in EPOCHS.items()}, "batch_sizes": found}


def table(document: dict[str, Any]) -> Table:
  rows = [
    (f"{size}", name, f"{cell['learning_rate']:g}", quartiles(cell["train_loss"]), quartiles(cell["test_loss"]))
    for size, cells in document["batch_sizes"].items()
    for name, cell in cells.items()
  ]
  count = len(next(iter(document["batch_sizes"].values()))["plain"]["train_loss"])
  return Table(
    f"An MLP on the digits, SGD: median [quartiles] over {count} seeds",
    ("batch size", "network", "learning rate", "train loss", "test loss"),
    rows,
  )


add_arguments = lambda parser: arguments.add(parser, seeds=5)
run = study("batch_sizes", lambda args: measure(args.seeds), table)
