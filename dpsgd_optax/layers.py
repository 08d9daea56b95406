# SPDX-License-Identifier: Apache-2.0
"""What enters each linear layer: one record for every provider (linen, nnx, `capture`), and its statistics.

Notation
  x      an input row of a layer, (d,): the features of a dense layer, a patch of a convolution
  x̃      [x, 1], where the layer has a bias
  W      its kernel as a matrix (d, k): input axes first, output axes last
  n      examples in the batch
  R      rows in all: n for a dense layer, n · positions for a convolution, times the calls of a shared layer
  S      Σ_rows x̃ x̃ᵀ / R, the second moment of the extended input
  E      dloss/d(output), a row for each row of inputs: x̃ᵀE summed over the rows is the gradient of [W; b]

A convolution is the dense layer of its patches (arXiv:1602.01407): one system, d = window · channels / groups, for each
group. An embedding is the dense layer of one-hot rows, whose S is diagonal. Layers stacked by ``nn.scan`` or
``nn.vmap`` have a stacked kernel and stacked inputs and count as separate layers.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax.base import working_dtype


class Window(NamedTuple):
  """How a convolution moves over its input (channels last), as ``jax.lax.conv_general_dilated`` has it. Static.

  Attributes:
    strides: one int per spatial axis.
    padding: "SAME", "VALID", "SAME_LOWER", or a pair (low, high) per spatial axis.
    input_dilation: one int per spatial axis.
    kernel_dilation: one int per spatial axis.
    groups: ``feature_group_count``.
  """

  strides: tuple[int, ...]
  padding: Any
  input_dilation: tuple[int, ...]
  kernel_dilation: tuple[int, ...]
  groups: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRecord:
  """The inputs of one linear layer in one forward pass; a pytree whose leaves are the arrays.

  A record stands where its kernel stands in the params.

  Attributes:
    inputs: one array per call of the layer: (*stack, *rows, *in_shape) for a dense layer, (*stack, *batch, *space,
      channels) for a convolution, integers (*stack, *rows) for an embedding. Empty if only moments are kept.
    gradients: E, one array per call, (*stack, *rows, *out_shape), or None if it was not asked for.
    gram: S, (matrices, d + 1, d + 1), or None; see :func:`second_moments`.
    mean, square: means of x and x² by input feature, (matrices, d), or None; see :func:`channel_moments`.
    kind: "dense", "conv" or "embed". Static, as are all that follow.
    kernel_shape: shape of the kernel of one layer: (*in_shape, *out_shape) after ``layout``.
    input_axes: how many axes of the kernel belong to the input.
    bias: key path of the bias in the params as a tuple of names, or None.
    layout: axes of the kernel in the order (input, output), if it is kept in another; None: it is in that order.
    window: of a convolution; otherwise None.
    rows, examples, positions: R, n and output positions per example, once the inputs are gone; otherwise 0.
    calls: of the layer, once the inputs are gone; otherwise 0.
  """

  inputs: tuple[jax.Array, ...]
  gradients: tuple[jax.Array, ...] | None = None
  gram: jax.Array | None = None
  mean: jax.Array | None = None
  square: jax.Array | None = None
  kind: str = dataclasses.field(default="dense", metadata={"static": True})
  kernel_shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
  input_axes: int = dataclasses.field(default=1, metadata={"static": True})
  bias: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
  layout: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
  window: Window | None = dataclasses.field(default=None, metadata={"static": True})
  rows: int = dataclasses.field(default=0, metadata={"static": True})
  examples: int = dataclasses.field(default=0, metadata={"static": True})
  positions: int = dataclasses.field(default=0, metadata={"static": True})
  calls: int = dataclasses.field(default=0, metadata={"static": True})

  @property
  def groups(self) -> int:
    return self.window.groups if self.window else 1

  @property
  def width(self) -> int:
    """d, of one group."""
    return math.prod(self.kernel_shape[: self.input_axes])


class Observation(NamedTuple):
  """What ``layer_inputs()`` observes: the records, and the updates for their structure and shapes."""

  records: Any
  like: Any


def merged(records: Any) -> LayerRecord:
  """One record of a layer that was called several times."""
  first, *others = records
  gradients = None if first.gradients is None else sum((r.gradients for r in records), ())
  if any(r.kernel_shape != first.kernel_shape or r.window != first.window for r in others):
    raise ValueError(f"calls of one layer with kernels {[r.kernel_shape for r in records]}: they must agree.")
  return dataclasses.replace(first, inputs=sum((r.inputs for r in records), ()), gradients=gradients)


def names(path: Any) -> tuple[str, ...]:
  """A key path as names, alike for dicts, lists, dataclasses and Flax states (a variable's value counts as itself)."""
  if path and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def is_record(x: Any) -> bool:
  return isinstance(x, LayerRecord)


# -- the shape of a batch ---------------------------------------------------------------------------------------------


class Extent(NamedTuple):
  """Sizes of a record: R, n, positions per example, calls."""

  rows: int
  examples: int
  positions: int
  calls: int


def extent(record: LayerRecord, stack: tuple[int, ...] = ()) -> Extent:
  """The sizes of what one layer of the stack was given. Needs shapes only."""
  if not record.inputs:
    return Extent(record.rows, record.examples, record.positions, record.calls)
  copies = math.prod(stack)
  if record.window is None:
    features = 1 if record.kind == "embed" else record.width
    sizes = [math.prod(x.shape) // (copies * features) for x in record.inputs]
    return Extent(sum(sizes), sizes[0], 1, len(sizes))
  window = record.kernel_shape[:-2]
  batches = [math.prod(x.shape[: -len(window) - 1]) // copies for x in record.inputs]
  places = [math.prod(output_space(record, x.shape[-len(window) - 1 : -1])) for x in record.inputs]
  total = sum(b * p for b, p in zip(batches, places, strict=True))
  return Extent(total, batches[0], places[0], len(batches))


def pads(record: LayerRecord, space: tuple[int, ...]) -> list[tuple[int, int]]:
  """Padding per spatial axis as pairs."""
  window, sizes = record.window, record.kernel_shape[:-2]
  assert window is not None
  if not isinstance(window.padding, str):
    return list(window.padding)
  spread = lambda sizes, dilation: [(s - 1) * d + 1 if s else 0 for s, d in zip(sizes, dilation, strict=True)]
  dilated = spread(space, window.input_dilation)
  return jax.lax.padtype_to_pads(dilated, spread(sizes, window.kernel_dilation), window.strides, window.padding)


def output_space(record: LayerRecord, space: tuple[int, ...]) -> tuple[int, ...]:
  """Spatial shape of the output of a convolution."""
  window, sizes = record.window, record.kernel_shape[:-2]
  assert window is not None
  found = []
  for i, (low, high) in enumerate(pads(record, space)):
    padded = (space[i] - 1) * window.input_dilation[i] + 1 + low + high
    reach = (sizes[i] - 1) * window.kernel_dilation[i] + 1
    found.append(max(0, (padded - reach) // window.strides[i] + 1))
  return tuple(found)


# -- rows -------------------------------------------------------------------------------------------------------------


def patches(record: LayerRecord, x: jax.Array) -> jax.Array:
  """(batch, *space, channels) → (batch, *output space, window, channels), in the order of the kernel's axes.

  Slices, one for each offset of the window: the same numbers as ``jax.lax.conv_general_dilated_patches``, which
  computes them as a product and orders them (channels, window).
  """
  window, sizes = record.window, record.kernel_shape[:-2]
  assert window is not None
  space = x.shape[1:-1]
  padding = [(low, high, d - 1) for (low, high), d in zip(pads(record, space), window.input_dilation, strict=True)]
  padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
  out = output_space(record, space)
  slices = []
  for offset in np.ndindex(*sizes):
    start = [o * d for o, d in zip(offset, window.kernel_dilation, strict=True)]
    limit = [a + (p - 1) * s + 1 for a, p, s in zip(start, out, window.strides, strict=True)]
    ends = [0, *start, 0], [len(x), *limit, x.shape[-1]], [1, *window.strides, 1]
    slices.append(jax.lax.slice(padded, *ends))
  return jnp.stack(slices, axis=-2)


def rows_of(record: LayerRecord, x: jax.Array, stack: tuple[int, ...] = ()) -> jax.Array:
  """x of one call as rows: (stack · groups, rows, d), float32 at least."""
  x = jax.lax.stop_gradient(x)
  x = x.astype(working_dtype(x.dtype))
  copies, d = math.prod(stack), record.width
  if record.window is None:
    return x.reshape(copies, -1, d)
  axes, groups = len(record.kernel_shape) - 2, record.groups
  found = patches(record, x.reshape(-1, *x.shape[-axes - 1 :]))
  split = found.reshape(copies, -1, math.prod(record.kernel_shape[:-2]), groups, record.kernel_shape[-2])
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


# -- statistics -------------------------------------------------------------------------------------------------------


def gram(record: LayerRecord, stack: tuple[int, ...] = ()) -> jax.Array:
  """S of the extended input, (stack · groups, d + 1, d + 1), symmetric; the mean over all rows of all calls."""
  if record.gram is not None:
    return record.gram
  total = jnp.zeros(())
  for x in record.inputs:
    a = extended(rows_of(record, x, stack))
    total = total + jnp.einsum("mni,mnj->mij", a, a, precision="highest")
  return total / extent(record, stack).rows


def feature_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
  """Means of x and (x − mean)² by input feature, (stack · groups, d).

  Of a convolution: by channel, over batch and space, repeated for each offset of the window. Exact for the patches
  but for what the padding adds.
  """
  if record.mean is not None and record.square is not None:
    return record.mean, jnp.maximum(record.square - record.mean**2, 0)
  if not record.inputs:
    raise ValueError(
      "a record of second moments has no moments by channel. Type `reduce=channel_moments`, or no `reduce`."
    )
  copies = math.prod(stack)
  channels = record.width if record.window is None else record.kernel_shape[-2] * record.groups
  flat = [jax.lax.stop_gradient(x).astype(working_dtype(x.dtype)).reshape(copies, -1, channels) for x in record.inputs]
  x = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
  mean = jnp.mean(x, axis=1)
  variance = jnp.mean((x - mean[:, None]) ** 2, axis=1)
  if record.window is None:
    return mean, variance
  repeat = lambda m: jnp.broadcast_to(
    m.reshape(copies * record.groups, 1, -1),
    (copies * record.groups, math.prod(record.kernel_shape[:-2]), record.kernel_shape[-2]),
  ).reshape(copies * record.groups, -1)
  return repeat(mean), repeat(variance)


def without_inputs(record: LayerRecord, stack: tuple[int, ...], **moments: Any) -> LayerRecord:
  return dataclasses.replace(record, inputs=(), **moments, **extent(record, stack)._asdict())


def second_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> LayerRecord:
  """The record with S in place of the inputs, where S is the smaller: for ``reduce=`` of a provider, with ``gls``.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.layers import LayerRecord, second_moments
    >>> record = LayerRecord((jnp.ones((100, 3)),), kernel_shape=(3, 2))
    >>> second_moments(record).gram.shape
    (1, 4, 4)
  """
  size = extent(record, stack)
  if record.kind == "embed" or not record.inputs or size.rows * record.width <= (record.width + 1) ** 2:
    return record
  return without_inputs(record, stack, gram=gram(record, stack))


def channel_moments(record: LayerRecord, stack: tuple[int, ...] = ()) -> LayerRecord:
  """The record with the means of x and x² by feature in place of the inputs: for ``reduce=``, with ``bnp``.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.layers import LayerRecord, channel_moments
    >>> record = LayerRecord((jnp.ones((100, 3)),), kernel_shape=(3, 2))
    >>> channel_moments(record).mean.shape
    (1, 3)
  """
  if record.kind == "embed" or not record.inputs:
    return record
  mean, variance = feature_moments(record, stack)
  return without_inputs(record, stack, mean=mean, square=variance + mean**2)
