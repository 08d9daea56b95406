# SPDX-License-Identifier: Apache-2.0
"""Three providers of layer inputs, one record: each agrees with the gradient, and they agree with each other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpsgd_optax as dpo
from dpsgd_optax import training
from dpsgd_optax.layers.find import find_layers
from dpsgd_optax.layers.find import records_of as matched
from dpsgd_optax.layers.matrix import as_matrix
from dpsgd_optax.layers.moments import gradients_of, gram, rows_of
from dpsgd_optax.layers.record import Window, is_record, output_space

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)


class Everything(nn.Module):
  """One of each layer that is recorded, none of them changed for it."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(7, 4)(ids)  # (batch, 4, 4)
    x = x.reshape(len(ids), 4, 2, 2)
    x = nn.Conv(4, (3, 2), strides=(2, 1), padding=((1, 1), (0, 1)))(x)
    x = nn.Conv(4, 3, padding="CIRCULAR", feature_group_count=2, use_bias=False)(x)
    x = nn.Conv(4, (2, 2), kernel_dilation=(1, 2), padding="SAME")(x)
    x = x.reshape(len(ids), -1, 4)
    x = nn.MultiHeadDotProductAttention(2, qkv_features=4)(x)
    x = nn.LayerNorm()(x)
    x = nn.Conv(4, 2, padding="CAUSAL")(x)
    x = nn.DenseGeneral((3, 2), axis=(1, 2))(x)
    x = nn.remat(nn.Dense)(5)(x.reshape(len(ids), -1))
    shared = nn.Dense(5)
    return nn.Dense(1, use_bias=False)(nn.tanh(shared(nn.tanh(shared(x)))))


@functools.cache
def everything():
  """Params, and what linen and `capture` record of one and the same loss."""
  model, ids = Everything(), jnp.arange(12).reshape(3, 4) % 7
  params = model.init(jax.random.key(0), ids)["params"]
  forward = training.with_layer_inputs(model.apply)

  def of_linen(params):
    pred, inputs = forward({"params": params}, ids)
    return jnp.mean((pred - 1.0) ** 2), inputs

  plain = lambda params: jnp.mean((model.apply({"params": params}, ids) - 1.0) ** 2)

  @jax.jit
  def both(params):
    linen = jax.value_and_grad(of_linen, has_aux=True)(params)
    return linen, dpo.capture(plain, gradients=True)(params)

  ((value, inputs), grads), captured = both(params)
  return params, value, grads, inputs, captured


def test_the_loss_and_its_gradient_are_those_of_the_plain_model():
  _, value, grads, _, (captured, captured_grads, _) = everything()
  close(captured, value)
  jax.tree.map(close, captured_grads, grads)


def products(params, grads, layers):
  """(Σ_rows x̃ᵀE, gradient of [W; b]) of each layer with output gradients."""
  found = find_layers(params, layers)
  leaves = jax.tree.leaves(grads)
  for layer, record in zip(found, matched(found, layers, params), strict=True):
    if record.kind == "embed":
      continue
    total = 0
    for x, e in zip(record.inputs, record.gradients, strict=True):
      a = rows_of(record, x, layer.stack)
      a = a if layer.bias is None else jnp.concatenate([a, jnp.ones((*a.shape[:2], 1))], -1)
      total = total + jnp.einsum("mnd,mnk->mdk", a, gradients_of(record, e, layer.stack))
    yield layer.name, total, as_matrix(layer, leaves)


def test_inputs_times_output_gradients_are_the_gradient():
  """Ãᵀ E = g, kernel and bias together, for every kind of layer."""
  params, _, grads, _, (_, _, layers) = everything()
  seen = [name for name, *pair in products(params, grads, layers) if close(*pair) is None]
  assert len(seen) == 12 and sum("Conv" in name for name in seen) == 4


