# SPDX-License-Identifier: Apache-2.0
"""The norm estimate of psgd_torch 2.0, from its recorded random rows: the package has a deterministic bound instead."""

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny


def norm_estimate(a: jax.Array, block: jax.Array, *, skew: bool = False) -> jax.Array:
  """‖a‖ of a Hermitian positive (or skew) matrix, (d, d), by a block power iteration from given random rows, (k, d).

  Tighter than `norm_bound`, and 16 times its cost for 32 rows.
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
