# SPDX-License-Identifier: Apache-2.0
"""What a run on wrong labels can still learn: trained on with the right ones, and beside it a fresh start.

python -m benchmarks "fashion_mnist(noise=0.4)" --save
python -m benchmarks plasticity fashion_mnist-noise-0.4-tuned
"""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.engine.calls import SpecError
from benchmarks.engine.problem import Problem, batches
from benchmarks.engine.runner import Evaluator, compiled
from benchmarks.studies._kept import Found, Kept, add_arguments, run_all

__all__ = ["add_arguments", "run"]


def plasticity(kept: Kept) -> Found:
  """Test accuracy before and after as many epochs again with the right labels, and after them from a fresh start."""
  saved, plan = kept.saved, kept.plan
  clean = with_right_labels(kept.problem)
  train = jax.tree.map(jnp.asarray, clean.arrays.train)
  racer, evaluate = compiled(clean, kept.contestant, plan, train), Evaluator(clean)
  rows = list(itertools.islice(batches(clean, saved.seed + 1000), plan.steps))
  found = {"before": evaluate(saved.variables)["test_accuracy"]}
  for name, start in {"after": saved.variables, "from_scratch": clean.init(jax.random.key(saved.seed))}.items():
    lane = racer.start(jax.tree.map(jnp.asarray, start), saved.seed)
    lane.train(train, rows, 0)
    found[name] = evaluate(lane.variables)["test_accuracy"]
  return found


def with_right_labels(problem: Problem) -> Problem:
  """The same problem after the noise: the labels it had before."""
  train = dict(problem.arrays.train)
  if "clean" not in train:
    raise SpecError(
      f"`{problem.name}` has no wrong labels to recover from. Type `fashion_mnist(noise=0.4)`, keep that run with "
      "`--save`, and give its name."
    )
  train["y"] = train.pop("clean")
  return replace(problem, arrays=problem.arrays._replace(train=train), deficit=0)


run = partial(run_all, plasticity)
