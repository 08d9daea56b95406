# SPDX-License-Identifier: Apache-2.0
"""The networks, with made-up data, on which `python -m benchmarks cost` times its calls.

mlp        784-512-512-10, batch 256            charlm    4 decoder blocks of width 128, 16 x 128 characters
lenet5     5 layers on 28 x 28, batch 64        resnet8   8 layers with batch norm on 32 x 32 x 3, batch 64
deep       kernels of 100 layers 64 x 64        gpt2      12 decoder blocks of width 768, 8 x 1024 tokens: for a GPU
layers     lenet5 as `nn.Conv` and `nn.Dense`: `capture` and `bnp` on an unchanged model, convolutions in a `lax.cond`
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.engine.problem import STATISTICS, cross_entropy
from benchmarks.engine.workload import Workload
from benchmarks.problems.models import MLP, LeNet5, Transformer
from benchmarks.problems.resnet import SIZES, ResNet


def _classifier(model: nn.Module, shape: tuple[int, ...], classes: int = 10, **train: Any) -> Workload:
  """Cross-entropy of random images or tokens; `train`: arguments of a model that has running statistics."""
  rng = np.random.default_rng(0)
  images = len(shape) != 2 or not isinstance(model, Transformer)
  x = jnp.asarray(rng.standard_normal(shape), jnp.float32) if images else jnp.asarray(rng.integers(0, classes, shape))
  y = jnp.asarray(rng.integers(0, classes, shape[:1] if images else shape))
  variables = jax.jit(model.init)(jax.random.key(0), x[:1])

  def loss(params: Any, statistics: Any, batch: Any) -> tuple[jax.Array, Any]:
    if not train:
      return cross_entropy(model.apply(params, batch[0]), batch[1])["loss"], statistics
    logits, new = model.apply(params | {STATISTICS: statistics}, batch[0], mutable=[STATISTICS], **train)
    return cross_entropy(logits, batch[1])["loss"], new[STATISTICS]

  statistics = variables.get(STATISTICS, ())
  params = {name: part for name, part in variables.items() if name != STATISTICS}
  return Workload(params, statistics, (x, y), loss)


class Layers(nn.Module):
  """LeNet-5 as anybody would write it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for features in (6, 16):
      x = nn.max_pool(nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
    x = x.reshape(len(x), -1)
    for features in (120, 84):
      x = nn.relu(nn.Dense(features)(x))
    return nn.Dense(10)(x)


def deep(depth: int = 100, width: int = 64) -> Workload:
  rng = np.random.default_rng(0)
  return Workload({f"w{i}": jnp.asarray(rng.standard_normal((width, width)), jnp.float32) for i in range(depth)})


WORKLOADS: dict[str, Callable[[], Workload]] = {
  "mlp": lambda: _classifier(MLP((512, 512, 10)), (256, 784)),
  "lenet5": lambda: _classifier(LeNet5(), (64, 28, 28, 1)),
  "charlm": lambda: _classifier(Transformer(65, 4, 128, 4), (16, 128), 65),
  "resnet8": lambda: _classifier(ResNet(*SIZES["resnet8"], "batch", True), (64, 32, 32, 3), train=True),
  "deep": deep,
  "layers": lambda: _classifier(Layers(), (64, 28, 28, 1)),
  "gpt2": lambda: _classifier(Transformer(50257, 12, 768, 12), (8, 1024), 50257),
}
USUAL = ("mlp", "lenet5", "charlm", "resnet8", "deep", "layers")
