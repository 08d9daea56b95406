# SPDX-License-Identifier: Apache-2.0
"""Inverses and Gram matrices of triangular matrices, by blocks: products are faster than solves."""

import math

import jax
import jax.numpy as jnp


def triangular_inverse(x: jax.Array, block: int = 32) -> jax.Array:
  """x⁻¹ of a lower triangular x, (d, d): diagonal blocks inverted together, then joined in pairs,

    [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹, C⁻¹].

  On a CPU faster than one solve with the identity, the more so the larger d, and as stable: Higham, Accuracy and
  Stability of Numerical Algorithms, §14.2.2.

  What is above the diagonal is not read. ``block`` (static) is the largest size left to a solve.
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
  """xᵀx of a lower triangular x, (d, d); where d > ``whole`` by halves, with half of the multiplications."""
  h = len(x) // 2
  product = lambda a, b: jnp.matmul(a.T, b, precision="highest")
  if len(x) <= whole:
    return product(x, x)
  left, corner = x[:, :h], x[h:, h:]
  below = product(corner, left[h:])
  return jnp.block([[product(left, left), below.T], [below, product(corner, corner)]])
