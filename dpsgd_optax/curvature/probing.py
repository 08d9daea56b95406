# SPDX-License-Identifier: Apache-2.0
"""How the diagonal of the Hessian is probed: with which vectors, and which tensors in which step.

Notation
  H        Hessian of the loss, or its diagonal block of the tensors that are probed
  v, h     probe vector and h = H v; the estimate of the diagonal is v ⊙ h
  tensor   a leaf of the params, or each slice over the last axis of a leaf of higher rank (norm layers under `nn.scan`)

A probe is a function (key, product, active, alone) → Probe. `active` is a tree of floats: 1 where a diagonal is asked
for, 0 elsewhere. `alone` (static) says that only one tensor is active.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax.base import Probe, Product

DiagonalProbe = Callable[..., Probe]
Cycle = bool | Sequence[str | None]


def ones(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """v = 1: the row sums of H, which the released code of SGD-PH takes for its diagonal. One product.

  They are the diagonal iff the other entries of each row sum to zero; see :func:`dpsgd_optax.sgd_ph`.
  """
  del key, alone
  return Probe(active, product(active))


def rademacher(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """v = ±1 at random: E[v ⊙ Hv] is the diagonal of every H; the variance of entry i is Σ_{j≠i} H_ij². One product."""
  del alone
  leaves, treedef = jax.tree.flatten(active)
  ends = list(itertools.accumulate((x.size for x in leaves), initial=0))
  signs = jax.random.rademacher(key, (ends[-1],))
  parts = [signs[start:end] for start, end in itertools.pairwise(ends)]
  v = treedef.unflatten([x * part.reshape(x.shape).astype(x.dtype) for x, part in zip(leaves, parts, strict=True)])
  return Probe(v, product(v))


def exact(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """The diagonal itself: one product for each of its entries (of the longest tensor, if one is probed alone), batched.

  For tests and small networks: time and memory grow with the number of entries.
  """
  del key
  leaves, treedef = jax.tree.flatten(active)
  starts = list(itertools.accumulate((x.size for x in leaves), initial=0))
  widths = [x.shape[-1] if x.ndim else 1 for x in leaves]
  count = max(widths, default=0) if alone else starts[-1]
  # where each entry stands: in its tensor, of which one alone is active, or in all tensors as one vector
  places = [
    np.arange(x.size) % width if alone else start + np.arange(x.size)
    for x, width, start in zip(leaves, widths, starts, strict=False)
  ]

  def unit(j):
    at = lambda x, place: (place == j).reshape(x.shape).astype(x.dtype)
    return treedef.unflatten([x * at(x, place) for x, place in zip(leaves, places, strict=True)])

  def column(j):
    e = unit(j)
    return jax.tree.map(jnp.multiply, e, product(e))

  if not count:
    return Probe(active, active)
  columns = jax.vmap(column)(jnp.arange(count))
  return Probe(active, jax.tree.map(lambda x: jnp.sum(x, 0), columns))
