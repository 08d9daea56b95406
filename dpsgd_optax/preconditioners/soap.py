# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the eigenbasis of Shampoo's moments, fitted on gradients or on Hessian-vector products.

Notation, for a matrix
  G, v     (m, n), what is observed: the gradient (whitening), or G = H v with its probe v (Newton)
  L, R     running means of GGᴴ and GᴴG;  Q_L, Q_R: their eigenvectors, of `basis_every` fits ago at most
  G'       Q_Lᴴ G Q_R, the observation in these bases
  V, V̂     the running mean of |G'|², entry by entry, and the same without the bias of its start at zero
  β        the weight kept of the old means
"""

import itertools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax._trees.branches import if_any
from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check, check_fraction, check_not_negative, check_period, is_static
from dpsgd_optax.geometry.eigenbasis import Moments, Refresh, eigenvectors, power_iteration, shampoo
from dpsgd_optax.geometry.linalg import along, gram, multiply
from dpsgd_optax.preconditioners._damped import damp
from dpsgd_optax.preconditioners._factors import Layout, dense_factor
from dpsgd_optax.preconditioners._lift import batched
from dpsgd_optax.preconditioners.affine import squarest


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


def _is_dense(x: Any) -> bool:
  return not isinstance(x, tuple)


def rotated(x: jax.Array, bases: tuple[Any, ...], back: bool = False) -> jax.Array:
  """G' = Q_Lᴴ G Q_R; ``back``: the inverse."""
  for axis, q in enumerate(bases):
    if _is_dense(q):
      x = multiply(x, q if back else jnp.conj(q.T), axis)
  return x


def _full(square: Any) -> jax.Array:
  """V; factored, V_ij = r_i c_j / mean(r)."""
  if _is_dense(square):
    return square
  rows, columns = square
  return rows[:, None] * (columns / (jnp.mean(rows) + tiny(rows)))


def _turned(refresh: Refresh, old: tuple, moments: tuple[Any, ...]) -> tuple:
  """Each basis after ``refresh``. V stays with its directions: it is sorted as they are."""
  bases, square = list(old[0]), old[1]
  for axis, s in enumerate(moments):
    if _is_dense(s):
      bases[axis], order = refresh(s.astype(bases[axis].dtype), bases[axis])
      if _is_dense(square):
        square = jnp.take(square, order, axis)
      else:
        square = tuple(jnp.take(part, order) if i == axis else part for i, part in enumerate(square))
  return tuple(bases), square


def _first_bases(bases: tuple[Any, ...], moments: tuple[Any, ...]) -> tuple[Any, ...]:
  return tuple(eigenvectors(s.astype(q.dtype)) if _is_dense(q) else q for q, s in zip(bases, moments, strict=True))


def _moved_moments(state: SoapState, x: jax.Array, weights: Any, keep: jax.Array, gain: jax.Array) -> tuple[Any, ...]:
  """S_i ← β S_i + (1 − β) ⟨x x*⟩_i, the squares weighed along the other axes, in their bases."""
  new = list(state.moments)
  for axis, s in enumerate(state.moments):
    if not _is_dense(s):
      continue
    seen = x
    if weights is not None:
      seen = rotated(x, tuple(() if i == axis else q for i, q in enumerate(state.bases)))
      for other, w in enumerate(weights):
        seen = seen if other == axis else seen * jnp.sqrt(along(w, other, x.ndim)).astype(x.real.dtype)
    new[axis] = (keep * s + gain * gram(seen, axis, s)).astype(s.dtype)
  return tuple(new)


def _moved_square(square: Any, observed: jax.Array, keep: jax.Array, gain: jax.Array) -> Any:
  """V ← β V + (1 − β) |G'|²."""
  move = lambda old, new: (gain * new + keep * old).astype(old.dtype)
  if _is_dense(square):
    return move(square, observed)
  return move(square[0], jnp.mean(observed, 1)), move(square[1], jnp.mean(observed, 0))


def _check_dtype(dtype: Any, b2: Any) -> None:
  if dtype is None:
    return
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`moment_dtype` must be a real floating dtype or None, got {dtype}. Try `jnp.bfloat16`.")
  eps = float(jnp.finfo(dtype).eps)
  if is_static(b2) and 1 - b2 < eps:
    warnings.warn(
      f"with `moment_dtype={jnp.dtype(dtype).name}` what b2={b2} takes in is often below half a unit in the last "
      f"place, so that the moments stand still. Use b2={1 - 4 * eps:.2g} or less, or float32.",
      stacklevel=3,
    )


