# SPDX-License-Identifier: Apache-2.0
"""The factors of one matrix: state, layout, fit, and the product with P."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe
from dpsgd_optax.geometry.fit import first_gain, fit_factors
from dpsgd_optax.geometry.linalg import balancing, kron_power, multiply
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer
from dpsgd_optax.geometry.seen import in_use, slices_waited, unseen
from dpsgd_optax.preconditioners._damped import sampled

ALWAYS_DENSE = 64  # numbers: an axis of 8 or less has a dense factor for nothing, that of a vector too


class KronState(NamedTuple):
  """Attributes:
  q: the factors, (d_i, d_i) or (d_i,); parameter^(1/k) units of Q; the diagonal is positive.
    () where P is fitted itself.
  p: q_iᴴ q_i, kept so that ``apply`` costs one product per dense factor.
  lipschitz: (k,), 0 before the first fit.
  idle: (d_i,) of each axis, uint8, fits since each slice was seen; (): all slices take part in every fit.
  """

  q: Factors
  p: Factors
  lipschitz: jax.Array
  idle: Factors = ()


def with_factors(q: Factors, lipschitz: jax.Array, geometry: Geometry, precision=None, idle: Factors = ()) -> KronState:
  """The state for factors that a geometry has moved."""
  return KronState(() if geometry.fits_p else q, tuple(geometry.factor_of_p(x, precision) for x in q), lipschitz, idle)


def dense_factor(d: int, dtype: Any) -> jax.Array:
  return jnp.eye(d, dtype=dtype)


def diagonal_factor(d: int, dtype: Any) -> jax.Array:
  return jnp.ones((d,), jnp.finfo(dtype).dtype)


class Layout(NamedTuple):
  """How a parameter is looked at. Static, made anew from its shape at every trace.

  Attributes:
    shape: of the tensor that has one factor per axis.
    factors: (d, dtype) -> the identity of each factor.
    order: the axes of the parameter in the order in which they are merged into that tensor; None: as they are.
  """

  shape: tuple[int, ...]
  factors: tuple[Callable[[int, Any], Any], ...]
  order: tuple[int, ...] | None = None

  def look(self, x: jax.Array) -> jax.Array:
    return (x if self.order is None else jnp.transpose(x, self.order)).reshape(self.shape)

  def back(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if self.order is None:
      return y.reshape(shape)
    inverse = sorted(range(len(shape)), key=lambda i: self.order[i])
    return jnp.transpose(y.reshape([shape[i] for i in self.order]), inverse)


def initial(layout: Layout, dtype: Any, scale: float, geometry: Geometry) -> KronState:
  """Q = scale · I, P = scale² · I."""
  each = scale ** ((2 if geometry.fits_p else 1) / len(layout.shape))
  q = tuple(factor(d, dtype) * each for d, factor in zip(layout.shape, layout.factors, strict=True))
  idle = tuple(map(unseen, layout.shape))
  return with_factors(q, jnp.zeros(len(layout.shape), jnp.finfo(dtype).dtype), geometry, idle=idle)


def refit(
  state: KronState,
  v: jax.Array | None,
  h: jax.Array,
  *,
  geometry: Geometry,
  normalizer: Normalizer,
  step_size,
  gain: jax.Array | None = None,
  precision=None,
) -> KronState:
  """Balance, move, and square. Balancing leaves the product P, and so what the fit sees, as it is.

  It comes first because DPSGD averages the factors one by one, and the split between them is then part of the rule.

  Args:
    state: before the fit.
    v: probe vector, or None.
    h: its product, damped.
    geometry: how the factors move.
    normalizer: what the step is divided by.
    step_size: in (0, 1].
    gain: that Q is multiplied by before the fit; None: 1.
    precision: of the matrix products.
  """
  of_p = None if gain is None else gain**2
  q, idle = state.q or state.p, slices_waited(state.idle, h)
  q, lip = fit_factors(
    q,
    state.p if gain is None else times_smallest(state.p, of_p),
    state.lipschitz,
    v,
    h,
    geometry=geometry,
    normalizer=normalizer,
    step_size=step_size,
    multiples=balancing(q, normalizer.size, of_p if geometry.fits_p else gain),
    precision=precision,
    seen=list(map(in_use, idle)) or None,
  )
  return with_factors(q, lip, geometry, precision, idle)


def sandwich(p: Factors, x: jax.Array, precision=None) -> jax.Array:
  """P x = x ×_1 p_1 … ×_k p_k."""
  for i, factor in enumerate(p):
    x = multiply(x, factor, i, precision)
  return x


def check_geometry(geometry: Geometry) -> None:
  if geometry.keeps_inverse:
    raise ValueError(
      "the geometry `gl` keeps the inverse of a single matrix, got it for factors. Type `dense(geometry=gl)`."
    )


def times_smallest(factors: Factors, gain: jax.Array) -> Factors:
  """gain · ⊗ factors, by way of the one of the fewest numbers."""
  sizes = [sum(x.size for x in jax.tree.leaves(q)) for q in factors]
  least = sizes.index(min(sizes))
  return tuple(q * gain.astype(q.dtype) if i == least else q for i, q in enumerate(factors))


def dense_if(wanted: bool) -> Callable[[int, Any], jax.Array]:
  return dense_factor if wanted else diagonal_factor


def group(
  layout: Callable[[tuple[int, ...]], Layout],
  *,
  geometry: Geometry,
  init_scale: float | None,
  **options: Any,
) -> Preconditioner:
  """The Kronecker preconditioner of one array under a layout; ``options`` as for :func:`refit`."""

  def init(x: jax.Array) -> KronState:
    return initial(layout(x.shape), x.dtype, 1.0 if init_scale is None else init_scale, geometry)

  def fit(state: KronState, probe: Probe, *, key: jax.Array) -> KronState:
    """q_i ← move(q_i, ⟨a a*⟩_i − ⟨b b*⟩_i, step_size / L_i)."""
    if geometry.samples:
      probe = sampled(probe, key)
    seen = layout(probe.product.shape)
    h = seen.look(probe.product)
    v = None if probe.vector is None else seen.look(probe.vector)
    gain = first_gain(state.lipschitz[0], v, h) if init_scale is None else None
    return refit(state, v, h, geometry=geometry, gain=gain, **options)

  def apply(state: KronState, x: jax.Array) -> jax.Array:
    seen = layout(x.shape)
    return seen.back(sandwich(state.p, seen.look(x), options.get("precision")), x.shape)

  def power(state: KronState, x: jax.Array, exponent: Any) -> jax.Array:
    seen = layout(x.shape)
    return seen.back(kron_power(state.p, seen.look(x), exponent, precision=options.get("precision")), x.shape)

  return Preconditioner(init, fit, apply, power=power, meaning=f"geometry={geometry.name}")
