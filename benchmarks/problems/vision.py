# SPDX-License-Identifier: Apache-2.0
"""Problems of images, with what can be done to the data on purpose as options.

noise      share of the training labels that are wrong
imbalance  share that is left of the training samples of every second class
blur       epochs in which the network sees blurred images only; then clear ones
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine.calls import SpecError, choice
from benchmarks.engine.problem import Arrays, Problem, classifier
from benchmarks.problems import cifar, data
from benchmarks.problems.models import LeNet5
from benchmarks.problems.resnet import NORMS, SIZES, ResNet


def lenet(
  dataset: str, data_dir: str | None, folded: bool, noise: float = 0.0, imbalance: float = 1.0, blur: int = 0
) -> Problem:
  """LeNet-5 on `mnist` or `fashion_mnist`; options: wrong labels, few samples of some classes, blurred beginnings."""
  arrays = spoiled(data.images(dataset, data_dir), noise, imbalance, blur)
  return classifier(LeNet5(folded), arrays, batch_size=64, epochs=20, evaluations=40, default_seeds=3, deficit=blur)


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
  widths, blocks = choice(model, "model", SIZES)
  choice(norm, "norm", NORMS)
  arrays = spoiled(cifar.cifar10(data_dir, batches), noise, imbalance, blur)
  options = dict(batch_size=128, epochs=20, evaluations=40, default_seeds=3, deficit=blur)
  return classifier(ResNet(widths, blocks, norm, shortcuts), arrays, statistics=norm == "batch", **options)


def noisy_labels(arrays: Arrays, share: float, classes: int = 10, seed: int = 0) -> Arrays:
  """This share of the training labels is replaced by one of the other classes, each as likely; `clean` keeps them."""
  rng, labels = np.random.default_rng([seed, 2]), arrays.train["y"]
  wrong = (labels + rng.integers(1, classes, len(labels))) % classes
  noisy = np.where(rng.random(len(labels)) < share, wrong, labels).astype(np.int32)
  train = arrays.train | {"y": noisy, "clean": labels}
  return arrays._replace(train=train, note=f"{arrays.note}; {share:.0%} of the training labels wrong")


def imbalanced(arrays: Arrays, share: float, seed: int = 0) -> Arrays:
  """Every second class keeps this share of its training samples only."""
  rng, labels = np.random.default_rng([seed, 3]), arrays.train["y"]
  kept = (labels % 2 == 0) | (rng.random(len(labels)) < share)
  train = {name: array[kept] for name, array in arrays.train.items()}
  return arrays._replace(train=train, note=f"{arrays.note}; the odd classes cut to {share:.0%}")


def blurred(images: np.ndarray, factor: int = 4, chunk: int = 1000) -> np.ndarray:
  """Images of less detail: means over squares, interpolated to the old size. The dtype is kept."""

  @jax.jit
  def blur(x):
    n, h, w, c = x.shape
    small = x.astype(jnp.float32).reshape(n, h // factor, factor, w // factor, factor, c).mean((2, 4))
    return jax.image.resize(small, x.shape, "bilinear")

  found = np.concatenate([blur(images[i : i + chunk]) for i in range(0, len(images), chunk)])
  return np.rint(found).astype(images.dtype) if images.dtype == np.uint8 else found.astype(images.dtype)


def spoiled(arrays: Arrays, noise: float, imbalance: float, blur: int) -> Arrays:
  """Wrong labels, then rare classes, then a blurred copy of the images as `spoiled`, for the first `blur` epochs."""
  if not (0 <= noise <= 1 and 0 < imbalance <= 1 and blur >= 0):
    raise SpecError(f"`noise`, `imbalance` are shares and `blur` counts epochs, got {noise}, {imbalance}, {blur}.")
  arrays = noisy_labels(arrays, noise) if noise else arrays
  arrays = imbalanced(arrays, imbalance) if imbalance < 1 else arrays
  if not blur:
    return arrays
  train = arrays.train | {"spoiled": blurred(arrays.train["x"])}
  return arrays._replace(train=train, note=f"{arrays.note}; blurred for the first {blur} epochs")
