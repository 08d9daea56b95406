# SPDX-License-Identifier: Apache-2.0
"""Names of leaves, trees with holes, and which parameter stands opposite a leaf of such a tree.

A hole is an ``optax.MaskedNode()`` in place of a leaf or a subtree that belongs to somebody else: inside
``optax.masked`` and ``optax.partition`` a transform is shown such trees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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


def match_leaves(what: str, params: Any, vector: Any) -> list[tuple[Any, Any, int]]:
  """(path, leaf, i) for each leaf of the vector that is no hole; i: where the leaf of its name stands in the params.

  The containers may differ, as a dict and the state of an nnx module do; a leaf in a box (of Flax: a tree of one leaf
  named `value`) counts as the leaf.

  Raises:
    ValueError: if one of the two has a leaf that the other has not; the message names it, and begins with ``what``.
  """
  entries = jax.tree_util.tree_leaves_with_path(vector, is_leaf=is_absent)
  holes = {names(path) for path, x in entries if is_absent(x)}
  vectors = {names(path): (path, x) for path, x in entries if not is_absent(x)}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  indices = {names(path): i for i, (path, _) in enumerate(leaves)}
  held = lambda name: any(name[:depth] in holes for depth in range(len(name) + 1))
  if unknown := sorted(vectors.keys() - indices.keys()):
    wrong = f"has a leaf at `{jax.tree_util.keystr(vectors[unknown[0]][0])}` where the parameters have none"
  elif missing := [name for name in sorted(indices.keys() - vectors.keys()) if not held(name)]:
    wrong = f"has nothing at `{jax.tree_util.keystr(leaves[indices[missing[0]]][0])}`, which is a parameter"
  elif len(indices) < len(leaves):
    wrong = "cannot be matched, for two parameters have the same name"
  else:
    return [(path, x, indices[name]) for name, (path, x) in vectors.items()]
  raise ValueError(
    f"{what} needs a vector with the structure of the parameters; this one {wrong}. Draw it as "
    "`optax.tree.random_like(key, params)`; for the block of some parameters put `optax.MaskedNode()` in place of the "
    "others."
  )


def opposite(params: Any, tree: Any) -> list:
  """The leaves of the params that stand opposite the leaves of a tree, which may have holes."""
  leaves = jax.tree.leaves(params)
  return [leaves[i] for _, _, i in match_leaves("the tree of updates", params, tree)]


def stepped(params: Any, step: Any) -> Any:
  """params + step in the dtypes of the params; where the step has a hole the params stay as they are.

  As ``optax.apply_updates``, for params that hold more than the step: the rest of a partition, or the functions of a
  model that is a pytree.
  """
  leaves, treedef = jax.tree.flatten(params)
  for _, x, i in match_leaves("the step", params, step):
    leaves[i] = jnp.asarray(leaves[i] + x, jnp.result_type(leaves[i]))
  return treedef.unflatten(leaves)
