# SPDX-License-Identifier: Apache-2.0
"""What `soap` keeps of one array and how it moves: moments, their eigenbases, and the second moment in them.

Notation: that of `soap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax._trees.branches import if_any
from dpsgd_optax.base import Preconditioner, Probe
from dpsgd_optax.geometry.eigenbasis import Moments, Refresh, eigenvectors
from dpsgd_optax.geometry.linalg import along, gram, multiply
from dpsgd_optax.preconditioners._damped import damp
from dpsgd_optax.preconditioners._factors import Layout


class SoapState(NamedTuple):
  """Attributes:
  count: (), int32, fits that saw something.
  moments: L and R, (d, d) each, or () for a side without a basis; in gradient².
  bases: Q_L and Q_R, (d, d) each, or (); orthonormal columns.
  square: V, (m, n) or (n,), in gradient²; ``factored``: its means over columns and over rows, (m,) and (n,).
  """

  count: jax.Array
  moments: tuple[Any, ...]
  bases: tuple[Any, ...]
  square: Any


def no_basis(d: int, dtype: Any) -> tuple:
  """A side that stays as it is."""
  del d, dtype
  return ()


def is_array(x: Any) -> bool:
  return not isinstance(x, tuple)


def rotated(x: jax.Array, bases: tuple[Any, ...], back: bool = False) -> jax.Array:
  """G' = Q_Lᴴ G Q_R; ``back``: the inverse."""
  for axis, q in enumerate(bases):
    if is_array(q):
      x = multiply(x, q if back else jnp.conj(q.T), axis)
  return x


def full_square(square: Any) -> jax.Array:
  """V; factored, V_ij = r_i c_j / mean(r)."""
  if is_array(square):
    return square
  rows, columns = square
  return rows[:, None] * (columns / (jnp.mean(rows) + tiny(rows)))


def _sorted(square: Any, order: jax.Array, axis: int) -> Any:
  """V with the directions of an axis in this order."""
  if is_array(square):
    return jnp.take(square, order, axis)
  return tuple(part[order] if i == axis else part for i, part in enumerate(square))


def _diagonals(moments: tuple[Any, ...]) -> jax.Array:
  """The diagonals of the moments, side by side. Of a sum of squares they tell what is zero and what is not finite."""
  return jnp.concatenate([jnp.real(jnp.diagonal(s)) for s in moments if is_array(s)] or [jnp.zeros(0)])


def refreshed(state: SoapState, due: jax.Array, refresh: Refresh) -> SoapState:
  """The state after a refresh of its bases, where that is ``due`` and the moments are known and finite.

  V stays with its directions: it is sorted as they are.
  """

  def turn(old, moments):
    bases, square = list(old[0]), old[1]
    for axis, s in enumerate(moments):
      if is_array(s):
        bases[axis], order = refresh(s.astype(bases[axis].dtype), bases[axis])
        square = _sorted(square, order, axis)
    return tuple(bases), square

  diagonals = _diagonals(state.moments)
  if not len(diagonals):
    return state
  sound = jnp.all(jnp.isfinite(diagonals)) & jnp.any(diagonals > 0)
  bases, square = if_any(due & sound, turn, (state.bases, state.square), state.moments)
  return state._replace(bases=bases, square=square)


def begun(old: SoapState, new: SoapState) -> SoapState:
  """The state with the eigenvectors of its moments, where the old ones were zero and these are not, and finite."""
  diagonals = _diagonals(new.moments)
  if not len(diagonals):
    return new
  first = jnp.all(_diagonals(old.moments) == 0) & jnp.all(jnp.isfinite(diagonals)) & jnp.any(diagonals > 0)

  def begin(bases, moments):
    return tuple(eigenvectors(s.astype(q.dtype)) if is_array(q) else q for q, s in zip(bases, moments, strict=True))

  return new._replace(bases=if_any(first, begin, new.bases, new.moments))


def moved_moments(state: SoapState, x: jax.Array, weights: Any, keep: jax.Array, gain: jax.Array) -> tuple[Any, ...]:
  """S_i ← β S_i + (1 − β) ⟨x x*⟩_i, the squares weighed along the other axes, in their bases."""
  new = list(state.moments)
  for axis, s in enumerate(state.moments):
    if not is_array(s):
      continue
    seen = x
    if weights is not None:
      seen = rotated(x, tuple(() if i == axis else q for i, q in enumerate(state.bases)))
      for other, w in enumerate(weights):
        seen = seen if other == axis else seen * jnp.sqrt(along(w, other, x.ndim)).astype(x.real.dtype)
    new[axis] = (keep * s + gain * gram(seen, axis, s)).astype(s.dtype)
  return tuple(new)


