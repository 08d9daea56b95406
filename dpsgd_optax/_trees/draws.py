# SPDX-License-Identifier: Apache-2.0
"""Random trees from a single draw: a draw is a loop to compile."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.mesh import replicated


def normal_like(key: jax.Array, tree: Any) -> Any:
  """v ~ N(0, I) in the shape of ``tree``, from a single draw for all leaves.

  Complex leaves get unit variance in total. The dtype is that of the leaf, float32 at least.
  """
  leaves, treedef = jax.tree.flatten(tree)
  dtypes = [working_dtype(jnp.result_type(leaf)) for leaf in leaves]
  parts = [2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1 for dtype in dtypes]
  sizes = [math.prod(jnp.shape(leaf)) * k for leaf, k in zip(leaves, parts, strict=True)]
  widest = jnp.float64 if any(jnp.finfo(d).dtype == jnp.float64 for d in dtypes) else jnp.float32
  flat = jax.random.normal(key, (sum(sizes),), widest)
  drawn, start = [], 0
  for leaf, dtype, k, size in zip(leaves, dtypes, parts, sizes, strict=True):
    x = flat[start : start + size]
    start += size
    if k == 2:
      x = jax.lax.complex(x[: size // 2], x[size // 2 :]) * math.sqrt(0.5)
    drawn.append(x.reshape(jnp.shape(leaf)).astype(dtype))
  return jax.tree.unflatten(treedef, drawn)


def noise(key: jax.Array, tree: Any) -> Any:
  """Random signs ξ like the leaves, ±1 each: E ξξᴴ = I, which is all that is asked of noise here.

  32 of them come from one random word, where a normal number takes one; one draw serves all leaves, because a draw is
  a loop to compile, and those of equal shape are made side by side, as they will be used.
  """
  leaves, treedef = jax.tree.flatten(tree)
  groups: dict[Any, list[int]] = {}
  for i, x in enumerate(leaves):
    groups.setdefault((jnp.shape(x), working_dtype(jnp.result_type(x))), []).append(i)
  words_of = lambda shape: -(-math.prod(shape) // 32)
  ends = list(itertools.accumulate((len(own) * words_of(shape) for (shape, _), own in groups.items()), initial=0))
  words = jax.random.bits(key, (ends[-1],), jnp.uint32)
  for ((shape, dtype), members), (start, end) in zip(groups.items(), itertools.pairwise(ends), strict=True):
    own = replicated(words[start:end]).reshape(len(members), words_of(shape), 1)
    bits = ((own >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1).reshape(len(members), -1)[:, : math.prod(shape)]
    signs = (2 * bits.astype(dtype) - 1).reshape(len(members), *shape)
    for row, i in enumerate(members):
      leaves[i] = jax.lax.index_in_dim(signs, row, keepdims=False)
  return jax.tree.unflatten(treedef, leaves)
