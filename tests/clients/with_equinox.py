# SPDX-License-Identifier: Apache-2.0
"""Equinox: `filter_jit`, `filter_value_and_grad`, `apply_updates`, with donation as its documentation has it."""

import io
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

import dpsgd_optax as dpo
from tests.clients.columns import regression, squares

STEPS = 60


class Network(eqx.Module):
  """Holds a function beside its arrays, as `eqx.nn.MLP` does."""

  first: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  second: eqx.nn.Linear
  activation: Callable = jax.nn.tanh

  def __call__(self, x):
    return self.second(self.activation(self.norm(self.first(x))))


def start():
  keys = jax.random.split(jax.random.key(1))
  return Network(eqx.nn.Linear(4, 16, key=keys[0]), eqx.nn.LayerNorm(16), eqx.nn.Linear(16, 1, key=keys[1]))


def compute_loss(model, x, y):
  return squares(jax.vmap(model)(x), y)


def of_arrays(model, x, y):
  """The loss as a function of the arrays alone, and the arrays."""
  params, static = eqx.partition(model, eqx.is_inexact_array)
  return lambda params: compute_loss(eqx.combine(params, static), x, y), params


def begin(optimizer):
  """Model, optimizer and its state; the kernels of Equinox are called `weight`, so that layers have to be named."""
  model = start()
  loss, params = of_arrays(model, *regression())
  optim = optimizer.make(layers=jax.eval_shape(dpo.capture(loss), params)[2])
  return model, optim, optim.init(params)


def run(make_step, model, opt_state, steps):
  batch, losses = regression(), []
  for _ in range(steps):
    model, opt_state, value = make_step(batch, model, opt_state)
    losses.append(value)
  return model, opt_state, losses


def step_on_arrays(optimizer, optim):
  """The optimizer is given the arrays of the model."""

  def make_step(batch, model, opt_state):
    value, grads = eqx.filter_value_and_grad(compute_loss)(model, *batch)
    loss, params = of_arrays(model, *batch)
    updates, opt_state = optim.update(grads, opt_state, params, **optimizer.extras(loss, params, value))
    return eqx.apply_updates(model, updates), opt_state, value

  return make_step


def filtered(optimizer):
  model, optim, opt_state = begin(optimizer)
  make_step = eqx.filter_jit(step_on_arrays(optimizer, optim), donate="all-except-first")
  return run(make_step, model, opt_state, STEPS)[2]


def whole_model(optimizer):
  """The optimizer is given the model itself: a function among its leaves, and None for it in the gradient."""
  model, optim, opt_state = begin(optimizer)

  @eqx.filter_jit(donate="all-except-first")
  def make_step(batch, model, opt_state):
    value, grads = eqx.filter_value_and_grad(compute_loss)(model, *batch)
    arrays, params = of_arrays(model, *batch)
    inputs = dpo.capture(arrays)(params)[2] if "layer_inputs" in optimizer.needs else None
    extras = optimizer.extras(lambda model: compute_loss(model, *batch), model, value, layer_inputs=inputs)
    updates, opt_state = optim.update(grads, opt_state, model, **extras)
    return eqx.apply_updates(model, updates), opt_state, value

  return run(make_step, model, opt_state, STEPS)[2]


def serialised(optimizer):
  """`tree_serialise_leaves` in the middle of a run, which goes on from what was read as it would have."""
  model, optim, opt_state = begin(optimizer)
  make_step = eqx.filter_jit(step_on_arrays(optimizer, optim))
  *half, first = run(make_step, model, opt_state, STEPS // 2)
  file = io.BytesIO()
  eqx.tree_serialise_leaves(file, half)
  file.seek(0)
  read = eqx.tree_deserialise_leaves(file, half)
  second, again = (run(make_step, *now, STEPS // 2)[2] for now in (half, read))
  assert jnp.array_equal(jnp.stack(second), jnp.stack(again)), "the run went on otherwise than it would have"
  return [*first, *second]
