# SPDX-License-Identifier: Apache-2.0
"""From one layer to a pytree: kernel and bias as one matrix, layers of equal shape batched.

`find_layers`  which leaves are layers: from names and shapes, or from a tree of records
`matched`      the record of each layer, or an error that names the layer
`per_layer`    a group on one matrix [W; b] run once per distinct shape, under `vmap`
`from_outputs` P g by way of the output gradients, g = ÃᵀE, where that is cheaper
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import check_floating, working_dtype
from dpsgd_optax._trees.paths import names
from dpsgd_optax.layers.record import LayerRecord, extent, is_record

BIAS_OF = {"kernel": "bias", "w": "b"}
SPEC = (
  "`layers=jax.eval_shape(forward, variables, x)[1]` (Flax, `forward` of `training.with_layer_inputs`) or "
  "`layers=jax.eval_shape(lambda: capture(loss)(params, batch))[2]` (any JAX code: Equinox, Haiku), the shapes of what "
  "is recorded"
)


class Layer(NamedTuple):
  """One layer, or one stack of layers, among the leaves of a tree. Static, made anew from shapes at every trace.

  Attributes:
    name: for messages.
    path: of the kernel.
    kernel, bias: indices of their leaves; no bias in this tree: None.
    stack: shape of the leading axes over layers.
    shape: of one kernel, input axes first.
    input_axes: how many of them.
    layout: the axes of the leaf in that order, or None.
    groups: of a convolution.
    kind: "dense", "conv" or "embed"; None: not known before the first record.
    rows: R of the batch, 0 if not known.
    dtype: float32 at least.
  """

  name: str
  path: tuple[str, ...]
  kernel: int
  bias: int | None
  stack: tuple[int, ...]
  shape: tuple[int, ...]
  input_axes: int
  layout: tuple[int, ...] | None
  groups: int
  kind: str | None
  rows: int
  dtype: Any

  @property
  def matrices(self) -> int:
    return math.prod(self.stack) * self.groups

  @property
  def width(self) -> int:
    """d, without the 1 for the bias."""
    return math.prod(self.shape[: self.input_axes])

  @property
  def matrix(self) -> tuple[int, int]:
    """Shape of [W; b] of one group."""
    return self.width + (self.bias is not None), math.prod(self.shape[self.input_axes :]) // self.groups


class Leaf(NamedTuple):
  index: int
  shape: tuple[int, ...]
  dtype: Any


def leaves_by_name(tree: Any) -> tuple[dict[tuple[str, ...], Leaf], set[tuple[str, ...]]]:
  """Leaves by name, and the names of the holes that `optax.masked` and `optax.partition` leave."""
  check_floating(tree)
  hole = lambda x: isinstance(x, optax.MaskedNode)
  found, holes = {}, set()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=hole)[0]:
    if hole(leaf):
      holes.add(names(path))
    else:
      found[names(path)] = Leaf(len(found), jnp.shape(leaf), jnp.result_type(leaf))
  return found, holes


def records_by_name(records: Any) -> dict[tuple[str, ...], Any]:
  """Records, or arrays in their place, by the name of the node at which they stand."""
  return {names(path): x for path, x in jax.tree_util.tree_flatten_with_path(records, is_leaf=is_record)[0]}


def _hidden(path: tuple[str, ...], holes: set[tuple[str, ...]]) -> bool:
  """Whether the layer that stands there, or anything above it, is a hole."""
  return any(path[:i] in holes for i in range(len(path) + 1)) or any((*path, name) in holes for name in BIAS_OF)


def find_layers(tree: Any, spec: Any = None) -> list[Layer]:
  """The layers among the leaves of ``tree``.

  With ``spec``, a tree of records or of their shapes: those. Without: each leaf of two or more axes named kernel or w,
  with the bias beside it named bias or b; as many of the kernel's last axes belong to the output as the bias
  has, one if there is none.
  """
  leaves, holes = leaves_by_name(tree)
  if spec is None:
    return [_by_name(path, leaf, leaves) for path, leaf in leaves.items() if path and _is_kernel(path, leaf)]
  return [
    _by_record(path, record, leaves)
    for path, record in records_by_name(spec).items()
    if not _hidden(path, holes) and leaves
  ]


def without_embeddings(spec: Any) -> Any:
  """The records of the other layers."""
  return jax.tree.map(lambda x: None if is_record(x) and x.kind == "embed" else x, spec, is_leaf=is_record)


def _is_kernel(path: tuple[str, ...], leaf: Leaf) -> bool:
  return path[-1] in BIAS_OF and len(leaf.shape) > 1 and math.prod(leaf.shape) > 0


def _by_name(path: tuple[str, ...], leaf: Leaf, leaves: dict[tuple[str, ...], Leaf]) -> Layer:
  bias = leaves.get((*path[:-1], BIAS_OF[path[-1]]))
  outputs = 1 if bias is None or not 0 < len(bias.shape) < len(leaf.shape) else len(bias.shape)
  if bias is not None and bias.shape != leaf.shape[-outputs:]:
    bias = None
  dtype = working_dtype(leaf.dtype if bias is None else jnp.result_type(leaf.dtype, bias.dtype))
  inputs = len(leaf.shape) - outputs
  where = None if bias is None else bias.index
  return Layer("/".join(path), path, leaf.index, where, (), leaf.shape, inputs, None, 1, None, 0, dtype)


def _by_record(path: tuple[str, ...], record: Any, leaves: dict[tuple[str, ...], Leaf]) -> Layer:
  if not is_record(record):
    raise ValueError(f"`layers` needs a tree of records, got {record!r} at {'/'.join(path)}. Type {SPEC}.")
  leaf = leaves.get(path)
  if leaf is None:
    raise ValueError(
      f"`layers` names {'/'.join(path)!r}, but the params have no such leaf; they have {_listed(leaves)}."
    )
  depth = len(leaf.shape) - len(record.kernel_shape)
  bias = leaves.get(record.bias) if record.bias else None
  dtype = working_dtype(jnp.result_type(leaf.dtype, bias.dtype) if bias else leaf.dtype)
  stack = leaf.shape[:depth]
  return Layer(
    "/".join(path),
    path,
    leaf.index,
    None if bias is None else bias.index,
    stack,
    record.kernel_shape,
    record.input_axes,
    record.layout,
    record.groups,
    record.kind,
    extent(record, stack).rows,
    dtype,
  )


def _listed(paths: Any) -> str:
  found = ["/".join(path) or "a single array" for path in paths]
  return ", ".join(found[:8]) + (", …" if len(found) > 8 else "")


def matched(layers: list[Layer], records: Any, tree: Any) -> list[LayerRecord]:
  """The record of each layer. Raises for a layer without one, a record without a layer, and for shapes that differ."""
  leaves, holes = leaves_by_name(tree)
  given = records_by_name(records)
  found: dict[int, LayerRecord] = {}
  kernels = {layer.path: i for i, layer in enumerate(layers)}
  for path, record in given.items():
    if _hidden(path, holes):
      continue
    i = kernels.get(path, next((i for p, i in kernels.items() if p[:-1] == path), None))
    if i is None:
      _check_unused(path, record, leaves)
    else:
      found[i] = _checked(layers[i], record)
  missing = [layer.name for i, layer in enumerate(layers) if i not in found]
  if missing:
    raise ValueError(
      f"no inputs were recorded for the layers {missing}; there are records of [{_listed(given)}]. A layer inside "
      "`nn.scan`, `nn.vmap` or `nn.RNN` needs `variable_axes={'layer_inputs': 0}` there; a layer of a class of your "
      "own needs `record={MyLayer: …}`; `capture(loss)` sees every product with a parameter, but not inside of "
      f"`jax.lax.scan`, `while_loop` and `cond`. To leave it to a fallback, say which layers are recorded: {SPEC}, "
      "and `fallback=optax.sgd(0.1)`."
    )
  return [found[i] for i in range(len(layers))]


def _check_unused(path: tuple[str, ...], record: Any, leaves: dict[tuple[str, ...], Leaf]) -> None:
  """A record that belongs to no layer: an embedding is nothing to mind, all else is a mistake."""
  below = [p for p in leaves if p[: len(path)] == path]
  if not below:
    raise ValueError(
      f"`layer_inputs` has a record at {'/'.join(path)!r}, but the params have no such layer, only {_listed(leaves)}."
    )
  if not (is_record(record) and record.kind == "embed"):
    raise ValueError(
      f"`layer_inputs` has a record at {'/'.join(path)!r}, which by its name and shape is not a layer with a kernel "
      f"(named {' or '.join(BIAS_OF)}). Type {SPEC}."
    )


def _checked(layer: Layer, record: Any) -> LayerRecord:
  if not is_record(record):  # an array written by hand
    record = LayerRecord((jnp.asarray(record),), kernel_shape=layer.shape, input_axes=layer.input_axes)
  same = (record.kernel_shape, record.input_axes, record.layout, record.groups)
  if same != (layer.shape, layer.input_axes, layer.layout, layer.groups):
    raise ValueError(
      f"the layer {layer.name!r} is recorded with kernel {record.kernel_shape}, {record.input_axes} input axes and "
      f"{record.groups} groups; from its name and shape it was taken to have kernel {layer.shape}, {layer.input_axes} "
      f"input axes and {layer.groups} groups. A stacked or grouped layer, or one without bias whose output has several "
      f"axes, cannot be told from its shape. Type {SPEC}."
    )
  _check_width(layer, record)
  return record


def _check_width(layer: Layer, record: LayerRecord) -> None:
  shape = layer.shape[: layer.input_axes]
  for x in record.inputs:
    if record.kind == "embed":
      continue
    if record.window is not None:
      needed, came = (layer.shape[-2] * layer.groups,), jnp.shape(x)[-1:]
    else:
      needed, came = shape, jnp.shape(x)[-len(shape) :]
    if came != needed or jnp.shape(x)[: len(layer.stack)] != layer.stack:
      raise ValueError(
        f"the inputs of the layer {layer.name!r} must have shape ({', '.join(map(str, layer.stack))}…, "
        f"{', '.join(map(str, needed))}), got {jnp.shape(x)}."
      )
