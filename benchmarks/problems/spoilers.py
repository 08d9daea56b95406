# SPDX-License-Identifier: Apache-2.0
"""What is done to a data set of images on purpose: wrong labels, rare classes, a time of blurred sight."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine.calls import SpecError
from benchmarks.problems.data import Arrays


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
  """Made smaller by a factor, by means over squares, and bilinearly large again; the dtype is kept."""

  @jax.jit
  def blur(x):
    n, h, w, c = x.shape
    small = x.astype(jnp.float32).reshape(n, h // factor, factor, w // factor, factor, c).mean((2, 4))
    return jax.image.resize(small, x.shape, "bilinear")

  parts = [np.asarray(blur(images[i : i + chunk])) for i in range(0, len(images), chunk)]
  found = np.concatenate(parts)
  return np.rint(found).astype(images.dtype) if images.dtype == np.uint8 else found.astype(images.dtype)


def spoiled(arrays: Arrays, noise: float, imbalance: float, blur: int) -> Arrays:
  """All three; with `blur`, the number of epochs for which it lasts, a blurred copy of the images as `spoiled`."""
  if not (0 <= noise <= 1 and 0 < imbalance <= 1 and blur >= 0):
    raise SpecError(f"`noise`, `imbalance` are shares and `blur` counts epochs, got {noise}, {imbalance}, {blur}.")
  arrays = noisy_labels(arrays, noise) if noise else arrays
  arrays = imbalanced(arrays, imbalance) if imbalance < 1 else arrays
  if not blur:
    return arrays
  train = arrays.train | {"spoiled": blurred(arrays.train["x"])}
  return arrays._replace(train=train, note=f"{arrays.note}; blurred for the first {blur} epochs")
