# SPDX-License-Identifier: Apache-2.0
"""What enters each linear layer of an nnx model, for `bnp` and `gls`. The model stays as it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from dpsgd_optax.layers.record import LayerRecord, Window, merged
from dpsgd_optax.training.linen import per_axis


def call_with_layer_inputs(
  model: nnx.Module, *args: Any, reduce: Callable[..., LayerRecord] | None = None, **kwargs: Any
) -> tuple[Any, Any]:
  """Calls an nnx model and returns also what enters each linear layer.

  Recorded are `nnx.Linear`, `nnx.LinearGeneral` (and so attention) and `nnx.Conv`. nnx has no hooks: during the call
  their attributes `dot_general` and `conv_general_dilated` are functions that record. Inside `nnx.scan`, `nnx.vmap` and
  `nnx.remat` use `dpsgd_optax.capture`.

  Args:
    model: a live module: the argument of a loss under `nnx.value_and_grad`, or `nnx.merge(graphdef, params, …)`.
    *args, **kwargs: of the call.
    reduce: as for `with_layer_inputs`.

  Returns:
    (what the model returns, tree of `LayerRecord`), each record in the place of its kernel in `nnx.state(model)`.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> from flax import nnx
    >>> from dpsgd_optax import training
    >>> model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    >>> def loss(model):
    ...   pred, inputs = training.call_with_layer_inputs(model, x)
    ...   return jnp.mean((pred - 1.0) ** 2), inputs
    >>> optimizer = nnx.Optimizer(model, dpo.bnp(0.1), wrt=nnx.Param)
    >>> (value, inputs), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    >>> _ = optimizer.update(model, grads, layer_inputs=inputs)
    >>> inputs["kernel"].inputs[0].shape, bool(loss(model)[0] < value)
    ((4, 3), True)
  """
  sown: dict[tuple[str, ...], list[LayerRecord]] = {}
  changed = []
  try:
    for path, module in nnx.iter_modules(model):
      where = tuple(map(str, path))
      for kind, attribute, recording in _RECORDED:
        if isinstance(module, kind):
          changed.append((module, attribute, getattr(module, attribute)))
          calls = sown.setdefault((*where, "kernel"), [])
          bias = None if module.bias is None else (*where, "bias")
          setattr(module, attribute, recording(changed[-1][-1], module, bias, calls))
    out = model(*args, **kwargs)
  finally:
    for module, attribute, original in changed:
      setattr(module, attribute, original)
  reduce = reduce or (lambda record: record)
  return out, unflatten_dict({path: reduce(merged(calls)) for path, calls in sown.items() if calls})


def _recording_dot(dot_general: Callable, module: Any, bias: tuple[str, ...] | None, calls: list) -> Callable:
  dot_general = dot_general or jax.lax.dot_general

  def recording(x, kernel, dimension_numbers, **kwargs):
    (axes, _), (batch, _) = dimension_numbers
    if not batch:
      rows = jnp.moveaxis(jax.lax.stop_gradient(x), axes, range(-len(axes), 0))
      calls.append(LayerRecord((rows,), kernel_shape=kernel.shape, input_axes=len(axes), bias=bias))
    return dot_general(x, kernel, dimension_numbers, **kwargs)

  return recording


def _recording_conv(conv: Callable, module: Any, bias: tuple[str, ...] | None, calls: list) -> Callable:
  def recording(x, kernel, strides, padding, **kwargs):
    if module.mask is None:
      pads = padding if isinstance(padding, str) else tuple(map(tuple, padding))
      options = [kwargs[name] for name in ("lhs_dilation", "rhs_dilation", "feature_group_count")]
      window = Window(per_axis(strides, kernel.ndim - 2), pads, *options)
      layer = {"kernel_shape": kernel.shape, "input_axes": kernel.ndim - 1, "bias": bias, "window": window}
      calls.append(LayerRecord((jax.lax.stop_gradient(x),), kind="conv", **layer))
    return conv(x, kernel, strides, padding, **kwargs)

  return recording


_RECORDED: list[tuple[type, str, Callable]] = [  # class, the attribute that computes, its replacement
  (nnx.Linear, "dot_general", _recording_dot),
  (nnx.LinearGeneral, "dot_general", _recording_dot),
  (nnx.Conv, "conv_general_dilated", _recording_conv),
]
