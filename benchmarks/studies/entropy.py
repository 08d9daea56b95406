# SPDX-License-Identifier: Apache-2.0
"""Entropy and margin of the predictions of a kept run; whether they are higher for what was forgotten."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.studies._kept import Found, Kept, add_arguments, forgotten, run_all

__all__ = ["add_arguments", "run"]
EXTREMES: dict[str, Callable[[np.ndarray], Any]] = {"min": np.min, "mean": np.mean, "max": np.max}


def uncertainty(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Entropy of each prediction in nats, and its margin: the probability of the first class less that of the second."""
  shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
  log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  p = np.exp(log)
  first = np.sort(p, -1)
  return -(p * log).sum(-1), first[:, -1] - first[:, -2]


def entropy(kept: Kept) -> Found:
  """Of the test samples; and Spearman's correlation of entropy and forgetting events over the training samples."""
  from scipy.stats import spearmanr

  values, margins = uncertainty(kept.array("test_logits"))
  events = forgotten(kept.array("correct"))
  of_train, _ = uncertainty(kept.array("train_logits"))
  known = len(set(events)) > 1
  return {
    **{f"entropy_{name}": float(f(values)) for name, f in EXTREMES.items()},
    **{f"margin_{name}": float(f(margins)) for name, f in EXTREMES.items()},
    "spearman_with_forgetting": float(spearmanr(of_train, events).statistic) if known else math.nan,
  }


run = partial(run_all, entropy)
