# SPDX-License-Identifier: Apache-2.0
"""What enters each linear layer of a linen model, for `bnp` and `gls`. The model stays as it is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dpsgd_optax.layers.record import LayerRecord, Window, merged

LAYER_INPUTS = "layer_inputs"
"""The collection of the records: in ``variable_axes`` of ``nn.scan`` and ``nn.vmap`` for the layers inside them."""
Recorder = Callable[..., LayerRecord | None]  # see `record` of `with_layer_inputs`


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
  """An option of a layer as one number for each axis: Flax also takes one int for all, and None for 1."""
  return (value,) * axes if isinstance(value, int) else (1,) * axes if value is None else tuple(value)


def _bias(module: Any) -> tuple[str, ...] | None:
  return ("bias",) if module.use_bias else None


def _dense(module: Any, x: jax.Array) -> LayerRecord | None:
  if per_axis(getattr(module, "batch_dims", ()), 1):
    return None
  axes = tuple(a % x.ndim for a in per_axis(getattr(module, "axis", -1), 1))
  x = jnp.moveaxis(x, axes, range(-len(axes), 0))
  shape = (*x.shape[x.ndim - len(axes) :], *per_axis(module.features, 1))
  return LayerRecord((x,), kernel_shape=shape, input_axes=len(axes), bias=_bias(module))


def _conv(module: Any, x: jax.Array) -> LayerRecord | None:
  if module.mask is not None:
    return None
  size = per_axis(module.kernel_size, 1)
  axes = len(size)
  dilation = per_axis(module.kernel_dilation, axes)
  padding = module.padding
  if not isinstance(padding, str):
    padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in per_axis(padding, axes))
  elif padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    pads = [(reach[0], 0)] if padding == "CAUSAL" else [(r // 2, (r + 1) // 2) for r in reach]
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}[padding]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - axes - 1) + pads + [(0, 0)], mode=mode)
    padding = "VALID"
  groups = module.feature_group_count
  window = Window(per_axis(module.strides, axes), padding, per_axis(module.input_dilation, axes), dilation, groups)
  shape = (*size, x.shape[-1] // groups, module.features)
  return LayerRecord((x,), kind="conv", kernel_shape=shape, input_axes=axes + 1, bias=_bias(module), window=window)


def _embed(module: Any, ids: jax.Array) -> LayerRecord:
  return LayerRecord((ids,), kind="embed", kernel_shape=(module.num_embeddings, module.features))


_RECORDERS: dict[type, tuple[str, Recorder]] = {  # class ↦ (name of its kernel, recorder)
  nn.Dense: ("kernel", _dense),
  nn.DenseGeneral: ("kernel", _dense),
  nn.Conv: ("kernel", _conv),
  nn.Embed: ("embedding", _embed),
}


def with_layer_inputs(
  apply: Callable[..., Any],
  *,
  record: Mapping[type, tuple[str, Recorder]] | None = None,
  reduce: Callable[..., LayerRecord] | None = None,
) -> Callable[..., Any]:
  """A linen model's `apply` that also returns what enters each linear layer.

  Recorded are `nn.Dense`, `nn.DenseGeneral` (and so attention), `nn.Conv` and `nn.Embed`, by `nn.intercept_methods`
  and `sow`. Inside `nn.remat` the inputs are kept and not recomputed. Inside `nn.scan`, `nn.vmap` and `nn.RNN` list
  the collection, `variable_axes={"params": 0, "layer_inputs": 0}`, else the layers there are missing. A layer that is
  called several times has one record with the inputs of all calls.

  Args:
    apply: `model.apply`.
    record: layers of your own: class ↦ (name of its kernel, recorder), where recorder(module, *args, **kwargs) of its
      `__call__` returns a `LayerRecord` whose `bias` is a tuple with the name of the bias, or None.
    reduce: what leaves the forward pass in place of the inputs: `dpsgd_optax.layers.second_moments` for `gls`,
      `channel_moments` for `bnp`. Saves memory if the activations are not kept anyway (remat, accumulation).

  Returns:
    `forward(variables, *args, **kwargs) -> (what apply returns, inputs)`, where `inputs` is a tree of `LayerRecord`,
    each in the place of its kernel in the params.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from dpsgd_optax import training
    >>> x, model = jnp.ones((4, 3)), nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(1)])
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> pred, inputs = training.with_layer_inputs(model.apply)({"params": params}, x)
    >>> [record.inputs[0].shape for record in (inputs["layers_0"]["kernel"], inputs["layers_2"]["kernel"])]
    [(4, 3), (4, 5)]
  """
  recorders = {**_RECORDERS, **(record or {})}

  def interceptor(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    known = next((recorders[c] for c in type(context.module).__mro__ if c in recorders), None)
    if known is None or context.method_name != "__call__" or context.module.is_initializing():
      return out
    kernel, recorder = known
    seen = recorder(context.module, *args, **kwargs)
    if seen is not None:  # where the collection is not lifted, `sow` does nothing
      context.module.sow(LAYER_INPUTS, kernel, jax.tree.map(jax.lax.stop_gradient, seen))
    return out

  def forward(variables, *args, mutable=False, **kwargs):
    listed = [mutable] if isinstance(mutable, str) else list(mutable or [])
    with nn.intercept_methods(interceptor):
      out, state = apply(variables, *args, mutable=[*listed, LAYER_INPUTS], **kwargs)
    inputs = _collected(state.pop(LAYER_INPUTS, {}), variables.get("params", {}), reduce)
    return (out if mutable is False else (out, state)), inputs

  return forward


def _collected(sown: Any, params: Any, reduce: Callable[..., LayerRecord] | None) -> Any:
  """{…: {kernel: (record of each call)}} → {…: {kernel: record}}, biases named by their whole path."""
  found = {}
  for path, calls in flatten_dict(sown).items():
    one = merged(calls)
    found[path] = dataclasses.replace(one, bias=one.bias and (*path[:-1], *one.bias))
  if reduce is not None:
    shapes = {path: jnp.shape(x) for path, x in flatten_dict(params).items() if path in found}
    layers = {path: shape[: len(shape) - len(found[path].kernel_shape)] for path, shape in shapes.items()}
    found = {path: reduce(record, layers[path]) for path, record in found.items()}
  return unflatten_dict(found)
