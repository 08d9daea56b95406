# SPDX-License-Identifier: Apache-2.0
"""Powers of a Kronecker product, by the eigenvectors of its factors.

Notation
  p_i = V_i diag(λ_i) V_iᴴ;   (p_1 ⊗ … ⊗ p_k + c I)^e = V diag((λ_1 ⊗ … ⊗ λ_k + c)^e) Vᴴ,  V = V_1 ⊗ … ⊗ V_k

Only penalties in preconditioned variables need them. Cost: one eigendecomposition of each dense factor.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.preconditioners._linalg import along, multiply


def eigen(factor: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
  """λ (d,) and V (d, d), None for a diagonal factor. Rounding may not make λ negative: at least ε max λ."""
  if factor.ndim == 1:
    return factor, None
  matrix = factor if isinstance(factor, jax.Array) else multiply(jnp.eye(len(factor.diagonal), dtype=dtype), factor, 0)
  values, vectors = jnp.linalg.eigh(matrix)
  return jnp.maximum(values, jnp.finfo(values.dtype).eps * values[-1]), vectors


def kron_power(p: tuple[Any, ...], x: jax.Array, exponent: Any, shift: Any = 0.0, precision: Any = None) -> jax.Array:
  """(p_1 ⊗ … ⊗ p_k + shift I)^exponent x; x has one axis per factor."""
  parts = [eigen(factor, x.dtype) for factor in p]
  spectrum = jnp.ones((), parts[0][0].dtype)
  for i, (values, vectors) in enumerate(parts):
    spectrum = spectrum[..., None] * along(values, i, i + 1)
    if vectors is not None:
      x = multiply(x, jnp.conj(vectors.T), i, precision)
  x = x * ((spectrum + shift) ** exponent).astype(spectrum.dtype)
  for i, (_, vectors) in enumerate(parts):
    if vectors is not None:
      x = multiply(x, vectors, i, precision)
  return x
