# SPDX-License-Identifier: Apache-2.0
"""The networks, as small Flax modules. Every affine map can store its bias in one of two ways.

plain    a kernel and a bias, as `nn.Dense` and `nn.Conv` have them
folded   one matrix (inputs + 1, outputs) whose last row is the bias, as in the experiments of the paper's author:
         the bias is then preconditioned together with the weights
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

XAVIER = nn.initializers.xavier_uniform()


class Affine(nn.Module):
  """x W + b; with a `window` (kh, kw) a valid convolution of NHWC images."""

  features: int
  folded: bool = False
  window: tuple[int, ...] = ()
  kernel_init: Callable = XAVIER
  use_bias: bool = True  # of the plain layout

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.window, x.shape[-1], self.features)
    if self.folded:
      matrix = self.param("kernel", self.kernel_init, (math.prod(shape[:-1]) + 1, self.features))
      kernel, bias = matrix[:-1].reshape(shape), matrix[-1]
    else:
      kernel = self.param("kernel", self.kernel_init, shape)
      bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else 0
    return patches(x, self.window) @ kernel.reshape(-1, self.features) + bias


def patches(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
  """NHWC -> (N, H - kh + 1, W - kw + 1, kh kw C): what each output of a valid convolution sees, side by side.

  As a matrix product LeNet-5's gradient is several times faster on a CPU than as a convolution.
  """
  if not window:
    return x
  height, width = (size - k + 1 for size, k in zip(x.shape[1:3], window, strict=True))
  return jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(window[0]) for j in range(window[1])], -1)


class MLP(nn.Module):
  """Affine maps with ReLU between them and nothing after the last."""

  widths: Sequence[int]
  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for width in self.widths[:-1]:
      x = nn.relu(Affine(width, self.folded)(x))
    return Affine(self.widths[-1], self.folded)(x)


def max_pool(x: jax.Array) -> jax.Array:
  """2 x 2, by a reshape: on a CPU several times cheaper to differentiate twice than a `reduce_window`."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


class LeNet5(nn.Module):
  """Conv 6 and 16 (5 x 5, valid, pool 2), dense 120, 84, 10; ReLU. 44426 parameters in either layout."""

  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for features in (6, 16):
      x = max_pool(nn.relu(Affine(features, self.folded, (5, 5))(x)))
    return MLP((120, 84, 10), self.folded)(x.reshape(len(x), -1))


NORMS = {  # norm layers: (in training mode?, channels of a group) -> layer
  "batch": lambda train, group: nn.BatchNorm(use_running_average=not train, momentum=0.9),
  "layer": lambda train, group: nn.LayerNorm(),
  "group": lambda train, group: nn.GroupNorm(num_groups=None, group_size=group),
}


def normalized(x: jax.Array, make: Callable[..., nn.Module], norm: str, train: bool, group: int) -> jax.Array:
  """x after a layer and the norm layer behind it. The layer has a bias where the norm layer has none.

  `weight` gives each output channel of the layer a length instead; `none` leaves the layer alone.
  """
  layer = make(use_bias=norm not in NORMS)
  x = (nn.WeightNorm(layer) if norm == "weight" else layer)(x)
  return NORMS[norm](train, group)(x) if norm in NORMS else x


class NormNet(nn.Module):
  """Two convolutions (3 x 3, valid; 16 and 32 channels), each with a norm layer and ReLU; mean over space; dense.

  Without a `window` the first two are dense layers of 128 and 64.

  `norm` is batch, layer, group (of 4 channels), weight or none.
  """

  norm: str = "batch"
  classes: int = 10
  window: tuple[int, ...] = (3, 3)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = x if self.window else x.reshape(len(x), -1)
    for features in (16, 32) if self.window else (128, 64):
      x = nn.relu(normalized(x, partial(Affine, features, window=self.window), self.norm, train, 4))
    return Affine(self.classes)(x.mean((1, 2)) if self.window else x)