def moved_square(square: Any, observed: jax.Array, keep: jax.Array, gain: jax.Array) -> Any:
  """V ← β V + (1 − β) |G'|²."""
  move = lambda old, new: (gain * new + keep * old).astype(old.dtype)
  if is_array(square):
    return move(square, observed)
  return move(square[0], jnp.mean(observed, 1)), move(square[1], jnp.mean(observed, 0))


def soap_of_array(
  layout: Callable[[tuple[int, ...]], Layout],
  *,
  b2: Any,
  basis_every: int,
  eps: Any,
  moments: Moments,
  refresh: Refresh,
  factored: bool,
  moment_dtype: Any,
) -> Preconditioner:
  """SOAP's P of one array, seen in the ``layout`` of its shape; its ``fit`` takes ``damping``. See `soap`."""

  def init(x: jax.Array) -> SoapState:
    view, real = layout(x.shape), jnp.finfo(x.dtype).dtype
    kept = lambda dtype: dtype if moment_dtype is None or jnp.issubdtype(dtype, jnp.complexfloating) else moment_dtype
    bases = tuple(kind(d, x.dtype) for d, kind in zip(view.shape, view.factors, strict=True))
    zeros = tuple(jnp.zeros(q.shape, kept(x.dtype)) if is_array(q) else q for q in bases)
    shapes = [(d,) for d in view.shape] if factored and min(view.shape) > 1 < len(view.shape) else [view.shape]
    square = tuple(jnp.zeros(shape, kept(real)) for shape in shapes)
    return SoapState(jnp.zeros((), jnp.int32), zeros, bases, square if len(square) > 1 else square[0])

  def fit(state: SoapState, probe: Probe, *, key: jax.Array, damping) -> SoapState:
    del key
    seen, shift = jnp.any(probe.product != 0), 0.0
    if probe.vector is None:
      seen, shift = seen | (state.count > 0), 0.0 if damping is None else damping**2
    else:
      probe = damp(probe, None, damping)
    x = layout(probe.product.shape).to_tensor(probe.product)
    keep, gain = jnp.where(seen, b2, 1.0).astype(x.real.dtype), jnp.where(seen, 1 - b2, 0.0).astype(x.real.dtype)
    turned = refreshed(state, seen & (state.count > 0) & (state.count % basis_every == 0), refresh)
    weights = None if moments.weights is None else moments.weights(full_square(turned.square).astype(x.real.dtype))
    new = begun(state, turned._replace(moments=moved_moments(turned, x, weights, keep, gain)))
    observed = jnp.abs(rotated(x, new.bases)) ** 2 + shift
    square = moved_square(new.square, observed, keep, gain)
    return new._replace(count=state.count + seen.astype(jnp.int32), square=square)

  def root_of_square(state: SoapState, dtype: Any) -> jax.Array:
    """√V̂ + ε; 1 before the first fit."""
    v, known = full_square(state.square).astype(dtype), state.count > 0
    d = jnp.sqrt(v / jnp.where(known, 1 - jax.lax.pow(jnp.asarray(b2, dtype), state.count.astype(dtype)), 1)) + eps
    return jnp.where(known, d, 1)

  def seen_in(function):
    """``function(state, x, √V̂ + ε, …)`` of the matrix as a function of the parameter."""

    def of_parameter(state: SoapState, x: jax.Array, *more: Any) -> jax.Array:
      view = layout(x.shape)
      done = function(state, view.to_tensor(x), root_of_square(state, x.real.dtype), *more)
      return view.to_parameter(done, x.shape)

    return of_parameter

  def apply(state, x, d):
    return rotated(rotated(x, state.bases) / d, state.bases, back=True)

  def power(state, x, d, exponent):
    return rotated(rotated(x, state.bases) * d ** (-exponent), state.bases, back=True)

  def root(state, x, d, inverse):
    """R = Q diag(d)^(−½): R Rᴴ = P. Half the products of P^½."""
    return rotated(x, state.bases) * jnp.sqrt(d) if inverse else rotated(x / jnp.sqrt(d), state.bases, back=True)

  group = Preconditioner(init, fit, seen_in(apply), power=seen_in(power), root=seen_in(root))
  return group._replace(meaning=f"moments={moments.name}")
