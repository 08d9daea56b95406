# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a tree are layers, and which record belongs to each of them.

A layer is a kernel, together with its bias if it has one. Layers are told by the names and shapes of the leaves or,
where that is not enough, by `layers`: a tree of records, or of their shapes, as one forward pass gives it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import check_floating, working_dtype
from dpsgd_optax._trees.paths import is_hole, names
from dpsgd_optax.layers.record import LayerRecord, extent, is_record

Path = tuple[str, ...]
BIAS_OF = {"kernel": "bias", "w": "b"}
AXES = ("kernel_shape", "input_axes", "layout", "groups")  # what a layer and its record have to agree in
LAYERS_HINT = (
  "`layers=jax.eval_shape(forward, variables, x)[1]` (Flax, `forward` of `training.with_layer_inputs`) or "
  "`layers=jax.eval_shape(lambda: capture(loss)(params, batch))[2]` (any JAX code: Equinox, Haiku), the shapes of what "
  "is recorded"
)


class Layer(NamedTuple):
  """One layer, or one stack of layers, among the leaves of a tree. Static, made anew from shapes at every trace."""

  path: Path  # of the kernel
  kernel: int  # index of its leaf
  bias: int | None  # index of the bias, if it has one in this tree
  dtype: Any  # float32 at least
  kernel_shape: tuple[int, ...]  # of one layer; this and the rest as in `LayerRecord`
  input_axes: int
  stack: tuple[int, ...] = ()  # shape of the leading axes over layers
  layout: tuple[int, ...] | None = None
  groups: int = 1
  kind: str | None = None  # None: not known before the first record
  rows: int = 0  # of the batch that `layers` was made with; 0: not known

  @property
  def name(self) -> str:
    """For messages."""
    return "/".join(self.path)

  @property
  def leaves(self) -> list[int]:
    return [i for i in (self.kernel, self.bias) if i is not None]

  @property
  def matrices(self) -> int:
    return math.prod(self.stack) * self.groups

  @property
  def width(self) -> int:
    """d, without the 1 for the bias."""
    return math.prod(self.kernel_shape[: self.input_axes])

  @property
  def matrix(self) -> tuple[int, int]:
    """Shape of [W; b] of one group."""
    return self.width + (self.bias is not None), math.prod(self.kernel_shape[self.input_axes :]) // self.groups


class Leaf(NamedTuple):
  index: int
  shape: tuple[int, ...]
  dtype: Any


