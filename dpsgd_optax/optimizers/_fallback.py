# SPDX-License-Identifier: Apache-2.0
"""Layers that a method knows, and another optimizer for the rest."""

import math
from typing import Any

import jax
import optax

from dpsgd_optax.layers.find import SPEC, Leaf, find_layers, leaves_by_name


def with_fallback(core: Any, fallback: Any, spec: Any, *, vectors: bool) -> Any:
  """``core`` on the layers and ``fallback`` on all other leaves; without a fallback, an error that names them.

  Args:
    core: transform of the layers.
    fallback: complete transform of the rest, with its learning rate and sign, or None.
    spec: as in `per_layer`.
    vectors: whether leaves of fewer than two axes need a fallback too, or may go through ``core``.
  """
  covered = lambda tree: {i for layer in find_layers(tree, spec) for i in (layer.kernel, layer.bias)}

  def labels(tree):
    ours, treedef = covered(tree), jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, ["layers" if i in ours else "rest" for i in range(treedef.num_leaves)])

  def init(params):
    ours = covered(params)
    rest = ["/".join(path) for path, leaf in leaves_by_name(params)[0].items() if _is_rest(path, leaf, ours, vectors)]
    if rest:
      raise ValueError(
        f"there is no layer that the leaves {rest} belong to. Name the transform that trains them, with its learning "
        f"rate: `fallback=optax.adam(1e-3)`. If there are kernels of layers among them, type {SPEC}."
      )
    return core.init(params)

  if fallback is None:
    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(core).update)
  parts = optax.partition({"layers": core, "rest": fallback}, labels)

  def update(updates, state, params=None, **extra):
    if params is not None:  # a model as params: its functions, opposite a None of the gradient, are no parameters
      is_none = lambda x: x is None
      params = jax.tree.map(lambda g, p: None if g is None else p, updates, params, is_leaf=is_none)
    return parts.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(parts.init, update)


def _is_rest(path: tuple[str, ...], leaf: Leaf, ours: set[int | None], vectors: bool) -> bool:
  if leaf.index in ours or math.prod(leaf.shape) == 0:
    return False
  return vectors or (len(leaf.shape) > 1 and path[-1:] != ("embedding",))
