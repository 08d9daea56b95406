# SPDX-License-Identifier: Apache-2.0
"""One optimizer for the layers, another for all other leaves: norm scales, embeddings, and what was not recorded."""

import math
from typing import Any

import jax
import optax

from dpsgd_optax.layers.find import LAYERS_HINT, find_layers, leaves_by_name


def with_fallback(core: Any, fallback: Any, layers: Any, *, vectors: bool) -> optax.GradientTransformationExtraArgs:
  """``core`` on the layers and ``fallback`` on all other leaves; without a fallback, an error that names them.

  If ``vectors`` is False, leaves of fewer than two axes need no fallback, and go through ``core``.
  """
  covered = lambda tree: {i for layer in find_layers(tree, layers) for i in layer.leaves}

  def labels(tree):
    ours, treedef = covered(tree), jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, ["layers" if i in ours else "rest" for i in range(treedef.num_leaves)])

  def init_alone(params):
    ours, leaves = covered(params), leaves_by_name(params)[0]
    needs = lambda path, leaf: vectors or (len(leaf.shape) > 1 and path[-1:] != ("embedding",))
    others = {path: leaf for path, leaf in leaves.items() if leaf.index not in ours and math.prod(leaf.shape) > 0}
    if rest := ["/".join(path) for path, leaf in others.items() if needs(path, leaf)]:
      raise ValueError(
        f"there is no layer that the leaves {rest} belong to. Name the transform that trains them, with its learning "
        f"rate: `fallback=optax.adam(1e-3)`. If there are kernels of layers among them, type {LAYERS_HINT}."
      )
    return core.init(params)

  if fallback is None:
    return optax.GradientTransformationExtraArgs(init_alone, optax.with_extra_args_support(core).update)
  parts = optax.partition({"layers": core, "rest": fallback}, labels)

  def init(params):
    if layers is not None and jax.tree.leaves(params) and not covered(params):
      raise ValueError(
        "`layers` must hold the record of at least one of the leaves "
        f"{['/'.join(path) for path in leaves_by_name(params)[0]]}, but holds none of them, so that the fallback would "
        f"train them all. Type {LAYERS_HINT}; `capture` records nothing inside of `jax.lax.scan` and `cond`."
      )
    return parts.init(params)

  def update(updates, state, params=None, **extra):
    if params is not None:  # a model as params: its functions, opposite a None of the gradient, are no parameters
      is_none = lambda x: x is None
      params = jax.tree.map(lambda g, p: None if g is None else p, updates, params, is_leaf=is_none)
    return parts.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)
