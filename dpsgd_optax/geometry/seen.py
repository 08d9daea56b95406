# SPDX-License-Identifier: Apache-2.0
"""Which slices of a parameter were seen lately: what was not seen for long is not learned.

The row of an embedding that no batch used has a gradient of exactly zero. To a fit that looks like a row of very small
gradients: its P grows, fit by fit, up to 1/λ, and the first gradient of that row then takes the whole step. So a slice
takes part in a fit only if it was seen in one of the last PATIENCE ones. One that is seen now and then has the P of the
mean over all batches, those without it included. One that never had a gradient keeps P at its start, is coupled with no
other, and has an update of exactly zero.

Notation
  idle     uint8, counters of an axis, or of the entries of a vector; () where all take part in every fit
  s_i      (d_i,) bool, the slices along axis i that take part
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.geometry.structured import Arrow, LowRank

PATIENCE = 10  # fits: P of a slice can grow by a factor of 2.7 in them
Seen = list[jax.Array]


def idle_counters(shape: Any) -> jax.Array:
  """Counters of what was never seen."""
  return jnp.full(shape, PATIENCE, jnp.uint8)


def count_idle(idle: Any, seen_now: jax.Array) -> Any:
  """Fits since each was seen, PATIENCE at most; 0 for what is seen in this fit."""
  count = lambda idle: jnp.where(seen_now, 0, jnp.minimum(idle + 1, PATIENCE)).astype(idle.dtype)
  return jax.tree.map(count, idle)


def count_idle_slices(idle: tuple[jax.Array, ...], h: jax.Array) -> tuple[jax.Array, ...]:
  """:func:`count_idle` for each axis of h; a slice is seen if any of its entries is not zero."""
  others = lambda i: [j for j in range(h.ndim) if j != i]
  return tuple(count_idle(x, jnp.any(h != 0, axis=others(i))) for i, x in enumerate(idle))


def seen_lately(idle: Any) -> Seen | None:
  """The masks s_i of the counters of all axes; None where all take part."""
  return [x < PATIENCE for x in jax.tree.leaves(idle)] or None


def zero_unseen(x: jax.Array, idle: Any) -> jax.Array:
  """x, zero in the entries that take no part; ``idle`` has the shape of x, or is ()."""
  seen = seen_lately(idle)
  return x if seen is None else jnp.where(seen[0], x, 0)


def zero_unseen_slices(x: jax.Array, seen: Seen) -> jax.Array:
  """x, zero in the slices that take no part."""
  for i, s in enumerate(seen):
    x = jnp.where(jnp.expand_dims(s, [j for j in range(x.ndim) if j != i]), x, 0)
  return x


def zero_unseen_block(e: Any, s: jax.Array) -> Any:
  """A moment along one axis, zero but for the rows and columns that take part."""
  if isinstance(e, LowRank):
    return dataclasses.replace(e, x=jnp.where(s[None], e.x, 0))
  if isinstance(e, Arrow):
    column = jnp.where(jnp.logical_and(s, s[-1]), e.column, 0)
    return dataclasses.replace(e, diagonal=jnp.where(s, e.diagonal, 0), column=column)
  return jnp.where(s if e.ndim == 1 else s[:, None] & s[None], e, 0)
