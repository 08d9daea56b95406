# SPDX-License-Identifier: Apache-2.0
"""Which parameter stands opposite each leaf of a vector, which may have holes or other containers than the params."""

from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.paths import is_absent, names


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