@pytest.mark.full
def test_linen_and_capture_record_the_same():
  """The same layers, biases, axes and second moments; of shared layers both calls."""
  params, _, _, inputs, (_, _, layers) = everything()
  ours, theirs = find_layers(params, inputs), find_layers(params, layers)
  assert sorted(ours) == sorted(theirs) and len(ours) == 13
  theirs = dict(zip([x.path for x in theirs], matched(theirs, layers, params), strict=True))
  for layer, record in zip(ours, matched(ours, inputs, params), strict=True):
    other = theirs[layer.path]
    assert len(record.inputs) == len(other.inputs) == (2 if layer.name == "Dense_0/kernel" else 1)
    if record.kind == "embed":
      np.testing.assert_array_equal(record.inputs[0], other.inputs[0])
    else:
      close(gram(record), gram(other))


WINDOWS = {
  "plain": (1, 1, "VALID", 1, 1, 1),
  "strides": (2, 1, "SAME", 1, 1, 1),
  "dilation": (1, 1, "SAME", 1, 2, 1),
  "input dilation": (1, 2, ((1, 0), (2, 1)), 2, 1, 1),
  "groups": (2, 2, ((0, 1), (1, 0)), 1, 1, 2),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_convolution_is_the_dense_layer_of_its_patches(name):
  down, right, padding, input_dilation, kernel_dilation, groups = WINDOWS[name]
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 6, 4)).astype(np.float32)
  kernel = rng.standard_normal((2, 3, 4 // groups, 6)).astype(np.float32)
  window = Window((down, right), padding, (input_dilation,) * 2, (kernel_dilation,) * 2, groups)
  record = dpo.LayerRecord((x,), kind="conv", kernel_shape=kernel.shape, input_axes=3, window=window)
  expected = jax.lax.conv_general_dilated(
    x,
    kernel,
    window.strides,
    padding,
    window.input_dilation,
    window.kernel_dilation,
    ("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  assert output_space(record, x.shape[1:-1]) == expected.shape[1:-1]
  params = {"kernel": kernel}
  matrix = as_matrix(find_layers(params, {"kernel": record})[0], jax.tree.leaves(params))
  close(np.einsum("gnd,gdk->gnk", rows_of(record, x), matrix), gradients_of(record, expected))


class Scanned(nn.Module):
  axes: tuple = ("params", "layer_inputs")

  @nn.compact
  def __call__(self, x):
    block = nn.scan(Block, variable_axes=dict.fromkeys(self.axes, 0), split_rngs={"params": True}, length=3)
    heads = nn.vmap(nn.Dense, variable_axes=dict.fromkeys(self.axes, 0), split_rngs={"params": True}, axis_size=2)
    return heads(1, name="heads")(jnp.stack([block(name="blocks")(x, None)[0]] * 2))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(2, name="dense")(x)), None


def test_layers_in_scan_and_vmap_are_separate_layers():
  """The second moment of the i-th layer is that of its own input, computed layer by layer."""
  x = jax.random.normal(jax.random.key(0), (4, 2))
  model = Scanned()
  params = model.init(jax.random.key(1), x)["params"]
  _, inputs = training.with_layer_inputs(model.apply)({"params": params}, x)
  found = {layer.path[0]: layer for layer in find_layers(params, inputs)}
  assert found["blocks"].stack == (3,) and found["heads"].stack == (2,) and found["blocks"].bias is not None
  kernel, bias = params["blocks"]["dense"]["kernel"], params["blocks"]["dense"]["bias"]
  for i in range(3):
    rows = np.concatenate([x, np.ones((4, 1))], 1)
    close(gram(inputs["blocks"]["dense"]["kernel"], (3,))[i], rows.T @ rows / 4)
    x = np.tanh(x @ kernel[i] + bias[i])
  shapes = jax.eval_shape(training.with_layer_inputs(Scanned(("params",)).apply), {"params": params}, x)[1]
  with pytest.raises(ValueError, match=r"no inputs .*blocks/dense/kernel.*variable_axes"):
    matched(find_layers(params, inputs), shapes, params)


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    self.shared = nnx.Linear(4, 4, rngs=rngs)
    self.head = nnx.Linear(4, 1, use_bias=False, rngs=rngs)

  def __call__(self, x):
    x = self.conv(x).reshape(len(x), -1, 4)
    x = self.attention(x)
    return self.head(nnx.tanh(self.shared(nnx.tanh(self.shared(x)))))


def test_nnx_and_capture_record_the_same():
  """In a model that is merged inside the loss; its attributes are afterwards what they were."""
  model, x = NnxNet(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
  graphdef, params = nnx.split(model)
  plain = lambda p: jnp.mean(nnx.merge(graphdef, p)(x) ** 2)

  def of_nnx(p):
    merged = nnx.merge(graphdef, p)
    out, inputs = training.call_with_layer_inputs(merged, x)
    assert merged.head.dot_general is model.head.dot_general
    return jnp.mean(out**2), inputs

  @jax.jit
  def both(p):
    return jax.value_and_grad(of_nnx, has_aux=True)(p), dpo.capture(plain, gradients=True)(p)

  (((value, inputs), grads), (other, captured_grads, layers)) = both(params)
  close(value, other)
  jax.tree.map(close, captured_grads, grads)
  ours, theirs = find_layers(params, inputs), find_layers(params, layers)
  assert sorted(ours) == sorted(theirs) and len(ours) == 7
  by_path = dict(zip([x.path for x in theirs], matched(theirs, layers, params), strict=True))
  for layer, record in zip(ours, matched(ours, inputs, params), strict=True):
    close(gram(record), gram(by_path[layer.path]))
  assert len(list(products(params, grads, layers))) == 7
  for _, came, expected in products(params, grads, layers):
    close(came, expected)


def plain_jax(p, x):
  """Products of every kind with parameters of every layout."""
  y = jax.vmap(lambda row: p["left"] @ row + p["left_bias"])(x)
  y = jnp.tanh(y) @ p["transposed"].T
  y = jax.jit(lambda y: y @ p["inner"] + p["inner_bias"])(y)
  y = jnp.einsum("nd,dhk->nhk", jax.checkpoint(jnp.tanh)(y), p["heads"])
  y = jnp.einsum("enk,ekj->enj", jnp.moveaxis(y, 1, 0), p["experts"]) + p["experts_bias"][:, None]
  image = jnp.moveaxis(y, 0, 1).reshape(len(x), 2, 2, 1)
  out = jax.lax.conv_general_dilated(image, p["oihw"], (1, 1), "SAME") + p["channels"][:, None, None]
  loop, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["looped"]), None), out.reshape(len(x), -1)[:, :2], None, 2)
  return jnp.mean(out**2) + jnp.mean(loop), {"out": out.shape[0]}


def test_capture_finds_every_product_with_a_parameter():
  """W x, x Wᵀ, in jit and checkpoint, einsum, a stack of experts, a convolution in OIHW; not what is inside a scan."""
  shapes = dict(
    left=(4, 3), left_bias=(4,), transposed=(4, 4), inner=(4, 2), inner_bias=(2,), heads=(2, 2, 3), experts=(2, 3, 2)
  )
  shapes |= dict(experts_bias=(2, 2), oihw=(3, 2, 2, 2), channels=(3,), looped=(2, 2))
  params = {k: jnp.cos(jnp.arange(np.prod(s)).reshape(s)) for k, s in shapes.items()}
  x = jnp.sin(jnp.arange(15.0).reshape(5, 3))
  run = jax.jit(lambda p: jax.tree.leaves(dpo.capture(plain_jax, has_aux=True, gradients=True)(p, x)))
  shape = jax.eval_shape(lambda p: dpo.capture(plain_jax, has_aux=True, gradients=True)(p, x), params)
  (value, aux), grads, layers = jax.tree.unflatten(jax.tree.structure(shape), run(params))
  expected, plain = jax.jit(jax.value_and_grad(lambda p: plain_jax(p, x)[0]))(params)
  close(value, expected)
  assert aux["out"] == 5
  jax.tree.map(close, grads, plain)
  kernels = [k for k in layers if is_record(layers[k])]
  assert kernels == ["experts", "heads", "inner", "left", "oihw", "transposed"]
  biases = {k: layers[k].bias and layers[k].bias[0] for k in kernels}
  assert biases == dict(
    experts="experts_bias", heads=None, inner="inner_bias", left="left_bias", oihw="channels", transposed=None
  )
  for name, came, needed in products(params, grads, layers):
    close(came, needed, err_msg=name)


class Scaled(nn.Module):
  """A layer of a user's own: twice its input, times a matrix."""

  @nn.compact
  def __call__(self, x):
    return (2 * x) @ self.param("matrix", nn.initializers.ones, (x.shape[-1], 2))


def test_a_layer_of_the_users_own_can_be_registered():
  seen = lambda module, x: dpo.LayerRecord((2 * x,), kernel_shape=(x.shape[-1], 2))
  forward = training.with_layer_inputs(
    nn.Sequential([Scaled()]).apply, record={Scaled: ("matrix", seen)}, reduce=dpo.layers.second_moments
  )
  params = {"layers_0": {"matrix": jnp.ones((3, 2))}}
  x = jnp.arange(24.0).reshape(8, 3)
  _, inputs = forward({"params": params}, x)
  record = inputs["layers_0"]["matrix"]
  rows = np.concatenate([2 * x, np.ones((8, 1))], 1)
  assert record.inputs == () and record.rows == 8
  close(record.gram[0], rows.T @ rows / 8)


def test_other_mutable_collections_are_returned_as_linen_returns_them():
  model, x = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=False)]), jnp.ones((4, 3))
  variables = model.init(jax.random.key(0), x)
  (out, state), inputs = training.with_layer_inputs(model.apply)(variables, x, mutable=["batch_stats"])
  expected, there = model.apply(variables, x, mutable=["batch_stats"])
  close(out, expected)
  jax.tree.map(close, state, there)
  assert set(state) == {"batch_stats"} and set(inputs) == {"layers_0"}


