# SPDX-License-Identifier: Apache-2.0
"""The Kronecker factors of one array: state, layout, fit, and the product with P. Symbols: see `geometry.moves`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Classes
from dpsgd_optax.base import Preconditioner, Probe, check, check_step_size
from dpsgd_optax.geometry.fit import check_init_scale, fit_factors, scale_before_fit
from dpsgd_optax.geometry.linalg import (
  balancing,
  kron_power,
  multiply,
  sandwich,
  scale_smallest,
  square,
)
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer, pro, qeq
from dpsgd_optax.geometry.seen import count_idle_slices, idle_counters, seen_lately
from dpsgd_optax.preconditioners._damped import sampled


class KronState(NamedTuple):
  """Attributes:
  q: the factors, (d_i, d_i) or (d_i,); parameter^(1/k) units of Q; the diagonal is positive.
    () where P is fitted itself.
  p: q_iᴴ q_i where they are kept, so that ``apply`` costs one product per dense factor in place of two; else ().
  lipschitz: (k,), 0 before the first fit.
  idle: (d_i,) of each axis, uint8, fits since each slice was seen; (): all slices take part in every fit.

  Where a matrix is padded q and p are zero.
  """

  q: Factors
  p: Factors
  lipschitz: jax.Array
  idle: Factors = ()


def with_factors(q: Factors, geometry: Geometry, lipschitz: jax.Array, idle: Factors, keep_p: bool) -> KronState:
  """The state for factors that a geometry has moved."""
  if geometry.fits_p:
    return KronState((), q, lipschitz, idle)
  keep_p = keep_p or not all(isinstance(x, jax.Array) for x in q)  # an arrow-head is small
  return KronState(q, tuple(map(square, q)) if keep_p else (), lipschitz, idle)


def factors_of_p(state: KronState) -> Factors:
  """p_i, made of q_i where they are not kept."""
  return state.p or tuple(map(square, state.q))


def product(state: KronState, x: jax.Array) -> jax.Array:
  """P x, x with one axis per factor; where P is not kept Qᴴ (Q x)."""
  if state.p:
    return sandwich(state.p, x)
  for i, q in enumerate(state.q):
    x = multiply(multiply(x, q, i), jnp.conj(q.T), i) if q.ndim > 1 else multiply(x, square(q), i)
  return x


def dense_factor(d: int, dtype: Any) -> jax.Array:
  """The identity, (d, d)."""
  return jnp.eye(d, dtype=dtype)


def diagonal_factor(d: int, dtype: Any) -> jax.Array:
  """The diagonal of the identity, (d,)."""
  return jnp.ones((d,), jnp.finfo(dtype).dtype)


def factor_kind(dense: bool) -> Callable[[int, Any], jax.Array]:
  """What makes the identity of a dense factor, or of a diagonal one."""
  return dense_factor if dense else diagonal_factor


class Layout(NamedTuple):
  """As which tensor a parameter is seen. Static, made anew from its shape at every trace.

  Attributes:
    shape: of the tensor that has one factor per axis.
    factors: (d, dtype) -> the identity of each factor.
    order: the axes of the parameter in the order in which they are merged into that tensor; None: as they are.
  """

  shape: tuple[int, ...]
  factors: tuple[Callable[[int, Any], Any], ...]
  order: tuple[int, ...] | None = None

  def to_tensor(self, x: jax.Array) -> jax.Array:
    """A parameter as the tensor."""
    return (x if self.order is None else jnp.transpose(x, self.order)).reshape(self.shape)

  def to_parameter(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, ``shape`` being that of the parameter."""
    if self.order is None:
      return y.reshape(shape)
    inverse = sorted(range(len(shape)), key=lambda i: self.order[i])
    return jnp.transpose(y.reshape([shape[i] for i in self.order]), inverse)


def check_options(geometry: Geometry, step_size: Any) -> None:
  """Raises for a geometry of a single matrix, and for a step size outside (0, 1]."""
  check_step_size(step_size)
  if geometry.keeps_inverse:
    raise ValueError(
      "the geometry `gl` keeps the inverse of a single matrix, got it for factors. Type `dense(geometry=gl)`."
    )


def check_max_padding(value: Any) -> None:
  """Raises for a bound of the padding below 1."""
  hint = "It is the largest ratio of the work with padding to that without; 1 puts equal shapes together only."
  check(lambda x: x >= 1, value, "max_padding", "at least 1", hint)


