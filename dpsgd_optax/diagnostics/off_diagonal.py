# SPDX-License-Identifier: Apache-2.0
"""How diagonal the Hessian of a network is in its 1-D parameters, measured.

Notation
  H, d    one block of the Hessian, between the C entries of one tensor, and its diagonal
  1       the vector of ones
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.paths import fill_holes, names, with_holes
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.curvature.products import hvp


class Diagonality(NamedTuple):
  """How far a block of the Hessian is from diagonal.

  Attributes:
    share: (), ‖H − diag d‖ / ‖H‖ (Frobenius), in [0, 1]: 0 for a diagonal block.
    error: (), ‖H·1 − d‖ / ‖d‖: how wrong the row sums are in place of the diagonal.
    negative: (), the share of negative entries in d.
  """

  share: jax.Array
  error: jax.Array
  negative: jax.Array


def diagonality(
  loss: Callable[..., Any], params: Any, where: Where = None, has_aux: bool = False
) -> dict[str, Diagonality]:
  """The off-diagonal share of each tensor's own block of the Hessian: what SGD-PH takes for zero.

  Meant for norm layers, not for kernels: it takes a product for each entry, batched, and holds a block as a dense
  matrix. The loss is that of training: in train mode, on one batch. May be jitted.

  Args:
    loss: from the params to a real scalar, or to (scalar, aux) if ``has_aux``.
    params: where the Hessian is taken.
    where: the tensors to be measured, as for :func:`dpsgd_optax.sgd_ph`; None: all. Static.
    has_aux: whether ``loss`` returns auxiliary data, which are dropped.

  Returns:
    Path → :class:`Diagonality`. A leaf with leading axes (norm layers under ``nn.scan``) has these axes in its numbers:
    one block for each index into them. A block of zeros has share 0 and error 0.

  Raises:
    ValueError: if ``where`` fits nothing.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> mixed = lambda p: (p["scale"][0] + p["scale"][1]) ** 2 + jnp.sum(p["bias"] ** 2)
    >>> found = dpo.diagonality(mixed, {"scale": jnp.ones(2), "bias": jnp.ones(2)})
    >>> {name: (round(float(of.share), 3), float(of.error)) for name, of in found.items()}  # [[2, 2], [2, 2]]
    {'bias': (0.0, 0.0), 'scale': (0.707, 1.0)}
  """
  chosen = with_holes(params, selection(params, where))
  leaves, treedef = jax.tree.flatten(chosen)
  loss_of = lambda i: lambda x: loss(fill_holes(treedef.unflatten([*leaves[:i], x, *leaves[i + 1 :]]), params))
  found = {}
  for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(chosen)):
    x = jnp.asarray(x)
    if x.size:
      found["/".join(names(path))] = _measured(_blocks(hvp(loss_of(i), x, has_aux), x))
  return found


def _blocks(product: Callable, x: jax.Array) -> jax.Array:
  """(*lead, C, C): the blocks of the Hessian in a leaf (*lead, C), between the entries of one slice each."""
  lead, width = x.shape[:-1], x.shape[-1] if x.ndim else 1
  flat = jax.vmap(lambda e: product(e.reshape(x.shape)).reshape(-1))(jnp.eye(x.size, dtype=x.dtype))
  by_slice = flat.reshape(x.size // width, width, x.size // width, width)
  same = jnp.arange(x.size // width)
  return by_slice[same, :, same].reshape(*lead, width, width)


def _measured(block: jax.Array) -> Diagonality:
  d = jnp.diagonal(block, axis1=-2, axis2=-1)
  off = block - d[..., None] * jnp.eye(d.shape[-1], dtype=d.dtype)
  ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.where(a > 0, jnp.inf, 0))
  norm = lambda y: jnp.sqrt(jnp.sum(y**2, (-2, -1)))
  error = jnp.linalg.norm(jnp.sum(off, -1), axis=-1)
  return Diagonality(ratio(norm(off), norm(block)), ratio(error, jnp.linalg.norm(d, axis=-1)), jnp.mean(d < 0, -1))
