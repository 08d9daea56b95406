# SPDX-License-Identifier: Apache-2.0
"""A jaxpr interpreter that finds the dense and convolutional layers of a loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from dpsgd_optax.layers.record import LayerRecord, Window

INLINED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
KEPT = {"convert_element_type", "copy", "copy_p", "reduce_precision"}  # the same array in another dtype
RESHAPED = {"reshape", "squeeze", "broadcast_in_dim", "expand_dims"}  # still the same bias


class Origin(NamedTuple):
  """A value that is a leaf.

  Attributes:
    leaf: its index.
    layout: the value's axes as axes of the leaf; None: reshaped, and so of use as a bias only.
  """

  leaf: int
  layout: tuple[int, ...] | None


@dataclasses.dataclass
class Call:
  """One product with a leaf.

  Attributes:
    leaf: index of the kernel.
    record: with the inputs, rows first.
    order: the axes of the output in the order of a record: (*stack, *rows, *out).
    bias: index of the leaf that is added to the output, if one is.
  """

  leaf: int
  record: LayerRecord
  order: tuple[int, ...]
  bias: int | None = None


def evaluate(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, values: dict) -> list:
  """The outputs of one equation, as a jaxpr of nothing else. The one place that depends on the version of JAX."""
  needed = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
  kept = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
  alone = jaxpr.replace(constvars=[], invars=needed, outvars=kept, eqns=[eqn], effects=eqn.effects)
  return list(zip(kept, core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(values[v] for v in needed)), strict=True))


def _shape(value: Any) -> tuple[int, ...]:
  return value.aval.shape


def _identity(layout: tuple[int, ...]) -> tuple[int, ...] | None:
  return None if layout == tuple(range(len(layout))) else layout


def _dense(eqn: core.JaxprEqn, side: int, origin: Origin, x: Any) -> Call | None:
  """x @ W, W @ x, and their like, with leading batch axes of W as a stack of layers."""
  contract, batch = eqn.params["dimension_numbers"]
  (of_x, of_w), (batch_x, batch_w) = (contract[1 - side], contract[side]), (batch[1 - side], batch[side])
  assert origin.layout is not None
  if tuple(origin.layout[a] for a in batch_w) != tuple(range(len(batch_w))):
    return None
  depth, axes = len(batch_w), len(_shape(eqn.invars[side]))
  free = [a for a in range(axes) if a not in (*of_w, *batch_w)]
  shape = _shape(eqn.invars[side])
  layout = tuple(origin.layout[a] - depth for a in (*of_w, *free))
  rows = [a for a in range(x.ndim) if a not in (*of_x, *batch_x)]
  inputs = jnp.transpose(x, (*batch_x, *rows, *of_x))
  record = LayerRecord(
    (jax.lax.stop_gradient(inputs),),
    kernel_shape=tuple(shape[a] for a in (*of_w, *free)),
    input_axes=len(of_w),
    layout=_identity(layout),
  )
  if not rows and depth == 0:  # a single example without a batch axis
    record = dataclasses.replace(record, inputs=(record.inputs[0][None],))
  first, second = (len(rows), len(free)) if side == 1 else (len(free), len(rows))
  left, right = range(depth, depth + first), range(depth + first, depth + first + second)
  order = (*range(depth), *left, *right) if side == 1 else (*range(depth), *right, *left)
  return Call(origin.leaf, record, order)


def _conv(eqn: core.JaxprEqn, side: int, origin: Origin, x: Any) -> Call | None:
  p = eqn.params
  if side != 1 or p["batch_group_count"] != 1:
    return None
  last = lambda spec: (spec[0], *spec[2:], spec[1])  # (batch, *space, channels)
  spec = p["dimension_numbers"]
  kernel = (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
  shape = tuple(_shape(eqn.invars[1])[a] for a in kernel)
  assert origin.layout is not None
  window = Window(
    tuple(p["window_strides"]),
    tuple(map(tuple, p["padding"])),
    tuple(p["lhs_dilation"]),
    tuple(p["rhs_dilation"]),
    p["feature_group_count"],
  )
  record = LayerRecord(
    (jax.lax.stop_gradient(jnp.transpose(x, last(spec.lhs_spec))),),
    kind="conv",
    kernel_shape=shape,
    input_axes=len(shape) - 1,
    layout=_identity(tuple(origin.layout[a] for a in kernel)),
    window=window,
  )
  return Call(origin.leaf, record, last(spec.out_spec))


def _rows_taken(eqn: core.JaxprEqn, side: int, origin: Origin, ids: Any) -> Call | None:
  """table[ids]: whole rows of the first axis."""
  numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn.invars[0])
  first = tuple(numbers.start_index_map)
  # a whole row begins at its first column, whatever the other indices say, if they are clipped
  rows = first == (0,) or (0 in first and eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP)
  whole = tuple(sizes) == (1, *shape[1:]) and tuple(numbers.collapsed_slice_dims) in ((), (0,))
  if side != 0 or not rows or not whole or origin.layout != tuple(range(len(shape))):
    return None
  return Call(origin.leaf, LayerRecord((ids[..., first.index(0)],), kind="embed", kernel_shape=shape), ())


PRODUCTS = {"dot_general": _dense, "conv_general_dilated": _conv, "gather": _rows_taken}


class Interpreter:
  """One evaluation of a jaxpr, with origins beside the values."""

  def __init__(self, shapes: Sequence[tuple[int, ...]], probes: Sequence[jax.Array | None] | None):
    self.shapes, self.probes = shapes, probes
    self.calls: list[Call] = []
    self.outputs: list[Any] = []
    self.hidden: set[int] = set()  # leaves that enter a loop or another body that is not walked

  def run(self, jaxpr: core.Jaxpr, consts: Sequence, values: Sequence, origins: Sequence, calls: Sequence) -> tuple:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, values, strict=True))
    origin = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}
    output = {v: c for v, c in zip(jaxpr.invars, calls, strict=True) if c is not None}
    known = lambda table, v: None if isinstance(v, core.Literal) else table.get(v)
    for eqn in jaxpr.eqns:
      came = [known(origin, v) for v in eqn.invars]
      after = [known(output, v) for v in eqn.invars]
      name, inner = eqn.primitive.name, eqn.params.get("jaxpr")
      if name in INLINED and inner is not None and any(o is not None for o in (*came, *after)):
        read = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
        body, of_body = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
        found = zip(eqn.outvars, *self.run(body, of_body, read, came, after), strict=True)
        for v, value, o, c in found:
          env[v] = value
          origin |= {} if o is None else {v: o}
          output |= {} if c is None else {v: c}
        continue
      env.update(evaluate(jaxpr, eqn, env))
      if not any(o is not None for o in (*came, *after)):
        continue
      out = eqn.outvars[0]
      if name in PRODUCTS:
        call = self._product(eqn, came, env)
        if call is not None:
          env[out] = self._probed(env[out], call)
          output[out] = call
          continue
      self._follow(eqn, came, after, origin, output)
    read = lambda table, v: None if isinstance(v, core.Literal) else table.get(v)
    results = [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]
    return results, [read(origin, v) for v in jaxpr.outvars], [read(output, v) for v in jaxpr.outvars]

  def _product(self, eqn, came, env) -> Call | None:
    for side in (1, 0):
      other = eqn.invars[1 - side]
      if came[side] is None or came[side].layout is None or came[1 - side] is not None:
        continue
      x = other.val if isinstance(other, core.Literal) else env[other]
      return PRODUCTS[eqn.primitive.name](eqn, side, came[side], x)
    return None

  def _probed(self, value, call: Call):
    """The output, with its probe added in the order of a record."""
    number = len(self.calls)
    self.calls.append(call)
    differentiable = call.record.kind != "embed"
    ordered = jax.eval_shape(lambda x: jnp.transpose(x, call.order), value) if differentiable else None
    self.outputs.append(ordered)
    if self.probes is None or not differentiable:
      return value
    back = sorted(range(len(call.order)), key=call.order.__getitem__)
    return value + jnp.transpose(self.probes[number], back)

  def _follow(self, eqn, came, after, origin, output) -> None:
    """Through equations that keep a leaf what it is, and an output on its way to its bias."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    first, made = came[0] if came else None, after[0] if after else None
    if name in KEPT or name in RESHAPED or name == "transpose":
      if first is not None:
        origin[out] = Origin(first.leaf, self._layout(eqn, first))
      if made is not None:
        output[out] = made
    elif name in ("add", "add_any"):
      for side in (0, 1):
        call, leaf = after[side], came[1 - side]
        if call is not None and leaf is not None and call.bias is None and self._is_bias(call, leaf):
          call.bias = leaf.leaf
    elif list(core.jaxprs_in_params(eqn.params)):
      self.hidden |= {o.leaf for o in came if o is not None}

  def _layout(self, eqn, first: Origin) -> tuple[int, ...] | None:
    if first.layout is None or eqn.primitive.name in RESHAPED:
      return None
    if eqn.primitive.name == "transpose":
      return tuple(first.layout[a] for a in eqn.params["permutation"])
    return first.layout

  def _is_bias(self, call: Call, leaf: Origin) -> bool:
    record, kernel = call.record, self.shapes[call.leaf]
    stack = kernel[: len(kernel) - len(record.kernel_shape)]
    wide = lambda shape: [n for n in shape if n != 1]  # of a convolution with channels first a bias is (out, 1, 1)
    return wide(self.shapes[leaf.leaf]) == wide((*stack, *record.kernel_shape[record.input_axes :]))