# -- three models as in public examples, in linen and nnx -------------------------------------------------------------


class LinenBlock(nn.Module):
  """A pre-norm transformer block."""

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))))


class LinenResidual(nn.Module):
  """A residual block with group norm and a projection."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), 2, use_bias=False)(x)))
    y = nn.GroupNorm(2)(nn.Conv(4, (3, 3), use_bias=False)(y))
    return nn.relu(y + nn.Conv(4, (1, 1), 2)(x))


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    self.mlp = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, 4, rngs=rngs))

  def __call__(self, x):
    x = x + self.attention(self.norms[0](x))
    return x + self.mlp(self.norms[1](x))


class NnxResidual(nnx.Module):
  def __init__(self, rngs):
    self.convs = nnx.List([nnx.Conv(c, 4, (3, 3), s, use_bias=False, rngs=rngs) for c, s in ((2, 2), (4, 1))])
    self.norms = nnx.List([nnx.GroupNorm(4, 2, rngs=rngs) for _ in range(2)])
    self.projection = nnx.Conv(2, 4, (1, 1), 2, rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.norms[0](self.convs[0](x)))
    return nnx.relu(self.norms[1](self.convs[1](y)) + self.projection(x))


MODELS = {
  "mlp": (
    nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(1)]),
    lambda r: nnx.Sequential(nnx.Linear(3, 5, rngs=r), nnx.tanh, nnx.Linear(5, 1, rngs=r)),
    (4, 3),
    2,
  ),
  "residual": (LinenResidual(), NnxResidual, (2, 4, 4, 2), 3),
  "transformer": (LinenBlock(), NnxBlock, (2, 3, 4), 6),
}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("name", MODELS)
def test_unchanged_models_take_a_step_of_gls(name, kind):
  """Every kernel has its inputs, without a word about layers; what is no layer goes to the fallback."""
  linen, make, shape, layers = MODELS[name]
  x = jnp.cos(jnp.arange(float(np.prod(shape))).reshape(shape))
  if kind == "linen":
    params = linen.init(jax.random.key(0), x)["params"]
    call = lambda p: training.with_layer_inputs(linen.apply)({"params": p}, x)
  else:
    graphdef, params = nnx.split(make(nnx.Rngs(0)))
    call = lambda p: training.call_with_layer_inputs(nnx.merge(graphdef, p), x)
  tx = dpo.gls(0.01, fallback=optax.sgd(0.1))

  def loss(p):
    out, inputs = call(p)
    return jnp.mean((out - 0.5) ** 2), inputs

  @jax.jit
  def step(params, state):
    (value, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, layer_inputs=inputs)
    return optax.apply_updates(params, updates), state, value

  assert len(find_layers(params)) == layers
  moved, state, before = step(params, tx.init(params))
  after = step(moved, state)[2]
  assert after < before and int(optax.tree.get(state, "skipped")) == 0
  assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True))
