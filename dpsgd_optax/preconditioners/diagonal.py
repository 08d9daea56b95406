# SPDX-License-Identifier: Apache-2.0
"""Diagonal preconditioner: Q = diag(q), P = Q², the smallest of the Lie groups.

Notation
  v, h   probe vector and its image under the curvature: h = H v, or h = g when whitening
  a, b   both seen through Q:  a = q h,  b = v / q

Reference: Li, "Preconditioner on matrix Lie group for SGD", arXiv:1809.10232.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check, check_step_size
from dpsgd_optax.geometry.seen import count_idle, idle_counters, zero_unseen
from dpsgd_optax.preconditioners._damped import sampled
from dpsgd_optax.preconditioners._lift import per_leaf


class DiagonalState(NamedTuple):
  """Attributes:
  q: shape of the parameter; positive; P = q², in parameter² / loss (Newton) or parameter / gradient (whitening).
  idle: the same shape, uint8, fits since each entry was seen.
  """

  q: jax.Array
  idle: jax.Array


def diagonal(step_size: float = 0.1, init_scale: float = 1.0, *, stacked: Stacked = None) -> Preconditioner:
  """P = diag(q²) on every leaf. Memory: 1.25 copies of the parameters.

  Fitted on Newton probes, P → 1 / |h_ii + λ| if H is diagonal; on gradients, P → 1 / sqrt(E g² + λ²): Adam's scaling
  without its second moment. v is drawn also when whitening: with v integrated out the normaliser correlates with the
  sample and biases P.

  Args:
    step_size: largest relative change of q per fit, in (0, 1].
    init_scale: the initial q, positive.
    stacked: see :func:`dpsgd_optax.per_leaf`.

  Raises:
    ValueError: if ``step_size`` is outside (0, 1] or ``init_scale`` is not positive.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.diagonal()
    >>> state = p.init(jnp.zeros(3))
    >>> p.apply(state, jnp.array([1.0, 2.0, 3.0]))
    Array([1., 2., 3.], dtype=float32)
  """
  check_step_size(step_size)
  check(lambda x: x > 0, init_scale, "init_scale", "positive", "It is the initial q; try 1.0.")

  def init(x: jax.Array) -> DiagonalState:
    return DiagonalState(jnp.full(x.shape, init_scale, jnp.finfo(x.dtype).dtype), idle_counters(x.shape))

  def fit(state: DiagonalState, probe: Probe, *, key: jax.Array) -> DiagonalState:
    """q ← q (1 − μ (|a|² − |b|²)),  μ = step_size / max(|a|² + |b|²), of the entries seen lately."""
    v, h = sampled(probe, key)
    idle = count_idle(state.idle, h != 0)
    a, b = jnp.abs(state.q * h) ** 2, zero_unseen(jnp.abs(v / state.q) ** 2, idle)
    mu = step_size / jnp.max(a + b)
    return DiagonalState(state.q * (1 - mu * (a - b)), idle)

  def apply(state: DiagonalState, x: jax.Array) -> jax.Array:
    return state.q**2 * x

  return per_leaf(Preconditioner(init, fit, apply, diagonal=True), stacked)
