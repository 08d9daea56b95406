# SPDX-License-Identifier: Apache-2.0
"""Flax: linen with its own TrainState and with ours, NNX with `nnx.Optimizer`. BatchNorm and Dropout in all of them."""

import functools
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.training import train_state

from dpsgd_optax import training
from tests.clients.columns import regression, squares

STEPS = 60


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Dense(16)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(0.1, deterministic=not train)(nn.tanh(x))
    return nn.Dense(1)(x)


def linen(optimizer, base, apply):
  """The guides on batch norm and dropout: a TrainState with two more fields, a key folded with the step."""
  x, y = regression()

  class TrainState(base):
    batch_stats: Any
    key: Any

  variables = Network().init(jax.random.key(1), x, train=False)
  state = TrainState.create(
    apply_fn=Network().apply,
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    key=jax.random.key(2),
    tx=optimizer.make(where=training.is_norm_param),
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state):
    forward = training.with_layer_inputs(state.apply_fn)

    def loss_fn(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      dropout = jax.random.fold_in(state.key, state.step)
      (prediction, updates), inputs = forward(
        variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
      )
      return squares(prediction, y), (updates, inputs)

    (value, (updates, inputs)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    extras = optimizer.extras(lambda params: loss_fn(params)[0], state.params, value, layer_inputs=inputs)
    return apply(state, grads, extras).replace(batch_stats=updates["batch_stats"]), value

  losses = []
  for _ in range(STEPS):
    state, value = train_step(state)
    losses.append(value)
  return losses


def own_train_state(optimizer):
  """Flax's `apply_gradients` takes gradients and nothing for `update`."""
  return linen(optimizer, train_state.TrainState, lambda state, grads, extras: state.apply_gradients(grads=grads))


def our_train_state(optimizer):
  apply = lambda state, grads, extras: state.apply_gradients(grads=grads, extra_args=extras)
  return linen(optimizer, training.TrainState, apply)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.second = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    return self.second(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def nnx_loop(optimizer, train_step):
  model = Net(nnx.Rngs(1))
  opt = nnx.Optimizer(model, optimizer.make(where=training.is_norm_param), wrt=nnx.Param)
  train_step = nnx.jit(train_step, donate_argnums=(0, 1))
  return [train_step(model, opt) for _ in range(STEPS)]


def nnx_optimizer(optimizer):
  """`nnx.value_and_grad` of the model; what looks at the loss again gets it as a function of arrays."""
  x, y = regression()

  def train_step(model, opt):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: squares(nnx.merge(graph, params, rest, copy=True)(x), y)

    def loss_fn(model):
      prediction, inputs = training.call_with_layer_inputs(model, x)
      return squares(prediction, y), inputs

    before = nnx.as_pure(params)
    (value, inputs), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    opt.update(model, grads, **optimizer.extras(loss, before, value, layer_inputs=inputs))
    return value

  return nnx_loop(optimizer, train_step)


def nnx_state(optimizer):
  """A `State` from `nnx.split` is what is differentiated, and where the product is taken."""
  x, y = regression()

  def train_step(model, opt):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
      net = nnx.merge(graph, params, rest, copy=True)
      prediction, inputs = training.call_with_layer_inputs(net, x)
      return squares(prediction, y), (nnx.state(net, nnx.Not(nnx.Param)), inputs)

    (value, (after, inputs)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    opt.update(model, grads, **optimizer.extras(lambda p: loss_fn(p)[0], params, value, layer_inputs=inputs))
    nnx.update(model, after)
    return value

  return nnx_loop(optimizer, train_step)
