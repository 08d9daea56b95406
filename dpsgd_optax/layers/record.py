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


def merged(records: Any) -> LayerRecord:
  """One record of a layer that was called several times."""
  first, *others = records
  gradients = None if first.gradients is None else sum((r.gradients for r in records), ())
  if any(r.kernel_shape != first.kernel_shape or r.window != first.window for r in others):
    raise ValueError(f"calls of one layer with kernels {[r.kernel_shape for r in records]}: they must agree.")
  return dataclasses.replace(first, inputs=sum((r.inputs for r in records), ()), gradients=gradients)


def is_record(x: Any) -> bool:
  return isinstance(x, LayerRecord)


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
