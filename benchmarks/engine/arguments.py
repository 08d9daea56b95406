# SPDX-License-Identifier: Apache-2.0
"""Arguments that several studies have in common, said once."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.engine.calls import name_of, unknown

RESULTS = Path(__file__).parents[1] / "results"


def positive(kind: type) -> Callable[[str], Any]:
  """An argparse type: a number above zero."""

  def convert(text: str) -> Any:
    if not (value := kind(text)) > 0:
      raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value

  convert.__name__ = f"positive {kind.__name__}"
  return convert


def known(kind: str, names: Iterable[str]) -> Callable[[str], str]:
  """An argparse type: one of the names, alone or with options in parentheses."""

  def check(text: str) -> str:
    if name_of(text) not in names:
      raise argparse.ArgumentTypeError(unknown(kind, name_of(text), names))
    return text

  return check


NUMBER, COUNT = {"type": positive(float)}, {"type": positive(int)}
PLAN: dict[str, dict[str, Any]] = {  # how a problem is trained: what `plan_of` gives back
  "data_dir": {"help": "folder of the data sets (default: $DPSGD_OPTAX_DATA, or a download)"},
  "seconds": NUMBER | {"help": "of training, after which a run ends (default: it ends after so many epochs)"},
  "clock": {"choices": ("seconds", "cpu_seconds"), "help": "what --seconds counts (default: wall time)"},
  "epochs": NUMBER | {"help": "passes over the training data (default: the problem's)"},
  "batch_size": COUNT | {"help": "samples per step (default: the problem's)"},
  "train_size": COUNT | {"help": "use only the first N training samples"},
  "test_size": COUNT | {"help": "evaluate on the first N test samples only"},
  "evaluations": COUNT | {"help": "points of each curve (default: the problem's)"},
  "decay": NUMBER | {"help": "learning-rate factor after each epoch (default: the setting's)"},
  "folded": {"action": argparse.BooleanOptionalAction, "help": "biases as a row of the kernels (default: by setting)"},
}
COMMON = PLAN | {
  "seeds": COUNT | {"help": "how many, from 1 on (default: %(default)s)"},
  "resume": {"action": "store_true", "help": "keep what an earlier run has finished"},
  "target": NUMBER | {"action": "append", "default": [], "help": "another target loss; may be repeated"},
}


def add(parser: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
  """Adds arguments of COMMON: those that are named, and those that are given with their default in this study."""
  for name in (*names, *defaults):
    parser.add_argument(f"--{name.replace('_', '-')}", **COMMON[name])
  parser.set_defaults(**defaults)


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
  """The arguments that `prepare` takes as they are."""
  return {name: getattr(args, name) for name in PLAN}
