# SPDX-License-Identifier: Apache-2.0
"""What an update may be told: choices known or traced, keys of every kind, dtypes that stay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpsgd_optax._trees.mesh import on_mesh
from dpsgd_optax.base import forward_extra_args
from dpsgd_optax.transforms.injection import injected


def choose(predicate: bool | jax.Array, yes: Callable, no: Callable, *operands: Any) -> Any:
  """``lax.cond``, or a plain choice where the predicate is known: a Python bool, or any value outside ``jit``."""
  if not isinstance(predicate, jax.core.Tracer):
    return (yes if predicate else no)(*operands)
  return jax.lax.cond(predicate, yes, no, *operands)


def _is_typed(key: Any) -> bool:
  return hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def make_key(key: int | jax.Array) -> tuple[Callable[[], jax.Array], Any]:
  """How to make the raw data of a key from an int, or from a key of either kind, and the name of its generator.

  The state holds raw data: a typed key cannot be cast, ravelled, saved by every library, or multiplied by zero, as the
  wrappers of Optax do with the leaves of a state. Each call makes arrays of its own, so that they may be donated.
  """
  if _is_typed(key):
    return lambda: jnp.array(jax.random.key_data(key)), jax.random.key_impl(key)
  if isinstance(key, int) or jnp.ndim(key) == 0:
    return lambda: jax.random.key_data(jax.random.key(key)), None
  return lambda: jnp.array(key), None


def compiled_once(function: Callable) -> Callable:
  """``function`` for a loop that is not jitted: compiled at the first call, not anew (as its branches would) at each.

  Inside ``jit``, ``vmap`` and the like it is the function itself; and for ``optax.inject_hyperparams``, which builds
  the transform anew at every step, so that nothing compiled would ever be met again.
  """
  if injected():
    return function
  jitted = jax.jit(function)

  def call(*args, **kwargs):
    leaves = jax.tree.leaves((args, kwargs))
    known = all(isinstance(x, jax.Array | np.ndarray | np.generic | int | float) for x in leaves)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    return (jitted if known and not traced and not on_mesh() else function)(*args, **kwargs)

  return call


def keep_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """``tx``, its updates in the dtypes in which they came: a learning rate of float32 does not make float32 of bf16."""
  inner = forward_extra_args(tx)

  def update(updates, state, params=None, **extra):
    done, state = inner.update(updates, state, params, **extra)
    return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), done, updates), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def both(a: Any, b: Any) -> Any:
  """a and b: a Python bool if both are, an array otherwise."""
  return a and b if isinstance(a, bool) and isinstance(b, bool) else jnp.logical_and(a, b)


def check_choice(value: Any, name: str) -> None:
  """Raises unless ``value`` is None, a bool, or a scalar array of bools."""
  if value is None or isinstance(value, bool | np.bool_):
    return
  if getattr(value, "dtype", None) != jnp.bool_ or jnp.shape(value) != ():
    what = type(value).__name__ if not hasattr(value, "dtype") else f"{value.dtype}{list(jnp.shape(value))}"
    raise ValueError(
      f"`{name}` must be True, False, or a scalar array of bools, got {what}. Inside `optax.MultiSteps(tx, k)` type "
      f"`{name}=opt_state.mini_step == k - 1`."
    )
