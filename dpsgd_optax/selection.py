# SPDX-License-Identifier: Apache-2.0
"""Which parameters a part of an optimizer speaks of: `where`, and the two usual answers.

`where` is a tree of bools with the structure of the params (or a prefix of it), or a function params ↦ such a tree, as
the masks of Optax are; None stands for all. A predicate on one leaf becomes one by `jax.tree_util.tree_map_with_path`.
What is not selected is `optax.MaskedNode()` in the trees that are made here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpsgd_optax.base import same_structure
from dpsgd_optax.fitted import between
from dpsgd_optax.layers import names

Where = Any | Callable[[Any], Any] | None

_USUAL = (
  "Type `where=training.is_norm_param` for the norm layers of a Flax model, `where=dpsgd_optax.is_vector` for every "
  "1-D parameter, or give a tree of bools like the params."
)


def is_vector(params: Any) -> Any:
  """True for every leaf of rank 1, as in the released code of SGD-PH: norm layers, but also the bias of any layer.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> dpo.is_vector({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "temperature": jnp.ones(())})
    {'bias': True, 'kernel': False, 'temperature': False}
  """
  return jax.tree.map(lambda x: jnp.ndim(x) == 1, params)


def is_norm_param(params: Any) -> Any:
  """True for the scale and bias of norm layers and for the lengths of weight-normalised layers of a Flax model.

  Told from the names beside a leaf: it is one of a norm layer iff its parent holds a `scale`, and nothing but `scale`
  and `bias`. This finds BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, the norms within attention, and norm
  layers under `nn.scan` and `nn.vmap`, whatever they are called, of linen and of nnx; and not the bias of a dense layer
  or of the classifier. Of weight-normalised layers it finds the lengths: `nn.WeightNorm` of linen keeps them under one
  key that ends in "/kernel/scale", `training.WeightNorm` of nnx in a module of their own.

  A norm layer with a bias alone (`use_scale=False`) looks like nothing in particular and is not found: give `where` as
  a tree of bools then.

  Args:
    params: linen params, or an nnx state of `nnx.Param`.

  Returns:
    A tree of bools like `params`: a `where` for `sgd_ph`, a mask for Optax, labels for `optax.partition`.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
    >>> from dpsgd_optax import training
    >>> model = nn.Sequential([nn.Dense(2), nn.LayerNorm()])
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> training.is_norm_param(params)
    {'layers_0': {'bias': False, 'kernel': False}, 'layers_1': {'bias': True, 'scale': True}}
    >>> tx = optax.partition({True: optax.sgd(0.1), False: optax.adam(1e-3)}, training.is_norm_param)
  """
  paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  children: dict[tuple[str, ...], set[str]] = {}
  for path in paths:
    for depth in range(len(path)):
      children.setdefault(path[:depth], set()).add(path[depth])

  def is_norm(path):
    if not path:
      return False
    siblings = children[path[:-1]]
    return path[-1].endswith("/kernel/scale") or ("scale" in siblings and siblings <= {"scale", "bias"})

  return jax.tree.unflatten(jax.tree.structure(params), [is_norm(path) for path in paths])


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
    mask = jax.tree.map(lambda chosen, part: jax.tree.map(lambda _: chosen, part), mask, tree)
    same_structure(mask, tree, "`where`", "the params")
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"`where` must be a tree of bools that fits the params, {jax.tree.structure(tree)}; got "
      f"{jax.tree.structure(mask)}. {_USUAL}"
    ) from error
  chosen = jax.tree.leaves(mask)
  if wrong := [x for x in chosen if not isinstance(x, bool | np.bool_)]:
    raise ValueError(f"`where` must be a tree of bools, but one of its leaves is {wrong[0]!r}. {_USUAL}")
  if not any(chosen):
    listed = ", ".join(f"{'/'.join(names(path))} {jnp.shape(x)}" for path, x in leaves[:4])
    raise ValueError(
      f"`where` selects none of the {len(leaves)} parameters: {listed}{', …' if leaves[4:] else ''}. {_USUAL} A "
      "network without norm layers gets 1-D lengths from `nn.WeightNorm` (linen) or `training.WeightNorm` (nnx)."
    )
  return mask


def punched(tree: Any, mask: Any) -> Any:
  """``tree`` with holes where the mask is False."""
  return jax.tree.map(lambda x, chosen: x if chosen else optax.MaskedNode(), tree, mask)


def filled(part: Any, tree: Any) -> Any:
  """``part`` with the leaves of ``tree`` in its holes."""
  return between(part, tree, lambda a, _: a, lambda b: b)
