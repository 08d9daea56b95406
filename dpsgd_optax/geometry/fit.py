# SPDX-License-Identifier: Apache-2.0
"""One fit of the factors: look at the probe through Q, take its moments, move. The notation is that of `moves`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax._trees.by_shape import LARGE, at_once, grouped
from dpsgd_optax.base import check
from dpsgd_optax.geometry.linalg import cross_gram, gram, hermitian, scaled, triu
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer, keep_all, spectral, unchanged
from dpsgd_optax.geometry.norms import norm_bound, normal_norm_bound
from dpsgd_optax.geometry.seen import Seen, zero_unseen_block, zero_unseen_slices
from dpsgd_optax.geometry.structured import hermitian_outer, outer


def each(function: Callable, rows: list[tuple]) -> list:
  """``function(*row)`` of each row; rows of small arrays of equal shape at once, as one kernel in place of many."""

  def key(i: int) -> Any:
    plain = all(x is None or (isinstance(x, jax.Array) and x.size < LARGE) for x in rows[i])
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(rows[i])) if plain else i

  return at_once(function, rows, grouped((key(i), i) for i in range(len(rows))).values())


def tracked_step(step_size: Any, old: jax.Array, measured: jax.Array, memory: float) -> tuple[jax.Array, jax.Array]:
  """μ = step_size / L with the new L ← max(memory · L + (1 − memory) · ℓ, ℓ), and L; ℓ is what was measured."""
  lip = jnp.maximum(memory * old + (1 - memory) * measured, measured)
  return step_size / (lip + tiny(lip)), lip


def directions(
  q: Factors,
  p: Factors | None,
  lip: jax.Array,
  v: jax.Array | None,
  h: jax.Array,
  *,
  geometry: Geometry,
  normalizer: Normalizer,
  step_size,
  low_rank: bool = False,
  seen: Seen | None = None,
) -> tuple[tuple, jax.Array, jax.Array]:
  """E of each factor, μ (k,) and the new L (k,): where to go and how far, for all factors from the same a, b.

  Args:
    q, p: factors of Q and of P; p is q⁻¹ for a geometry that keeps it, None if neither is at hand.
    lip: (k,), L; 0 before the first fit.
    v, h: (d_1, …, d_k), the damped probe; v may be None.
    geometry, normalizer, step_size: see `kron`.
    low_rank: keep the moments of a vector as outer products, so that a move costs O(n²); normalizer ``trace``.
    seen: the slices along each axis that take part (see `seen`); None: all.
  """
  a, b = geometry.lift(q, p, v, h)
  if seen is not None:
    a, b = zero_unseen_slices(a, seen), None if b is None else zero_unseen_slices(b, seen)
  expected = geometry.expected(q, a.shape, seen) if b is None else None
  masked = seen is not None and (b is None or geometry.moment is not unchanged)  # otherwise a and b are enough
  bound_of = norm_bound if geometry.project is triu else normal_norm_bound
  by_difference = normalizer.of_difference and b is not None and not low_rank and geometry.moment is unchanged
  two_terms = geometry.project is keep_all and normalizer is spectral
  moments = []
  for i, factor in enumerate(q):
    if by_difference and factor.ndim == 2 and isinstance(factor, jax.Array):
      # one product: a aᴴ − b bᴴ is the Hermitian part of (a − b)(a + b)ᴴ; of a vector it is never written down
      if two_terms and a.size == len(factor):
        e = hermitian_outer((a - b).reshape(-1), (a + b).reshape(-1))
      else:
        e = hermitian(cross_gram(a - b, a + b, i))
      moments.append((None, None, e))
    else:
      of = outer if low_rank else lambda x, i=i, factor=factor: gram(x, i, factor)
      second = expected[i] if b is None else of(b)
      moments.append((geometry.moment(factor, of(a)), geometry.moment(factor, second), None))

  def measured(t1, t2, e, s):
    dense = (t1 if e is None else e).ndim == 2
    if e is None:
      e = t1 - (t2 * jnp.eye(len(t1), dtype=t1.dtype) if dense and b is None and t2.ndim == 0 else t2)
    e = e if s is None else zero_unseen_block(e, s)
    e = geometry.project(e) if dense else e
    return e, normalizer.measure(t1, t2, e, bound_of).astype(lip.dtype)

  rows = [(*moments[i], seen[i] if masked and seen is not None else None) for i in range(len(q))]
  found, sizes = zip(*each(measured, rows), strict=True)
  mu, lip = tracked_step(step_size, lip, jnp.stack(sizes), normalizer.memory)
  return found, mu.astype(jnp.finfo(a.dtype).dtype), lip


def fit_factors(
  q: Factors, *args, geometry: Geometry, multiples: jax.Array | None = None, **options
) -> tuple[Factors, jax.Array]:
  """The new factors and the new L after one fit, arguments as for :func:`directions`.

  ``multiples`` (k,) are what the factors are multiplied by before the fit. A move is homogeneous, so its result is
  multiplied in place of q: where the geometry does not look at q, the multiple is never written down.
  """
  at = q if multiples is None else scaled(q, multiples)
  found, mu, lip = directions(at, *args, geometry=geometry, **options)

  def move(q, e, mu, multiple):
    new = (geometry.move if q.ndim == 2 else geometry.move_diagonal)(q, e, mu)
    return new if multiple is None else new * multiple.astype(new.dtype)

  rows = [(q[i], found[i], mu[i], None if multiples is None else multiples[i]) for i in range(len(q))]
  return tuple(each(move, rows)), lip


def check_init_scale(value: Any) -> None:
  """Raises for a start Q = init_scale · I that is not positive."""
  check(lambda x: x > 0, value, "init_scale", "positive or None", "None sets it from the first probe.")


def scale_of_probe(v: jax.Array | None, h: jax.Array, numbers: Any = None) -> jax.Array:
  """s⁴ = mean |v|² / sqrt(mean |h|⁴); mean |v|² is 1 when whitening. ``numbers``: of h, without zeros that pad it.

  |h| is divided by its maximum first, so that 1e±38 neither overflows nor vanishes. P = s² is kept a normal number:
  XLA takes a smaller one for zero, and the parameter would stand still until P has grown.
  """
  size = jnp.abs(h)
  top = jnp.max(size)
  safe = jnp.where(top > 0, top, 1)
  mean = lambda x: jnp.sum(x) / (x.size if numbers is None else numbers)
  root = jnp.sqrt(safe)  # divided by twice: 1/1e38 is no normal number, and XLA would multiply by zero
  from_h = (mean((size / root / root) ** 4) ** 0.125 * root) ** -1
  scale = from_h if v is None else from_h * mean(jnp.abs(v) ** 2) ** 0.25
  return jnp.maximum(scale, 1.1 * jnp.sqrt(jnp.finfo(scale.dtype).tiny))


def scale_before_fit(
  init_scale: float | None, lipschitz: jax.Array, v: jax.Array | None, h: jax.Array, numbers: Any = None
) -> jax.Array | None:
  """What Q is multiplied by before a fit: the scale of the first probe, later 1; None if ``init_scale`` is given.

  L = 0 tells the first fit. A branch, because the scale reads v and h twice.
  """
  if init_scale is not None:
    return None
  one = lambda v, h: jnp.ones((), jnp.finfo(h.dtype).dtype)
  return jax.lax.cond(lipschitz > 0, one, lambda v, h: scale_of_probe(v, h, numbers), v, h)
