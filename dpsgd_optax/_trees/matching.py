# SPDX-License-Identifier: Apache-2.0
"""The leaves of the params that a tree with holes, or with other containers, speaks of."""

from typing import Any

import jax
import optax

from dpsgd_optax._trees.paths import names


def opposite(params: Any, tree: Any) -> list:
  """The leaves of the params that stand opposite the leaves of a tree, which may have holes."""
  leaves = jax.tree.leaves(params)
  return [leaves[i] for i in match_leaves("the tree of updates", params, tree)[1] if i is not None]


def match_leaves(what: str, params: Any, vector: Any) -> tuple[list, list[int | None]]:
  """The slots of the vector, and the index of the parameter opposite each of them; None at a hole.

  By position where the two trees are alike, a leaf in a box (of Flax: a tree of one leaf named `value`) counting as the
  leaf; by the names of the leaves where only the containers differ, as a dict and the state of an nnx module do.
  """
  slots, treedef = jax.tree.flatten(vector, is_leaf=_is_hole)
  places = _by_position(slots, treedef, params)
  if places is None:
    places = _by_name(vector, params)
  if places is None:
    raise ValueError(_mismatch(what, params, vector))
  return slots, places


def _by_position(slots: list, treedef: Any, params: Any) -> list[int | None] | None:
  try:
    parts = treedef.flatten_up_to(params)
  except (ValueError, TypeError, KeyError):
    return None
  places, start = [], 0
  for slot, part in zip(slots, parts, strict=True):
    inside = jax.tree_util.tree_leaves_with_path(part)
    if not _is_hole(slot) and (len(inside) != 1 or names(inside[0][0])):
      return None
    places.append(None if _is_hole(slot) else start)
    start += len(inside)
  return places


def _by_name(vector: Any, params: Any) -> list[int | None] | None:
  paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  left = {path: i for i, path in enumerate(paths)}
  if len(left) < len(paths):
    return None
  places, holes = [], []
  for path, slot in jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole):
    if not _is_hole(slot) and names(path) not in left:
      return None
    places.append(None if _is_hole(slot) else left.pop(names(path)))
    holes += [names(path)] if _is_hole(slot) else []
  missing = [path for path in left if not any(path[: len(hole)] == hole for hole in holes)]
  return None if missing else places


def _is_hole(x) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def _mismatch(what, params, vector) -> str:
  """Name the first leaf that only one of the two has, rather than print two trees."""
  slots = jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole)
  holes = [names(path) for path, x in slots if _is_hole(x)]
  came = {names(path): jax.tree_util.keystr(path) for path, x in slots if not _is_hole(x)}
  needed = {names(path): jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  held = lambda path: any(path[: len(hole)] == hole for hole in holes)
  unknown = [came[path] for path in sorted(came.keys() - needed.keys())]
  missing = [needed[path] for path in sorted(needed.keys() - came.keys()) if not held(path)]
  if unknown:
    found = f"has a leaf at `{unknown[0]}` where the parameters have none"
  elif missing:
    found = f"has nothing at `{missing[0]}`, which is a parameter"
  else:
    found = f"is a {jax.tree.structure(vector)}, the parameters are a {jax.tree.structure(params)}"
  return (
    f"{what} needs a vector with the structure of the parameters; this one {found}. Draw it as "
    "`optax.tree.random_like(key, params)`; for the block of some parameters put `optax.MaskedNode()` in place of the "
    "others."
  )


def place(path) -> str:
  return f"`{jax.tree_util.keystr(path)}`" if path else "the root"
