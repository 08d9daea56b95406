# SPDX-License-Identifier: Apache-2.0
"""Which slices of a parameter were seen lately: what was not seen for long is not learned.

The row of an embedding that no batch used has a gradient of exactly zero. To a fit that looks like a row of very small
gradients: its P grows, fit by fit, up to 1/λ, and the first gradient of that row then takes the whole step. So each
slice along each axis has a counter, and takes part in a fit as long as it was seen in one of the last PATIENCE fits:
the fit is that of the part of the tensor that is in use. A slice that is seen now and then keeps its P for the mean
over all batches, those without it included; a slice that never had a gradient keeps P at its start, is coupled with no
other, and has an update of exactly zero.

Notation
  s_i      (d_i,) bool, the slices along axis i that take part
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.geometry.structured import Arrow, LowRank

PATIENCE = 10  # fits: P of a slice can grow by a factor of 2.7 in them
Seen = list[jax.Array]


def unseen(shape: Any) -> jax.Array:
  """Counters of slices, or of entries, that were never seen; uint8."""
  return jnp.full(shape, PATIENCE, jnp.uint8)


def waited(idle: jax.Array, here: jax.Array) -> jax.Array:
  """Fits since each was seen, PATIENCE at most; ``here``: those that are seen now."""
  return jnp.where(here, 0, jnp.minimum(idle + 1, PATIENCE)).astype(idle.dtype)


def slices_waited(idle: tuple[jax.Array, ...], h: jax.Array) -> tuple[jax.Array, ...]:
  """:func:`waited` for the slices of h along each axis; one is seen that is not zero throughout."""
  others = lambda i: [j for j in range(h.ndim) if j != i]
  return tuple(waited(x, jnp.any(h != 0, axis=others(i))) for i, x in enumerate(idle))


def in_use(idle: jax.Array) -> jax.Array:
  return idle < PATIENCE


def only_seen(x: jax.Array, seen: Seen) -> jax.Array:
  """x, zero in the slices that take no part."""
  for i, s in enumerate(seen):
    x = jnp.where(jnp.expand_dims(s, [j for j in range(x.ndim) if j != i]), x, 0)
  return x


def block_of(e: Any, s: jax.Array) -> Any:
  """A moment along one axis, zero outside of the rows and columns that take part."""
  if isinstance(e, LowRank):
    return dataclasses.replace(e, x=jnp.where(s[None], e.x, 0))
  if isinstance(e, Arrow):
    column = jnp.where(jnp.logical_and(s, s[-1]), e.column, 0)
    return dataclasses.replace(e, diagonal=jnp.where(s, e.diagonal, 0), column=column)
  return jnp.where(s if e.ndim == 1 else s[:, None] & s[None], e, 0)