def size_classes(
  layout: Callable[[tuple[int, ...]], Layout], geometry: Geometry | None, bound: float
) -> Classes | None:
  """Matrices whose factors are of the same kinds may share a class; none may where a move solves equations with q."""
  if geometry is not None and not geometry.inverse_free:
    return None

  def kind(shape: tuple[int, ...]) -> Any:
    return layout(shape).factors, layout(shape).order, tuple(d == 1 for d in shape)

  def multiplications(shape: tuple[int, ...]) -> float:
    view, numbers = layout(shape), math.prod(shape)
    dense = [d for d, factor in zip(view.shape, view.factors, strict=True) if factor is dense_factor]
    return numbers * (1 + sum(dense)) + sum(d**3 for d in dense)

  return Classes(kind, multiplications, bound)


def initial(layout: Layout, ones: jax.Array, scale: float, geometry: Geometry, keep_p: bool) -> KronState:
  """Q = scale · I, P = scale² · I, and zero where ``ones``, in the shape of the parameter, is: there it is padded."""
  x = layout.to_tensor((ones != 0).astype(jnp.finfo(ones.dtype).dtype))
  each = scale ** ((2 if geometry.fits_p else 1) / x.ndim)
  real = [jnp.max(x, axis=[j for j in range(x.ndim) if j != i]) for i in range(x.ndim)]

  def identity(d: int, factor: Callable, own: jax.Array) -> Any:
    whole = factor(d, ones.dtype)
    return jax.tree.map(lambda q: q * (each * own).astype(q.dtype).reshape((1,) * (q.ndim - 1) + (-1,)), whole)

  q = tuple(identity(d, f, own) for d, f, own in zip(layout.shape, layout.factors, real, strict=True))
  return with_factors(q, geometry, jnp.zeros(x.ndim, x.dtype), tuple(map(idle_counters, layout.shape)), keep_p)


def move_factors(
  state: KronState, v: jax.Array | None, h: jax.Array, *, scale: jax.Array | None = None, **options: Any
) -> KronState:
  """Balance, move, and square. Balancing leaves the product P, and so what the fit sees, as it is.

  It comes first because DPSGD averages the factors one by one, and the split between them is then part of the rule.
  ``scale`` is what Q is multiplied by before the fit; None: 1. ``options`` are geometry, normalizer and step_size.
  """
  geometry, normalizer = options["geometry"], options["normalizer"]
  of_p = None if scale is None else scale**2
  q, idle, p = state.q or state.p, count_idle_slices(state.idle, h), None
  if state.p:
    p = state.p if of_p is None else scale_smallest(state.p, of_p)
  multiples = balancing(q, normalizer.size, of_p if geometry.fits_p else scale)
  q, lip = fit_factors(q, p, state.lipschitz, v, h, multiples=multiples, seen=seen_lately(idle), **options)
  return with_factors(q, geometry, lip, idle, bool(state.p))


def kron_of_array(
  layout: Callable[[tuple[int, ...]], Layout],
  *,
  geometry: Geometry | None,
  normalizer: Normalizer,
  step_size: Any,
  init_scale: float | None,
  keep_p: bool = False,
) -> Preconditioner:
  """The Kronecker preconditioner of one array, seen in the ``layout`` of its shape; see `kron` for the rest."""
  of_state = geometry or pro  # the states of `qeq` and `pro` are alike
  check_options(of_state, step_size)
  check_init_scale(init_scale)

  def init(x: jax.Array) -> KronState:
    return initial(layout(x.shape), x, 1.0 if init_scale is None else init_scale, of_state, keep_p)

  def fit(state: KronState, probe: Probe, *, key: jax.Array, numbers: Any = None) -> KronState:
    """q_i ← move(q_i, ⟨a a*⟩_i − ⟨b b*⟩_i, step_size / L_i)."""
    moves = geometry or (qeq if probe.vector is None else pro)
    if moves.samples:
      probe = sampled(probe, key)
    to_tensor = layout(probe.product.shape).to_tensor
    h = to_tensor(probe.product)
    v = None if probe.vector is None else to_tensor(probe.vector)
    scale = scale_before_fit(init_scale, state.lipschitz[0], v, h, numbers)
    return move_factors(state, v, h, scale=scale, geometry=moves, normalizer=normalizer, step_size=step_size)

  def apply(state: KronState, x: jax.Array) -> jax.Array:
    view = layout(x.shape)
    return view.to_parameter(product(state, view.to_tensor(x)), x.shape)

  def power(state: KronState, x: jax.Array, exponent: Any) -> jax.Array:
    view = layout(x.shape)
    return view.to_parameter(kron_power(factors_of_p(state), view.to_tensor(x), exponent), x.shape)

  return Preconditioner(
    init, fit, apply, power=power, meaning=f"geometry={geometry.name if geometry else 'quad or pro'}"
  )