def _elman_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """N(0, 0.1^2) in the rows of x, an orthogonal block in those of h, zero in that of the bias, if it is folded."""
  hidden = shape[1]
  inputs = 2
  k1, k2 = jax.random.split(key)
  block = jnp.zeros(shape).at[:inputs].set(0.1 * jax.random.normal(k1, (inputs, hidden)))
  return block.at[inputs : inputs + hidden].set(nn.initializers.orthogonal()(k2, (hidden, hidden)))


class Elman(nn.Module):
  """h <- tanh([x, h] W1 + b1), read out at the last position. 481 parameters."""

  hidden: int = 20
  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cell = Affine(self.hidden, self.folded, kernel_init=_elman_init)
    h = jnp.zeros((len(x), self.hidden), x.dtype)
    for t in range(x.shape[1]):  # unrolled: 32 tiny matrix products, which a loop would drown in overhead
      h = jnp.tanh(cell(jnp.concatenate([x[:, t], h], -1)))
    return Affine(1, self.folded)(h)


class LSTM(nn.Module):
  """[i, f, g, o] = x W + b + h R; c <- sig(f + 1) c + sig(i) tanh(g); h <- sig(o) tanh(c). (n, T, d) -> (n, T, hidden).

  The products with x are taken for all times at once; the loop is left with those with h.
  """

  hidden: int
  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    recurrent = self.param("recurrent", nn.initializers.orthogonal(), (self.hidden, 4 * self.hidden))
    inputs = Affine(4 * self.hidden, self.folded)(x)

    def step(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
      h, c = carry
      i, f, g, o = jnp.split(gates + h @ recurrent, 4, -1)
      c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(g)
      h = nn.sigmoid(o) * jnp.tanh(c)
      return (h, c), h

    start = jnp.zeros((len(x), self.hidden), inputs.dtype)
    return jax.lax.scan(step, (start, start), inputs.swapaxes(0, 1))[1].swapaxes(0, 1)


class LastOfLSTM(nn.Module):
  """One LSTM layer, read out at the last position."""

  hidden: int
  folded: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Affine(1, self.folded)(LSTM(self.hidden, self.folded)(x)[:, -1])


class LanguageLSTM(nn.Module):
  """Embedding, `layers` LSTMs, logits of the next token. Every window of the text begins with a state of zero."""

  vocabulary: int
  layers: int
  width: int
  folded: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(self.vocabulary, self.width)(tokens)
    for _ in range(self.layers):
      x = LSTM(self.width, self.folded)(x)
    return Affine(self.vocabulary, self.folded)(x)


GPT2 = nn.initializers.normal(0.02)


class Transformer(nn.Module):
  """nanoGPT in small: pre-norm decoder blocks, learned positions, GELU, weights N(0, 0.02^2) as in GPT-2.

  The maps that write into the residual stream begin 1/sqrt(2 layers) times smaller. No dropout, logits not tied.
  """

  vocabulary: int
  layers: int
  width: int
  heads: int
  folded: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    length, out = tokens.shape[1], nn.initializers.normal(0.02 / math.sqrt(2 * self.layers))
    affine = lambda features, init=GPT2: Affine(features, self.folded, kernel_init=init)
    x = nn.Embed(self.vocabulary, self.width, embedding_init=GPT2)(tokens)
    x = x + self.param("positions", GPT2, (length, self.width))
    for _ in range(self.layers):
      heads = affine(3 * self.width)(nn.LayerNorm()(x)).reshape(*x.shape[:2], 3, self.heads, -1)
      mixed = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 2, 0), is_causal=True)
      x = x + affine(self.width, out)(mixed.reshape(x.shape))
      x = x + affine(self.width, out)(nn.gelu(affine(4 * self.width)(nn.LayerNorm()(x))))
    return affine(self.vocabulary)(nn.LayerNorm()(x))
