# SPDX-License-Identifier: Apache-2.0
"""Buckets: matrices of one shape, whatever leaves they come from, stacked on a leading axis and cut again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import check_floating, working_dtype
from dpsgd_optax._trees.by_shape import grouped
from dpsgd_optax._trees.mesh import Path
from dpsgd_optax._trees.selection import spread

Stacked = Any | Callable[[Any, jax.Array], int] | None
"""How many leading axes of each leaf count layers: a (prefix) tree of ints, or (path, leaf) ↦ int; None: no axis."""


class Bucket(NamedTuple):
  """Matrices of one shape: static, made anew from shapes at every trace."""

  name: str  # "64x10_float32", the key in the state
  shape: tuple[int, ...]  # of one matrix
  dtype: Any  # float32 at least
  members: tuple[tuple[int, int], ...]  # (index of the leaf, matrices in it)

  @property
  def size(self) -> int:
    return sum(count for _, count in self.members)


def _stack_depths(params: Any, stacked: Stacked) -> list[int]:
  """The number of leading axes of each leaf that count layers."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if stacked is None:
    return [0] * len(leaves)
  if callable(stacked):
    return [int(stacked(path, leaf)) for path, leaf in leaves]
  try:
    return [int(depth) for depth in jax.tree.leaves(spread(stacked, params))]
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"`stacked` must be a tree of ints that fits the params, {jax.tree.structure(params)}, or be a prefix of it; got "
      f"{jax.tree.structure(stacked)}: {error}. Type a function of path and leaf, `stacked=lambda path, leaf: …`, or "
      "the number of leading axes for each leaf."
    ) from error


def make_buckets(params: Any, stacked: Stacked = None) -> list[Bucket]:
  """Groups the matrices by (shape, dtype), in the order in which they first appear; empty leaves are in none."""
  depths = _stack_depths(params, stacked)
  check_floating(params)
  matrices = []
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    shape, depth = jnp.shape(leaf), depths[i]
    if depth > len(shape):
      name = jax.tree_util.keystr(path)
      raise ValueError(f"`stacked` gives {depth} leading axes for {name}, which has shape {shape}.")
    if math.prod(shape) > 0:
      matrices.append(((shape[depth:], working_dtype(jnp.result_type(leaf))), (i, math.prod(shape[:depth]))))
  return [
    Bucket(f"{'x'.join(map(str, shape)) or 'scalar'}_{jnp.dtype(dtype).name}", shape, dtype, tuple(members))
    for (shape, dtype), members in grouped(matrices).items()
  ]


def stack(bucket: Bucket, leaves: list[jax.Array]) -> jax.Array:
  """(size, *shape) in the working dtype."""
  parts = [jnp.reshape(leaves[i], (count, *bucket.shape)).astype(bucket.dtype) for i, count in bucket.members]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def bucket_paths(bucket: Bucket, tree: Any) -> list[Path | None]:
  """Where the matrices of a bucket are leaves of the tree; None for a leaf that is a stack of them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [leaves[i][0] if jnp.shape(leaves[i][1]) == bucket.shape else None for i, _ in bucket.members]


def unstack(bucket: Bucket, x: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes (size, *shape) back over the leaves it came from, in their shapes and dtypes."""
  start = 0
  for i, count in bucket.members:
    part = x if count == bucket.size else jax.lax.slice_in_dim(x, start, start + count)
    leaves[i] = part.reshape(jnp.shape(leaves[i])).astype(jnp.result_type(leaves[i]))
    start += count
