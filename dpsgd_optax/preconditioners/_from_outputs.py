# SPDX-License-Identifier: Apache-2.0
"""The option `from_outputs` of `gls`, all of it: the step made from the gradients of the outputs.

The gradient of a layer is a product, g = ÃᵀE, and so is the step, P g = (P Ãᵀ) E. Made in this order, it does not need
g; where nothing else does either, XLA leaves out the product that makes g. Notation as in `least_squares`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.mesh import replica_axis
from dpsgd_optax.layers.find import Layer, find_layers, records_of
from dpsgd_optax.layers.matrix import input_rows, output_gradients
from dpsgd_optax.layers.record import LayerRecord
from dpsgd_optax.preconditioners._lift import over_matrices
from dpsgd_optax.preconditioners._per_layer import LayerMethod, layer_buckets, side_by_side, write_bucket
from dpsgd_optax.preconditioners.least_squares import LeastSquaresState


def step_from_outputs(method: LayerMethod, layers: Any = None) -> Callable:
  """A ``direction`` for ``scale_by_preconditioner``: P ÃᵀE from the records, which is P g if g = ÃᵀE.

  Anything that has changed the gradient on its way here is not seen. Where P ÃᵀE is dearer than P g (more rows than
  outputs, embeddings), P g is taken. The arguments are those of `per_layer`.
  """

  def direction(apply, updates, params, *, fitted, layer_inputs=None, **extra):
    del params, extra
    if replica_axis() is not None:
      raise ValueError(
        "`from_outputs` makes the step from the output gradients of the local batch, which differ between the replicas "
        "of `data_parallel`. Type `from_outputs=False`."
      )
    found = find_layers(updates, layers)
    records = dict(zip(found, records_of(found, layer_inputs, updates), strict=True))
    leaves, treedef = jax.tree.flatten(apply(updates))
    for bucket in layer_buckets(found, method):
      if any(records[layer].kind == "embed" for layer in bucket.layers):
        continue
      seen = [_rows_and_gradients(layer, records[layer]) for layer in bucket.layers]
      (_, outputs), sizes = bucket.layers[0].matrix, {rows.shape[1] for rows, _ in seen}
      if len(sizes) == 1 and 0 < max(sizes) <= outputs:
        rows, e = (side_by_side(*parts) for parts in zip(*seen, strict=True))
        a, b = over_matrices(_factors, bucket.size)(fitted.state.buckets[bucket.name], rows, e)
        width = bucket.layers[0].width  # W and b apart: to cut them from one product would be to copy it
        write_bucket(bucket, a[..., :width].mT @ b, a[..., width:].mT @ b, leaves)
    return jax.tree.unflatten(treedef, leaves)

  return direction


def _rows_and_gradients(layer: Layer, record: LayerRecord) -> tuple[jax.Array, jax.Array]:
  """Ã and E, a row of one for a row of the other."""
  e = jnp.concatenate(output_gradients(layer, record, "from_outputs"), axis=1).astype(layer.dtype)
  if not record.inputs:
    raise ValueError(
      f"`from_outputs` needs the inputs of the layer {layer.name!r}, but only their moments were recorded. Leave out "
      "`reduce`, or `from_outputs`."
    )
  return input_rows(layer, record), e


def _factors(state: LeastSquaresState, rows: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(a, b) with P ÃᵀE = aᵀb: (Ã(S + λI)⁻¹, E), or in the dual form, which was fitted to Ã, (Ã, (ÃÃᵀ/n + λI)⁻¹E)."""
  if state.rows is not None:
    e = state.inverse @ e
  else:
    rows = rows * state.inverse if state.inverse.ndim == 1 else rows @ state.inverse
  return rows, e if state.output_inverse is None else e @ state.output_inverse


def check_from_outputs(b1: Any, every: Any, decay: Any) -> None:
  """Raises for what needs an averaged gradient, or in the dual form the fit of another batch."""
  if b1 is not None or (decay is None and every != 1):
    raise ValueError(
      f"`from_outputs` makes the step from the output gradients of this batch, got b1={b1}, every={every}: there is no "
      "averaged gradient to precondition, and with `decay=None` no older fit to use. Type `b1=None` (and put "
      "`optax.trace` after it) and `every=1`."
    )


def fitted_always(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """``tx`` whose every step fits, whatever ``refresh`` says: outside ``lax.cond``, where XLA can leave out products."""

  def update(updates, state, params=None, *, refresh=None, **extra):
    del refresh
    return tx.update(updates, state, params, refresh=True, **extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)
