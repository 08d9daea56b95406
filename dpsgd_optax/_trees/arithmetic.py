# SPDX-License-Identifier: Apache-2.0
"""Dtypes, sums and choices over whole trees."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def working_dtype(dtype: Any) -> Any:
  """The dtype of state and arithmetic for a parameter of this dtype: float32 at least."""
  return jnp.promote_types(dtype, jnp.float32)


def scalar_dtype(params: Any) -> Any:
  """The dtype of scalars that go with these params: float32, or float64 if any of them is that wide."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
  return jnp.result_type(jnp.float32, *(jnp.finfo(d).dtype for d in dtypes if jnp.issubdtype(d, jnp.inexact)))


def check_floating(params: Any) -> None:
  """Raises a ValueError for a leaf that is no floating-point or complex array; the message names it."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if callable(leaf) or isinstance(leaf, str):
      cure = "Leave out what is no array: `tx.init(eqx.filter(model, eqx.is_inexact_array))` for an Equinox model."
      found = f"is a {type(leaf).__name__}. {cure}"
    elif not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
      found = f"has dtype {dtype}. Leave it out with `optax.masked` or `optax.partition`, or make it a float."
    else:
      continue
    raise ValueError(f"a preconditioner needs floating-point parameters, but {jax.tree_util.keystr(path)} {found}")


def select(predicate: jax.Array, new: Any, old: Any) -> Any:
  """The tree ``new`` where the scalar ``predicate`` holds, otherwise ``old``."""
  return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), new, old)


def separate(tree: Any, *others: Any) -> Any:
  """``tree`` with copies of the arrays that it has twice, or that ``others`` have: no buffer can be donated twice."""
  seen = {id(x) for x in jax.tree.leaves(others)}

  def own(x):
    if id(x) in seen and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      x = jnp.copy(x)
    seen.add(id(x))
    return x

  return jax.tree.map(own, tree)


def leaves_apart(tree: Any) -> tuple[list[jax.Array], list[np.ndarray], Callable[[list[jax.Array]], Any]]:
  """The default of ``Preconditioner.matrices``: each leaf a matrix, (1, *shape), its size, and the way back."""
  leaves, treedef = jax.tree.flatten(tree)
  sizes = [np.array([math.prod(jnp.shape(x))]) for x in leaves]
  return [x[None] for x in leaves], sizes, lambda parts: treedef.unflatten([x[0] for x in parts])


def dot(a: Any, b: Any) -> jax.Array:
  """Re⟨a, b⟩ over all leaves, in float32 at least."""
  real = lambda x, y: jnp.real(jnp.conj(x) * y)
  products = jax.tree.map(lambda x, y: jnp.sum(real(x, y).astype(working_dtype(jnp.real(x).dtype))), a, b)
  return sum(jax.tree.leaves(products), jnp.zeros(()))


def tiny(x: jax.Array) -> float:
  """The smallest normal number of x's dtype: guards a division by an exact zero, in the unit of x."""
  return float(jnp.finfo(x.dtype).tiny)