def leaves_by_name(tree: Any) -> tuple[dict[Path, Leaf], set[Path]]:
  """Leaves by name, and the names of the holes that `optax.masked` and `optax.partition` leave."""
  check_floating(tree)
  named = [(names(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)]
  leaves = enumerate((path, x) for path, x in named if not is_hole(x))
  found = {path: Leaf(i, jnp.shape(x), jnp.result_type(x)) for i, (path, x) in leaves}
  return found, {path for path, x in named if is_hole(x)}


def _records_by_name(records: Any) -> dict[Path, Any]:
  """Records, or arrays in their place, by the name of the node at which they stand."""
  return {names(path): x for path, x in jax.tree_util.tree_leaves_with_path(records, is_leaf=is_record)}


def _in_hole(path: Path, holes: set[Path]) -> bool:
  """Whether the layer that stands there, or anything above it, is a hole."""
  return any(path[:i] in holes for i in range(len(path) + 1)) or any((*path, name) in holes for name in BIAS_OF)


def find_layers(tree: Any, layers: Any = None) -> list[Layer]:
  """The layers among the leaves of ``tree``.

  With ``layers``, those that have a record there. Without, each leaf of two or more axes named kernel or w, with the
  bias beside it named bias or b; as many of the kernel's last axes belong to the output as the bias has, at least one.
  """
  leaves, holes = leaves_by_name(tree)
  if layers is None:
    kernel = lambda path, leaf: path and path[-1] in BIAS_OF and len(leaf.shape) > 1 and math.prod(leaf.shape) > 0
    return [_from_names(path, leaf, leaves) for path, leaf in leaves.items() if kernel(path, leaf)]
  records = _records_by_name(layers) if leaves else {}
  return [_from_record(path, record, leaves) for path, record in records.items() if not _in_hole(path, holes)]


def without_embeddings(layers: Any) -> Any:
  """The records of the other layers."""
  return jax.tree.map(lambda x: None if is_record(x) and x.kind == "embed" else x, layers, is_leaf=is_record)


def _layer(path: Path, kernel: Leaf, bias: Leaf | None, **more: Any) -> Layer:
  dtype = kernel.dtype if bias is None else jnp.result_type(kernel.dtype, bias.dtype)
  index = None if bias is None else bias.index
  return Layer(path, kernel.index, index, working_dtype(dtype), **more)


def _from_names(path: Path, leaf: Leaf, leaves: dict[Path, Leaf]) -> Layer:
  bias = leaves.get((*path[:-1], BIAS_OF[path[-1]]))
  outputs = 1 if bias is None or not 0 < len(bias.shape) < len(leaf.shape) else len(bias.shape)
  if bias is not None and bias.shape != leaf.shape[-outputs:]:
    bias = None
  return _layer(path, leaf, bias, kernel_shape=leaf.shape, input_axes=len(leaf.shape) - outputs)


def _from_record(path: Path, record: Any, leaves: dict[Path, Leaf]) -> Layer:
  if not is_record(record):
    raise ValueError(f"`layers` needs a tree of records, got {record!r} at {'/'.join(path)}. Type {LAYERS_HINT}.")
  leaf = leaves.get(path)
  if leaf is None:
    raise ValueError(
      f"`layers` names {'/'.join(path)!r}, but the params have no such leaf; they have {_listed(leaves)}."
    )
  stack = leaf.shape[: len(leaf.shape) - len(record.kernel_shape)]
  bias = leaves.get(record.bias) if record.bias else None
  as_recorded = {name: getattr(record, name) for name in (*AXES, "kind")}
  return _layer(path, leaf, bias, stack=stack, rows=extent(record, stack).rows, **as_recorded)


def _listed(paths: Any) -> str:
  found = ["/".join(path) or "a single array" for path in paths]
  return ", ".join(found[:8]) + (", …" if len(found) > 8 else "")


def records_of(layers: list[Layer], records: Any, tree: Any) -> list[LayerRecord]:
  """The record of each layer. Raises for a layer without one, a record without a layer, and for shapes that differ."""
  leaves, holes = leaves_by_name(tree)
  given = _records_by_name(records)
  found: dict[Layer, LayerRecord] = {}
  at_kernel, at_node = ({layer.path[:end]: layer for layer in reversed(layers)} for end in (None, -1))
  for path, record in given.items():
    if _in_hole(path, holes):
      continue
    if layer := at_kernel.get(path, at_node.get(path)):
      found[layer] = _checked(layer, record)
    else:
      _check_unused(path, record, leaves)
  if missing := [layer.name for layer in layers if layer not in found]:
    raise ValueError(
      f"no inputs were recorded for the layers {missing}; there are records of [{_listed(given)}]. A layer inside "
      "`nn.scan`, `nn.vmap` or `nn.RNN` needs `variable_axes={'layer_inputs': 0}` there; a layer of a class of your "
      "own needs `record={MyLayer: …}`; `capture(loss)` sees every product with a parameter, but not inside of "
      "`jax.lax.scan`, `while_loop` and `cond`. To leave it to a fallback, say which layers are recorded: "
      f"{LAYERS_HINT}, and `fallback=optax.sgd(0.1)`."
    )
  return [found[layer] for layer in layers]


def _check_unused(path: Path, record: Any, leaves: dict[Path, Leaf]) -> None:
  """A record that belongs to no layer: an embedding is nothing to mind, all else is a mistake."""
  if not any(p[: len(path)] == path for p in leaves):
    raise ValueError(
      f"`layer_inputs` has a record at {'/'.join(path)!r}, but the params have no such layer, only {_listed(leaves)}."
    )
  if not (is_record(record) and record.kind == "embed"):
    raise ValueError(
      f"`layer_inputs` has a record at {'/'.join(path)!r}, which by its name and shape is not a layer with a kernel "
      f"(named {' or '.join(BIAS_OF)}). Type {LAYERS_HINT}."
    )


def _checked(layer: Layer, record: Any) -> LayerRecord:
  """The record, or one made of an array that stands in its place, if it fits the layer."""
  if not is_record(record):
    record = LayerRecord((jnp.asarray(record),), kernel_shape=layer.kernel_shape, input_axes=layer.input_axes)
  if any(getattr(record, name) != getattr(layer, name) for name in AXES):
    raise ValueError(
      f"the layer {layer.name!r} is recorded with kernel {record.kernel_shape}, {record.input_axes} input axes and "
      f"{record.groups} groups; from its name and shape it was taken to have kernel {layer.kernel_shape}, "
      f"{layer.input_axes} input axes and {layer.groups} groups. A stacked or grouped layer, or one without bias whose "
      f"output has several axes, cannot be told from its shape. Type {LAYERS_HINT}."
    )
  if record.kind == "embed":
    return record
  needed = layer.kernel_shape[: layer.input_axes] if record.window is None else (layer.kernel_shape[-2] * layer.groups,)
  for shape in map(jnp.shape, record.inputs):
    if shape[-len(needed) :] != needed or shape[: len(layer.stack)] != layer.stack:
      raise ValueError(
        f"the inputs of the layer {layer.name!r} must have shape ({', '.join(map(str, layer.stack))}…, "
        f"{', '.join(map(str, needed))}), got {shape}."
      )
  return record
