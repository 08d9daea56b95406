# SPDX-License-Identifier: Apache-2.0
"""A branch that stays one under `vmap`: what is seldom due is computed only when it is due somewhere in the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import select


def if_any(due: jax.Array, change: Callable[..., Any], old: Any, *inputs: Any) -> Any:
  """``change(old, *inputs)`` where ``due`` holds, and ``old`` where it does not.

  ``lax.cond`` becomes a select under ``vmap``, whose two sides are computed on every step. Here a batch is one branch:
  ``change`` runs for all its members if any of them is due, and each takes the result only if it is due itself.

  Args:
    due: (), bool.
    change: a function of its arguments alone; it must not close over traced values. Static.
    old: what it changes, a pytree of arrays; the result has the same shapes and dtypes.
    *inputs: what else it reads. All arguments count as constants where an update is differentiated.
  """

  @jax.custom_batching.custom_vmap
  def run(due, old, inputs):
    return jax.lax.cond(due, lambda old, inputs: change(old, *inputs), lambda old, inputs: old, old, inputs)

  @run.def_vmap
  def batch(size, batched, due, old, inputs):
    axes = jax.tree.map(lambda along: 0 if along else None, tuple(batched))
    spread = lambda x, along: x if along else jnp.broadcast_to(x, (size, *x.shape))
    old, axes = jax.tree.map(spread, old, batched[1]), (axes[0], 0, axes[2])
    each = jax.vmap(lambda due, old, inputs: select(due, change(old, *inputs), old), in_axes=axes, axis_size=size)
    done = if_any(jnp.any(due), lambda old, due, inputs: each(due, old, inputs), old, due, inputs)
    return done, jax.tree.map(lambda _: True, done)

  return run(*jax.lax.stop_gradient((due, old, inputs)))
