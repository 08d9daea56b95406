# SPDX-License-Identifier: Apache-2.0
"""Problems that consist of a model, data, and a loss of the model's outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.engine.problem import STATISTICS, Arrays, Metrics, Problem, cross_entropy

Batch = Mapping[str, jax.Array]
OfOutputs = Callable[[jax.Array, Batch], Metrics]


def supervised(model: nn.Module, arrays: Arrays, metrics: OfOutputs, **more: Any) -> Problem:
  """`metrics` takes the outputs of the model and the batch."""
  return Problem(
    init=lambda key: model.init(key, jnp.asarray(arrays.train["x"][:1])),
    metrics=lambda variables, batch: metrics(model.apply(variables, batch["x"]), batch),
    arrays=arrays,
    **more,
  )


def regression(model: nn.Module, arrays: Arrays, target: str = "y", **more: Any) -> Problem:
  """Squared error, mean over all elements. An autoencoder is the case target = "x"."""
  return supervised(model, arrays, lambda outputs, batch: {"loss": jnp.mean((outputs - batch[target]) ** 2)}, **more)


def classifier(model: nn.Module, arrays: Arrays, statistics: bool = False, **more: Any) -> Problem:
  """Mean cross-entropy and accuracy; with `statistics` a model that has running ones and a mode of training."""

  def training(variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
    logits, new = model.apply(variables, batch["x"], train=True, mutable=[STATISTICS])
    return cross_entropy(logits, batch["y"])["loss"], new[STATISTICS]

  metrics = lambda logits, batch: cross_entropy(logits, batch["y"])
  more |= {"outputs": model.apply} | ({"training": training} if statistics else {})
  return supervised(model, arrays, metrics, **more)
