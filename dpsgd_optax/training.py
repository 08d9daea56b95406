# SPDX-License-Identifier: Apache-2.0
"""Flax and the training loop. The only module that imports Flax, and not imported by the package itself.

`TrainState` hands extra arguments (`value`, `value_fn`, `hvp`, ...) to transforms that need more than a gradient. Flax
NNX needs no such help: `nnx.Optimizer.update(model, grads, **extra)` forwards what it is given. Its transform sees pure
arrays; `hvp` and `value_fn` may be functions of the `nnx.State` that `nnx.split` gives, or of `nnx.as_pure` of it.

`host_cadence` chooses on the host which steps fit the preconditioner and which are judged, so that each kind of step is
a program of its own without `jax.lax.cond`.

`is_norm_param` tells the scales and shifts of norm layers from the other parameters, for `sgd_ph`; `WeightNorm` gives
nnx layers without normalization 1-D lengths (linen has `nn.WeightNorm`).

`with_layer_inputs` (linen) and `call_with_layer_inputs` (nnx) return what enters each linear layer beside the
prediction, for `bnp` and `gls`, and leave the model as it is.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state

from dpsgd_optax.base import forward_extra_args
from dpsgd_optax.layers import LayerRecord, Window, merged
from dpsgd_optax.selection import is_norm_param as is_norm_param

Schedule = Callable[[Any], Any]  # count ↦ probability of a fit


class TrainState(train_state.TrainState):
  """Flax's `TrainState`, whose `apply_gradients` forwards extra arguments to the transform.

  A drop-in for it: without `extra_args` it is the same. Flax's overwrite-with-gradient collection (fp8) is handled by
  Flax's own code; the transform then sees only the collection `params`, so that `hvp` and `value_fn` have to be
  functions of that collection.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from dpsgd_optax import training
    >>> x, model = jnp.ones((4, 3)), nn.Dense(1)
    >>> state = training.TrainState.create(
    ...   apply_fn=model.apply,
    ...   params=model.init(jax.random.key(0), x)["params"],
    ...   tx=optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9)),
    ... )
    >>> @jax.jit
    ... def train_step(state):
    ...   loss = lambda p: jnp.mean((state.apply_fn({"params": p}, x) - 1.0) ** 2)
    ...   value, grads = jax.value_and_grad(loss)(state.params)
    ...   extra = {"value": value, "value_fn": loss, "grad": grads}
    ...   return state.apply_gradients(grads=grads, extra_args=extra), value
    >>> state, first = train_step(state)
    >>> state, second = train_step(state)
    >>> bool(second < first), int(state.step)
    (True, 2)
  """

  def apply_gradients(self, *, grads: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any) -> "TrainState":
    """One step: `updates, opt_state = tx.update(grads, opt_state, params, **extra_args)`, then apply the updates.

    Args:
      grads: gradients with the structure of `params`.
      extra_args: keyword arguments of the transform's `update`: `value`, `value_fn`, `hvp`, `refresh`, ... A transform
        that takes none ignores them. `optax.MultiSteps(tx, k)` hands them on; add
        `accumulating=state.opt_state.mini_step < k - 1`, so that the k - 1 calls whose result it throws away compute no
        product and no fit.
      **kwargs: attributes of the state to be replaced, as in Flax.

    Returns:
      The state after the step, `step` incremented by one.
    """
    tx = forward_extra_args(self.tx)

    def update(updates, state, params=None):
      return tx.update(updates, state, params, **(extra_args or {}))

    bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
    stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
    return stepped.replace(tx=kwargs.get("tx", self.tx))


def host_cadence(
  step: Callable[..., Any],
  *,
  refresh_every: int | Schedule = 1,
  judge_every: int = 1,
  donate_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
  """A training loop's step that knows on the host whether to fit (`refresh`) and whether to judge (`judge`).

  On the CPU a convolution inside `jax.lax.cond` is many times slower than outside; and under `vmap` a cond computes
  both of its branches. Here the two choices are Python bools, constant in each of the at most four programs that are
  compiled, one for every pair that occurs:

    refresh  ⇔  count mod refresh_every = 0,            the first step included,
             ⇔  ⌊p(0) + … + p(count)⌋ grows at count,   if it is a schedule p of probabilities,
    judge    ⇔  (count + 1) mod judge_every = 0,        the first step not, unless all are.

  The sums are exact (rational numbers), so that the long-run rate is that of the schedule without a coin, and the same
  count gives the same choice wherever a run is resumed.

  Args:
    step: `step(*args, refresh: bool, judge: bool)`, to be passed on to `tx.update`; it is jitted here.
    refresh_every: fit every so many steps (DPSGD's T1), or a schedule count ↦ probability in [0, 1], of JAX operations.
    judge_every: judge every so many steps (DPSGD's T2).
    donate_argnums: arguments of `step` whose buffers may be reused, as in `jax.jit`; the old ones are then gone.

  Returns:
    `run(count, *args)`, which returns what `step` returns. The count is that of the steps done so far, an int on the
    host: the Python variable of the loop, not `state.step`, for which every step would have to wait.

  Raises:
    ValueError: if a period is below 1; by `run`, if the count is negative or a probability is outside [0, 1].

  Example:
    >>> from dpsgd_optax.training import host_cadence
    >>> def step(x, *, refresh, judge):
    ...   return x + 1 + 10 * refresh + 100 * judge
    >>> run = host_cadence(step, refresh_every=2, judge_every=3)
    >>> [int(run(count, 0)) for count in range(6)]
    [11, 1, 111, 1, 11, 101]
  """
  fit_due = _scheduled(refresh_every) if callable(refresh_every) else _periodic(refresh_every, "refresh_every")
  judge_due = _periodic(judge_every, "judge_every")
  jitted = jax.jit(step, static_argnames=("refresh", "judge"), donate_argnums=donate_argnums)

  def run(count: int, *args: Any) -> Any:
    count = operator.index(count)
    if count < 0:
      raise ValueError(f"`run` needs the number of steps done so far, 0 on the first step, got {count}.")
    return jitted(*args, refresh=fit_due(count), judge=judge_due(count + 1))

  return run


def _periodic(every: int, name: str) -> Callable[[int], bool]:
  """count ↦ count mod every = 0."""
  try:
    period = operator.index(every)
  except TypeError:
    period = 0
  if period < 1:
    raise ValueError(f"`host_cadence` needs `{name}` to be a whole number of steps, at least 1, got {every!r}.")
  return lambda count: count % period == 0


def _scheduled(probability: Schedule, chunk: int = 256) -> Callable[[int], bool]:
  """count ↦ whether ⌊Σ p⌋ grows at count. Evaluates the schedule for many counts at once and remembers the answers."""
  due: list[bool] = []
  fraction = Fraction(0)  # the sum so far, less its whole part

  def at(count: int) -> bool:
    nonlocal fraction
    while len(due) <= count:
      counts = np.arange(len(due), len(due) + chunk, dtype=np.int32)
      for p in np.asarray(jax.vmap(lambda t: jnp.asarray(probability(t)))(counts)).tolist():
        if not 0 <= p <= 1:
          raise ValueError(
            f"`refresh_every` must give probabilities in [0, 1], but at count {len(due)} its value is {p}. "
            "For a fixed period pass an int."
          )
        fraction += Fraction(p)
        due.append(fraction >= 1)
        fraction -= due[-1]
    return due[count]

  return at


# -- layer inputs: linen ----------------------------------------------------------------------------------------------

LAYER_INPUTS = "layer_inputs"
"""The collection of the records: in ``variable_axes`` of ``nn.scan`` and ``nn.vmap`` for the layers inside them."""

Recorder = Callable[..., LayerRecord | None]  # (module, *args, **kwargs) of a call ↦ record; its bias one name


def _spread(value: Any, axes: int) -> tuple[int, ...]:
  return (value,) * axes if isinstance(value, int) else (1,) * axes if value is None else tuple(value)


def _dense(module: Any, x: jax.Array) -> LayerRecord:
  features = module.features
  return LayerRecord((x,), kernel_shape=(x.shape[-1], features), bias=("bias",) if module.use_bias else None)


def _dense_general(module: Any, x: jax.Array) -> LayerRecord | None:
  if _spread(module.batch_dims, 1):
    return None
  axes = tuple(a % x.ndim for a in _spread(module.axis, 1))
  x = jnp.moveaxis(x, axes, range(-len(axes), 0))
  shape = (*x.shape[x.ndim - len(axes) :], *_spread(module.features, 1))
  bias = ("bias",) if module.use_bias else None
  return LayerRecord((x,), kernel_shape=shape, input_axes=len(axes), bias=bias)


def _conv(module: Any, x: jax.Array) -> LayerRecord | None:
  if module.mask is not None:
    return None
  size = _spread(module.kernel_size, 1)
  axes = len(size)
  dilation = _spread(module.kernel_dilation, axes)
  padding = module.padding
  if not isinstance(padding, str):
    padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in _spread(padding, axes))
  elif padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    pads = [(reach[0], 0)] if padding == "CAUSAL" else [(r // 2, (r + 1) // 2) for r in reach]
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}[padding]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - axes - 1) + pads + [(0, 0)], mode=mode)
    padding = "VALID"
  groups = module.feature_group_count
  window = Window(_spread(module.strides, axes), padding, _spread(module.input_dilation, axes), dilation, groups)
  shape = (*size, x.shape[-1] // groups, module.features)
  bias = ("bias",) if module.use_bias else None
  return LayerRecord((x,), kind="conv", kernel_shape=shape, input_axes=axes + 1, bias=bias, window=window)


def _embed(module: Any, ids: jax.Array) -> LayerRecord:
  return LayerRecord((ids,), kind="embed", kernel_shape=(module.num_embeddings, module.features))


LINEN: dict[type, tuple[str, Recorder]] = {
  nn.Dense: ("kernel", _dense),
  nn.DenseGeneral: ("kernel", _dense_general),
  nn.Conv: ("kernel", _conv),
  nn.Embed: ("embedding", _embed),
}


def with_layer_inputs(
  apply: Callable[..., Any],
  *,
  record: Mapping[type, tuple[str, Recorder]] | None = None,
  reduce: Callable[..., LayerRecord] | None = None,
) -> Callable[..., Any]:
  """A linen model's `apply` that also returns what enters each linear layer. The model stays as it is.

  Recorded are `nn.Dense`, `nn.DenseGeneral` (and so attention), `nn.Conv` and `nn.Embed`, by `nn.intercept_methods`
  and `sow`. That works inside `nn.remat` (the inputs are then kept, and not recomputed). Inside `nn.scan`, `nn.vmap`
  and `nn.RNN` the collection must be listed, `variable_axes={"params": 0, "layer_inputs": 0}`, else the layers there
  are missing. A layer that is called several times has one record with the inputs of all calls.

  Args:
    apply: `model.apply`.
    record: layers of your own: class ↦ (name of its kernel, recorder), where recorder(module, *args, **kwargs) of its
      `__call__` returns a `LayerRecord` whose `bias` is a tuple with the name of the bias, or None.
    reduce: what leaves the forward pass in place of the inputs: `dpsgd_optax.second_moments` for `gls`,
      `channel_moments` for `bnp`; saves memory where the activations are not kept anyway (remat, accumulation).

  Returns:
    `forward(variables, *args, **kwargs) -> (what apply returns, inputs)`, where `inputs` is a tree of `LayerRecord`,
    each in the place of its kernel in the params.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> from dpsgd_optax import training
    >>> x, model = jnp.ones((4, 3)), nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(1)])
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> forward = training.with_layer_inputs(model.apply)
    >>> pred, inputs = forward({"params": params}, x)
    >>> [record.inputs[0].shape for record in (inputs["layers_0"]["kernel"], inputs["layers_2"]["kernel"])]
    [(4, 3), (4, 5)]
  """
  recorders = {**LINEN, **(record or {})}

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
    inputs = _assembled(state.pop(LAYER_INPUTS, {}))
    if reduce is not None:
      inputs = _reduced(inputs, variables["params"], reduce)
    return (out if mutable is False else (out, state)), inputs

  return forward


def _assembled(sown: Any, path: tuple[str, ...] = ()) -> Any:
  """{…: {kernel: (record of each call)}} → {…: {kernel: record}}, biases named by their whole path."""
  found = {}
  for name, below in sown.items():
    if isinstance(below, Mapping):
      found[name] = _assembled(below, (*path, name))
    else:
      one = merged(below)
      found[name] = dataclasses.replace(one, bias=one.bias and (*path, *one.bias))
  return found


def _reduced(inputs: Any, params: Any, reduce: Callable[..., LayerRecord]) -> Any:
  if isinstance(inputs, LayerRecord):
    depth = jnp.ndim(params) - len(inputs.kernel_shape)
    return reduce(inputs, jnp.shape(params)[:depth])
  return {name: _reduced(below, params[name], reduce) for name, below in inputs.items()}


# -- layer inputs: nnx ------------------------------------------------------------------------------------------------


def call_with_layer_inputs(
  model: nnx.Module, *args: Any, reduce: Callable[..., LayerRecord] | None = None, **kwargs: Any
) -> tuple[Any, Any]:
  """Calls an nnx model and returns also what enters each linear layer. The model stays as it is.

  Recorded are `nnx.Linear`, `nnx.LinearGeneral` (and so attention) and `nnx.Conv`. For the time of the call their
  attributes `dot_general` and `conv_general_dilated` are functions that record; nnx has no hooks. Inside `nnx.scan`,
  `nnx.vmap` and `nnx.remat` use `dpsgd_optax.capture`.

  Args:
    model: a live module: the argument of a loss under `nnx.value_and_grad`, or `nnx.merge(graphdef, params, …)`.
    *args, **kwargs: of the call.
    reduce: as in `with_layer_inputs`.

  Returns:
    (what the model returns, tree of `LayerRecord`), each record in the place of its kernel in `nnx.state(model)`.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> from flax import nnx
    >>> from dpsgd_optax import training
    >>> model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    >>> optimizer = nnx.Optimizer(model, dpo.bnp(0.1), wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer):
    ...   def loss(model):
    ...     pred, inputs = training.call_with_layer_inputs(model, x)
    ...     return jnp.mean((pred - 1.0) ** 2), inputs
    ...   (value, inputs), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    ...   optimizer.update(model, grads, layer_inputs=inputs)
    ...   return value
    >>> first = train_step(model, optimizer)
    >>> bool(train_step(model, optimizer) < first)
    True
  """
  sown: dict[tuple[str, ...], list[LayerRecord]] = {}
  changed = []
  try:
    for path, module in nnx.iter_modules(model):
      where = tuple(map(str, path))
      for kind, attribute, recording in NNX:
        if isinstance(module, kind):
          changed.append((module, attribute, getattr(module, attribute)))
          calls = sown.setdefault((*where, "kernel"), [])
          bias = None if module.bias is None else (*where, "bias")
          setattr(module, attribute, recording(changed[-1][-1], module, bias, calls))
    out = model(*args, **kwargs)
  finally:
    for module, attribute, original in changed:
      setattr(module, attribute, original)
  inputs: dict[str, Any] = {}
  for path, calls in sown.items():
    if calls:
      here = inputs
      for name in path[:-1]:
        here = here.setdefault(name, {})
      here[path[-1]] = merged(calls) if reduce is None else reduce(merged(calls))
  return out, inputs


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
  def recording(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, feature_group_count, **kwargs):
    if module.mask is None:
      pads = padding if isinstance(padding, str) else tuple(map(tuple, padding))
      window = Window(_spread(strides, kernel.ndim - 2), pads, lhs_dilation, rhs_dilation, feature_group_count)
      seen = (jax.lax.stop_gradient(x),)
      calls.append(
        LayerRecord(seen, kind="conv", kernel_shape=kernel.shape, input_axes=kernel.ndim - 1, bias=bias, window=window)
      )
    more = {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation, "feature_group_count": feature_group_count}
    return conv(x, kernel, strides, padding, **more, **kwargs)

  return recording


NNX: list[tuple[type, str, Callable]] = [
  (nnx.Linear, "dot_general", _recording_dot),
  (nnx.LinearGeneral, "dot_general", _recording_dot),
  (nnx.Conv, "conv_general_dilated", _recording_conv),
]


# -- weight normalization: nnx ----------------------------------------------------------------------------------------


class Lengths(nnx.Module):
  """The 1-D lengths of a weight-normalised layer, in a module of their own as the scale of a norm layer."""

  def __init__(self, scale: jax.Array):
    self.scale = nnx.Param(scale)


class WeightNorm(nnx.Module):
  """Weight normalization of an nnx layer: kernel = g v/‖v‖, the norm over all axes but that of the outputs.

  The layer keeps v as its kernel; the lengths g are a 1-D `nnx.Param` under "length/scale", which `is_norm_param` finds
  and `nnx.Optimizer` trains. (The scales of `nnx.WeightNorm` of flax 0.12 are no `nnx.Param`, so that they are neither,
  and its call overwrites v.) In linen `nn.WeightNorm` does all this.

  Args:
    layer: `nnx.Linear`, `nnx.Conv`, or any layer whose `kernel` has its outputs on the last axis.
    epsilon: added to ‖v‖² under the root, in the squared unit of the kernel.

  Source: Salimans, Kingma, arXiv:1602.07868, Eq. 2. g starts as ‖v‖, so that the layer starts as it was.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from dpsgd_optax import training
    >>> plain, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    >>> normed = training.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> bool(jnp.allclose(normed(x), plain(x))), normed.length.scale.shape
    (True, (2,))
  """

  def __init__(self, layer: Any, epsilon: float = 1e-12):
    self.layer: Any = layer
    self.epsilon = epsilon
    self.length = Lengths(self._norm(layer.kernel[...]))

  def _norm(self, v: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(v**2, range(v.ndim - 1)) + self.epsilon)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    v = self.layer.kernel[...]
    graphdef, state = nnx.split(self.layer)
    kernel = v * jnp.expand_dims(self.length.scale[...] / self._norm(v), tuple(range(v.ndim - 1)))
    state["kernel"] = jax.tree.map(lambda _: kernel, state["kernel"])
    return nnx.merge(graphdef, state)(*args, **kwargs)
