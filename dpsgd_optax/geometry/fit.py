# SPDX-License-Identifier: Apache-2.0
"""One fit of the factors: look at the probe, take the moments, move."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax.geometry.linalg import cross_gram, gram, hermitian, scaled, triu
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer, as_it_is, keep_all, spectral
from dpsgd_optax.geometry.norms import norm_bound, normal_norm_bound
from dpsgd_optax.geometry.seen import Seen, block_of, only_seen
from dpsgd_optax.geometry.structured import hermitian_outer, outer


def tracked(old: jax.Array, measured: jax.Array, memory: float) -> jax.Array:
  """L ← max(memory · L + (1 − memory) · ℓ, ℓ)."""
  return jnp.maximum(memory * old + (1 - memory) * measured, measured)


def steps(
  q: Factors,
  p: Factors,
  lip: jax.Array,
  v: jax.Array | None,
  h: jax.Array,
  *,
  geometry: Geometry,
  normalizer: Normalizer,
  step_size,
  norms: tuple[Callable, ...] | None = None,
  precision=None,
  low_rank: bool = False,
  seen: Seen | None = None,
) -> tuple[tuple, jax.Array, jax.Array]:
  """Where each factor is to go, E, and how far, μ, from one probe: all of the same a, b (Jacobi, not Gauss-Seidel).

  Args:
    q: factors, dense (d_i, d_i) or diagonal (d_i,).
    p: the factor of P that belongs to each; q⁻¹ for a geometry that keeps it; None if neither is at hand.
    lip: (k,), the L of each factor; 0 before the first fit.
    v: (d_1, …, d_k) probe vector, or None.
    h: its product, or the gradient; damped already.
    geometry: lift, project and move.
    normalizer: how L is measured.
    step_size: in (0, 1].
    norms: one norm estimate per factor in place of the deterministic bound, to replay recorded random numbers.
    precision: of the matrix products.
    low_rank: keep the moments of a vector as outer products, so that a move costs O(n²); normalizer ``trace``.
    seen: the slices along each axis that take part, see `_seen`; None: all.

  Returns:
    E of each factor, μ (k,) and the new L (k,): the first two are what a geometry's ``move`` takes.
  """
  a, b = geometry.lift(q, p, v, h, precision)
  if seen is not None:
    a, b = only_seen(a, seen), None if b is None else only_seen(b, seen)
  found, measured = [], []
  expected = geometry.expected(q, a.shape, seen) if b is None else None
  masked = seen is not None and (b is None or geometry.moment is not as_it_is)  # otherwise a and b are enough
  bound_of = norm_bound if geometry.project is triu else normal_norm_bound
  by_difference = normalizer.of_difference and b is not None and not low_rank and geometry.moment is as_it_is
  two_terms = norms is None and geometry.project is keep_all and normalizer is spectral
  for i, factor in enumerate(q):
    dense, norm = factor.ndim == 2, bound_of if norms is None else norms[i]
    if by_difference and dense and isinstance(factor, jax.Array):
      t1 = t2 = None
      # the Hermitian part of (a − b)(a + b)ᴴ = a aᴴ − b bᴴ + a bᴴ − b aᴴ; of vectors never written down
      if a.size == len(factor) and two_terms:
        e = hermitian_outer((a - b).reshape(-1), (a + b).reshape(-1))
      else:
        e = hermitian(cross_gram(a - b, a + b, i, precision))
    else:
      of = outer if low_rank else lambda x, i=i, factor=factor: gram(x, i, factor, precision)
      second = expected[i] if b is None else of(b)
      t1, t2 = geometry.moment(factor, of(a), precision), geometry.moment(factor, second, precision)
      e = t1 - (t2 * jnp.eye(len(t1), dtype=t1.dtype) if dense and b is None and t2.ndim == 0 else t2)
    e = block_of(e, seen[i]) if masked and seen is not None else e
    e = geometry.project(e) if dense else e
    measured.append(normalizer.measure(t1, t2, e, norm).astype(lip.dtype))
    found.append(e)
  lip = tracked(lip, jnp.stack(measured), normalizer.memory)
  mu = (step_size / (lip + tiny(lip))).astype(jnp.finfo(a.dtype).dtype)
  return tuple(found), mu, lip


def fit_factors(
  q: Factors, *args, geometry: Geometry, multiples: jax.Array | None = None, **options
) -> tuple[Factors, jax.Array]:
  """One fit of all factors, arguments as for :func:`steps`: the new factors and the new L.

  Args:
    q: factors.
    multiples: (k,), by which the factors are multiplied before the fit; None: by nothing. A move is homogeneous, so its
      result is multiplied in place of q; where the geometry does not look at q, the multiple is never written down.
  """
  at = q if multiples is None else scaled(q, multiples)
  found, mu, lip = steps(at, *args, geometry=geometry, **options)
  move = lambda i: (geometry.move if q[i].ndim == 2 else geometry.move_diagonal)(q[i], found[i], mu[i])
  new = tuple(map(move, range(len(q))))
  return new if multiples is None else scaled(new, multiples), lip


def first_scale(v: jax.Array | None, h: jax.Array) -> jax.Array:
  """The scale s of Q = s I that fits the first probe: s⁴ = sqrt(E v⁴…)/sqrt(E h⁴), with E v² = 1 when whitening.

  Written with |h| divided by its maximum, so that 1e±38 neither overflows nor vanishes. And s² = P is a normal number:
  below, XLA takes it for zero, and the parameter would stand still until P has grown.
  """
  size = jnp.abs(h)
  top = jnp.max(size)
  safe = jnp.where(top > 0, top, 1)
  from_h = (jnp.mean((size / safe) ** 4) ** 0.125 * jnp.sqrt(safe)) ** -1
  scale = from_h if v is None else from_h * jnp.mean(jnp.abs(v) ** 2) ** 0.25
  return jnp.maximum(scale, 1.1 * jnp.sqrt(jnp.finfo(scale.dtype).tiny))


def first_gain(lipschitz: jax.Array, v: jax.Array | None, h: jax.Array) -> jax.Array:
  """:func:`first_scale` at the first fit, which L = 0 tells, then 1: a branch, for it reads v and h twice."""
  one = lambda v, h: jnp.ones((), jnp.finfo(h.dtype).dtype)
  return jax.lax.cond(lipschitz > 0, one, first_scale, v, h)
