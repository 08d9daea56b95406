# SPDX-License-Identifier: Apache-2.0
"""Plain-array algebra of the Kronecker family: no trees, no keys, no state.

Notation
  x        a tensor of shape (d_1, …, d_k) with N elements
  q        one factor: (d, d) dense or (d,) diagonal
  x ×_i q  multiply along axis i;  x_(i) the mode-i unfolding, d_i × N/d_i
  ᴴ        conjugate transpose
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.preconditioners import _arrow
from dpsgd_optax.preconditioners._arrow import Arrow


def tiny(x: jax.Array) -> float:
  """The smallest normal number of x's dtype: guards a division by an exact zero, in the unit of x."""
  return float(jnp.finfo(x.dtype).tiny)


def along(q: jax.Array, axis: int, ndim: int) -> jax.Array:
  """The vector q as a tensor of ``ndim`` axes that lies along ``axis``."""
  return q.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def multiply(x: jax.Array, q: jax.Array, axis: int, precision=None) -> jax.Array:
  """x ×_axis q."""
  if isinstance(q, Arrow):
    return q.multiply(x, axis)
  if q.ndim == 1:
    return x * along(q, axis, x.ndim)
  letters = "abcdefghijkl"[: x.ndim]
  moved = letters.replace(letters[axis], "z")
  return jnp.einsum(f"{letters},z{letters[axis]}->{moved}", x, q, precision=precision)


def solve_adjoint(x: jax.Array, q: jax.Array, axis: int) -> jax.Array:
  """x ×_axis q⁻ᴴ, q upper triangular: a solve, never an inverse."""
  if isinstance(q, Arrow):
    return q.solve_adjoint(x, axis)
  if q.ndim == 1:
    return x / along(jnp.conj(q), axis, x.ndim)
  moved = jnp.moveaxis(x, axis, 0)
  solved = jax.lax.linalg.triangular_solve(
    q, moved.reshape(q.shape[0], -1), left_side=True, lower=False, transpose_a=True, conjugate_a=True
  )
  return jnp.moveaxis(solved.reshape(moved.shape), 0, axis)


def triangular_inverse(x: jax.Array, block: int = 32) -> jax.Array:
  """x⁻¹ of a lower triangular x, (d, d): diagonal blocks inverted together, then joined in pairs,

    [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹, C⁻¹],

  by products, which a CPU does faster than one solve with the identity, the more so the larger d. As stable: Higham,
  Accuracy and Stability of Numerical Algorithms, §14.2.2.

  Args:
    x: (d, d); what is above the diagonal is not read.
    block: the largest size left to a solve. Static.
  """
  d = len(x)
  levels = max(0, math.ceil(math.log2(d / block)))
  size = math.ceil(d / 2**levels) * 2**levels
  padded = x if size == d else jax.scipy.linalg.block_diag(x, jnp.eye(size - d, dtype=x.dtype))
  return _blocks_inverse(padded[None], levels)[0, :d, :d]


def _blocks_inverse(x: jax.Array, levels: int) -> jax.Array:
  """(blocks, d, d), d divisible by 2 ** levels."""
  blocks, d, _ = x.shape
  if levels == 0:
    eye = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), x.shape)
    return jax.lax.linalg.triangular_solve(x, eye, left_side=True, lower=True)
  h = d // 2
  halves = jnp.stack([x[:, :h, :h], x[:, h:, h:]], axis=1).reshape(2 * blocks, h, h)
  a, c = jnp.moveaxis(_blocks_inverse(halves, levels - 1).reshape(blocks, 2, h, h), 1, 0)
  below = -jnp.matmul(c, jnp.matmul(x[:, h:, :h], a, precision="highest"), precision="highest")
  return jnp.block([[a, jnp.zeros_like(a)], [below, c]])


def lower_gram(x: jax.Array, whole: int = 192) -> jax.Array:
  """xᵀx of a lower triangular x, (d, d): with d > ``whole`` in halves, which leaves out half of the multiplications."""
  h = len(x) // 2
  product = lambda a, b: jnp.matmul(a.T, b, precision="highest")
  if len(x) <= whole:
    return product(x, x)
  left, corner = x[:, :h], x[h:, h:]
  below = product(corner, left[h:])
  return jnp.block([[product(left, left), below.T], [below, product(corner, corner)]])


def gram(x: jax.Array, axis: int, like: Any, precision=None) -> Any:
  """x_(i) x_(i)ᴴ, (d, d), or what of it the factor ``like`` can use: its diagonal, (d,), or its arrow-head."""
  if isinstance(like, Arrow):
    return _arrow.gram(x, axis)
  others = [i for i in range(x.ndim) if i != axis]
  if like.ndim == 1:
    return jnp.sum(jnp.real(x * jnp.conj(x)), axis=others)
  return cross_gram(x, x, axis, precision)


def cross_gram(x: jax.Array, y: jax.Array, axis: int, precision=None) -> jax.Array:
  """x_(i) y_(i)ᴴ, (d, d)."""
  letters = "abcdefghijkl"[: x.ndim]
  moved = letters.replace(letters[axis], "z")
  return jnp.einsum(f"{letters},{moved}->{letters[axis]}z", x, jnp.conj(y), precision=precision)


