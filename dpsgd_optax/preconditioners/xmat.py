# SPDX-License-Identifier: Apache-2.0
"""X-shaped preconditioner: Q = diag(a) + adiag(b), the smallest group beyond the diagonal one.

Notation
  x~       x reversed: x~_i = x_{n−1−i}; (Qx)_i = a_i x_i + b_i x~_i
  v, h     probe vector and its image under the damped curvature
  t        Qh
  s        Q⁻ᵀv; without v, E s² and E s s~ over all v
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe, check, check_real
from dpsgd_optax.geometry.fit import check_init_scale, scale_before_fit, tracked_step
from dpsgd_optax.geometry.seen import count_idle, idle_counters, seen_lately
from dpsgd_optax.preconditioners._views import raveled


class XMatState(NamedTuple):
  """Attributes:
  a: (n,), the diagonal of Q.
  b: (n,), its anti-diagonal; 0 in the middle of an odd n.
  lipschitz: (), what the step is divided by; 0 before the first fit.
  idle: (n,), uint8, fits since each entry was seen; (): all take part in every fit.
  """

  a: jax.Array
  b: jax.Array
  lipschitz: jax.Array
  idle: Any = ()


def second_order(e_a: jax.Array, e_b: jax.Array, tt: jax.Array, ss: jax.Array) -> jax.Array:
  """ℓ = max (t² + s²), at least half of the norm of the 2 × 2 blocks of ttᵀ + ssᵀ."""
  del e_a, e_b
  return jnp.max(tt + ss)


def move_x(
  state: XMatState, v: jax.Array | None, h: jax.Array, *, step_size: Any, measure=second_order, memory: float = 0.9
) -> XMatState:
  """a ← a − μ (E_a a + E_b b~), b ← b − μ (E_a b + E_b a~), with E_a = t² − s², E_b = t t~ − s s~.

  Without v its mean over all v: s² is (a~² + b~²)/D² and s s~ is −(a~ b + a b~)/D², D = a a~ − b b~.
  """
  a, b, lip, idle = state
  back_a, back_b = a[::-1], b[::-1]
  t = a * h + b * h[::-1]
  over = 1 / (a * back_a - b * back_b)
  if v is None:
    over = over * over
    tt, ss, across = t * t, (back_a * back_a + back_b * back_b) * over, -(back_a * b + a * back_b) * over
  else:
    s = (back_a * v - back_b * v[::-1]) * over
    tt, ss, across = t * t, s * s, s * s[::-1]
  e_a, e_b = tt - ss, t * t[::-1] - across
  idle = count_idle(idle, h != 0)
  if seen := seen_lately(idle):
    tt, ss, e_a = (jnp.where(seen[0], x, 0) for x in (tt, ss, e_a))
    e_b = jnp.where(seen[0] & seen[0][::-1], e_b, 0)  # both entries of a pair must take part
  if len(a) % 2:  # the middle is on both diagonals: it belongs to a
    e_b = jnp.where(jnp.arange(len(a)) == len(a) // 2, 0, e_b)
  mu, lip = tracked_step(step_size, lip, measure(e_a, e_b, tt, ss), memory)
  return XMatState(a - mu * (e_a * a + e_b * back_b), b - mu * (e_a * b + e_b * back_a), lip, idle)


def product(state: XMatState, x: jax.Array) -> jax.Array:
  """P x = (a² + (b²)~) x + (ab + (ab)~) x~."""
  a, b = state.a, state.b
  ab = a * b
  return (a * a + (b * b)[::-1]) * x + (ab + ab[::-1]) * x[::-1]


def root(state: XMatState, x: jax.Array, inverse: bool) -> jax.Array:
  """Qᵀx = a x + (b x)~, or its inverse, (a~ x − b~ x~) / (a a~ − b b~)."""
  a, b = state.a, state.b
  if not inverse:
    return a * x + (b * x)[::-1]
  return (a[::-1] * x - b[::-1] * x[::-1]) / (a * a[::-1] - b * b[::-1])


def xmat(*, step_size: float = 0.1, init_scale: float | None = None) -> Preconditioner:
  """P = QᵀQ with Q an X-shaped matrix over all parameters as one vector. Memory: 2.25 copies of the parameters.

  Each parameter is coupled with its mirror image in the raveled vector: P is 2 × 2 block diagonal over the pairs
  (i, n − 1 − i), and on each pair the fit ends in |H|⁻¹ (Newton) or (E ggᵀ)^(−½) (whitening) if H is X-shaped too.

  Args:
    step_size: of the fit, in (0, 0.5]: the normaliser may be half of the norm it stands for.
    init_scale: see :func:`dpsgd_optax.kron`.

  Raises:
    ValueError: for a step size outside (0, 0.5], a scale that is not positive, or complex parameters.

  Departures from psgd_torch: the normaliser remembers (0.9 of its last value at least), as in version 2.0 of the
  others; when whitening, v is integrated out in place of drawn.

  Source: arXiv:2402.04553 (XMat); the update: psgd_torch.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.xmat(init_scale=2.0)
    >>> p.apply(p.init(jnp.zeros(3)), jnp.array([1.0, 2.0, 3.0]))
    Array([ 4.,  8., 12.], dtype=float32)
  """
  bound = "Its normaliser may be half of the norm it stands for; a larger step could make P singular. Try 0.1."
  check(lambda x: 0 < x <= 0.5, step_size, "step_size", "in (0, 0.5]", bound)
  check_init_scale(init_scale)

  def init(x: jax.Array) -> XMatState:
    check_real(x.dtype, "xmat")
    scale = 1.0 if init_scale is None else init_scale
    zero = lambda shape: jnp.zeros(shape, x.dtype)
    return XMatState(jnp.full(x.shape, scale, x.dtype), zero(x.shape), zero(()), idle_counters(x.shape))

  def fit(state: XMatState, probe: Probe, *, key: jax.Array) -> XMatState:
    v, h = probe
    scale = scale_before_fit(init_scale, state.lipschitz, v, h)
    if scale is not None:
      state = state._replace(a=state.a * scale, b=state.b * scale)
    return move_x(state, v, h, step_size=step_size)

  return raveled(Preconditioner(init, fit, product, root=root))
