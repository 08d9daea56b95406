# SPDX-License-Identifier: Apache-2.0
"""Arguments that several studies have in common, said once."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.engine.calls import name_of, unknown

RESULTS = Path(__file__).parents[1] / "results"
PLAN = ("data_dir", "epochs", "batch_size", "train_size", "test_size", "evaluations", "decay", "folded")
Parser = argparse.ArgumentParser


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


def add_seeds(parser: Parser, default: int | None) -> None:
  text = default or "5 on small problems, 3 on large ones"
  parser.add_argument("--seeds", type=positive(int), default=default, help=f"how many, from 1 on (default: {text})")


def add_data_dir(parser: Parser) -> None:
  parser.add_argument("--data-dir", help="folder of the data sets (default: $DPSGD_OPTAX_DATA, or a download)")


def add_resume(parser: Parser) -> None:
  parser.add_argument("--resume", action="store_true", help="keep what an earlier run has finished")


def add_targets(parser: Parser) -> None:
  parser.add_argument(
    "--target", type=positive(float), action="append", default=[], help="another target loss; may be repeated"
  )


def add_plan(parser: Parser) -> None:
  """How a problem is trained: what `plan_of` gives back."""
  add = parser.add_argument
  add_data_dir(parser)
  add("--epochs", type=positive(float), help="passes over the training data (default: the problem's)")
  add("--batch-size", type=positive(int), help="samples per step (default: the problem's)")
  add("--train-size", type=positive(int), help="use only the first N training samples")
  add("--test-size", type=positive(int), help="evaluate on the first N test samples only")
  add("--evaluations", type=positive(int), help="points of each curve (default: the problem's)")
  add("--decay", type=positive(float), help="learning-rate factor after each epoch (default: the setting's)")
  add("--folded", action=argparse.BooleanOptionalAction, help="biases as a row of the kernels (default: by setting)")


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
  """The arguments that `prepare` takes as they are."""
  return {name: getattr(args, name) for name in PLAN}
