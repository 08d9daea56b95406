# SPDX-License-Identifier: Apache-2.0
"""Bytes of a state: in all before it is allocated, and on one device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
  """Bytes of the optimizer state for these params, by ``jax.eval_shape``: nothing is allocated.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> dpo.state_bytes(optax.adam(1e-3), jnp.zeros(1000))
    8004
  """
  shapes = jax.eval_shape(lambda params: _raw(tx.init(params)), params)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays, the fullest of them, as they are sharded.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> dpo.diagnostics.bytes_per_device({"w": jnp.zeros((3, 4))})
    48
  """
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(_raw(tree)))


def _raw(tree: Any) -> Any:
  """Typed PRNG keys as the numbers they hold."""
  typed = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)
