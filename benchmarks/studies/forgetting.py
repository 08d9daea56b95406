# SPDX-License-Identifier: Apache-2.0
"""How often the samples of a kept run were learned and forgotten again (arXiv:1812.05159)."""

from functools import partial

import numpy as np

from benchmarks.studies._kept import Found, Kept, add_arguments, forgotten, run_all

__all__ = ["add_arguments", "run"]


def forgetting(kept: Kept) -> Found:
  """Events of a sample, and the shares that were never forgotten and never learned (arXiv:1812.05159)."""
  correct = kept.array("correct")
  events, learned = forgotten(correct), correct[1:].any(0)
  return {
    "mean_events": float(events.mean()),
    "most_events": float(events.max()),
    "never_forgotten": float(np.mean((events == 0) & learned)),
    "never_learned": float(np.mean(~learned)),
  }


run = partial(run_all, forgetting)
