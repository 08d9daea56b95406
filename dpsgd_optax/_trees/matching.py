# SPDX-License-Identifier: Apache-2.0
"""Which parameter stands opposite each leaf of a vector, which may have holes or other containers than the params."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.paths import is_absent, names


class Match(NamedTuple):
  """A leaf of the vector and the parameter opposite it."""

  path: Any  # in the vector
  leaf: Any  # of the vector
  index: int  # of the parameter among the leaves of the params


def match_leaves(what: str, params: Any, vector: Any) -> list[Match]:
  """The leaves of the vector in their order, without holes, each with its parameter.

  By position if the two trees are alike. A leaf in a box counts as the leaf (of Flax: a tree of one leaf named
  `value`). If only the containers differ, as a dict and the state of an nnx module do, by the names of the leaves.

  Raises:
    ValueError: if neither works; the message begins with ``what`` and names the first leaf without a counterpart.
  """
  entries = jax.tree_util.tree_leaves_with_path(vector, is_leaf=is_absent)
  found = _by_position(entries, vector, params)
  if found is None:
    found = _by_name(entries, params)
  if found is None:
    raise ValueError(_mismatch(what, entries, params, vector))
  return found


def opposite(params: Any, tree: Any) -> list:
  """The leaves of the params that stand opposite the leaves of a tree, which may have holes."""
  leaves = jax.tree.leaves(params)
  return [leaves[match.index] for match in match_leaves("the tree of updates", params, tree)]


def stepped(params: Any, step: Any) -> Any:
  """params + step in the dtypes of the params; where the step has a hole the params stay as they are.

  As ``optax.apply_updates``, for params that hold more than the step speaks of: the rest of a partition, or the
  functions and other static fields of a model that is a pytree.
  """
  leaves, treedef = jax.tree.flatten(params)
  for _, x, i in match_leaves("the step", params, step):
    leaves[i] = jnp.asarray(leaves[i] + x, jnp.result_type(leaves[i]))
  return treedef.unflatten(leaves)


def _by_position(entries: list, vector: Any, params: Any) -> list[Match] | None:
  try:
    parts = jax.tree.structure(vector, is_leaf=is_absent).flatten_up_to(params)
  except (ValueError, TypeError, KeyError):
    return None
  found, index = [], 0
  for (path, entry), part in zip(entries, parts, strict=True):
    inside = jax.tree_util.tree_leaves_with_path(part)
    if not is_absent(entry):
      if len(inside) != 1 or names(inside[0][0]):
        return None
      found.append(Match(path, entry, index))
    index += len(inside)
  return found


def _by_name(entries: list, params: Any) -> list[Match] | None:
  paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  left = {path: i for i, path in enumerate(paths)}
  if len(left) < len(paths):
    return None
  found = []
  for path, entry in entries:
    if not is_absent(entry):
      if names(path) not in left:
        return None
      found.append(Match(path, entry, left.pop(names(path))))
  return None if _uncovered(left, entries) else found


def _uncovered(paths: Any, entries: list) -> list:
  """The paths, as names, that lie under no hole."""
  holes = [names(path) for path, entry in entries if is_absent(entry)]
  return [path for path in paths if not any(path[: len(hole)] == hole for hole in holes)]


def _mismatch(what: str, entries: list, params: Any, vector: Any) -> str:
  came = {names(path): path for path, entry in entries if not is_absent(entry)}
  needed = {names(path): path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  if unknown := sorted(came.keys() - needed.keys()):
    found = f"has a leaf at `{jax.tree_util.keystr(came[unknown[0]])}` where the parameters have none"
  elif missing := _uncovered(sorted(needed.keys() - came.keys()), entries):
    found = f"has nothing at `{jax.tree_util.keystr(needed[missing[0]])}`, which is a parameter"
  else:
    found = f"is a {jax.tree.structure(vector)}, the parameters are a {jax.tree.structure(params)}"
  return (
    f"{what} needs a vector with the structure of the parameters; this one {found}. Draw it as "
    "`optax.tree.random_like(key, params)`; for the block of some parameters put `optax.MaskedNode()` in place of the "
    "others."
  )
