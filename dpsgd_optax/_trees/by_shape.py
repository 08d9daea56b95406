# SPDX-License-Identifier: Apache-2.0
"""Leaves of equal shape side by side: one kernel to compile in place of many."""

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.mesh import on_mesh, spec_of

MIN_LIBRARY_SUM = 2**14  # XLA on a CPU calls a library for longer sums; each shorter one is a kernel or two of its own
FEW = 8  # up to so many leaves of equal shape are not stacked: their kernels are not worth the copy
LARGE = 2**16  # nor leaves of so many numbers: over a training the copies take longer than the compilation


def grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list]:
  """Key → its members, from pairs of both, in the order in which the keys first appear."""
  found: dict[Any, list] = {}
  for key, member in pairs:
    found.setdefault(key, []).append(member)
  return found


def _by_shape(tree: Any) -> list[list[int]]:
  """The indices of the leaves of each shape and dtype; on a mesh also of each sharding, not to send them."""
  leaves = enumerate(jax.tree_util.tree_leaves_with_path(tree))
  return list(grouped(((jnp.shape(x), jnp.result_type(x), spec_of(path)), i) for i, (path, x) in leaves).values())


def _stacks(leaves: list[jax.Array]) -> list[jax.Array]:
  """The leaves; on one device those of a shape that many have are stacked, to be one kernel to compile."""
  found = []
  for group in _by_shape(leaves):
    members = [leaves[i] for i in group]
    together = len(members) > FEW and math.prod(jnp.shape(members[0])) < LARGE and not on_mesh()
    found += [jnp.stack(members)] if together else members
  return found


def at_once(function: Callable, rows: list[tuple], groups: Iterable[list[int]]) -> list:
  """``function(*row)`` of each row, a group of equal shapes at once under ``vmap``; ``groups`` are indices of rows."""
  found: list = [None] * len(rows)
  for group in groups:
    if len(group) == 1:
      found[group[0]] = function(*rows[group[0]])
      continue
    done = jax.vmap(function)(*jax.tree.map(lambda *x: jnp.stack(x), *(rows[i] for i in group)))
    for place, i in enumerate(group):
      found[i] = jax.tree.map(lambda x, place=place: x[place], done)
  return found


def map_by_shape(of_leaf: Callable[..., jax.Array], tree: Any, *rest: Any) -> Any:
  """``jax.tree.map(of_leaf, tree, *rest)``, leaves of equal shape at once under ``vmap``.

  For what a preconditioner returns: its leaves are slices of one stack, which XLA puts together again without a copy.
  Mapped one by one, each slice would be a kernel to compile.
  """
  leaves, treedef = jax.tree.flatten(tree)
  rows = list(zip(leaves, *(treedef.flatten_up_to(other) for other in rest), strict=True))
  return jax.tree.unflatten(treedef, at_once(of_leaf, rows, _by_shape(tree)))


def all_finite(tree: Any) -> jax.Array:
  """True if no leaf holds a NaN or an infinity. Scalar bool.

  By the sum of x − x, which is 0 or NaN: on a CPU it compiles and runs faster than ``jnp.all(jnp.isfinite(x))``. A
  maximum will not do, because XLA's on a CPU loses a NaN in large arrays; nor 0 · x, for which it may store the zeros.
  """
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and jnp.size(x)]
  little = lambda x: jnp.size(x) < MIN_LIBRARY_SUM and not on_mesh()
  parts = _stacks([x for x in leaves if not little(x)])
  if side_by_side := [jnp.reshape(x, -1) for x in leaves if little(x)]:
    parts.append(jnp.concatenate(side_by_side))
  sums = [jnp.sum(x - x) for x in parts]
  return jnp.isfinite(sum(sums)) if sums else jnp.array(True)


def safe_norm(tree: Any) -> jax.Array:
  """‖tree‖₂ in float32 at least, scaled by the largest entry so that no square overflows or vanishes."""
  leaves = [x for x in jax.tree.leaves(tree) if math.prod(jnp.shape(x)) > 0]
  if not leaves:
    return jnp.zeros(())
  leaves = _stacks(leaves)
  top = jnp.max(jnp.stack([jnp.max(jnp.abs(x)).astype(working_dtype(jnp.abs(x).dtype)) for x in leaves]))
  safe = jnp.where(top > 0, top, 1)
  return safe * jnp.sqrt(sum(jnp.sum(jnp.abs(x / safe) ** 2) for x in leaves))
