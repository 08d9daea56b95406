# SPDX-License-Identifier: Apache-2.0
"""The probe of the damped curvature.

Notation
  v, h   probe vector and its image under the curvature: h = H v, or h = g when whitening (v = None)
  λ, ξ   the damping of the curvature; random signs, drawn for it when whitening
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax._trees.draws import signs_like
from dpsgd_optax.base import Preconditioner, Probe


def damp(probe: Probe, xi: jax.Array | None, damping) -> Probe:
  """The probe of the damped curvature; ``damping`` None: λ = 0.

  Newton: h ← h + λ v, that is H + λI.
  Whitening: h ← h + (λ + ε|h|) ξ with ε the machine epsilon: E hhᴴ grows by at least λ² I, so P ≤ I/λ.

  Where h is exactly zero it stays so, that a fit can tell what was not seen (see `geometry.seen`).
  """
  h, damping = probe.product, 0.0 if damping is None else damping
  if probe.vector is not None:
    return Probe(probe.vector, jnp.where(h != 0, h + jnp.asarray(damping, h.dtype) * probe.vector, h))
  size = jnp.abs(h)
  eps = jnp.finfo(h.dtype).eps
  return Probe(None, jnp.where(h != 0, h + (jnp.asarray(damping, size.dtype) + eps * size) * xi, h))


def sampled(probe: Probe, key: jax.Array) -> Probe:
  """The probe with v drawn, where it was integrated out."""
  return probe if probe.vector is not None else Probe(signs_like(key, probe.product), probe.product)


def unless_zero(x: jax.Array, fit: Callable[[Probe], Any], probe: Probe, old: Any) -> Any:
  """``fit(probe)``, or ``old`` where x is zero throughout: nothing was seen, so nothing is learned, P cannot run away.

  ``lax.cond`` (a select under ``vmap``) also writes what enters and leaves the fit to memory. Fused into every pass of
  the fit and of what reads the new state, the noise and the small sums would be made anew in each.
  """
  # a sum of squares is one pass of a library; scaled, so that no normal number has a square of 0; a NaN is seen
  larger = x * (2 / math.sqrt(tiny(x)))
  seen = jnp.sum(jnp.real(larger * jnp.conj(larger))) != 0
  return jax.lax.cond(seen, lambda probe, old: fit(probe), lambda probe, old: old, probe, old)


def damped(group: Preconditioner) -> Preconditioner:
  """A group whose ``fit(state, probe, *, key)`` knows no λ, fitted on the probe of the damped curvature.

  Its ``fit`` takes ``damping`` λ and, where v is integrated out, ``noise`` ξ, shaped like the probe; the ``shape`` of a
  matrix that is padded goes on to the group, as the ``numbers`` in it.
  """

  def fit(state, probe, *, key, damping, noise=None, shape=None):
    padded = {} if shape is None else {"numbers": jnp.prod(shape)}
    # decided on the undamped h: λ alone says nothing about a leaf that is not in use, whose P would grow up to I/λ
    like = lambda new: jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)
    fitted = lambda seen: like(group.fit(state, seen, key=key, **padded))
    return unless_zero(probe.product, fitted, damp(probe, noise, damping), state)

  return group._replace(fit=fit)