def square(q: Any, precision=None) -> Any:
  """qᴴ q, the factor of P that belongs to the factor q of Q."""
  if isinstance(q, Arrow):
    return q.square()
  if q.ndim == 1:
    return jnp.real(q * jnp.conj(q))
  return jnp.matmul(jnp.conj(q.T), q, precision=precision)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Σ_k s_k x_k x_kᴴ, a Hermitian matrix of few terms that is never formed, so that products with it cost O(n²).

  It stands where a matrix E could: ``e @ q``, ``q @ e``, ``e - f``, ``e * c``, ``e / c``.

  Attributes:
    x: (r, n).
    s: (r,), real.
    upper: only the upper triangle is meant, diagonal included.
  """

  x: jax.Array
  s: jax.Array
  upper: bool = False

  ndim = 2  # of the matrix it stands for

  def __sub__(self, other: "LowRank") -> "LowRank":
    return LowRank(jnp.concatenate([self.x, other.x]), jnp.concatenate([self.s, -other.s]))

  def __mul__(self, c: Any) -> "LowRank":
    return dataclasses.replace(self, s=self.s * c)

  def __truediv__(self, c: Any) -> "LowRank":
    return self * (1 / c)

  def __matmul__(self, q: jax.Array) -> jax.Array:
    if not self.upper:
      return (self.x * self.s[:, None]).T @ (jnp.conj(self.x) @ q)
    # triu(x xᴴ) q = x ⊙ (sums from below of conj(x) ⊙ q)
    below = jax.lax.cumsum(jnp.conj(self.x)[:, :, None] * q[None], axis=1, reverse=True)
    return jnp.einsum("kn,knm->nm", self.x * self.s[:, None], below)

  def __rmatmul__(self, q: jax.Array) -> jax.Array:
    return ((q @ self.x.T) * self.s[None]) @ jnp.conj(self.x)

  def through(self, q: jax.Array) -> "LowRank":
    """q E qᴴ."""
    return dataclasses.replace(self, x=self.x @ q.T)

  def trace(self) -> jax.Array:
    return jnp.sum(self.s * jnp.sum(jnp.abs(self.x) ** 2, 1))

  def norm(self) -> jax.Array:
    """Its spectral norm, of two terms: the larger root of the characteristic polynomial of the 2 × 2 matrix XᴴX S."""
    inner = jnp.conj(self.x) @ self.x.T * self.s[None]
    trace = jnp.real(jnp.trace(inner))
    det = jnp.real(inner[0, 0] * inner[1, 1] - inner[0, 1] * inner[1, 0])
    return (jnp.abs(trace) + jnp.sqrt(jnp.maximum(trace * trace - 4 * det, 0))) / 2

  def divide_by_one_minus(self, q: jax.Array) -> jax.Array:
    """q (I − E)⁻¹, by the identity of Woodbury: one system of r equations."""
    small = jnp.eye(len(self.s), dtype=self.x.dtype) - (jnp.conj(self.x) @ self.x.T) * self.s[None]
    return q + ((q @ self.x.T) * self.s[None]) @ jnp.linalg.solve(small, jnp.conj(self.x))


def outer(x: jax.Array) -> LowRank:
  """x xᴴ of a vector."""
  return LowRank(x[None], jnp.ones(1, jnp.finfo(x.dtype).dtype))


def hermitian_outer(x: jax.Array, y: jax.Array) -> LowRank:
  """The Hermitian part of x yᴴ of two vectors, (x yᴴ + y xᴴ) / 2.

  It is ¼ (x + y)(x + y)ᴴ − ¼ (x − y)(x − y)ᴴ. With cx and y/c of equal length neither term is larger than twice
  the norm of the difference, so that nothing cancels.
  """
  a, b = (jnp.linalg.norm(z) for z in (x, y))
  c = jnp.sqrt((b + tiny(b)) / (a + tiny(a)))
  x, y = x * c, y / c
  return LowRank(jnp.stack([x + y, x - y]), jnp.array([0.25, -0.25], a.dtype))


def triu(e: Any) -> Any:
  """The upper triangle, diagonal included; an arrow-head is nothing else."""
  if isinstance(e, Arrow):
    return e
  return dataclasses.replace(e, upper=True) if isinstance(e, LowRank) else jnp.triu(e)


def hermitian(x: jax.Array) -> jax.Array:
  """(x + xᴴ) / 2."""
  return (x + jnp.conj(x.T)) / 2


def norm_bound(a: jax.Array, normal: bool = False) -> jax.Array:
  """A lower bound of the spectral norm ‖a‖ of a square matrix, within √2 of it in practice.

  One step of the power iteration, started at the row or the column of largest norm, whichever is longer
  (a tie: the row). Deterministic; two products of a matrix with a vector; 0 for a = 0.

  Args:
    a: (d, d); an arrow-head has its largest entry for a norm, and one of two terms its exact norm.
    normal: True promises a aᴴ = aᴴ a (Hermitian, skew): each row is as long as its column, so that rows will do, which
      halves what there is to compile.

  Source: the bound of psgd_torch that arXiv:2402.11858 uses; same ties as there.
  """
  if isinstance(a, Arrow):
    return _arrow.largest(a)
  if isinstance(a, LowRank):
    return a.norm()
  size = jnp.max(jnp.abs(a))
  scale = 1 / (size + tiny(size))
  # scaled as they are read: a copy of the matrix would cost more than all the rest; a tie goes to the row
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
  return size * jnp.sqrt(inner[1, 1]) / (jnp.sqrt(inner[0, 0]) + tiny(size))


normal_norm_bound = functools.partial(norm_bound, normal=True)


def norm_estimate(a: jax.Array, block: jax.Array, *, skew: bool = False) -> jax.Array:
  """‖a‖ of a Hermitian positive (or skew) matrix by a block power iteration from given random rows.

  Tighter than :func:`norm_bound` (0.97 of ‖a‖ at d = 40) and 16 times its cost for 32 rows; the reference's
  random numbers enter as ``block``, (k, d), so that its runs can be replayed.

  Source: psgd_torch 2.0.
  """
  size = jnp.max(jnp.abs(a)) if skew else jnp.max(jnp.real(jnp.diagonal(a)))
  size = size + tiny(size)
  a = a / size
  longest = a[jnp.argmax(jnp.sum(jnp.real(a * jnp.conj(a)), 1))]
  block = longest[None] + jnp.sign(jnp.conj(block) @ longest)[:, None] * block
  for _ in range(2):
    block = block @ a
    block = block / (jnp.linalg.norm(block, axis=1, keepdims=True) + tiny(size))
    block = block @ a
  return size * jnp.max(jnp.linalg.norm(block, axis=1))


def procrustes_step(q: jax.Array, norm=normal_norm_bound) -> jax.Array:
  """Rotate q towards the nearest Hermitian positive matrix: q ← exp(aR) q to second order, R ∝ qᴴ − q.

  The step a maximises tr(exp(aR) q) on its quadratic model, at most 1/8; P = qᴴ q changes by O(a⁴) only.

  Source: arXiv:2402.11858 and psgd_torch 2.0 (Q^0.5 E Q^1.5).
  """
  r = jnp.conj(q.T) - q
  r = r / (norm(r) + tiny(jnp.real(r)))
  rq = r @ q
  rrq = r @ rq
  first, second = jnp.real(jnp.trace(rq)), jnp.real(jnp.trace(rrq))
  negative = second < 0
  step = jnp.where(negative, jnp.minimum(-first / jnp.where(negative, second, 1), 0.125), 0.125)
  return q + step * (rq + step / 2 * rrq)


def procrustes_step_3(q: jax.Array, norm=normal_norm_bound) -> jax.Array:
  """The same to third order: a maximises tr(exp(aR) q) on its cubic model, at most 1/3; q as it is if none helps.

  Source: psgd_torch 2.0 (PRO4P).
  """
  r = jnp.conj(q.T) - q
  r = r / (norm(r) + tiny(jnp.real(r)))
  rq = r @ q
  rrq = r @ rq
  rrrq = r @ rrq
  t1, t2, t3 = (jnp.real(jnp.trace(x)) for x in (rq, rrq, rrrq))
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


def largest_entry(q: Any) -> jax.Array:
  return _arrow.largest(q) if isinstance(q, Arrow) else jnp.max(jnp.abs(q))


def largest_diagonal(q: Any) -> jax.Array:
  if isinstance(q, Arrow):
    return jnp.max(jnp.abs(q.diagonal))
  return jnp.max(jnp.abs(q if q.ndim == 1 else jnp.diagonal(q)))


def balancing(factors: tuple[jax.Array, ...], size=largest_entry, gain: Any = None) -> jax.Array:
  """The multiples that give all factors the same size, (k,); their Kronecker product stays, or grows by ``gain``.

  (gain · Π n_j)^(1/k) / n_i with n_i = size(q_i), the roots first, so that the product cannot overflow. All of them in
  one array: each scalar by itself would be a kernel to compile.
  """
  k = len(factors)
  root = {1: lambda x: x, 2: jnp.sqrt}.get(k, lambda x: x ** (1 / k))
  times = jnp.ones(k) if gain is None else jnp.broadcast_to(root(gain), k)
  if k > 1:
    sizes = jnp.stack([size(q) for q in factors])
    roots = root(sizes)
    times = times * math.prod(jnp.roll(roots, i) for i in range(k)) / sizes
  return times


def scaled(factors: tuple[jax.Array, ...], multiples: jax.Array) -> tuple[jax.Array, ...]:
  """Each factor times its number."""
  return tuple(q * multiples[i].astype(q.dtype) for i, q in enumerate(factors))


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """(…, n) as (product of the leading axes, n); a vector as a column. A conv kernel becomes (kh·kw·in, out)."""
  if len(shape) <= 1:
    return (math.prod(shape), 1)
  return (math.prod(shape[:-1]), shape[-1])
