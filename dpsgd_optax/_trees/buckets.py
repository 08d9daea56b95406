# SPDX-License-Identifier: Apache-2.0
"""Buckets: matrices of one size class, whatever leaves they come from, stacked on a leading axis and cut again.

A class holds matrices of one shape, or of similar ones, which are padded with zeros at the ends of their axes. Padding
costs products with zeros and saves launches: a fit launches dozens of kernels for each class, which take as long as
`LAUNCHES` multiplications.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.arithmetic import check_floating, working_dtype
from dpsgd_optax._trees.by_shape import grouped
from dpsgd_optax._trees.mesh import Path
from dpsgd_optax._trees.selection import spread

Shape = tuple[int, ...]
Stacked = Any | Callable[[Any, jax.Array], int] | None
"""How many leading axes of each leaf count layers: a (prefix) tree of ints, or (path, leaf) ↦ int; None: no axis."""

LAUNCHES = 2**21  # so many more multiplications in a pass over a class are worth a class less
NEARLY = 1.02  # padding that adds no more is always worth it: blocks whose lengths differ by one


class Classes(NamedTuple):
  """Which shapes may share a size class.

  Attributes:
    kind: shape -> what all members of a class have in common, such as the kinds of their factors.
    multiplications: shape -> of one fit, about.
    bound: the largest ratio of the multiplications with padding to those without; 1: equal shapes only.
  """

  kind: Callable[[Shape], Hashable]
  multiplications: Callable[[Shape], float]
  bound: float


class Member(NamedTuple):
  """The part that a leaf has in a bucket."""

  leaf: int  # its index
  count: int  # of matrices
  shape: Shape  # of one of them, without padding


class Bucket(NamedTuple):
  """Matrices of one size class: static, made anew from shapes at every trace."""

  name: str  # "64x10_float32", the key in the state
  shape: Shape  # of one matrix, padding included
  dtype: Any  # float32 at least
  members: tuple[Member, ...]

  @property
  def size(self) -> int:
    return sum(member.count for member in self.members)

  @property
  def padded(self) -> bool:
    return any(member.shape != self.shape for member in self.members)

  @property
  def shapes(self) -> np.ndarray | None:
    """(size, axes) of floats, the shape of each matrix without padding; None if none is padded."""
    shapes = np.repeat(np.array([m.shape for m in self.members], np.float32), [m.count for m in self.members], axis=0)
    return shapes if self.padded else None

  @property
  def numbers(self) -> np.ndarray:
    """(size,), how many numbers each matrix has, without padding."""
    return np.repeat([math.prod(m.shape) for m in self.members], [m.count for m in self.members])


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


def _enclosing(shapes: list[Shape]) -> Shape:
  return tuple(map(max, zip(*shapes, strict=True)))


def _size_classes(counts: dict[Shape, int], classes: Classes | None) -> list[list[Shape]]:
  """The shapes of one kind, put together where that pays: the costliest first, each into the first class it fits."""
  if classes is None or classes.bound == 1:
    return [[shape] for shape in counts]
  cost = classes.multiplications
  found: list[list[Shape]] = []
  for shape in sorted(counts, key=lambda s: (-cost(s), s)):
    for group in found:
      together = [*group, shape]
      if classes.kind(_enclosing(together)) != classes.kind(shape):
        continue
      real = sum(counts[s] * cost(s) for s in together)
      with_padding = sum(counts[s] for s in together) * cost(_enclosing(together))
      added = with_padding - real
      if with_padding <= classes.bound * real and (added <= LAUNCHES or with_padding <= NEARLY * real):
        group.append(shape)
        break
    else:
      found.append([shape])
  return found


def _name(shapes: list[Shape], dtype: Any) -> str:
  """A key for the state: each shape is in one class of its dtype only, so that the first tells the classes apart."""
  words = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
  more = [] if len(words) == 1 else ["with", words[1] if len(words) == 2 else f"{len(words) - 1}_more"]
  return "_".join([words[0], *more, jnp.dtype(dtype).name])


def make_buckets(params: Any, stacked: Stacked = None, classes: Classes | None = None) -> list[Bucket]:
  """Groups the matrices by size class and dtype, in the order in which they first appear; empty leaves are in none."""
  depths = _stack_depths(params, stacked)
  check_floating(params)
  matrices = []
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    shape, depth = jnp.shape(leaf), depths[i]
    if depth > len(shape):
      name = jax.tree_util.keystr(path)
      raise ValueError(f"`stacked` gives {depth} leading axes for {name}, which has shape {shape}.")
    if math.prod(shape) > 0:
      member = Member(i, math.prod(shape[:depth]), shape[depth:])
      kind = member.shape if classes is None else classes.kind(member.shape)
      matrices.append(((len(member.shape), kind, working_dtype(jnp.result_type(leaf))), member))
  found = []
  for (_, _, dtype), members in grouped(matrices).items():
    counts: dict[Shape, int] = {}
    for member in members:
      counts[member.shape] = counts.get(member.shape, 0) + member.count
    for shapes in _size_classes(counts, classes):
      mine = tuple(member for member in members if member.shape in shapes)
      found.append(Bucket(_name(shapes, dtype), _enclosing(shapes), dtype, mine))
  return sorted(found, key=lambda bucket: bucket.members[0].leaf)


def _padded(x: jax.Array, shape: Shape) -> jax.Array:
  """x, (count, *its shape), with zeros at the ends of its axes up to ``shape``."""
  widths = [(0, 0), *((0, d - own) for d, own in zip(shape, x.shape[1:], strict=True))]
  return jnp.pad(x, widths) if x.shape[1:] != shape else x


def _together(bucket: Bucket, parts: list[jax.Array]) -> jax.Array:
  parts = [_padded(x, bucket.shape) for x in parts]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def stack(bucket: Bucket, leaves: list[jax.Array]) -> jax.Array:
  """(size, *shape) in the working dtype."""
  return _together(
    bucket, [jnp.reshape(leaves[m.leaf], (m.count, *m.shape)).astype(bucket.dtype) for m in bucket.members]
  )


def ones(bucket: Bucket) -> jax.Array:
  """(size, *shape), one where a matrix has a number, zero where it is padded."""
  return _together(bucket, [jnp.ones((m.count, *m.shape), bucket.dtype) for m in bucket.members])


def bucket_paths(bucket: Bucket, tree: Any) -> list[Path | None]:
  """Where the matrices of a bucket are leaves of the tree; None for one that is padded or in a stack."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [leaves[m.leaf][0] if jnp.shape(leaves[m.leaf][1]) == bucket.shape else None for m in bucket.members]


def unstack(bucket: Bucket, x: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes (size, *shape) back over the leaves it came from, in their shapes and dtypes."""
  start = 0
  for m in bucket.members:
    part = jax.lax.slice(x, (start, *(0,) * len(m.shape)), (start + m.count, *m.shape))
    leaves[m.leaf] = part.reshape(jnp.shape(leaves[m.leaf])).astype(jnp.result_type(leaves[m.leaf]))
    start += m.count
