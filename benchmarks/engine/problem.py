# SPDX-License-Identifier: Apache-2.0
"""What a problem is: variables, a loss over data, and the order in which the data come."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problems import data

Metrics = dict[str, jax.Array]
STATISTICS = "batch_stats"  # Flax's name for what batch normalization keeps


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Metrics:
  """Mean cross-entropy and accuracy."""
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)}


@dataclass(frozen=True)
class Problem:
  """A loss over data.

  `metrics(variables, batch)` gives means over the batch; its "loss" is what is minimised. The variables are the params,
  or params and running statistics (Flax's collection "batch_stats"): then `training` gives the loss in training mode.
  """

  name: str
  init: Callable[[jax.Array], Any]  # key -> variables
  metrics: Callable[[Any, Mapping[str, jax.Array]], Metrics]
  arrays: data.Arrays
  batch_size: int
  epochs: int  # default length of a run
  evaluations: int  # how often the loss curve is sampled in a run
  default_seeds: int = 5
  training: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, Any]] | None = None  # -> loss, new statistics
  outputs: Callable[[Any, jax.Array], jax.Array] | None = None  # of a classifier: (variables, x) -> logits
  deficit: int = 0  # epochs of the beginning in which `spoiled` takes the place of "x"

  def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return self.metrics(params, batch)["loss"]

  def split(self, variables: Any) -> tuple[Any, Any]:
    """What is trained, and the running statistics, which are not."""
    if self.training is None:
      return variables, {}
    return {name: part for name, part in variables.items() if name != STATISTICS}, variables[STATISTICS]

  def join(self, params: Any, statistics: Any) -> Any:
    """The inverse of `split`."""
    return params if self.training is None else params | {STATISTICS: statistics}

  def advance(self, params: Any, statistics: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
    """The loss that is differentiated, and the statistics after this batch."""
    if self.training is None:
      return self.loss(params, batch), statistics
    return self.training(self.join(params, statistics), batch)

  def take(self, train: Mapping[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    """The batch of these rows; a number past the end means the spoiled copy of the sample."""
    if not self.deficit:
      return {name: array[rows] for name, array in train.items()}
    size = len(train["x"])
    batch = {name: array[rows % size] for name, array in train.items()}
    late = (rows < size).reshape(-1, *[1] * (batch["x"].ndim - 1))
    return batch | {"x": jnp.where(late, batch["x"], batch["spoiled"])}

  @property
  def train_size(self) -> int:
    return len(self.arrays.train["x"])

  @property
  def steps_per_epoch(self) -> int:
    return -(-self.train_size // self.batch_size)


def batches(problem: Problem, seed: int, epochs: int) -> Iterator[np.ndarray]:
  """Row numbers of each mini-batch: a fresh permutation per epoch; the last batch is filled from its beginning."""
  rng = np.random.default_rng([seed, 1])
  for epoch in range(epochs):
    order = rng.permutation(problem.train_size).astype(np.int32)
    filled = np.resize(order, problem.steps_per_epoch * problem.batch_size)
    filled = filled + problem.train_size * (epoch < problem.deficit)
    yield from filled.reshape(-1, problem.batch_size)
