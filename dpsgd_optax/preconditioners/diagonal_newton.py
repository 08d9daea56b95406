# SPDX-License-Identifier: Apache-2.0
"""Newton's method with a diagonal Hessian: the running mean of v ⊙ Hv, damped and inverted.

Notation
  v, s   probe vector and s = v ⊙ H v, an estimate of the diagonal of H: exact for a diagonal H and v = ±1
  h      running mean of s, or of |s|
  n, t   visits: fits whose probe was not zero on this tensor; all fits
  μ, λ   decay of the mean, damping of the curvature
  c      1 − μᵏ, the weight that the mean has seen

Source: SGD with partial Hessian, arXiv:2403.02681 and its released code.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check_fraction, check_not_negative, check_period
from dpsgd_optax.preconditioners._lift import batched


class DiagonalNewtonState(NamedTuple):
  """Attributes:
  fits: (), int32, t.
  visits: (), int32, n.
  curvature: shape of the parameter, h, in loss / parameter².
  added: (), λ of the last step, in the same unit.
  """

  fits: jax.Array
  visits: jax.Array
  curvature: jax.Array
  added: jax.Array


Terms = Callable[[jax.Array, jax.Array], jax.Array]  # (n, t) -> k


def visit_count(visits: jax.Array, fits: jax.Array) -> jax.Array:
  """k = max(n, 1): the terms that the mean of this tensor really has. The exact bias correction."""
  del fits
  return jnp.maximum(visits, 1)


def cycle_count(length: int) -> Terms:
  """k = ⌊t / length⌋ + 1, the same for all tensors: the released code's bias correction.

  It is off by one for tensors that come late in the cycle of ``length`` steps (those without a probe, None in
  ``cycle``, included): up to 1.9 times too large a step in the first cycle at μ = 0.9.
  """
  check_period(length, "length")
  return lambda visits, fits: fits // length + 1


def diagonal_newton(
  *,
  decay: float = 0.9,
  scale: float = 1.0,
  signed: bool = True,
  bias_correction: Terms = visit_count,
  stacked: Stacked = None,
) -> Preconditioner:
  """P = τ c / (|h| + λ), entry by entry: Newton's step for a diagonal Hessian. Memory: one copy of the parameters.

    h ← μ h + (1 − μ) s,   s = v ⊙ H v,   c = 1 − μⁿ

  For random signs v, E s is the diagonal of H, with variance Σ_{j≠i} H_ij² in entry i. For v = 1, s is the vector of
  row sums of H, which is the diagonal only if H is diagonal; :func:`dpsgd_optax.sgd_ph` says when it is. On gradients
  (``whitening()``) s = |g|², the diagonal of the empirical Fisher matrix. At a fixed H the fixed point is
  P = τ / (|E s| + λ), between 0 and τ/λ. The damping λ is added to |h|, not to H, whose eigenvalues have any sign.

  A tensor on which the probe is zero throughout is not visited and keeps its h; before its first visit h = 0, so that
  P = τ (1 − μ)/λ. Before the first fit of all P = 1.

  Args:
    decay: μ, weight kept of the old h, in [0, 1).
    scale: τ ≥ 0, the ratio of this step to that of plain SGD with the same learning rate.
    signed: True: the mean is of s, and its absolute value is taken where it is used: the noise of random signs averages
      out. False: of |s|, as the released code has it: never below |E s|, and above it by the noise. Static.
    bias_correction: (n, t) → k in c = 1 − μᵏ: ``visit_count``, or ``cycle_count(M)``, the released code's. Static.
    stacked: see :func:`dpsgd_optax.per_leaf`: each layer of a stack has visits of its own.

  Raises:
    ValueError: for a decay outside [0, 1) or a negative ``scale``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> loss, params = lambda p: jnp.sum(jnp.array([1.0, -4.0, 0.5]) * p**2), jnp.ones(3)  # H = diag(2, −8, 1)
    >>> tx = dpo.scale_by_preconditioner(dpo.diagonal_newton(), dpo.hessian_diagonal())
    >>> tx.update(jnp.ones(3), tx.init(params), params, hvp=dpo.hvp(loss, params))[0].round(3)
    Array([0.5 , 0.125, 1. ], dtype=float32)
  """
  check_fraction(decay, "decay")
  check_not_negative(scale, "scale", "It is τ, which multiplies the step. Try 1e-3.")

  def init(x: jax.Array) -> DiagonalNewtonState:
    real, zero = jnp.finfo(x.dtype).dtype, jnp.zeros((), jnp.int32)
    return DiagonalNewtonState(zero, zero, jnp.zeros(x.shape, real), jnp.zeros((), real))

  def fit(state: DiagonalNewtonState, probe: Probe, *, key: jax.Array, damping) -> DiagonalNewtonState:
    del key
    v = probe.product if probe.vector is None else probe.vector
    s = jnp.real(jnp.conj(v) * probe.product)
    visited = True if probe.vector is None else jnp.any(v != 0)
    dtype = state.curvature.dtype
    mean = decay * state.curvature + (1 - decay) * (s if signed else jnp.abs(s))
    return DiagonalNewtonState(
      state.fits + 1,
      state.visits + jnp.asarray(visited, jnp.int32),
      jnp.where(visited, mean, state.curvature).astype(dtype),
      jnp.asarray(damping, dtype),
    )

  def advance(state: DiagonalNewtonState, *, damping) -> DiagonalNewtonState:
    return state._replace(added=jnp.asarray(damping, state.added.dtype))

  def apply(state: DiagonalNewtonState, x: jax.Array) -> jax.Array:
    dtype = state.curvature.dtype
    c = 1 - jnp.asarray(decay, dtype) ** jnp.asarray(bias_correction(state.visits, state.fits), dtype)
    curvature = jnp.abs(state.curvature) + state.added
    # without damping an entry of no curvature keeps τ c: the step stays finite, and a NaN stays a NaN
    newton = scale * c / jnp.where(curvature == 0, 1, curvature)
    return x * jnp.where(state.fits > 0, newton, 1).astype(dtype)

  return batched(Preconditioner(init, fit, apply, advance, diagonal=True), stacked)
