# SPDX-License-Identifier: Apache-2.0
"""Statistics of what enters a layer, and of the gradients of what leaves it. Notation as in `record`.

``stack`` is the shape of the leading axes over layers, () for a single one. The leading axis of every result is over
matrices: the layers of the stack, times the groups of a convolution.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax.layers.record import LayerRecord, extent, output_space, pads


def _patches(record: LayerRecord, x: jax.Array) -> jax.Array:
  """(batch, *space, channels) → (batch, *output space, window, channels), a slice for each offset of the window.

  `jax.lax.conv_general_dilated_patches` computes them as a product, and in another order than the kernel's.
  """
  window, space = record.window, x.shape[1:-1]
  assert window is not None
  padding = [(low, high, d - 1) for (low, high), d in zip(pads(record, space), window.input_dilation, strict=True)]
  padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
  out = output_space(record, space)
  slices = []
  for offset in np.ndindex(*record.kernel_shape[:-2]):
    start = [o * d for o, d in zip(offset, window.kernel_dilation, strict=True)]
    limit = [a + (p - 1) * s + 1 for a, p, s in zip(start, out, window.strides, strict=True)]
    slices.append(jax.lax.slice(padded, [0, *start, 0], [len(x), *limit, x.shape[-1]], [1, *window.strides, 1]))
  return jnp.stack(slices, axis=-2)


def _working(x: jax.Array) -> jax.Array:
  """x in float32 at least, and constant to differentiation."""
  return jax.lax.stop_gradient(x).astype(working_dtype(x.dtype))


def rows_of(record: LayerRecord, x: jax.Array, stack: tuple[int, ...] = ()) -> jax.Array:
  """x of one call as rows: (stack · groups, rows, d)."""
  x, copies, d = _working(x), math.prod(stack), record.width
  if record.window is None:
    return x.reshape(copies, -1, d)
  (*window, channels, _), groups = record.kernel_shape, record.groups
  found = _patches(record, x.reshape(-1, *x.shape[-len(window) - 1 :]))
  split = found.reshape(copies, -1, math.prod(window), groups, channels)
  return jnp.transpose(split, (0, 3, 1, 2, 4)).reshape(copies * groups, -1, d)


def gradients_of(record: LayerRecord, e: jax.Array, stack: tuple[int, ...] = ()) -> jax.Array:
  """E of one call as rows: (stack · groups, rows, k)."""
  copies, groups = math.prod(stack), record.groups
  out = math.prod(record.kernel_shape[record.input_axes :])
  split = e.astype(working_dtype(e.dtype)).reshape(copies, -1, groups, out // groups)
  return jnp.moveaxis(split, 2, 1).reshape(copies * groups, -1, out // groups)


def extended(x: jax.Array) -> jax.Array:
  """[x, 1]."""
  return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def frequencies(record: LayerRecord, stack: tuple[int, ...]) -> jax.Array:
  """How often each entry of an embedding occurs: (stack, d), summing to 1."""
  copies, d = math.prod(stack), record.width
  ids = jnp.concatenate([x.reshape(copies, -1) for x in record.inputs], axis=1)
  count = jax.vmap(lambda i: jnp.zeros(d, jnp.float32).at[i].add(1.0, mode="drop"))(ids)
  return count / ids.shape[1]


def gram(record: LayerRecord, stack: tuple[int, ...] = ()) -> jax.Array:
  """S of the extended input, (stack · groups, d + 1, d + 1), symmetric; the mean over all rows of all calls."""
  if record.gram is not None:
    return record.gram
  if not record.inputs:
    raise ValueError("a record of channel moments has no second moments. Type `reduce=second_moments`, or none.")
  calls = (extended(rows_of(record, x, stack)) for x in record.inputs)
  total = sum((jnp.einsum("mni,mnj->mij", a, a, precision="highest") for a in calls), jnp.zeros(()))
  return total / extent(record, stack).rows


def feature_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
  """Means of x and (x − mean)² by input feature, (stack · groups, d).

  Of a convolution by channel, repeated for each offset of the window: that of the patches but for the padding.
  """
  if record.mean is not None and record.square is not None:
    return record.mean, jnp.maximum(record.square - record.mean**2, 0)
  if not record.inputs:
    raise ValueError("a record of second moments has no channel moments. Type `reduce=channel_moments`, or none.")
  copies = math.prod(stack)
  channels = record.width if record.window is None else record.kernel_shape[-2] * record.groups
  x = jnp.concatenate([_working(x).reshape(copies, -1, channels) for x in record.inputs], axis=1)
  mean = jnp.mean(x, axis=1)
  variance = jnp.mean((x - mean[:, None]) ** 2, axis=1)
  if record.window is None:
    return mean, variance
  matrices, shape = copies * record.groups, (math.prod(record.kernel_shape[:-2]), record.kernel_shape[-2])
  repeat = lambda m: jnp.broadcast_to(m.reshape(matrices, 1, -1), (matrices, *shape)).reshape(matrices, -1)
  return repeat(mean), repeat(variance)


def _without_inputs(record: LayerRecord, stack: tuple[int, ...], **moments: Any) -> LayerRecord:
  return dataclasses.replace(record, inputs=(), **moments, **extent(record, stack)._asdict())


def second_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> LayerRecord:
  """The record with S in place of the inputs where S is smaller, for ``reduce=`` of a provider, with ``gls``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> record = dpo.LayerRecord((jnp.ones((100, 3)),), kernel_shape=(3, 2))
    >>> dpo.layers.second_moments(record).gram.shape
    (1, 4, 4)
  """
  size = extent(record, stack)
  if record.kind == "embed" or not record.inputs or size.rows * record.width <= (record.width + 1) ** 2:
    return record
  return _without_inputs(record, stack, gram=gram(record, stack))


def channel_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> LayerRecord:
  """The record with the means of x and x² by feature in place of the inputs, for ``reduce=``, with ``bnp``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> record = dpo.LayerRecord((jnp.ones((100, 3)),), kernel_shape=(3, 2))
    >>> dpo.layers.channel_moments(record).mean.shape
    (1, 3)
  """
  if record.kind == "embed" or not record.inputs:
    return record
  mean, variance = feature_moments(record, stack)
  return _without_inputs(record, stack, mean=mean, square=variance + mean**2)
