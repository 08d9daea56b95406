# SPDX-License-Identifier: Apache-2.0
"""Matrices that are never written down: of low rank, and arrow-heads.

Notation
  E, Q, P  Σ_k s_k x_k x_kᴴ; an upper arrow-head, diagonal and last column; QᵀQ
  x_(i)    the mode-i unfolding of a tensor x
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax.base import check_real


@dataclasses.dataclass(frozen=True)
class LowRank:
  """E, a Hermitian matrix of few terms that is never formed, so that products with it cost O(n²).

  It stands where a matrix could: ``e @ q``, ``q @ e``, ``e - f``, ``e * c``.

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
    """Its spectral norm, for r = 2 only: the larger root of the characteristic polynomial of the 2 × 2 matrix XᴴX S."""
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

  It is ¼ (x + y)(x + y)ᴴ − ¼ (x − y)(x − y)ᴴ. With cx and y/c of equal length neither term is larger than twice the
  norm of the difference, so that nothing cancels.
  """
  a, b = (jnp.linalg.norm(z) for z in (x, y))
  c = jnp.sqrt((b + tiny(b)) / (a + tiny(a)))
  x, y = x * c, y / c
  return LowRank(jnp.stack([x + y, x - y]), jnp.array([0.25, -0.25], a.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrow:
  """A (d, d) arrow-head: zero but for its diagonal and its last column, in P the last row too.

  Attributes:
    diagonal: (d,).
    column: (d,), the last column above the diagonal; its last entry is 0.
    symmetric: True for P. Static.
  """

  diagonal: jax.Array
  column: jax.Array
  symmetric: bool = dataclasses.field(default=False, metadata={"static": True})

  ndim = 2  # of the matrix it stands for

  @property
  def dtype(self):
    return self.diagonal.dtype

  def astype(self, dtype: Any) -> "Arrow":
    return jax.tree.map(lambda x: x.astype(dtype), self)

  def __sub__(self, other: "Arrow") -> "Arrow":
    return jax.tree.map(jnp.subtract, self, other)

  def __add__(self, other: "Arrow") -> "Arrow":
    return jax.tree.map(jnp.add, self, other)

  def __mul__(self, c: Any) -> "Arrow":
    return jax.tree.map(lambda x: x * c, self)

  def __matmul__(self, other: "Arrow") -> "Arrow":
    """The product of two upper ones."""
    column = self.diagonal * other.column + self.column * other.diagonal[-1]
    return Arrow(self.diagonal * other.diagonal, column)

  @staticmethod
  def _last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The vector along the last axis of x."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))

  def multiply(self, x: jax.Array, axis: int) -> jax.Array:
    """Q or P along an axis."""
    x = jnp.moveaxis(x, axis, -1)
    y = x * self._last(self.diagonal, x) + x[..., -1:] * self._last(self.column, x)
    if self.symmetric:
      y = y.at[..., -1].add(x @ self.column)
    return jnp.moveaxis(y, -1, axis)

  def solve_adjoint(self, x: jax.Array, axis: int) -> jax.Array:
    """Q⁻ᵀ along an axis."""
    x = jnp.moveaxis(x, axis, -1)
    y = x / self._last(self.diagonal, x)
    last = y[..., -1] - (y @ self.column) / self.diagonal[-1]
    return jnp.moveaxis(y.at[..., -1].set(last), -1, axis)

  def square(self) -> "Arrow":
    """QᵀQ."""
    diagonal = (self.diagonal**2).at[-1].add(jnp.sum(self.column**2))
    return Arrow(diagonal, self.diagonal * self.column, symmetric=True)


def arrow_identity(d: int, dtype: Any) -> Arrow:
  """The identity, (d, d). Raises a ValueError for a complex dtype."""
  check_real(dtype, "scan")
  return Arrow(jnp.ones(d, dtype), jnp.zeros(d, dtype))


def arrow_gram(x: jax.Array, axis: int) -> Arrow:
  """What of x_(i) x_(i)ᵀ lies on the diagonal and above it in the last column."""
  x = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
  column = x @ x[-1]
  return Arrow(jnp.sum(x * x, 1), column.at[-1].set(0))
