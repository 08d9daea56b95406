# SPDX-License-Identifier: Apache-2.0
"""One matrix for all parameters: Q is n × n, P = QᵀQ.

Notation
  n        number of parameters, raveled to one vector
  a, b     the probe seen through Q (see `_geometry`)
  E        a aᵀ − b bᵀ, never formed: products with it cost O(n²)

Sources: Li, arXiv:1512.04202 (the criterion and EQ), arXiv:2402.11858 (the general linear group), psgd_torch 2.0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe, check, check_step_size
from dpsgd_optax.geometry.fit import first_gain, steps
from dpsgd_optax.geometry.linalg import kron_power, square
from dpsgd_optax.geometry.moves import Geometry, pro, trace
from dpsgd_optax.geometry.seen import in_use, unseen, waited
from dpsgd_optax.preconditioners._damped import sampled
from dpsgd_optax.preconditioners._lift import raveled


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


def refit(
  state: DenseState, v: jax.Array, h: jax.Array, *, geometry: Geometry, step_size: Any, normalizer=trace, **options: Any
) -> DenseState:
  """Q ← move(Q, E, μ), E of rank two."""
  kept = (state.inverse,) if geometry.keeps_inverse else (state.q,) if geometry.fits_p else None
  idle = jax.tree.map(lambda x: waited(x, h != 0), state.idle)
  options |= {"geometry": geometry, "normalizer": normalizer, "step_size": step_size}
  seen = [in_use(x) for x in jax.tree.leaves(idle)] or None
  (e,), mu, lip = steps((state.q,), kept, state.lipschitz, v, h, seen=seen, **options)
  inverse = (e * mu[0]).divide_by_one_minus(state.inverse) if geometry.keeps_inverse else ()
  return DenseState(geometry.move(state.q, e, mu[0]), inverse, lip, idle)


def dense(
  *,
  geometry: Geometry = pro,
  step_size: float = 0.1,
  init_scale: float | None = None,
  precision: Any = None,
) -> Preconditioner:
  """P = QᵀQ, one matrix for all parameters: for up to some thousands of them. Memory n².

  Fitted on Newton probes, P → |H + λ|⁻¹, whatever H is; on gradients, P → (E ggᵀ + λ²)^(−½), v being sampled.
  At constant step size this converges linearly for a definite H without noise (there Ph = v for every sample); for an
  indefinite H and for whitening let the step size go to 0.

  Args:
    geometry: how Q moves. ``pro`` copes best with ill-conditioned H and costs two products of n × n matrices,
      ``pro4p`` up to thirty; ``qeq``, ``quad``, ``qep``, ``quad4p``, ``gl`` ``eq`` (a triangular solve) cost O(n²).
    step_size: of the fit, in (0, 1].
    init_scale: the initial Q = init_scale · I; None: from the first probe that is not zero.
    precision: of the matrix products, as ``jax.lax.Precision``.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` of the whole tree as one vector.

  Raises:
    ValueError: for a step size outside (0, 1] or a scale that is not positive.

  Departures from psgd_torch 2.0: ``eq`` costs O(n²) there O(n³), by triu(aaᵀ)Q = a ⊙ (sums from below of a ⊙ Q);
  whitening is offered too.

  Source: arXiv:1512.04202; arXiv:2402.11858.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> h = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> p, loss, params = dpo.dense(step_size=0.5), lambda x: x @ h @ x / 2, jnp.ones(2)
    >>> @jax.jit
    ... def fit(state, key):
    ...   probe = dpo.newton()(key, params, params, hvp=dpo.hvp(loss, params))
    ...   return p.fit(state, probe, key=key, damping=0.0)
    >>> state = p.init(params)
    >>> for key in jax.random.split(jax.random.key(0), 100):
    ...   state = fit(state, key)
    >>> p.apply(state, h @ params).round(2)
    Array([1., 1.], dtype=float32)
  """
  check_step_size(step_size)
  check(lambda x: x > 0, init_scale, "init_scale", "positive or None", "None sets it from the first probe.")
  power = 2 if geometry.fits_p else 1

  def init(x: jax.Array) -> DenseState:
    scale = 1.0 if init_scale is None else init_scale
    eye = jnp.eye(x.size, dtype=x.dtype)
    inverse = eye / scale if geometry.keeps_inverse else ()
    return DenseState(eye * scale**power, inverse, jnp.zeros(1, jnp.finfo(x.dtype).dtype), unseen(x.size))

  def fit(state: DenseState, probe: Probe, *, key: jax.Array) -> DenseState:
    v, h = sampled(probe, key)
    if init_scale is None:
      gain = first_gain(state.lipschitz[0], v, h).astype(state.q.dtype)
      inverse = jax.tree.map(lambda x: x / gain, state.inverse)
      state = state._replace(q=state.q * gain**power, inverse=inverse)
    return refit(state, v, h, geometry=geometry, step_size=step_size, precision=precision, low_rank=True)

  def apply(state: DenseState, x: jax.Array) -> jax.Array:
    product = jnp.matmul(state.q, x, precision=precision)
    if geometry.fits_p:
      return product
    return jnp.matmul(jnp.conj(state.q.T), product, precision=precision)

  def to_the_power(state: DenseState, x: jax.Array, exponent: Any) -> jax.Array:
    p = state.q if geometry.fits_p else square(state.q, precision)
    return kron_power((p,), x, exponent, precision=precision)

  return raveled(Preconditioner(init, fit, apply, power=to_the_power, meaning=f"geometry={geometry.name}"))
