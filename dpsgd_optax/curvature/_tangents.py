# SPDX-License-Identifier: Apache-2.0
"""A vector with holes as a tangent of the loss at the whole parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.matching import _is_hole, match_leaves, place


class _Block(NamedTuple):
  """The part of the parameters that a vector with holes speaks of; the rest is constant."""

  theta: list[jax.Array]  # the leaves of θ opposite an array of the vector
  vector: list[jax.Array]  # those arrays, in the dtypes of theta
  join: Callable[[list], Any]  # leaves like theta -> parameters, the held ones as they are
  take: Callable[[Any], list]  # a tree like the parameters -> its leaves opposite theta
  restore: Callable[[list], Any]  # leaves like theta -> a tree like the vector, holes included


def _block(name: str, params, vector) -> _Block:
  """Match the vector with the parameters, or say where they part."""
  slots, places = match_leaves(f"`{name}`", params, vector)
  leaves, treedef = jax.tree.flatten(params)
  active = [i for i in places if i is not None]
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole)]
  pairs = [(path, leaves[i], v) for path, i, v in zip(paths, places, slots, strict=True) if i is not None]
  _check_differentiable(name, [(path, x) for path, x, _ in pairs])
  theta = [jnp.asarray(x) for _, x, _ in pairs]

  def join(part):
    return treedef.unflatten(put(leaves, active, part))

  def restore(part):
    held = [j for j, i in enumerate(places) if i is not None]
    return jax.tree.structure(vector, is_leaf=_is_hole).unflatten(put(slots, held, part))

  def put(whole, where, part):
    found = dict(zip(where, part, strict=True))
    return [found.get(i, x) for i, x in enumerate(whole)]

  return _Block(
    theta=theta,
    vector=[_cast(name, path, v, x) for (path, _, v), x in zip(pairs, theta, strict=True)],
    join=join,
    take=lambda tree: [found[i] for found in [jax.tree.leaves(tree)] for i in active],
    restore=restore,
  )


def _gradient(loss, join, has_aux) -> Callable[[list], list]:
  """θ_b ↦ g_b, complex leaves in the direction of ascent."""
  gradient = jax.grad(_drop_aux(lambda leaves: loss(join(leaves)), has_aux))
  return lambda leaves: _ascent(gradient(leaves))


def _ascent(grads):
  """∂L/∂x + i ∂L/∂y, where JAX has its conjugate."""
  return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def _drop_aux(f, has_aux):
  return (lambda x: f(x)[0]) if has_aux else f


def _cast(name, path, v, x):
  v = jnp.asarray(v)
  if v.shape != x.shape:
    raise ValueError(
      f"`{name}` needs a vector with the shapes of the parameters; at {place(path)} the parameter has shape "
      f"{x.shape} and the vector {v.shape}. Draw it as `optax.tree.random_like(key, params)`."
    )
  if jnp.iscomplexobj(v) and not jnp.iscomplexobj(x):
    raise ValueError(
      f"`{name}` cannot move a real parameter in a complex direction: at {place(path)} the parameter is {x.dtype} "
      f"and the vector {v.dtype}. Pass the real part."
    )
  return v.astype(x.dtype)


def _check_differentiable(name, leaves_with_path):
  for path, x in leaves_with_path:
    if not hasattr(x, "dtype") and not isinstance(x, bool | int | float | complex):
      raise ValueError(
        f"`{name}` differentiates floating-point or complex parameters, but the leaf at {place(path)} is a "
        f"{type(x).__name__}. Let the loss be a function of the arrays alone; of an Equinox model: "
        "`params, static = eqx.partition(model, eqx.is_inexact_array)`, `lambda p: loss(eqx.combine(p, static))`."
      )
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"`{name}` differentiates floating-point or complex parameters, but the leaf at {place(path)} is {dtype}. "
        "Keep it out of the parameters that the loss is a function of, or put `optax.MaskedNode()` there in the vector."
      )
