# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images (arXiv:1512.03385), with a choice of the norm layers, with and without shortcuts.

ResNet-8: widths 16, 32, 64, one block each, 78042 parameters with batch norm: a CPU can train it. ResNet-18: widths 64
to 512, two blocks each, 11.2 million. No augmentation, no dropout.
"""

from collections.abc import Sequence
from functools import partial

import jax
from flax import linen as nn

from benchmarks.problems.models import XAVIER, normalized

NORMS = ("batch", "group", "weight", "none")
SIZES = {"resnet8": ((16, 32, 64), 1), "resnet18": ((64, 128, 256, 512), 2)}


def pixels(x: jax.Array) -> jax.Array:
  """Bytes as numbers of about unit variance; floats as they are."""
  return x if x.dtype == "float32" else (x.astype("float32") - 121) / 64


class ResNet(nn.Module):
  """3 x 3 convolution, stages of blocks of two convolutions each, mean over space, dense."""

  widths: Sequence[int]
  blocks: int
  norm: str = "batch"
  shortcuts: bool = True
  classes: int = 10

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    def convolution(x: jax.Array, width: int, window: int, stride: int) -> jax.Array:
      layer = partial(nn.Conv, width, (window, window), (stride, stride), kernel_init=XAVIER)
      return normalized(x, layer, self.norm, train, 8)

    x = nn.relu(convolution(pixels(x), self.widths[0], 3, 1))
    for stage, width in enumerate(self.widths):
      for block in range(self.blocks):
        stride = 2 if stage and not block else 1
        inner = convolution(nn.relu(convolution(x, width, 3, stride)), width, 3, 1)
        if self.shortcuts:
          inner = inner + (x if x.shape == inner.shape else convolution(x, width, 1, stride))
        x = nn.relu(inner)
    return nn.Dense(self.classes, kernel_init=XAVIER)(x.mean((1, 2)))
