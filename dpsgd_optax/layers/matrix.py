# SPDX-License-Identifier: Apache-2.0
"""A layer's kernel and bias as one matrix, with the rows that enter it."""

import math

import jax
import jax.numpy as jnp

from dpsgd_optax.layers.find import Layer
from dpsgd_optax.layers.moments import extended, gradients_of, rows_of
from dpsgd_optax.layers.record import LayerRecord


def as_matrix(layer: Layer, leaves: list[jax.Array]) -> jax.Array:
  """[W; b] of all groups: (matrices, d + 1, k), or (matrices, d, k) without a bias."""
  copies, groups = math.prod(layer.stack), layer.groups
  kernel = leaves[layer.kernel].astype(layer.dtype)
  if layer.layout is not None:
    depth = len(layer.stack)
    kernel = jnp.transpose(kernel, (*range(depth), *(depth + a for a in layer.layout)))
  split = lambda x, d: jnp.moveaxis(x.reshape(copies, d, groups, -1), 2, 1).reshape(copies * groups, d, -1)
  matrix = split(kernel, layer.width)
  if layer.bias is None:
    return matrix
  return jnp.concatenate([matrix, split(leaves[layer.bias].astype(layer.dtype), 1)], axis=1)


def from_matrix(layer: Layer, x: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes [W; b] back over the leaves it came from."""
  from_parts(layer, x[:, : layer.width], x[:, layer.width :], leaves)


def from_parts(layer: Layer, kernel: jax.Array, bias: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes W and b, (matrices, d, k) and (matrices, 1, k), over the leaves they came from; b not where it has none."""
  copies, groups = math.prod(layer.stack), layer.groups
  join = lambda x: jnp.moveaxis(x.reshape(copies, groups, x.shape[1], -1), 1, 2)
  like = leaves[layer.kernel]
  kernel = join(kernel).reshape(*layer.stack, *layer.shape)
  if layer.layout is not None:
    depth = len(layer.stack)
    back = sorted(range(len(layer.layout)), key=layer.layout.__getitem__)
    kernel = jnp.transpose(kernel, (*range(depth), *(depth + a for a in back)))
  leaves[layer.kernel] = kernel.reshape(jnp.shape(like)).astype(jnp.result_type(like))
  if layer.bias is not None:
    like = leaves[layer.bias]
    leaves[layer.bias] = join(bias).reshape(jnp.shape(like)).astype(jnp.result_type(like))


def rows_in(layer: Layer, record: LayerRecord) -> jax.Array:
  """Ã, the rows of all calls: (matrices, R, d)."""
  parts = [rows_of(record, x, layer.stack) for x in record.inputs]
  rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
  return (rows if layer.bias is None else extended(rows)).astype(layer.dtype)


def gradients_out(layer: Layer, record: LayerRecord, needed_by: str) -> list[jax.Array]:
  """E of each call, (matrices, R, k)."""
  if record.gradients is None:
    raise ValueError(
      f"`{needed_by}` looks at the output gradients of the layer {layer.name!r}, which were not recorded. "
      f"Type `capture(loss, gradients=True)`, or leave out `{needed_by}`."
    )
  return [gradients_of(record, e, layer.stack) for e in record.gradients]


def _rows_and_gradients(layer: Layer, record: LayerRecord) -> tuple[jax.Array, jax.Array]:
  """Ã and E, a row of one for a row of the other; of an embedding no rows."""
  if record.kind == "embed":
    d, k = layer.matrix
    return jnp.zeros((layer.matrices, 0, d), layer.dtype), jnp.zeros((layer.matrices, 0, k), layer.dtype)
  e = jnp.concatenate(gradients_out(layer, record, "from_outputs"), axis=1).astype(layer.dtype)
  if not record.inputs:
    raise ValueError(
      f"`from_outputs` needs the inputs of the layer {layer.name!r}, but only their moments were recorded. Leave out "
      "`reduce`, or `from_outputs`."
    )
  return rows_in(layer, record), e
