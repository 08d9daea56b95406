# SPDX-License-Identifier: Apache-2.0
"""Random trees from a single draw for all leaves: each draw is a loop that XLA has to compile."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.mesh import replicated


def pieces(flat: jax.Array, sizes: Iterable[int]) -> list[jax.Array]:
  """A draw cut into consecutive pieces of these sizes."""
  return [flat[start:end] for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def normal_like(key: jax.Array, tree: Any) -> Any:
  """v ~ N(0, I) in the shape of ``tree``.

  Complex leaves get unit variance in total. The dtype is that of the leaf, float32 at least.
  """
  leaves, treedef = jax.tree.flatten(tree)
  dtypes = [working_dtype(jnp.result_type(leaf)) for leaf in leaves]
  is_complex = [jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes]
  sizes = [math.prod(jnp.shape(leaf)) * (1 + pair) for leaf, pair in zip(leaves, is_complex, strict=True)]
  widest = jnp.float64 if any(jnp.finfo(d).dtype == jnp.float64 for d in dtypes) else jnp.float32
  drawn = pieces(jax.random.normal(key, (sum(sizes),), widest), sizes)
  for i, (x, pair) in enumerate(zip(drawn, is_complex, strict=True)):
    if pair:
      x = jax.lax.complex(x[: len(x) // 2], x[len(x) // 2 :]) * math.sqrt(0.5)
    drawn[i] = x.reshape(jnp.shape(leaves[i])).astype(dtypes[i])
  return jax.tree.unflatten(treedef, drawn)


def _signs(words: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """±1 from random words, 32 of each, where a normal number takes a word."""
  bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
  return (2 * bits.reshape(-1)[: math.prod(shape)].astype(dtype) - 1).reshape(shape)


def _words(shape: tuple[int, ...]) -> int:
  return -(-math.prod(shape) // 32)


FEW_WORDS = 1024  # so many are drawn by the generator of the device


def noise(key: jax.Array, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> list[jax.Array]:
  """Random signs ξ of these shapes and dtypes, ±1 each: E ξξᴴ = I, which is all that is asked of this noise.

  A few words are drawn by the generator of the device, a few kernels where Threefry is a loop of many on
  a CPU. XLA fuses it into what reads the words, and would draw each anew for every sign: too slow for many of them.
  """
  counts = [_words(shape) for shape, _ in shapes]
  if sum(counts) <= FEW_WORDS:
    key = jax.random.wrap_key_data(jnp.resize(jax.random.key_data(key), 4), impl="unsafe_rbg")
  drawn = jax.random.bits(key, (sum(counts),), jnp.uint32)
  return [_signs(replicated(words), *like) for like, words in zip(shapes, pieces(drawn, counts), strict=True)]


def signs_like(key: jax.Array, x: jax.Array) -> jax.Array:
  """Random signs in the shape of x, by the generator of the key."""
  return _signs(jax.random.bits(key, (_words(x.shape),), jnp.uint32), x.shape, x.dtype)
