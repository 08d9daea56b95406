# SPDX-License-Identifier: Apache-2.0
"""Bounds of the spectral norm ‖·‖, and rotations towards a Hermitian positive factor.

Notation
  q        (d, d), a factor that is to become Hermitian positive while P = qᴴ q stays
  R        the skew matrix qᴴ − q over its norm: exp(aR) is a rotation
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax.geometry.linalg import largest_entry
from dpsgd_optax.geometry.structured import Arrow, LowRank


def norm_bound(a: jax.Array, normal: bool = False) -> jax.Array:
  """A lower bound of the spectral norm ‖a‖ of a square matrix, within √2 of it in practice.

  One step of the power iteration, started at the row or the column of largest norm, whichever is longer
  (a tie: the row). Deterministic; two products of a matrix with a vector; 0 for a = 0.

  Of an arrow-head the largest entry is returned, of a `LowRank` of two terms the exact norm. ``normal`` promises
  a aᴴ = aᴴ a (Hermitian, skew): each row is as long as its column, so rows will do, which halves what is compiled.

  Source: the bound of psgd_torch that arXiv:2402.11858 uses; same ties as there.
  """
  if isinstance(a, Arrow):
    return largest_entry(a)
  if isinstance(a, LowRank):
    return a.norm()
  size = jnp.max(jnp.abs(a))
  scale = 1 / (size + tiny(size))
  # scaled as they are read: a copy of the matrix would cost more than all the rest
  squares = jnp.abs(a * scale) ** 2
  rows = jnp.sum(squares, 1)
  line = a[jnp.argmax(rows)][None]  # a matrix of one row: its products compile sooner than a vector's
  if normal:
    x = jnp.conj((jnp.conj(line) * scale) @ a.T) * scale
    y = (x @ a) * scale
  else:
    columns = jnp.sum(squares, 0)
    by_row = jnp.max(rows) >= jnp.max(columns)
    line = jnp.where(by_row, line, a[:, jnp.argmax(columns)][None]) * scale
    x = jnp.conj(jnp.where(by_row, jnp.conj(line) @ a.T, jnp.conj(line) @ a)) * scale
    y = jnp.where(by_row, x @ a, x @ a.T) * scale
  both = jnp.concatenate([x, y])
  inner = jnp.real(jnp.matmul(both, jnp.conj(both.T), precision="highest"))  # a product compiles sooner than two sums
  bound = size * jnp.sqrt(inner[1, 1]) / (jnp.sqrt(inner[0, 0]) + tiny(size))
  # of larger numbers the reciprocal is none, the bound would be 0 and the step without bound; so the fit is dropped
  return jnp.where(size < jnp.finfo(size.dtype).max / 4, bound, jnp.inf)


normal_norm_bound = functools.partial(norm_bound, normal=True)


def _skew_products(q: jax.Array, norm, count: int) -> tuple[list[jax.Array], list[jax.Array]]:
  """R q, R² q, …, and the real parts of their traces."""
  r = jnp.conj(q.T) - q
  r = r / (norm(r) + tiny(jnp.real(r)))
  products = list(itertools.accumulate(range(count), lambda x, _: r @ x, initial=q))[1:]
  return products, [jnp.real(jnp.trace(x)) for x in products]


def procrustes_step(q: jax.Array, norm=normal_norm_bound) -> jax.Array:
  """Rotates q towards the nearest Hermitian positive matrix: q ← exp(aR) q to second order.

  The step a maximises tr(exp(aR) q) on its quadratic model, at most 1/8; P = qᴴ q changes by O(a⁴) only.

  Source: arXiv:2402.11858 and psgd_torch 2.0 (Q^0.5 E Q^1.5).
  """
  (rq, rrq), (first, second) = _skew_products(q, norm, 2)
  negative = second < 0
  step = jnp.where(negative, jnp.minimum(-first / jnp.where(negative, second, 1), 0.125), 0.125)
  return q + step * (rq + step / 2 * rrq)


def procrustes_step_3(q: jax.Array, norm=normal_norm_bound) -> jax.Array:
  """The same to third order: a maximises tr(exp(aR) q) on its cubic model, at most 1/3; q as it is if none helps.

  Source: psgd_torch 2.0 (PRO4P).
  """
  (rq, rrq, rrrq), (t1, t2, t3) = _skew_products(q, norm, 3)
  useful = (t1 > 0) & (t3 < 0)
  a = (-t2 - jnp.sqrt(jnp.maximum(t2 * t2 - 1.5 * t1 * t3, 0))) / (0.75 * jnp.where(useful, t3, -1))
  a = jnp.where(useful, jnp.minimum(a, 1 / 3), 0)
  return q + a * (rq + a / 2 * (rrq + a / 4 * rrrq))


def procrustes(q: jax.Array, *, steps: int = 10, close: float = 1e-3) -> jax.Array:
  """At most ``steps`` rotations of third order, until max |qᴴ − q| < close · max |q|."""

  def ahead(carry):
    q, step = carry
    return (step < steps) & (largest_entry(jnp.conj(q.T) - q) >= close * largest_entry(q))

  return jax.lax.while_loop(ahead, lambda carry: (procrustes_step_3(carry[0]), carry[1] + 1), (q, 0))[0]
