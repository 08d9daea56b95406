# SPDX-License-Identifier: Apache-2.0
"""Problems of images, with what can be done to the data on purpose as options.

noise      share of the training labels that are wrong
imbalance  share that is left of the training samples of every second class
blur       epochs in which the network sees blurred images only; then clear ones
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.engine.calls import choice
from benchmarks.engine.problem import STATISTICS, Metrics, Problem, cross_entropy
from benchmarks.problems import cifar, data
from benchmarks.problems.models import LeNet5
from benchmarks.problems.resnet import NORMS, SIZES, ResNet
from benchmarks.problems.spoilers import spoiled


def classifier(model: nn.Module, arrays: data.Arrays, statistics: bool = False, **options: Any) -> Problem:
  """Mean cross-entropy and accuracy; with `statistics` a model that has running ones and a mode of training."""

  def outputs(variables: Any, x: jax.Array) -> jax.Array:
    return model.apply(variables, x)

  def metrics(variables: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    return cross_entropy(outputs(variables, batch["x"]), batch["y"])

  def training(variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
    logits, new = model.apply(variables, batch["x"], train=True, mutable=[STATISTICS])
    return cross_entropy(logits, batch["y"])["loss"], new[STATISTICS]

  return Problem(
    init=lambda key: model.init(key, jnp.asarray(arrays.train["x"][:1])),
    metrics=metrics,
    arrays=arrays,
    training=training if statistics else None,
    outputs=outputs,
    **options,
  )


def lenet(
  dataset: str, data_dir: str | None, folded: bool, noise: float = 0.0, imbalance: float = 1.0, blur: int = 0
) -> Problem:
  """LeNet-5 on `mnist` or `fashion_mnist`; options: wrong labels, few samples of some classes, blurred beginnings."""
  arrays = spoiled(data.images(dataset, data_dir), noise, imbalance, blur)
  options = dict(name=dataset, batch_size=64, epochs=20, evaluations=40, default_seeds=3)
  return classifier(LeNet5(folded), arrays, deficit=blur, **options)


def cifar10(
  data_dir: str | None,
  folded: bool,
  model: str = "resnet8",
  norm: str = "batch",
  shortcuts: bool = True,
  noise: float = 0.0,
  imbalance: float = 1.0,
  blur: int = 0,
  batches: int = 5,
) -> Problem:
  """`resnet8` or `resnet18` on CIFAR-10 without augmentation; norm `batch`, `group`, `weight` or `none`.

  `batches`: how many of the five training files are read. The biases are never folded.
  """
  del folded
  widths, blocks = choice(model, "model", SIZES)
  choice(norm, "norm", NORMS)
  arrays = spoiled(cifar.cifar10(data_dir, batches), noise, imbalance, blur)
  network = ResNet(widths, blocks, norm, shortcuts)
  options = dict(name="cifar10", batch_size=128, epochs=20, evaluations=40, default_seeds=3)
  return replace(classifier(network, arrays, statistics=norm == "batch", **options), deficit=blur)