def soap(
  *,
  b2: float = 0.95,
  basis_every: int = 10,
  eps: float = 1e-8,
  max_size: float = 2048,
  max_skew: float = 1.0,
  moments: Moments = shampoo,
  refresh: Refresh = power_iteration,
  factored: bool = False,
  moment_dtype: Any = None,
  stacked: Stacked = None,
) -> Preconditioner:
  """P = (Q_L ⊗ Q_R) diag(1 / (√V̂ + ε)) (Q_L ⊗ Q_R)ᴴ on every leaf, seen as a matrix: Adam's P in Shampoo's eigenbasis.

  ``psgd(3e-3, soap(), b1=0.95, every=1)`` is the optimizer SOAP. One fit:

    every ``basis_every``-th   Q ← qr(S Q) for S = L and S = R as they were before this fit; V is sorted with the columns
    V ← β V + (1 − β)|G'|²     G' = Q_Lᴴ G Q_R
    L ← β L + (1 − β) GGᴴ      R ← β R + (1 − β) GᴴG

  Fitted on gradients, P → (E ggᵀ)^(−½) where that is diagonal in a Kronecker basis. On Newton probes (v, Hv) the
  second moment of h is H², so P → |H|⁻¹, whatever the signs of H, and without a step size of the fit.

  The first fit takes the eigenvectors of its own L and R. P = I before it. A matrix seen as zero throughout teaches
  nothing: on gradients before the first that is not zero, on Newton products ever.

  A tensor is seen as the matrix that is nearest to a square one, as by :func:`dpsgd_optax.affine`. A side of length d
  gets a basis iff 1 < d ≤ ``max_size`` and d² ≤ ``max_skew`` · N; otherwise Q = I on that side. Vectors and scalars
  have none: there P is Adam's. Parameters may be complex.

  Damped, P → (E ggᵀ + λ²)^(−½) on gradients; on Newton probes |H + λ|⁻¹.

  Memory: N numbers for V, and 2 d² for each side with a basis.

  Args:
    b2: β, in [0, 1).
    basis_every: the bases move on every ``basis_every``-th fit. Static.
    eps: ε ≥ 0, in units of √V.
    max_size: the longest side that may have a basis. Static. ``jnp.inf``: any.
    max_skew: a basis holds at most ``max_skew`` · N numbers. Static. ``jnp.inf``: every side has one.
    moments: ``geometry.shampoo``, or ``geometry.kl``, where L and R weigh each other. Static.
    refresh: how a basis moves: ``geometry.power_iteration``, or ``geometry.exact`` eigenvectors. Static.
    factored: keep of V the means of its rows and columns only, as Adafactor: V = r cᵀ / mean(r). Static.
    moment_dtype: of L, R and V between the fits; None: that of the parameters, float32 at least. The bases always have
      that: rounded to bfloat16 they would not be orthonormal. Complex moments keep their dtype. Static.
    stacked: see :func:`dpsgd_optax.per_leaf`.

  Raises:
    ValueError: for a ``b2`` outside [0, 1), ``basis_every`` below 1, a negative ``eps``, a size or skew that is not
      positive, or a ``moment_dtype`` that is not real.

  Warns:
    UserWarning: if 1 − β is below the precision of ``moment_dtype``.

  Departures from the paper and its code: the first fit counts and gives a step; a tensor is one matrix, not one basis
  per axis; the momentum stays in the original space, where no basis moves under it (``b1`` of ``psgd``); ``max_skew``.
  Without the first step the trajectory is theirs.

  Source: arXiv:2409.11321; Shampoo, arXiv:1802.09568; KL-Shampoo, arXiv:2509.03378; Adafactor, arXiv:1804.04235.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.array([[1.0, 0.5], [0.5, -1.0]])  # H v = A v B
    >>> p, key = dpo.soap(b2=0.99), jax.random.key(0)
    >>> fit = lambda state, v: (p.fit(state, dpo.Probe(v, a @ v @ b), key=key, damping=0.0), None)
    >>> state, _ = jax.lax.scan(fit, p.init(jnp.ones((2, 2))), jax.random.normal(key, (1000, 2, 2)))
    >>> bool(jnp.allclose(p.apply(state, a) @ b, jnp.sqrt(b @ b) @ jnp.linalg.inv(b) @ b, atol=10))
    True
  """
  check_fraction(b2, "b2")
  check_period(basis_every, "basis_every")
  check_not_negative(eps, "eps", "It bounds P by 1/eps. Try 1e-8.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` for Adam, `jnp.inf` for any size.")
  check(lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for Adam, 1.0 for bases of Adam's size.")
  _check_dtype(moment_dtype, b2)

  def layout(shape: tuple[int, ...]) -> Layout:
    if len(shape) < 2:
      return Layout((math.prod(shape),), (no_basis,))
    parts = squarest(shape)
    sides = tuple(math.prod(shape[i] for i in part) for part in parts)
    dense = (1 < d <= max_size and d * d <= max_skew * math.prod(sides) for d in sides)
    kinds = tuple(dense_factor if has and min(sides) > 1 else no_basis for has in dense)
    return Layout(sides, kinds, tuple(itertools.chain(*parts)))

  def init(x: jax.Array) -> SoapState:
    view, real = layout(x.shape), jnp.finfo(x.dtype).dtype
    kept = lambda dtype: dtype if moment_dtype is None or jnp.issubdtype(dtype, jnp.complexfloating) else moment_dtype
    bases = tuple(kind(d, x.dtype) for d, kind in zip(view.shape, view.factors, strict=True))
    zeros = tuple(jnp.zeros(q.shape, kept(x.dtype)) if _is_dense(q) else q for q in bases)
    shapes = [(d,) for d in view.shape] if factored and len(view.shape) > 1 else [view.shape]
    square = tuple(jnp.zeros(shape, kept(real)) for shape in shapes)
    return SoapState(jnp.zeros((), jnp.int32), zeros, bases, square if len(square) > 1 else square[0])

  def with_bases(state: SoapState, seen: jax.Array) -> SoapState:
    """The state after a refresh of its bases, where one is due and the moments are finite."""
    diagonals = [jnp.real(jnp.diagonal(s)) for s in state.moments if _is_dense(s)]
    if not diagonals:
      return state
    known = (diagonals[0] > 0).any() & jnp.all(jnp.isfinite(jnp.concatenate(diagonals)))
    due = seen & known & (state.count > 0) & (state.count % basis_every == 0)
    change = lambda old, moments: _turned(refresh, old, moments)
    bases, square = if_any(due, change, (state.bases, state.square), state.moments)
    return state._replace(bases=bases, square=square)

  def with_first_bases(state: SoapState, old: SoapState) -> SoapState:
    """The state with the eigenvectors of its moments, if the old ones were zero."""
    diagonals = [jnp.real(jnp.diagonal(s)) for s in state.moments if _is_dense(s)]
    if not diagonals:
      return state
    before = jnp.real(jnp.diagonal(next(s for s in old.moments if _is_dense(s))))
    sound = jnp.all(jnp.isfinite(jnp.concatenate(diagonals)))
    first = sound & jnp.all(before == 0) & jnp.any(diagonals[0] > 0)
    return state._replace(bases=if_any(first, _first_bases, state.bases, state.moments))

  def fit(state: SoapState, probe: Probe, *, key: jax.Array, damping) -> SoapState:
    del key
    seen, shift = jnp.any(probe.product != 0), 0.0
    if probe.vector is None:
      seen, shift = seen | (state.count > 0), damping**2
    else:
      probe = damp(probe, None, damping)
    x = layout(probe.product.shape).to_tensor(probe.product)
    keep, gain = jnp.where(seen, b2, 1.0).astype(x.real.dtype), jnp.where(seen, 1 - b2, 0.0).astype(x.real.dtype)
    turned = with_bases(state, seen)
    weights = None if moments.weights is None else moments.weights(_full(turned.square).astype(x.real.dtype))
    new = turned._replace(moments=_moved_moments(turned, x, weights, keep, gain))
    new = with_first_bases(new, state)
    observed = jnp.abs(rotated(x, new.bases)) ** 2 + shift
    square = _moved_square(new.square, observed, keep, gain)
    return new._replace(count=state.count + seen.astype(jnp.int32), square=square)

  def root_of_square(state: SoapState, dtype: Any) -> jax.Array:
    """√V̂ + ε; 1 before the first fit."""
    v, known = _full(state.square).astype(dtype), state.count > 0
    d = jnp.sqrt(v / jnp.where(known, 1 - jnp.asarray(b2, dtype) ** state.count, 1)) + eps
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
  return batched(group._replace(meaning=f"moments={moments.name}"), stacked)
