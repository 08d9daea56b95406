# SPDX-License-Identifier: Apache-2.0
"""A layer as matrices: kernel and bias as one, [W; b], the rows that enter it, and the gradients of its outputs.

Notation as in `record`; d counts the 1 for the bias where there is one. The leading axis of every array is over the
matrices of the layer: those of a stack of layers, and the groups of a convolution.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax.layers.find import Layer
from dpsgd_optax.layers.moments import extended, gradients_of, gram, rows_of
from dpsgd_optax.layers.record import LayerRecord


def _transposed(layer: Layer, kernel: jax.Array, axes: Iterable[int]) -> jax.Array:
  depth = len(layer.stack)
  return jnp.transpose(kernel, (*range(depth), *(depth + a for a in axes)))


def as_matrix(layer: Layer, leaves: list[jax.Array]) -> jax.Array:
  """[W; b]: (matrices, d, k)."""
  copies, groups = math.prod(layer.stack), layer.groups
  kernel = leaves[layer.kernel].astype(layer.dtype)
  if layer.layout is not None:
    kernel = _transposed(layer, kernel, layer.layout)
  split = lambda x, d: jnp.moveaxis(x.reshape(copies, d, groups, -1), 2, 1).reshape(copies * groups, d, -1)
  bias = [] if layer.bias is None else [split(leaves[layer.bias].astype(layer.dtype), 1)]
  return jnp.concatenate([split(kernel, layer.width), *bias], axis=1)


def write_layer(layer: Layer, kernel: jax.Array, bias: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes W and b, (matrices, width, k) and (matrices, 1, k), over their leaves; a layer without bias has no b."""
  copies, groups = math.prod(layer.stack), layer.groups
  join = lambda x: jnp.moveaxis(x.reshape(copies, groups, x.shape[1], -1), 1, 2)
  as_leaf = lambda x, i: x.reshape(jnp.shape(leaves[i])).astype(jnp.result_type(leaves[i]))
  kernel = join(kernel).reshape(*layer.stack, *layer.kernel_shape)
  if layer.layout is not None:
    kernel = _transposed(layer, kernel, np.argsort(layer.layout))
  leaves[layer.kernel] = as_leaf(kernel, layer.kernel)
  if layer.bias is not None:
    leaves[layer.bias] = as_leaf(join(bias), layer.bias)


def input_rows(layer: Layer, record: LayerRecord) -> jax.Array:
  """Ã, the rows x̃ (without a bias x) of all calls: (matrices, R, d)."""
  rows = jnp.concatenate([rows_of(record, x, layer.stack) for x in record.inputs], axis=1)
  return (rows if layer.bias is None else extended(rows)).astype(layer.dtype)


def input_moment(layer: Layer, record: LayerRecord) -> jax.Array:
  """S of those rows, (matrices, d, d)."""
  s = gram(record, layer.stack)
  return s if layer.bias is not None else s[:, :-1, :-1]


def output_gradients(layer: Layer, record: LayerRecord, needed_by: str) -> list[jax.Array]:
  """E of each call, (matrices, R, k)."""
  if record.gradients is None:
    raise ValueError(
      f"`{needed_by}` looks at the output gradients of the layer {layer.name!r}, which were not recorded. "
      f"Type `capture(loss, gradients=True)`, or leave out `{needed_by}`."
    )
  return [gradients_of(record, e, layer.stack) for e in record.gradients]
