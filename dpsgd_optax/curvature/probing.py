# SPDX-License-Identifier: Apache-2.0
"""How ``hessian_diagonal`` estimates the diagonal of the Hessian: with which vectors.

Notation
  H        Hessian of the loss, or its diagonal block of the tensors that are probed
  v, h     probe vector and h = H v; the estimate of the diagonal is v ⊙ h
  tensor   a leaf of the params, or each slice over the last axis of a leaf of higher rank (norm layers under `nn.scan`)

A probe is a function (key, product, active, alone) → Probe. `product` is v ↦ H v. `active` is a tree of floats like v:
1 where the diagonal is asked for, 0 elsewhere. `alone` (static) says that only one tensor is active.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.draws import pieces
from dpsgd_optax.base import Probe, Product

DiagonalProbe = Callable[..., Probe]
"""A function (key, product, active, alone) -> Probe. ``product`` is v ↦ H v; ``active`` is a tree of floats like v, 1
where the diagonal is asked for; ``alone`` says that only one tensor is active."""
Cycle = bool | Sequence[str | None]  # which tensors are active in which fit, see `hessian_diagonal`


def ones(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """v = 1: the row sums of H, which the released code of SGD-PH takes for its diagonal. One product.

  They are the diagonal only if the other entries of each row sum to zero; see :func:`dpsgd_optax.sgd_ph`.
  """
  del key, alone
  return Probe(active, product(active))


def rademacher(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """v = ±1 at random: E[v ⊙ Hv] is the diagonal of every H; the variance of entry i is Σ_{j≠i} H_ij². One product."""
  del alone
  leaves, treedef = jax.tree.flatten(active)
  sizes = [x.size for x in leaves]
  signs = pieces(jax.random.rademacher(key, (sum(sizes),)), sizes)
  v = treedef.unflatten([x * part.reshape(x.shape).astype(x.dtype) for x, part in zip(leaves, signs, strict=True)])
  return Probe(v, product(v))


def exact(key: jax.Array, product: Product, active: Any, alone: bool) -> Probe:
  """The diagonal itself: one product for each of its entries (of the longest tensor, if one is probed alone), batched.

  For tests and small networks: time and memory grow with the number of entries.
  """
  del key
  leaves, treedef = jax.tree.flatten(active)
  if not leaves or not sum(x.size for x in leaves):
    return Probe(active, active)
  if alone:  # entries are numbered within each tensor, for all but one tensor are zero
    numbers = [np.arange(x.size) % (x.shape[-1] if x.ndim else 1) for x in leaves]
  else:  # through all tensors
    numbers = np.split(np.arange(sum(x.size for x in leaves)), np.cumsum([x.size for x in leaves])[:-1])

  def column(j):
    is_j = [(own == j).reshape(x.shape).astype(x.dtype) for x, own in zip(leaves, numbers, strict=True)]
    e = treedef.unflatten([x * one for x, one in zip(leaves, is_j, strict=True)])
    return jax.tree.map(jnp.multiply, e, product(e))

  columns = jax.vmap(column)(jnp.arange(1 + max(own.max() for own in numbers if own.size)))
  return Probe(active, jax.tree.map(lambda x: jnp.sum(x, 0), columns))
