# SPDX-License-Identifier: Apache-2.0
"""SGD with partial Hessian on Flax models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dpsgd_optax as dpo
from dpsgd_optax import training
from tests.laws.test_norm_layer_hessian import KEY, X, close, cross_entropy


class Zoo(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3,), name="conv")(x)
    x = nn.BatchNorm(use_running_average=False, name="my_own_name")(x)
    x = nn.LayerNorm(use_bias=False)(x)
    x = nn.GroupNorm(2)(x) + nn.RMSNorm()(x) + nn.InstanceNorm()(x)
    x = nn.WeightNorm(nn.Dense(4, name="normed"))(x)
    x = nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x)
    x = nn.PReLU()(x)
    body = lambda m, x, _: (nn.LayerNorm(name="scanned")(nn.Dense(4, name="plain")(x)), None)
    block = type("Block", (nn.Module,), {"__call__": nn.compact(body)})
    x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="stack")(x, None)
    return nn.Dense(3, name="classifier")(x)


def test_the_norm_parameters_of_linen_models_are_found_whatever_they_are_called():
  params = jax.eval_shape(Zoo().init, jax.random.key(0), jnp.ones((2, 5, 4)))["params"]
  found = jax.tree_util.tree_leaves_with_path(training.is_norm_param(params))
  chosen = {"/".join(k.key for k in path) for path, yes in found if yes}
  both = lambda name: {f"{name}/scale", f"{name}/bias"}
  attention = "MultiHeadDotProductAttention_0"
  expected = both("my_own_name") | {"LayerNorm_0/scale"} | both("GroupNorm_0") | {"RMSNorm_0/scale"}
  expected |= both("InstanceNorm_0") | {"WeightNorm_0/normed/kernel/scale"} | both("stack/scanned")
  expected |= {f"{attention}/query_ln/scale", f"{attention}/key_ln/scale"}
  assert chosen == expected


def test_running_statistics_advance_once_per_step_and_the_product_does_not_read_them(x64):
  """A linen training loop, gradient and product from one linearization: the statistics are those of the gradient."""
  model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False, momentum=0.9), nn.relu, nn.Dense(3)])
  x = jnp.asarray(X)
  variables = jax.jit(model.init)(KEY, x)
  tx = dpo.sgd_ph(0.1, training.is_norm_param)

  @jax.jit
  def train_step(params, stats, opt_state):
    def loss(p):
      out, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
      return cross_entropy(out), new["batch_stats"]

    (_, new), grads, hvp = dpo.value_and_grad_then_hvp(loss, True, where=training.is_norm_param)(params)
    updates, opt_state = tx.update(grads, opt_state, params, hvp=hvp)
    return optax.apply_updates(params, updates), new, opt_state

  params, stats = variables["params"], variables["batch_stats"]
  opt_state, mean = tx.init(params), np.zeros(4)
  for _ in range(3):
    dense = params["layers_0"]
    mean = 0.9 * mean + 0.1 * np.mean(X @ dense["kernel"] + dense["bias"], 0)
    params, stats, opt_state = train_step(params, stats, opt_state)
  close(stats["layers_1"]["mean"], mean, rtol=1e-6, atol=1e-7)
  other, _, _ = train_step(params, jax.tree.map(lambda s: 7 + s, stats), opt_state)
  close(other, train_step(params, stats, opt_state)[0], rtol=0, atol=0)


class Normed(nnx.Module):
  """Without a norm layer before the last, but with 1-D lengths."""

  def __init__(self, rngs):
    self.conv = training.WeightNorm(nnx.Conv(1, 4, (3,), rngs=rngs))
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.head = training.WeightNorm(nnx.Linear(4, 3, rngs=rngs))

  def __call__(self, x):
    return self.head(jnp.tanh(self.norm(self.conv(x[..., None]))).mean(1))


def test_an_nnx_model_with_weight_normalised_layers_is_trained():
  """`nnx.Optimizer` hands `hvp` on; the lengths are second order; v moves at right angles to itself."""
  model = Normed(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, dpo.sgd_ph(0.1, training.is_norm_param), wrt=nnx.Param)
  chosen = training.is_norm_param(nnx.as_pure(nnx.state(model, nnx.Param)))
  paths = jax.tree_util.tree_leaves_with_path(chosen)
  names = {"/".join(str(k.key) for k in path) for path, yes in paths if yes}
  assert names == {"conv/length/scale", "norm/scale", "norm/bias", "head/length/scale"}

  @nnx.jit
  def train_step(model, optimizer):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p: cross_entropy(nnx.merge(graphdef, p, rest, copy=True)(jnp.asarray(X, jnp.float32)))
    value, grads, hvp = dpo.value_and_grad_then_hvp(loss, where=training.is_norm_param)(nnx.as_pure(params))
    grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))  # `nnx.Param`s, as it expects
    optimizer.update(model, grads, hvp=hvp)
    return value, grads

  v = model.conv.layer.kernel[...]
  first, grads = train_step(model, optimizer)
  inner = jnp.sum(v * nnx.as_pure(grads)["conv"]["layer"]["kernel"], (0, 1))
  np.testing.assert_allclose(inner, np.zeros(4), atol=1e-6)
  for _ in range(40):
    value, _ = train_step(model, optimizer)
  assert value < 0.95 * first
