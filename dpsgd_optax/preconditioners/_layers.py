# SPDX-License-Identifier: Apache-2.0
"""From one layer to a pytree: kernel and bias as one matrix, layers of equal shape batched.

`find_layers`  which leaves are layers: from names and shapes, or from a tree of records
`matched`      the record of each layer, or an error that names the layer
`per_layer`    a group on one matrix [W; b] run once per distinct shape, under `vmap`
`from_outputs` P g by way of the output gradients, g = ÃᵀE, where that is cheaper
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._replicas import replica_axis
from dpsgd_optax._split import as_leaves
from dpsgd_optax.base import Preconditioner, working_dtype
from dpsgd_optax.layers import LayerRecord, extended, extent, gradients_of, is_record, names, rows_of
from dpsgd_optax.preconditioners._lift import LiftState, _match, make_buckets, over_matrices

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


def _leaves(tree: Any) -> tuple[dict[tuple[str, ...], Leaf], set[tuple[str, ...]]]:
  """Leaves by name, and the names of the holes that `optax.masked` and `optax.partition` leave."""
  make_buckets(tree)  # for its message about integer leaves
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
  leaves, holes = _leaves(tree)
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


# -- records ----------------------------------------------------------------------------------------------------------


def matched(layers: list[Layer], records: Any, tree: Any) -> list[LayerRecord]:
  """The record of each layer. Raises for a layer without one, a record without a layer, and for shapes that differ."""
  leaves, holes = _leaves(tree)
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


# -- matrices ---------------------------------------------------------------------------------------------------------


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


# -- the lift ---------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
  """A preconditioner of one matrix [W; b], which is told what the layer is.

  Attributes:
    init: (layer) -> state of one matrix.
    observe: (layer, record) -> statistics of its matrices, each array with that leading axis.
    fit: (layer, state, statistics, *, damping) -> state, of one matrix.
    apply: (layer, state, x) -> P x, of one matrix.
    kind: (layer) -> a word; layers of equal shape and word are batched.
    factored: (layer, state, rows, e) -> (a, b) with P rowsᵀ e = aᵀ b, of one matrix; for `from_outputs`.
  """

  init: Callable
  observe: Callable
  fit: Callable
  apply: Callable
  kind: Callable = lambda layer: ""
  factored: Callable | None = None


def running_weight(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
  """Weight of the new value in a debiased running mean: (1 − ρ) / (1 − ρᵗ), t = count + 1; exactly 1 at first."""
  log = jnp.log(jnp.asarray(decay, dtype))
  return jnp.expm1(log) / jnp.expm1((count + 1).astype(dtype) * log)


class LayerBucket(NamedTuple):
  """Layers of one shape, for `_lift.match`."""

  name: str
  layers: tuple[Layer, ...]

  @property
  def size(self) -> int:
    return sum(layer.matrices for layer in self.layers)


def make_layer_buckets(layers: list[Layer], group: Group) -> list[LayerBucket]:
  found: dict[str, list[Layer]] = {}
  for layer in layers:
    words = ["x".join(map(str, layer.matrix)), jnp.dtype(layer.dtype).name, group.kind(layer)]
    words.append("bias" if layer.bias is not None else "")
    found.setdefault("_".join(filter(None, words)), []).append(layer)
  return [LayerBucket(name, tuple(members)) for name, members in found.items()]


def per_layer(group: Group, spec: Any = None) -> Preconditioner:
  """One P for each layer, kernel and bias together; all other leaves keep their updates.

  Args:
    group: on one matrix.
    spec: tree of records or of their shapes; None: layers are told by name and shape, see `find_layers`.
  """

  def init(params):
    buckets = make_layer_buckets(find_layers(params, spec), group)
    if not buckets:
      return LiftState(jnp.zeros(()))
    repeat = lambda size, state: jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)).copy(), state)
    return LiftState({b.name: repeat(b.size, group.init(b.layers[0])) for b in buckets})

  def fit(state, observation, *, key, damping):
    del key
    layers = find_layers(observation.like, spec)
    records = dict(zip(layers, matched(layers, observation.records, observation.like), strict=True))
    buckets = make_layer_buckets(layers, group)
    _match(state, buckets)
    new = {}
    for bucket in buckets:
      seen = [group.observe(layer, records[layer]) for layer in bucket.layers]
      seen = jax.tree.map(lambda *parts: as_leaves(jnp.concatenate(parts) if len(parts) > 1 else parts[0]), *seen)
      one = functools.partial(group.fit, bucket.layers[0], damping=damping)
      new[bucket.name] = over_matrices(one, bucket.size)(state.buckets[bucket.name], seen)
    return LiftState(new) if buckets else state

  def apply(state, updates):
    layers = find_layers(updates, spec)
    leaves, treedef = jax.tree.flatten(updates)
    buckets = make_layer_buckets(layers, group)
    _match(state, buckets)
    for bucket in buckets:
      parts = [as_matrix(layer, leaves) for layer in bucket.layers]
      x = as_leaves(parts[0] if len(parts) == 1 else jnp.concatenate(parts))
      run = over_matrices(functools.partial(group.apply, bucket.layers[0]), bucket.size)
      done = run(state.buckets[bucket.name], x)
      width = bucket.layers[0].width
      _write(bucket, (done[..., :width, :], done[..., width:, :]), leaves)
    return jax.tree.unflatten(treedef, leaves)

  return Preconditioner(init, fit, apply)


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


def _write(bucket: LayerBucket, done: tuple[jax.Array, jax.Array], leaves: list[jax.Array]) -> None:
  """The kernels and biases of a bucket over the leaves they came from."""
  kernels, biases = map(as_leaves, done)
  start = 0
  for layer in bucket.layers:
    mine = slice(start, start + layer.matrices)
    from_parts(layer, kernels[mine], biases[mine], leaves)
    start += layer.matrices


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


def with_fallback(core: Any, fallback: Any, spec: Any, *, vectors: bool) -> Any:
  """``core`` on the layers and ``fallback`` on all other leaves; without a fallback, an error that names them.

  Args:
    core: transform of the layers.
    fallback: complete transform of the rest, with its learning rate and sign, or None.
    spec: as in `per_layer`.
    vectors: whether leaves of fewer than two axes need a fallback too, or may go through ``core``.
  """
  covered = lambda tree: {i for layer in find_layers(tree, spec) for i in (layer.kernel, layer.bias)}

  def labels(tree):
    ours, treedef = covered(tree), jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, ["layers" if i in ours else "rest" for i in range(treedef.num_leaves)])

  def init(params):
    ours = covered(params)
    rest = ["/".join(path) for path, leaf in _leaves(params)[0].items() if _is_rest(path, leaf, ours, vectors)]
    if rest:
      raise ValueError(
        f"there is no layer that the leaves {rest} belong to. Name the transform that trains them, with its learning "
        f"rate: `fallback=optax.adam(1e-3)`. If there are kernels of layers among them, type {SPEC}."
      )
    return core.init(params)

  if fallback is None:
    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(core).update)
  parts = optax.partition({"layers": core, "rest": fallback}, labels)

  def update(updates, state, params=None, **extra):
    if params is not None:  # a model as params: its functions, opposite a None of the gradient, are no parameters
      is_none = lambda x: x is None
      params = jax.tree.map(lambda g, p: None if g is None else p, updates, params, is_leaf=is_none)
    return parts.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(parts.init, update)


def _is_rest(path: tuple[str, ...], leaf: Leaf, ours: set[int | None], vectors: bool) -> bool:
  if leaf.index in ours or math.prod(leaf.shape) == 0:
    return False
  return vectors or (len(leaf.shape) > 1 and path[-1:] != ("embedding",))
