# SPDX-License-Identifier: Apache-2.0
"""Plain-array algebra of the Kronecker family: no trees, no keys, no state.

Notation
  x        a tensor of shape (d_1, …, d_k) with N elements
  q        one factor: (d, d) dense, (d,) diagonal, or an arrow-head (`structured.Arrow`)
  x ×_i q  multiply along axis i;  x_(i) the mode-i unfolding, d_i × N/d_i
  ᴴ        conjugate transpose
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.geometry.structured import Arrow, LowRank, arrow_gram


def along(q: jax.Array, axis: int, ndim: int) -> jax.Array:
  """The vector q as a tensor of ``ndim`` axes that lies along ``axis``."""
  return q.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def multiply(x: jax.Array, q: Any, axis: int) -> jax.Array:
  """x ×_axis q."""
  if isinstance(q, Arrow):
    return q.multiply(x, axis)
  if q.ndim == 1:
    return x * along(q, axis, x.ndim)
  letters = "abcdefghijkl"[: x.ndim]
  product = letters.replace(letters[axis], "z")
  return jnp.einsum(f"{letters},z{letters[axis]}->{product}", x, q)


def solve_adjoint(x: jax.Array, q: Any, axis: int) -> jax.Array:
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


def gram(x: jax.Array, axis: int, like: Any) -> Any:
  """x_(i) x_(i)ᴴ, (d, d), or what of it the factor ``like`` can use: its diagonal, (d,), or its arrow-head."""
  if isinstance(like, Arrow):
    return arrow_gram(x, axis)
  if like.ndim == 1:
    return jnp.sum(jnp.real(x * jnp.conj(x)), axis=[i for i in range(x.ndim) if i != axis])
  return cross_gram(x, x, axis)


def cross_gram(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
  """x_(i) y_(i)ᴴ, (d, d)."""
  letters = "abcdefghijkl"[: x.ndim]
  moved = letters.replace(letters[axis], "z")
  return jnp.einsum(f"{letters},{moved}->{letters[axis]}z", x, jnp.conj(y))


def square(q: Any) -> Any:
  """qᴴ q, the factor of P that belongs to the factor q of Q."""
  if isinstance(q, Arrow):
    return q.square()
  if q.ndim == 1:
    return jnp.real(q * jnp.conj(q))
  return jnp.matmul(jnp.conj(q.T), q)


def sandwich(p: tuple[Any, ...], x: jax.Array) -> jax.Array:
  """P x = x ×_1 p_1 … ×_k p_k."""
  for i, factor in enumerate(p):
    x = multiply(x, factor, i)
  return x


def triu(e: Any) -> Any:
  """The upper triangle, diagonal included; an arrow-head is nothing else."""
  if isinstance(e, Arrow):
    return e
  return dataclasses.replace(e, upper=True) if isinstance(e, LowRank) else jnp.triu(e)


def hermitian(x: jax.Array) -> jax.Array:
  """(x + xᴴ) / 2."""
  return (x + jnp.conj(x.T)) / 2


def largest_entry(q: Any) -> jax.Array:
  """max |q_ij|. Of an arrow-head it bounds the relative change of the diagonal, and so keeps Q in its group."""
  if isinstance(q, Arrow):
    return jnp.maximum(jnp.max(jnp.abs(q.diagonal)), jnp.max(jnp.abs(q.column)))
  return jnp.max(jnp.abs(q))


def largest_diagonal(q: Any) -> jax.Array:
  """max |q_ii|."""
  if isinstance(q, Arrow):
    return jnp.max(jnp.abs(q.diagonal))
  return jnp.max(jnp.abs(q if q.ndim == 1 else jnp.diagonal(q)))


def balancing(factors: tuple[jax.Array, ...], size=largest_entry, scale: Any = None) -> jax.Array:
  """(scale · Π n_j)^(1/k) / n_i with n_i = size(q_i), (k,): times these all factors have the same size.

  Their Kronecker product is then times ``scale`` (None: 1). The roots come first, so that the product cannot overflow.
  All multiples are made in one array: as scalars each would be a kernel to compile.
  """
  k = len(factors)
  root = {1: lambda x: x, 2: jnp.sqrt}.get(k, lambda x: x ** (1 / k))
  multiples = jnp.ones(k) if scale is None else jnp.broadcast_to(root(scale), k)
  if k > 1:
    sizes = jnp.stack([size(q) for q in factors])
    roots = root(sizes)
    multiples = multiples * math.prod(jnp.roll(roots, i) for i in range(k)) / sizes
  return multiples


def scaled(factors: tuple[jax.Array, ...], multiples: jax.Array) -> tuple[jax.Array, ...]:
  """Each factor times its number."""
  return tuple(q * multiples[i].astype(q.dtype) for i, q in enumerate(factors))


def scale_smallest(factors: tuple[Any, ...], scale: jax.Array) -> tuple[Any, ...]:
  """Factors of scale · (p_1 ⊗ … ⊗ p_k): the one with the fewest entries is multiplied, the others stay."""
  sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in factors]
  smallest = sizes.index(min(sizes))
  return tuple(p * scale.astype(p.dtype) if i == smallest else p for i, p in enumerate(factors))


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """(…, n) as (product of the leading axes, n); a vector as a column. A conv kernel becomes (kh·kw·in, out)."""
  if len(shape) <= 1:
    return (math.prod(shape), 1)
  return (math.prod(shape[:-1]), shape[-1])


def eigen(factor: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
  """λ (d,) and V (d, d), None for a diagonal factor. Rounding may not make λ negative: at least ε max λ.

  So zeros that pad a factor have a λ that no power makes infinite; what is multiplied by it is zero there.
  """
  if factor.ndim == 1:
    return jnp.where(factor > 0, factor, jnp.max(factor)), None
  matrix = factor if isinstance(factor, jax.Array) else multiply(jnp.eye(len(factor.diagonal), dtype=dtype), factor, 0)
  values, vectors = jnp.linalg.eigh(matrix)
  return jnp.maximum(values, jnp.finfo(values.dtype).eps * values[-1]), vectors


def kron_power(p: tuple[Any, ...], x: jax.Array, exponent: Any, shift: Any = 0.0) -> jax.Array:
  """(p_1 ⊗ … ⊗ p_k + shift I)^exponent x; x has one axis per factor."""
  parts = [eigen(factor, x.dtype) for factor in p]
  spectrum = jnp.ones((), parts[0][0].dtype)
  for i, (values, vectors) in enumerate(parts):
    spectrum = spectrum[..., None] * along(values, i, i + 1)
    if vectors is not None:
      x = multiply(x, jnp.conj(vectors.T), i)
  x = x * ((spectrum + shift) ** exponent).astype(spectrum.dtype)
  for i, (_, vectors) in enumerate(parts):
    if vectors is not None:
      x = multiply(x, vectors, i)
  return x
