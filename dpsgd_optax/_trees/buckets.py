# SPDX-License-Identifier: Apache-2.0
"""Leaves of one shape stacked on a leading axis, and cut again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.mesh import Path
from dpsgd_optax._trees.selection import spread


class Bucket(NamedTuple):
  """Leaves of one shape: static, made anew from shapes at every trace."""

  name: str  # "64x10_float32", the key in the state
  shape: tuple[int, ...]  # of one matrix
  dtype: Any  # float32 at least
  members: tuple[tuple[int, int], ...]  # (index of the leaf, matrices in it)

  @property
  def size(self) -> int:
    return sum(count for _, count in self.members)


Stacked = Any | Callable[[Any, jax.Array], int] | None


def _stack_depths(params: Any, stacked: Stacked) -> list[int]:
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  if stacked is None:
    return [0] * len(paths)
  if callable(stacked):
    return [int(stacked(path, leaf)) for path, leaf in paths]
  try:
    return [int(depth) for depth in jax.tree.leaves(spread(stacked, params))]
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"`stacked` must be a tree of ints that fits the params, {jax.tree.structure(params)}, or be a prefix of it; got "
      f"{jax.tree.structure(stacked)}: {error}. Type a function of path and leaf, `stacked=lambda path, leaf: …`, or "
      "the number of leading axes for each leaf."
    ) from error


def make_buckets(params: Any, stacked: Stacked = None) -> list[Bucket]:
  """Groups the leaves by (shape, dtype), in the order in which they first appear; empty leaves in none."""
  found: dict[tuple, list[tuple[int, int]]] = {}
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  for index, ((path, leaf), depth) in enumerate(zip(paths, _stack_depths(params, stacked), strict=True)):
    if callable(leaf) or isinstance(leaf, str):
      raise ValueError(
        f"a preconditioner needs floating-point parameters, but {jax.tree_util.keystr(path)} is a "
        f"{type(leaf).__name__}. Leave out what is no array: `tx.init(eqx.filter(model, eqx.is_inexact_array))` for an "
        "Equinox model."
      )
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"a preconditioner needs floating-point parameters, but {jax.tree_util.keystr(path)} has dtype {dtype}. "
        "Leave it out with `optax.masked` or `optax.partition`, or make it a float."
      )
    if depth > len(shape):
      raise ValueError(
        f"`stacked` gives {depth} leading axes for {jax.tree_util.keystr(path)}, which has shape {shape}."
      )
    if math.prod(shape) > 0:
      matrix = shape[depth:]
      found.setdefault((matrix, working_dtype(dtype)), []).append((index, math.prod(shape[:depth])))
  return [
    Bucket(f"{'x'.join(map(str, shape)) or 'scalar'}_{jnp.dtype(dtype).name}", shape, dtype, tuple(members))
    for (shape, dtype), members in found.items()
  ]


def stack(bucket: Bucket, leaves: list[jax.Array]) -> jax.Array:
  """(size, *shape) in the working dtype."""
  parts = [jnp.reshape(leaves[i], (count, *bucket.shape)).astype(bucket.dtype) for i, count in bucket.members]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def bucket_paths(bucket: Bucket, tree: Any) -> list[Path | None]:
  """Where the matrices of a bucket are leaves of the tree; None for a leaf that is a stack of them."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [leaves[i][0] if jnp.shape(leaves[i][1]) == bucket.shape else None for i, _ in bucket.members]


def unstack(bucket: Bucket, x: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes (size, *shape) back over the leaves it came from, in their shapes and dtypes."""
  start = 0
  for i, count in bucket.members:
    part = x if count == bucket.size else jax.lax.slice_in_dim(x, start, start + count)
    leaves[i] = part.reshape(jnp.shape(leaves[i])).astype(jnp.result_type(leaves[i]))
    start += count
