# SPDX-License-Identifier: Apache-2.0
"""Arrow-head factors: upper triangular matrices that hold a diagonal and a last column, and nothing else.

Notation
  Q = [D c; 0 δ]     y_i = d_i x_i + c_i x_last (i < last), y_last = δ x_last
  P = QᵀQ            the same pattern, symmetric: diagonal d² with |c|² added at the end, last row and column d c

They are closed under products and inverses: the group of feature normalisation, x ↦ D x + c, if the last feature is the
constant 1. All work is O(d) per column.

Source: psgd_tf and legacy psgd_torch (normalisation preconditioner); the reverse arrow-head of usmanqadeer1/DPSGD.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.base import check_real


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrow:
  """Attributes:
  diagonal: (d,).
  column: (d,), the last column above the diagonal; its last entry is 0.
  symmetric: (static) the matrix P: the last column is the last row too.
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


def identity(d: int, dtype: Any) -> Arrow:
  check_real(dtype, "scan")
  return Arrow(jnp.ones(d, dtype), jnp.zeros(d, dtype))


def gram(x: jax.Array, axis: int) -> Arrow:
  """What of x_(i) x_(i)ᵀ lies on the diagonal and above it in the last column."""
  x = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
  column = x @ x[-1]
  return Arrow(jnp.sum(x * x, 1), column.at[-1].set(0))


def largest(e: Arrow) -> jax.Array:
  """The largest entry, which bounds the relative change of the diagonal, and so keeps Q in its group."""
  return jnp.maximum(jnp.max(jnp.abs(e.diagonal)), jnp.max(jnp.abs(e.column)))
