# SPDX-License-Identifier: Apache-2.0
"""Names of leaves, and trees with holes.

A hole is an ``optax.MaskedNode()`` in place of a leaf or a subtree that belongs to somebody else: inside
``optax.masked`` and ``optax.partition`` a transform is shown such trees.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


def names(path: Any) -> tuple[str, ...]:
  """A key path as names, alike for dicts, lists, dataclasses and Flax states (a variable's value counts as itself)."""
  if path and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def quoted(path: Any) -> str:
  """A key path as an error message shows it."""
  return f"`{jax.tree_util.keystr(path)}`" if path else "the root"


def is_hole(x: Any) -> bool:
  """Whether x is a hole. None is not: in the params it is an empty subtree, such as a layer without a bias."""
  return isinstance(x, optax.MaskedNode)


def is_absent(x: Any) -> bool:
  """Whether x is a hole or None. For vectors that are matched with the params: users may leave a part out by None."""
  return x is None or is_hole(x)


def has_holes(tree: Any) -> bool:
  """Whether the tree is a part of a larger one."""
  return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))


def map_with_holes(x: Any, full: Any, leaf: Callable, hole: Callable | None = None) -> Any:
  """``leaf(a, b)`` over the leaves of ``x`` and ``full``; at a hole of ``x`` the hole, or ``hole(part of full)``."""

  def one(a, b):
    if is_hole(a):
      return hole(b) if hole else a
    return leaf(a, b)

  return jax.tree.map(one, x, full, is_leaf=is_hole)


def with_holes(tree: Any, mask: Any) -> Any:
  """``tree`` with holes where the mask is False."""
  return jax.tree.map(lambda x, chosen: x if chosen else optax.MaskedNode(), tree, mask)


def fill_holes(part: Any, tree: Any) -> Any:
  """``part`` with the leaves of ``tree`` in its holes."""
  return map_with_holes(part, tree, lambda a, _: a, lambda b: b)


def same_structure(tree: Any, other: Any, what: str, of: str) -> None:
  """Raises unless ``tree`` has the pytree structure of ``other``."""
  came, needed = jax.tree.structure(tree), jax.tree.structure(other)
  if came != needed:
    raise ValueError(f"{what} must have the structure of {of}, {needed}; got {came}.")
