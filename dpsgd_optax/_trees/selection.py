# SPDX-License-Identifier: Apache-2.0
"""Which parameters a part of an optimizer is for: the argument `where`.

`where` is a tree of bools with the structure of the params (or a prefix of it), or a function params ↦ such a tree, as
the masks of Optax are; None stands for all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.paths import is_hole, names

Where = Any | Callable[[Any], Any] | None


def spread(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
  """The leaf of ``prefix`` that each leaf of ``tree`` lies under, as a tree like ``tree``.

  By position if the two trees have the same containers, else by the names of the leaves: a plain dict may stand for
  an nnx state, a ``FrozenDict`` or an Equinox module. If the tree has holes, leaves of the prefix at the holes are
  passed over.

  Raises:
    ValueError: if a leaf of the tree lies under none, or a leaf of the prefix has none under it.
  """
  try:
    return jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), prefix, tree, is_leaf=is_leaf)
  except (ValueError, TypeError, KeyError):
    pass  # other containers
  given = {names(path): x for path, x in jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_leaf)[0]}
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found: dict[tuple[str, ...], tuple[str, ...]] = {}  # leaf of the tree -> leaf of the prefix above it
  for path in (names(path) for path, _ in leaves):
    above = [path[:i] for i in range(len(path), -1, -1) if path[:i] in given]
    if not above:
      raise ValueError(f"it has nothing for {'/'.join(path) or 'the params'}")
    found[path] = above[0]
  holes = [names(path) for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole) if is_hole(x)]
  at_a_hole = lambda path: any(path[: len(h)] == h[: len(path)] for h in holes)
  if unused := [path for path in given if path not in found.values() and not at_a_hole(path)]:
    raise ValueError(f"it names {'/'.join(unused[0])}, but there are only {', '.join(map('/'.join, found))}")
  return jax.tree.unflatten(jax.tree.structure(tree), [given[found[names(path)]] for path, _ in leaves])


def is_vector(params: Any) -> Any:
  """True for every leaf of rank 1, as in the released code of SGD-PH: norm layers, but also the bias of any layer.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> dpo.is_vector({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "temperature": jnp.ones(())})
    {'bias': True, 'kernel': False, 'temperature': False}
  """
  return jax.tree.map(lambda x: len(getattr(x, "shape", ())) == 1, params)


def _usual(where: Where) -> str:
  """What could be typed in place of ``where``."""
  usual = {
    "is_norm_param": "`where=dpsgd_optax.training.is_norm_param` for the norm layers of a Flax, Haiku or Equinox model",
    "is_vector": "`where=dpsgd_optax.is_vector` for every 1-D parameter",
  }
  usual.pop(getattr(where, "__name__", ""), None)
  return f"Type {', '.join(usual.values())}, or give a tree of bools like the params."


def selection(tree: Any, where: Where) -> Any:
  """``where`` as a tree of bools with the structure of ``tree``.

  Raises:
    ValueError: if it does not fit the tree, or selects nothing of it.
  """
  if where is None:
    return jax.tree.map(lambda _: True, tree)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if not leaves:
    return tree  # nothing to select from: `optax.tree.map_params` asks for such a state
  mask = where(tree) if callable(where) else where
  try:
    mask = spread(mask, tree)
  except ValueError as error:
    raise ValueError(
      f"`where` must be a tree of bools that fits the params, {jax.tree.structure(tree)}; got "
      f"{jax.tree.structure(mask)}: {error}. {_usual(where)}"
    ) from error
  chosen = jax.tree.leaves(mask)
  if wrong := [x for x in chosen if not isinstance(x, bool | np.bool_)]:
    raise ValueError(f"`where` must be a tree of bools, but one of its leaves is {wrong[0]!r}. {_usual(where)}")
  if not any(chosen):
    listed = ", ".join(f"{'/'.join(names(path))} {jnp.shape(x)}" for path, x in leaves[:4])
    raise ValueError(
      f"`where` selects none of the {len(leaves)} parameters: {listed}{', …' if leaves[4:] else ''}. "
      f"{_usual(where)} A network without norm layers gets 1-D lengths from `nn.WeightNorm` (linen) or "
      "`training.WeightNorm` (nnx)."
    )
  return mask
