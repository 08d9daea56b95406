# SPDX-License-Identifier: Apache-2.0
"""Evaluates the jaxpr of a loss and finds the products with its parameters on the way.

A jaxpr is a list of equations. The interpreter runs them one after another and keeps two notes beside the values: which
leaf of the params a value still is, and which product with a leaf has made it. Such a product is a layer; a leaf that
is added to its result is the bias. Notation as in `capture`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dpsgd_optax.layers.record import LayerRecord, Window

INLINED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
KEPT = {"convert_element_type", "copy", "copy_p", "reduce_precision"}  # the same array in another dtype
RESHAPED = {"reshape", "squeeze", "broadcast_in_dim", "expand_dims"}  # still the same bias


class Origin(NamedTuple):
  """What says that a value is a leaf."""

  leaf: int  # its index
  layout: tuple[int, ...] | None  # the value's axes as axes of the leaf; None: reshaped, and so of use as a bias only


@dataclasses.dataclass
class Call:
  """One product with a leaf."""

  leaf: int  # index of the kernel
  record: LayerRecord
  order: tuple[int, ...]  # the axes of the output in the order of a record: (*stack, *rows, *out)
  bias: int | None = None  # index of the leaf that is added to the output


def evaluate(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, values: dict) -> list:
  """The outputs of one equation, as a jaxpr of nothing else. What depends on the version of JAX is here only."""
  needed = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
  kept = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
  alone = jaxpr.replace(constvars=[], invars=needed, outvars=kept, eqns=[eqn], effects=eqn.effects)
  return list(zip(kept, core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(values[v] for v in needed)), strict=True))


def _shape(atom: Any) -> tuple[int, ...]:
  return atom.aval.shape


def _values(table: dict, atoms: Sequence) -> list:
  return [v.val if isinstance(v, core.Literal) else table[v] for v in atoms]


def _noted(table: dict, atoms: Sequence) -> list:
  """What the table says of each atom; None where it says nothing."""
  return [None if isinstance(v, core.Literal) else table.get(v) for v in atoms]


def _record(x: jax.Array, shape: tuple[int, ...], inputs: int, layout: tuple[int, ...], **more: Any) -> LayerRecord:
  """Of a kernel of this shape, whose first axes are the inputs; they are the axes ``layout`` of its leaf."""
  kept = None if layout == tuple(range(len(layout))) else layout
  return LayerRecord((jax.lax.stop_gradient(x),), kernel_shape=shape, input_axes=inputs, layout=kept, **more)


def _dense(eqn: core.JaxprEqn, side: int, leaf: int, layout: tuple[int, ...], x: Any) -> Call | None:
  """x @ W, W @ x, and their like, with leading batch axes of W as a stack of layers."""
  contract, batch = eqn.params["dimension_numbers"]
  (of_x, of_w), (batch_x, batch_w) = (contract[1 - side], contract[side]), (batch[1 - side], batch[side])
  depth, shape = len(batch_w), _shape(eqn.invars[side])
  if tuple(layout[a] for a in batch_w) != tuple(range(depth)):
    return None
  free = [a for a in range(len(shape)) if a not in (*of_w, *batch_w)]
  rows = [a for a in range(x.ndim) if a not in (*of_x, *batch_x)]
  inputs = jnp.transpose(x, (*batch_x, *rows, *of_x))
  if not rows and depth == 0:  # a single example without a batch axis
    inputs = inputs[None]
  axes = (*of_w, *free)
  record = _record(inputs, tuple(shape[a] for a in axes), len(of_w), tuple(layout[a] - depth for a in axes))
  end, middle = depth + len(rows) + len(free), depth + (len(rows) if side == 1 else len(free))
  left, right = range(depth, middle), range(middle, end)
  return Call(leaf, record, (*range(depth), *left, *right) if side == 1 else (*range(depth), *right, *left))


def _conv(eqn: core.JaxprEqn, side: int, leaf: int, layout: tuple[int, ...], x: Any) -> Call | None:
  """A convolution of x with W, whatever the order of their axes."""
  p = eqn.params
  if side != 1 or p["batch_group_count"] != 1:
    return None
  channels_last = lambda spec: (spec[0], *spec[2:], spec[1])  # (batch, *space, channels)
  spec = p["dimension_numbers"]
  kernel = (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
  strides, of_input, of_kernel = (tuple(p[name]) for name in ("window_strides", "lhs_dilation", "rhs_dilation"))
  window = Window(strides, tuple(map(tuple, p["padding"])), of_input, of_kernel, p["feature_group_count"])
  inputs = jnp.transpose(x, channels_last(spec.lhs_spec))
  shape, axes = (tuple(of[a] for a in kernel) for of in (_shape(eqn.invars[1]), layout))
  record = _record(inputs, shape, len(shape) - 1, axes, kind="conv", window=window)
  return Call(leaf, record, channels_last(spec.out_spec))


def _rows_taken(eqn: core.JaxprEqn, side: int, leaf: int, layout: tuple[int, ...], ids: Any) -> Call | None:
  """table[ids]: whole rows of the first axis."""
  numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn.invars[0])
  first = tuple(numbers.start_index_map)
  # a whole row begins at its first column, whatever the other indices say, if they are clipped
  rows = first == (0,) or (0 in first and eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP)
  whole = tuple(sizes) == (1, *shape[1:]) and tuple(numbers.collapsed_slice_dims) in ((), (0,))
  if side != 0 or not rows or not whole or layout != tuple(range(len(shape))):
    return None
  return Call(leaf, LayerRecord((ids[..., first.index(0)],), kind="embed", kernel_shape=shape), ())


PRODUCTS = {"dot_general": _dense, "conv_general_dilated": _conv, "gather": _rows_taken}


class Interpreter:
  """One evaluation of a jaxpr, from the shapes of the leaves and an offset for each call, or none at all."""

  def __init__(self, shapes: Sequence[tuple[int, ...]], offsets: Sequence[jax.Array | None] | None):
    self.shapes, self.offsets = shapes, offsets
    self.calls: list[Call] = []
    self.outputs: list[Any] = []  # of each call shape and dtype, in the order of a record; None for rows of a table
    self.hidden: set[int] = set()  # leaves that enter a loop or another body that is not walked

  def run(self, jaxpr: core.Jaxpr, consts: Sequence, values: Sequence, origins: Sequence, calls: Sequence) -> tuple:
    """(outputs, origin of each, call that each is the output of) from the same of the inputs; None: of no leaf."""
    value = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
    origin, output = (dict(zip(jaxpr.invars, notes, strict=True)) for notes in (origins, calls))
    for eqn in jaxpr.eqns:
      came, after = _noted(origin, eqn.invars), _noted(output, eqn.invars)
      name, inner = eqn.primitive.name, eqn.params.get("jaxpr")
      of_a_leaf = any(note is not None for note in (*came, *after))
      if of_a_leaf and name in INLINED and inner is not None:
        body, of_body = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
        results = self.run(body, of_body, _values(value, eqn.invars), came, after)
        for table, found in zip((value, origin, output), results, strict=True):
          table.update(zip(eqn.outvars, found, strict=True))
        continue
      value.update(evaluate(jaxpr, eqn, value))
      call = self._product(eqn, came, value) if of_a_leaf and name in PRODUCTS else None
      if call is not None:
        (out,) = eqn.outvars
        value[out], output[out] = self._with_offset(value[out], call), call
      elif of_a_leaf:
        self._follow(eqn, came, after, origin, output)
    return _values(value, jaxpr.outvars), _noted(origin, jaxpr.outvars), _noted(output, jaxpr.outvars)

  def _product(self, eqn: core.JaxprEqn, came: list, value: dict) -> Call | None:
    for side in (1, 0):
      kernel, other = came[side], came[1 - side]
      if kernel is not None and kernel.layout is not None and other is None:
        return PRODUCTS[eqn.primitive.name](eqn, side, *kernel, *_values(value, [eqn.invars[1 - side]]))
    return None

  def _with_offset(self, value: jax.Array, call: Call) -> jax.Array:
    """The output of a call, noted as the next one, with its offset."""
    number = len(self.calls)
    self.calls.append(call)
    if call.record.kind == "embed":
      self.outputs.append(None)
      return value
    self.outputs.append(jax.eval_shape(lambda x: jnp.transpose(x, call.order), value))
    return value if self.offsets is None else value + jnp.transpose(self.offsets[number], np.argsort(call.order))

  def _follow(self, eqn: core.JaxprEqn, came: list, after: list, origin: dict, output: dict) -> None:
    """Through equations that keep a leaf what it is, and an output on its way to its bias."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    if name in KEPT or name in RESHAPED or name == "transpose":
      output[out] = after[0]
      if came[0] is not None:
        leaf, layout = came[0]
        if layout is not None and name == "transpose":
          layout = tuple(layout[a] for a in eqn.params["permutation"])
        origin[out] = Origin(leaf, None if name in RESHAPED else layout)
    elif name in ("add", "add_any"):
      for call, leaf in zip(after, reversed(came), strict=True):
        if call is not None and leaf is not None and call.bias is None and self._is_bias(call, leaf):
          call.bias = leaf.leaf
    elif list(core.jaxprs_in_params(eqn.params)):
      self.hidden |= {o.leaf for o in came if o is not None}

  def _is_bias(self, call: Call, leaf: Origin) -> bool:
    record, kernel = call.record, self.shapes[call.leaf]
    stack = kernel[: len(kernel) - len(record.kernel_shape)]
    wide = lambda shape: [n for n in shape if n != 1]  # of a convolution with channels first a bias is (out, 1, 1)
    return wide(self.shapes[leaf.leaf]) == wide((*stack, *record.kernel_shape[record.input_axes :]))
