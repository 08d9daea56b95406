# SPDX-License-Identifier: Apache-2.0
"""What a problem is: variables, a loss over data, and the order in which the data come."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class Arrays(NamedTuple):
  """A data set in memory. `note` says what a reader of the results must know about it."""

  train: dict[str, np.ndarray]
  test: dict[str, np.ndarray]
  note: str


Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]
OfOutputs = Callable[[jax.Array, Batch], Metrics]
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

  init: Callable[[jax.Array], Any]  # key -> variables
  metrics: Callable[[Any, Batch], Metrics]
  arrays: Arrays
  batch_size: int
  epochs: int  # default length of a run
  evaluations: int  # how often the loss curve is sampled in a run
  default_seeds: int = 5
  name: str = ""  # as it is typed on the command line: `build` knows it
  training: Callable[[Any, Batch], tuple[jax.Array, Any]] | None = None  # -> loss, new statistics
  outputs: Callable[[Any, jax.Array], jax.Array] | None = None  # of a classifier: (variables, x) -> logits
  residuals: Callable[[Any], Any] | None = None  # params -> what `gauss_newton` takes as `residual_fn`
  deficit: int = 0  # epochs of the beginning in which `spoiled` takes the place of "x"

  def loss(self, params: Any, batch: Batch) -> jax.Array:
    return self.metrics(params, batch)["loss"]

  def split(self, variables: Any) -> tuple[Any, Any]:
    """What is trained, and the running statistics, which are not."""
    if self.training is None:
      return variables, {}
    return {name: part for name, part in variables.items() if name != STATISTICS}, variables[STATISTICS]

  def join(self, params: Any, statistics: Any) -> Any:
    """The inverse of `split`."""
    return params if self.training is None else params | {STATISTICS: statistics}

  def advance(self, params: Any, statistics: Any, batch: Batch) -> tuple[jax.Array, Any]:
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


def batches(problem: Problem, seed: int) -> Iterator[np.ndarray]:
  """Row numbers of each mini-batch, for ever: a new order per epoch; its last batch is filled from its beginning."""
  rng = np.random.default_rng([seed, 1])
  for epoch in itertools.count():
    order = rng.permutation(problem.train_size).astype(np.int32)
    filled = np.resize(order, problem.steps_per_epoch * problem.batch_size)
    filled = filled + problem.train_size * (epoch < problem.deficit)
    yield from filled.reshape(-1, problem.batch_size)


def limit(problem: Problem, train_size: int | None, test_size: int | None = None) -> Problem:
  """The same problem on the first `train_size` training and `test_size` test samples."""
  for part, size, name in (("train", train_size, "training"), ("test", test_size, "test")):
    known = getattr(problem.arrays, part)
    if size is None or size >= len(known["x"]):
      continue
    first = {key: array[:size] for key, array in known.items()}
    note = f"{problem.arrays.note}; the first {size} of {len(known['x'])} {name} samples"
    problem = replace(problem, arrays=problem.arrays._replace(**{part: first}, note=note))
  return problem


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
