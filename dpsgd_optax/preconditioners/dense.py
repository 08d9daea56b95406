# SPDX-License-Identifier: Apache-2.0
"""One matrix for all parameters: Q is n × n, P = QᵀQ.

Notation
  n        number of parameters, raveled to one vector
  v, h     probe vector and its image under the damped curvature;  a, b: both seen through Q (see `geometry.moves`)
  E, μ     a aᵀ − b bᵀ, never formed: products with it cost O(n²); the step, step_size / L
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe, check_step_size
from dpsgd_optax.geometry.fit import check_init_scale, directions, scale_before_fit
from dpsgd_optax.geometry.linalg import kron_power
from dpsgd_optax.geometry.moves import Geometry, pro, trace
from dpsgd_optax.geometry.seen import count_idle, idle_counters, seen_lately
from dpsgd_optax.preconditioners._damped import sampled
from dpsgd_optax.preconditioners._views import raveled


class DenseState(NamedTuple):
  """Attributes:
  q: (n, n), Q, or P itself with a geometry that fits P.
  inverse: (n, n), Q⁻¹, with the geometry ``gl``; otherwise ().
  lipschitz: (1,), what the step is divided by; 0 before the first fit.
  idle: (n,), uint8, fits since each entry was seen; (): all take part in every fit.
  """

  q: jax.Array
  inverse: Any
  lipschitz: jax.Array
  idle: Any = ()


def move_dense(
  state: DenseState, v: jax.Array, h: jax.Array, *, geometry: Geometry, normalizer=trace, **options: Any
) -> DenseState:
  """Q ← move(Q, E, μ), E of rank two; ``options`` are those of `directions`."""
  kept = (state.inverse,) if geometry.keeps_inverse else (state.q,) if geometry.fits_p else None
  idle = count_idle(state.idle, h != 0)
  options |= {"geometry": geometry, "normalizer": normalizer, "seen": seen_lately(idle)}
  (e,), mu, lip = directions((state.q,), kept, state.lipschitz, v, h, **options)
  inverse = (e * mu[0]).divide_by_one_minus(state.inverse) if geometry.keeps_inverse else ()
  return DenseState(geometry.move(state.q, e, mu[0]), inverse, lip, idle)


def dense(
  *,
  geometry: Geometry = pro,
  step_size: float = 0.1,
  init_scale: float | None = None,
) -> Preconditioner:
  """P = QᵀQ, one matrix for all parameters: for up to some thousands of them. Memory n².

  Fitted on Newton probes, P → |H + λ|⁻¹, whatever H is; on gradients, P → (E ggᵀ + λ²)^(−½), v being drawn.
  At constant step size this converges linearly for a definite H without noise (there Ph = v for every sample); for an
  indefinite H and for whitening let the step size go to 0.

  Args:
    geometry: how Q moves. ``pro`` copes best with ill-conditioned H and costs two products of n × n matrices,
      ``pro4p`` up to thirty; ``qeq``, ``quad``, ``qep``, ``quad4p``, ``gl``, ``eq`` (a triangular solve) cost O(n²).
      Where H itself can be had, solving with it is better: a Cholesky solve is n³/3 multiplications, a fit by ``pro``
      2 n³. For least squares see :func:`dpsgd_optax.gauss_newton`.
    step_size, init_scale: see :func:`dpsgd_optax.kron`.

  Raises:
    ValueError: for a step size outside (0, 1] or a scale that is not positive.

  Departures from psgd_torch 2.0: ``eq`` costs O(n²), there O(n³), by triu(aaᵀ)Q = a ⊙ (sums from below of a ⊙ Q);
  whitening is offered too.

  Source: arXiv:1512.04202 (the criterion, ``eq``); arXiv:2402.11858 (``gl``); psgd_torch 2.0.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> h, p, key = jnp.array([[2.0, 1.0], [1.0, 3.0]]), dpo.dense(step_size=0.5), jax.random.key(0)
    >>> fit = lambda state, v: (p.fit(state, dpo.Probe(v, h @ v), key=key, damping=0.0), None)
    >>> state, _ = jax.lax.scan(fit, p.init(jnp.ones(2)), jax.random.normal(key, (100, 2)))
    >>> p.apply(state, h @ jnp.ones(2)).round(2)
    Array([1., 1.], dtype=float32)
  """
  check_step_size(step_size)
  check_init_scale(init_scale)

  def scaled(state: DenseState, scale: Any) -> DenseState:
    """The state of scale · Q."""
    q = state.q * scale ** (2 if geometry.fits_p else 1)
    return state._replace(q=q, inverse=jax.tree.map(lambda x: x / scale, state.inverse))

  def init(x: jax.Array) -> DenseState:
    eye, lipschitz = jnp.eye(x.size, dtype=x.dtype), jnp.zeros(1, jnp.finfo(x.dtype).dtype)
    state = DenseState(eye, eye if geometry.keeps_inverse else (), lipschitz, idle_counters(x.size))
    return scaled(state, 1.0 if init_scale is None else init_scale)

  def fit(state: DenseState, probe: Probe, *, key: jax.Array) -> DenseState:
    v, h = sampled(probe, key)
    scale = scale_before_fit(init_scale, state.lipschitz[0], v, h)
    state = state if scale is None else scaled(state, scale.astype(state.q.dtype))
    return move_dense(state, v, h, geometry=geometry, step_size=step_size, low_rank=True)

  def apply(state: DenseState, x: jax.Array) -> jax.Array:
    product = jnp.matmul(state.q, x)
    return product if geometry.fits_p else jnp.matmul(jnp.conj(state.q.T), product)

  def power(state: DenseState, x: jax.Array, exponent: Any) -> jax.Array:
    return kron_power((geometry.factor_of_p(state.q),), x, exponent)

  return raveled(Preconditioner(init, fit, apply, power=power, meaning=f"geometry={geometry.name}"))
