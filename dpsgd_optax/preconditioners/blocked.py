# SPDX-License-Identifier: Apache-2.0
"""Long axes cut into blocks: a P of its own for each block of a large parameter."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax.base import Preconditioner, check
from dpsgd_optax.preconditioners._views import seen_as


def _ends(d: int, block_size: int) -> tuple[int, ...]:
  """Where an axis of length d is cut: as few parts as ``block_size`` allows, their lengths equal within one."""
  parts = -(-d // block_size)
  return tuple(itertools.accumulate(len(part) for part in np.array_split(np.empty(d), parts)))


def _cut(x: jax.Array, block_size: int) -> list[jax.Array]:
  """The blocks of an array, the last axis running fastest; a short or empty array is its only block."""
  blocks = [x]
  for axis, d in enumerate(x.shape):
    ends = _ends(d, block_size)[:-1] if d else ()
    blocks = [part for block in blocks for part in (jnp.split(block, ends, axis) if ends else [block])]
  return blocks


def _join(blocks: list[jax.Array], shape: tuple[int, ...], block_size: int) -> jax.Array:
  """The inverse of :func:`_cut`."""
  for axis in reversed(range(len(shape))):
    parts = max(1, -(-shape[axis] // block_size))
    if parts > 1:
      blocks = [jnp.concatenate(blocks[i : i + parts], axis) for i in range(0, len(blocks), parts)]
  return blocks[0]


def blocked(preconditioner: Preconditioner, block_size: int) -> Preconditioner:
  """``preconditioner`` on blocks: no axis of what it sees is longer than ``block_size``.

  This is for a vocabulary or a wide layer, where a dense factor would be too large and a diagonal one too weak. An axis
  of length d is cut into ⌈d / block_size⌉ parts whose lengths differ by one at most: with 1024, 50257 × 768 becomes 50
  blocks of 1005 or 1006 × 768. Each block has a P of its own; the curvature between blocks is left out. Blocks of equal
  or nearly equal shape, of all leaves, are fitted and applied as one stack. Dense factors of a d × d matrix hold 2 d²
  numbers at every ``block_size``; the flops of a fit are O(d² · block_size) in place of O(d³).

  Args:
    preconditioner: of any pytree, fitted on gradients or Hessian-vector products: ``kron()``, ``affine()``,
      ``damped_kron()``, … Static. The result has the parts that this one has.
    block_size: the longest axis of a block, at least 1. Static. Axes of stacked layers count as axes.

  Raises:
    ValueError: for a ``block_size`` below 1 or not an int, and what the inner one raises.

  Source: the blocks of distributed Shampoo, arXiv:2309.06497; there the last block is the smaller one.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.blocked(dpo.kron(max_skew=jnp.inf), 4)
    >>> state = p.init({"embedding": jnp.zeros((10, 4))})
    >>> {name: [q.shape for q in group.q] for name, group in state.buckets.items()}
    {'4x4_with_3x4_float32': [(3, 4, 4), (3, 4, 4)]}
  """
  whole = lambda x: isinstance(x, int) and x >= 1
  check(whole, block_size, "block_size", "a whole number, at least 1", "512 to 2048 is usual.")

  def cut(tree: Any) -> Any:
    return jax.tree.map(lambda x: _cut(x, block_size), tree)

  def join(blocks: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x, done: _join(done, jnp.shape(x), block_size), tree, blocks)

  return seen_as(preconditioner, cut, join)
