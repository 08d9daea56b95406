# SPDX-License-Identifier: Apache-2.0
"""The table of problems: what is minimised, over which data, in which batches. To add one: one function, one row."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import data
from benchmarks.models import MLP, Elman, LeNet5

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Problem:
  """A loss over data.

  `metrics(params, batch)` gives means over the batch; its "loss" is what is minimised.
  """

  name: str
  init: Callable[[jax.Array], Any]  # key -> params
  metrics: Callable[[Any, Mapping[str, jax.Array]], Metrics]
  arrays: data.Arrays
  batch_size: int
  epochs: int  # default length of a run
  evaluations: int  # how often the loss curve is sampled in a run
  default_seeds: int = 5

  def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return self.metrics(params, batch)["loss"]

  @property
  def train_size(self) -> int:
    return len(self.arrays.train["x"])

  @property
  def steps_per_epoch(self) -> int:
    return -(-self.train_size // self.batch_size)


def batches(problem: Problem, seed: int, epochs: int) -> Iterator[np.ndarray]:
  """Row numbers of each mini-batch: a fresh permutation per epoch; the last batch is filled from its beginning."""
  rng = np.random.default_rng([seed, 1])
  for _ in range(epochs):
    order = rng.permutation(problem.train_size).astype(np.int32)
    filled = np.resize(order, problem.steps_per_epoch * problem.batch_size)
    yield from filled.reshape(-1, problem.batch_size)


def _classifier(model: nn.Module, arrays: data.Arrays, **options: Any) -> Problem:
  """Mean cross-entropy and accuracy of a network with one logit per class."""

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    logits = model.apply(params, batch["x"])
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == batch["y"])}

  return Problem(init=_init(model, arrays), metrics=metrics, arrays=arrays, **options)


def _regression(model: nn.Module, arrays: data.Arrays, target: str, **options: Any) -> Problem:
  """Squared error, mean over all elements. An autoencoder is the case target = "x"."""

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    return {"loss": jnp.mean((model.apply(params, batch["x"]) - batch[target]) ** 2)}

  return Problem(init=_init(model, arrays), metrics=metrics, arrays=arrays, **options)


def _init(model: nn.Module, arrays: data.Arrays) -> Callable[[jax.Array], Any]:
  return lambda key: model.init(key, jnp.asarray(arrays.train["x"][:1]))


def digits(data_dir: str | None, folded: bool) -> Problem:
  """Real handwritten digits, 8 x 8; an MLP 64-128-64-10. Ships with scikit-learn: the problem of the demo."""
  del data_dir
  return _classifier(MLP((128, 64, 10), folded), data.digits(), name="digits", batch_size=64, epochs=12, evaluations=36)


def _lenet(dataset: str, data_dir: str | None, folded: bool) -> Problem:
  arrays = data.images(dataset, data_dir)
  return _classifier(LeNet5(folded), arrays, name=dataset, batch_size=64, epochs=20, evaluations=40, default_seeds=3)


def curves(data_dir: str | None, folded: bool) -> Problem:
  """The 12-layer autoencoder of the CURVES experiments, 842340 parameters."""
  model = MLP((400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), folded)
  options = dict(name="curves", batch_size=64, epochs=20, evaluations=40, default_seeds=3)
  return _regression(model, data.curves(data_dir), "x", **options)


def mnist_autoencoder(data_dir: str | None, folded: bool) -> Problem:
  """784-300-100-10-100-300-784 on MNIST, 533994 parameters."""
  arrays = data.flat(data.images("mnist", data_dir))
  options = dict(name="mnist_autoencoder", batch_size=64, epochs=20, evaluations=40, default_seeds=3)
  return _regression(MLP((300, 100, 10, 100, 300, 784), folded), arrays, "x", **options)


def addition(data_dir: str | None, folded: bool) -> Problem:
  """An Elman network adds two marked numbers out of 32."""
  del data_dir
  options = dict(name="addition", batch_size=100, epochs=50, evaluations=100, default_seeds=3)
  return _regression(Elman(20, folded), data.addition(), "y", **options)


def rosenbrock(data_dir: str | None, folded: bool, size: int = 10) -> Problem:
  """sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2 from a random point near (-1, ..., -1); minimum 0 at (1, ..., 1)."""
  del data_dir, folded

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    x = params["x"]
    return {"loss": jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2) + 0 * jnp.sum(batch["x"])}

  def init(key: jax.Array) -> Any:
    return {"x": 0.1 * jax.random.normal(key, (size,)) - 1}

  return Problem("rosenbrock", init, metrics, data.nothing(), batch_size=1, epochs=2000, evaluations=100)


def quadratic(data_dir: str | None, folded: bool) -> Problem:
  """1/2 mean ||c (x W - y)||^2 with Hessian cov(x) (x) diag(c^2): condition number 1e5, minimum 0."""
  del data_dir, folded
  arrays = data.ill_conditioned()
  inputs, outputs = arrays.train["x"].shape[1], arrays.train["y"].shape[1]
  c = np.geomspace(1, 0.1, outputs, dtype=np.float32)

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    return {"loss": jnp.mean(jnp.sum((c * (batch["x"] @ params["w"] - batch["y"])) ** 2, -1)) / 2}

  def init(key: jax.Array) -> Any:
    return {"w": jax.random.normal(key, (inputs, outputs))}

  return Problem("quadratic", init, metrics, arrays, batch_size=100, epochs=50, evaluations=50)


PROBLEMS: dict[str, Callable[[str | None, bool], Problem]] = {
  "digits": digits,
  "mnist": partial(_lenet, "mnist"),
  "fashion_mnist": partial(_lenet, "fashion_mnist"),
  "curves": curves,
  "mnist_autoencoder": mnist_autoencoder,
  "addition": addition,
  "rosenbrock": rosenbrock,
  "quadratic": quadratic,
}


def limit(problem: Problem, train_size: int | None) -> Problem:
  """The same problem on the first `train_size` training samples."""
  if train_size is None or train_size >= problem.train_size:
    return problem
  from dataclasses import replace

  train = {name: array[:train_size] for name, array in problem.arrays.train.items()}
  note = f"{problem.arrays.note}; the first {train_size} of {problem.train_size} training samples"
  return replace(problem, arrays=problem.arrays._replace(train=train, note=note))
