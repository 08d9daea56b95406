# SPDX-License-Identifier: Apache-2.0
"""A vector with holes as a tangent: the parameters opposite its arrays are differentiated, the others are constant.

Notation
  θ_b, v_b   the block: the leaves of the parameters θ opposite an array of the vector v, and these arrays
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.paths import is_absent, match_leaves, quoted


class Block(NamedTuple):
  """The block of the parameters that a vector speaks of."""

  theta: list[jax.Array]  # θ_b
  vector: list[jax.Array]  # v_b, in the dtypes of θ_b
  indices: list[int]  # where θ_b stands among the leaves of θ
  join: Callable[[list], Any]  # leaves like θ_b ↦ a tree like θ, the other parameters as they are
  restore: Callable[[list], Any]  # leaves like θ_b ↦ a tree like v, with its holes

  def of(self, function: Callable) -> Callable[[list], Any]:
    """A function of θ as one of θ_b."""
    return lambda theta: function(self.join(theta))

  def take(self, tree: Any) -> list:
    """The leaves of a tree like θ that stand opposite θ_b."""
    leaves = jax.tree.leaves(tree)
    return [leaves[i] for i in self.indices]


def block_of(name: str, params: Any, vector: Any) -> Block:
  """Matches the vector with the parameters, for the product ``name``; raises a ValueError if it does not fit."""
  matches = match_leaves(f"`{name}`", params, vector)
  leaves, treedef = jax.tree.flatten(params)
  check_differentiable(name, [(path, leaves[i]) for path, _, i in matches])
  indices = [i for _, _, i in matches]
  theta = [jnp.asarray(leaves[i]) for i in indices]

  def join(part):
    found = dict(zip(indices, part, strict=True))
    return treedef.unflatten([found.get(i, x) for i, x in enumerate(leaves)])

  def restore(part):
    found = iter(part)
    return jax.tree.map(lambda x: x if is_absent(x) else next(found), vector, is_leaf=is_absent)

  cast = [_cast(name, path, v, x) for (path, v, _), x in zip(matches, theta, strict=True)]
  return Block(theta, cast, indices, join, restore)


def gradient(loss: Callable, has_aux: bool) -> Callable[[list], list]:
  """θ_b ↦ g_b of a loss of θ_b, complex leaves in the direction of ascent."""
  return lambda theta: ascent(jax.grad(drop_aux(loss, has_aux))(theta))


def ascent(grads: Any) -> Any:
  """∂L/∂x + i ∂L/∂y, of which JAX returns the conjugate."""
  return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def drop_aux(f: Callable, has_aux: bool) -> Callable:
  return (lambda x: f(x)[0]) if has_aux else f


def _cast(name: str, path: Any, v: Any, x: jax.Array) -> jax.Array:
  """v in the dtype of its parameter x, if it has the shape and is real where x is."""
  v = jnp.asarray(v)
  if v.shape != x.shape:
    raise ValueError(
      f"`{name}` needs a vector with the shapes of the parameters; at {quoted(path)} the parameter has shape "
      f"{x.shape} and the vector {v.shape}. Draw it as `optax.tree.random_like(key, params)`."
    )
  if jnp.iscomplexobj(v) and not jnp.iscomplexobj(x):
    raise ValueError(
      f"`{name}` cannot move a real parameter in a complex direction: at {quoted(path)} the parameter is {x.dtype} "
      f"and the vector {v.dtype}. Pass the real part."
    )
  return v.astype(x.dtype)


def check_differentiable(name: str, leaves_with_path: Any) -> None:
  """Raises a ValueError for a leaf that has no derivative: no array and no number, or an integer."""
  for path, x in leaves_with_path:
    if not hasattr(x, "dtype") and not isinstance(x, bool | int | float | complex):
      cure = (
        "Let the loss be a function of the arrays alone; of an Equinox model: `params, static = eqx.partition(model, "
        "eqx.is_inexact_array)`, `lambda p: loss(eqx.combine(p, static))`."
      )
      found = f"a {type(x).__name__}. {cure}"
    elif not jnp.issubdtype(dtype := x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.inexact):
      held = "put `optax.MaskedNode()` there in the vector"
      found = f"{dtype}. Keep it out of the parameters that the loss is a function of, or {held}."
    else:
      continue
    needed = f"`{name}` differentiates floating-point or complex parameters"
    raise ValueError(f"{needed}, but the leaf at {quoted(path)} is {found}")
