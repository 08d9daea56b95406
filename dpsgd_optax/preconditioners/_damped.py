# SPDX-License-Identifier: Apache-2.0
"""The probe of the damped curvature."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax._trees.draws import noise
from dpsgd_optax.base import Preconditioner, Probe


def damp(probe: Probe, xi: jax.Array | None, damping) -> Probe:
  """The probe of the damped curvature.

  Newton: h ← h + λ v, that is H + λI.
  Whitening: h ← h + (λ + ε|h|) ξ with ε the machine epsilon: E hhᴴ grows by at least λ² I, so P ≤ I/λ.

  Where h is exactly zero it stays so, that a fit can tell what was not seen (see ``seen_slices``).
  """
  h, damping = probe.product, 0.0 if damping is None else damping
  if probe.vector is not None:
    return Probe(probe.vector, jnp.where(h != 0, h + jnp.asarray(damping, h.dtype) * probe.vector, h))
  size = jnp.abs(h)
  eps = jnp.finfo(h.dtype).eps
  return Probe(None, jnp.where(h != 0, h + (jnp.asarray(damping, size.dtype) + eps * size) * xi, h))


def sampled(probe: Probe, key: jax.Array) -> Probe:
  """The probe with v drawn, where it was integrated out."""
  return probe if probe.vector is not None else Probe(noise(key, probe.product), probe.product)


def unless_zero(x: jax.Array, fit: Callable[[Probe], Any], probe: Probe, old: Any) -> Any:
  """``fit(probe)``, or ``old`` where x is zero throughout: nothing was seen, so nothing is learned, P cannot run away.

  A branch, or in a batch of matrices a choice. What enters and leaves a branch is written to memory; fused into every
  pass of the fit and of what reads the new state, the noise and the small sums would be made anew in each: time for
  ``xmat``, instructions to compile for ``kron``.
  """
  # of squares, which a library sums in one pass, no normal number so small that its square vanishes; a NaN is seen
  larger = x * (2 / math.sqrt(tiny(x)))
  seen = jnp.sum(jnp.real(larger * jnp.conj(larger))) != 0
  return jax.lax.cond(seen, lambda probe, old: fit(probe), lambda probe, old: old, probe, old)


def damped(group: Preconditioner, whitens: bool) -> Preconditioner:
  """A group whose ``fit(state, probe, *, key)`` knows no λ, fitted on the probe of the damped curvature.

  Where it ``whitens``, v is integrated out, and the place of the vector holds the noise of the damping.
  """

  def fit(state, probe, *, key, damping):
    seen = damp(Probe(None, probe.product), probe.vector, damping) if whitens else damp(probe, None, damping)
    # λ alone says nothing about a leaf that is not in use: 2000 such fits would leave it with P = I/λ
    like = lambda new: jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)
    return unless_zero(probe.product, lambda seen: like(group.fit(state, seen, key=key)), seen, state)

  return group._replace(fit=fit)
