# SPDX-License-Identifier: Apache-2.0
"""Problems of plain layers, for the layerwise methods: MLPs, autoencoders and a single layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.engine.calls import choice
from benchmarks.engine.problem import Arrays, Metrics, Problem, classifier, supervised
from benchmarks.problems import cifar, data, tabular
from benchmarks.problems.models import MLP

HIDDEN = (512, 256)  # the two hidden layers; the note on GLS does not give their widths


def as_rows(x: jax.Array) -> jax.Array:
  """Images as rows of numbers in [0, 1]."""
  scale = 255 if jnp.issubdtype(x.dtype, jnp.integer) else 1
  return x.reshape(len(x), -1).astype(jnp.float32) / scale


class PixelMLP(nn.Module):
  """An MLP of images, as they are stored."""

  widths: Sequence[int]
  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return MLP(self.widths, self.folded)(as_rows(x))


def mlp_mnist(data_dir: str | None, folded: bool) -> Problem:
  """An MLP 784-512-256-10 on MNIST, 535818 parameters."""
  options = dict(batch_size=128, epochs=20, evaluations=20)
  return classifier(PixelMLP((*HIDDEN, 10), folded), data.images("mnist", data_dir), **options)


def mlp_cifar10(data_dir: str | None, folded: bool, batches: int = 5) -> Problem:
  """An MLP 3072-512-256-10 on CIFAR-10, 1707274 parameters; `batches`: how many training files are read."""
  options = dict(batch_size=128, epochs=20, evaluations=20, default_seeds=3)
  return classifier(PixelMLP((*HIDDEN, 10), folded), cifar.cifar10(data_dir, batches), **options)


def _autoencoder(widths: Sequence[int], folded: bool, arrays: Arrays, **options: Any) -> Problem:
  """Half the squared distance, a sum over pixels and a mean over images; "error" is the mean over pixels."""

  def metrics(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> Metrics:
    square = (outputs - as_rows(batch["x"])) ** 2
    return {"loss": jnp.mean(jnp.sum(square, -1)) / 2, "error": jnp.mean(square)}

  return supervised(PixelMLP(widths, folded), arrays, metrics, **options)


def ae_digits(data_dir: str | None, folded: bool) -> Problem:
  """An autoencoder 64-32-8-32-64 on scikit-learn's digits: 4744 parameters, two layers wider than what enters them."""
  return _autoencoder((32, 8, 32, 64), folded, data.digits(), batch_size=64, epochs=15, evaluations=30)


def ae_cifar10(data_dir: str | None, folded: bool, batches: int = 5) -> Problem:
  """An autoencoder 3072-256-64-256-3072 on CIFAR-10, 1609280 parameters."""
  options = dict(batch_size=128, epochs=20, evaluations=20, default_seeds=3)
  return _autoencoder((256, 64, 256, 3072), folded, cifar.cifar10(data_dir, batches), **options)


def uci(data_dir: str | None, folded: bool, table: str = "diabetes") -> Problem:
  """Regression, an MLP with two hidden layers of 50: diabetes (no file needed), california, or one of UCI's sets."""
  arrays = tabular.regression(choice(table, "table", tabular.NAMES), data_dir)
  metrics = lambda outputs, batch: {"loss": jnp.mean((outputs - batch["y"]) ** 2) / 2}
  return supervised(MLP((50, 50, 1), folded), arrays, metrics, batch_size=64, epochs=40, evaluations=40)


def single_layer(
  data_dir: str | None, folded: bool, samples: int = 500, inputs: int = 10, noise: float = 0.02
) -> Problem:
  """y = sigmoid(x W + b) + noise, squared error, all samples in every batch: what `irls_fit` solves in closed form."""
  metrics = lambda outputs, batch: {"loss": jnp.mean((nn.sigmoid(outputs) - batch["y"]) ** 2) / 2}
  options = dict(batch_size=samples, epochs=1000, evaluations=100)
  return supervised(MLP((1,), folded), generated(samples, inputs, noise), metrics, **options)


def generated(samples: int, inputs: int, noise: float, seed: int = 0) -> Arrays:
  """x normal, W normal; training and test part of equal size."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2 * samples, inputs))
  u = x @ rng.normal(size=(inputs, 1)) + 0.5
  y = 1 / (1 + np.exp(-u)) + noise * rng.normal(size=u.shape)
  train, test = (
    {"x": x[rows].astype(np.float32), "y": y[rows].astype(np.float32)} for rows in np.split(np.arange(2 * samples), 2)
  )
  return Arrays(train, test, f"single_layer: {samples} generated samples of {inputs} numbers")
