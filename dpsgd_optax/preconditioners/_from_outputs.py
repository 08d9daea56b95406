# SPDX-License-Identifier: Apache-2.0
"""Least squares from the outputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import as_leaves, replica_axis
from dpsgd_optax.layers.find import find_layers, matched
from dpsgd_optax.layers.matrix import _rows_and_gradients
from dpsgd_optax.preconditioners._lift import over_matrices
from dpsgd_optax.preconditioners._per_layer import Group, _write, make_layer_buckets


def from_outputs(group: Group, spec: Any = None) -> Callable:
  """A ``direction`` for ``scale_by_preconditioner``: P g from the records, as P ÃᵀE, E the output gradients.

  It is P g if g = ÃᵀE, that is if nothing has changed the gradient on its way here. Then the gradient itself is not
  used, and XLA leaves out its product. Where it is dearer (more rows than outputs, embeddings) P g is taken.
  """
  assert group.factored is not None
  factored = group.factored

  def direction(apply, updates, params, *, fitted, layer_inputs=None, **extra):
    del params, extra
    if replica_axis() is not None:
      raise ValueError(
        "`from_outputs` makes the step from the output gradients of the local batch, which differ between the replicas "
        "of `data_parallel`. Type `from_outputs=False`."
      )
    layers = find_layers(updates, spec)
    records = dict(zip(layers, matched(layers, layer_inputs, updates), strict=True))
    leaves, treedef = jax.tree.flatten(apply(updates))
    for bucket in make_layer_buckets(layers, group):
      seen = [_rows_and_gradients(layer, records[layer]) for layer in bucket.layers]
      first, sizes = bucket.layers[0], {rows.shape[1] for rows, _ in seen}
      if len(sizes) == 1 and 0 < max(sizes) <= first.matrix[1]:
        rows, e = (as_leaves(jnp.concatenate(x) if len(x) > 1 else x[0]) for x in zip(*seen, strict=True))
        run = over_matrices(functools.partial(factored, first), bucket.size)
        a, b = run(fitted.state.buckets[bucket.name], rows, e)
        kernel, bias = (
          a[..., : first.width],
          a[..., first.width :],
        )  # apart: cutting [W; b] would be a copy of all of it
        _write(bucket, (kernel.mT @ b, bias.mT @ b), leaves)
    return jax.tree.unflatten(treedef, leaves)

  return direction
