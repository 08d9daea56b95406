# SPDX-License-Identifier: Apache-2.0
"""Random trees from a single draw for all leaves: each draw is a loop that XLA has to compile."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.by_shape import grouped
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


def noise(key: jax.Array, tree: Any) -> Any:
  """Random signs ξ like the leaves, ±1 each: E ξξᴴ = I, which is all that is asked of noise here.

  One random word gives 32 signs, where a normal number takes a word. Leaves of equal shape are drawn side by side, as
  they are used later.
  """
  leaves, treedef = jax.tree.flatten(tree)
  groups = grouped(((jnp.shape(x), working_dtype(jnp.result_type(x))), i) for i, x in enumerate(leaves))
  words_of = lambda shape: -(-math.prod(shape) // 32)
  sizes = [len(members) * words_of(shape) for (shape, _), members in groups.items()]
  drawn = pieces(jax.random.bits(key, (sum(sizes),), jnp.uint32), sizes)
  for ((shape, dtype), members), words in zip(groups.items(), drawn, strict=True):
    words = replicated(words).reshape(len(members), words_of(shape), 1)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    bits = bits.reshape(len(members), -1)[:, : math.prod(shape)]
    signs = (2 * bits.astype(dtype) - 1).reshape(len(members), *shape)
    for row, i in enumerate(members):
      leaves[i] = jax.lax.index_in_dim(signs, row, keepdims=False)
  return jax.tree.unflatten(treedef, leaves)
