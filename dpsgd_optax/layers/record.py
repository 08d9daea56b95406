# SPDX-License-Identifier: Apache-2.0
"""What enters each linear layer: one record, whoever provides it (linen, nnx, `capture`), and its sizes.

Notation
  x      an input row of a layer, (d,): the features of a dense layer, a patch of a convolution
  x̃      [x, 1], where the layer has a bias
  W      its kernel as a matrix (d, k): input axes first, output axes last
  n      examples in the batch
  R      rows in all: n for a dense layer, n · positions for a convolution, times the calls of a shared layer
  S      Σ_rows x̃ x̃ᵀ / R, the second moment of the extended input
  E      dloss/d(output), a row for each row of inputs: Σ_rows x̃ Eᵀ is the gradient of [W; b]

A convolution is the dense layer of its patches (arXiv:1602.01407), for each group one with d = window · channels /
groups. An embedding is the dense layer of one-hot rows, whose S is diagonal. Layers stacked by ``nn.scan`` or
``nn.vmap`` have a stacked kernel and stacked inputs and count as separate layers.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax


class Window(NamedTuple):
  """How a convolution moves over its input (channels last), as ``jax.lax.conv_general_dilated`` has it. Static.

  Attributes:
    strides, input_dilation, kernel_dilation: one int per spatial axis.
    padding: "SAME", "VALID", "SAME_LOWER", or a pair (low, high) per spatial axis.
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
  """The inputs of one linear layer in one forward pass: a pytree, which stands where its kernel stands in the params.

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
    rows, examples, positions, calls: R, n, output positions per example and calls of the layer, once the inputs are
      gone; otherwise 0.
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
  first = records[0]
  gradients = None if first.gradients is None else sum((r.gradients for r in records), ())
  if any((r.kernel_shape, r.window) != (first.kernel_shape, first.window) for r in records):
    raise ValueError(f"calls of one layer with kernels {[r.kernel_shape for r in records]}: they must agree.")
  return dataclasses.replace(first, inputs=sum((r.inputs for r in records), ()), gradients=gradients)


def is_record(x: Any) -> bool:
  return isinstance(x, LayerRecord)


class Extent(NamedTuple):
  """Sizes, as in :class:`LayerRecord`."""

  rows: int
  examples: int
  positions: int
  calls: int


def extent(record: LayerRecord, stack: tuple[int, ...] = ()) -> Extent:
  """The sizes of what one layer of the stack was given. Needs shapes only."""
  if not record.inputs:
    return Extent(record.rows, record.examples, record.positions, record.calls)
  shapes, copies = [x.shape for x in record.inputs], math.prod(stack)
  if record.window is None:
    features = 1 if record.kind == "embed" else record.width
    batches, places = [math.prod(shape) // (copies * features) for shape in shapes], [1] * len(shapes)
  else:
    space = len(record.kernel_shape) - 1  # and channels
    batches = [math.prod(shape[:-space]) // copies for shape in shapes]
    places = [math.prod(output_space(record, shape[-space:-1])) for shape in shapes]
  return Extent(sum(map(math.prod, zip(batches, places, strict=True))), batches[0], places[0], len(shapes))


def _spread(sizes: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
  """Sizes once the entries are ``dilation`` apart."""
  return [(s - 1) * d + 1 if s else 0 for s, d in zip(sizes, dilation, strict=True)]


def pads(record: LayerRecord, space: tuple[int, ...]) -> list[tuple[int, int]]:
  """Padding per spatial axis as pairs."""
  window = record.window
  assert window is not None
  if not isinstance(window.padding, str):
    return list(window.padding)
  sizes = _spread(space, window.input_dilation), _spread(record.kernel_shape[:-2], window.kernel_dilation)
  return jax.lax.padtype_to_pads(*sizes, window.strides, window.padding)


def output_space(record: LayerRecord, space: tuple[int, ...]) -> tuple[int, ...]:
  """Spatial shape of the output of a convolution."""
  window = record.window
  assert window is not None
  sizes = _spread(space, window.input_dilation), _spread(record.kernel_shape[:-2], window.kernel_dilation)
  axes = zip(*sizes, pads(record, space), window.strides, strict=True)
  return tuple(max(0, (n + low + high - reach) // stride + 1) for n, reach, (low, high), stride in axes)
