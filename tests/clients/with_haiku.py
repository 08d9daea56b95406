# SPDX-License-Identifier: Apache-2.0
"""Haiku: `hk.transform_with_state`, params as a dict of dicts, the loop of its MNIST example with a BatchNorm."""

import functools

import haiku as hk
import jax
import optax

from tests.clients.columns import regression, squares

STEPS = 60


def net_fn(x):
  x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(hk.Linear(16)(x), is_training=True)
  return hk.Linear(1)(jax.nn.tanh(x))


def train(optimizer):
  x, y = regression()
  network = hk.without_apply_rng(hk.transform_with_state(net_fn))
  params, net_state = network.init(jax.random.key(1), x)
  optimiser = optimizer.make()
  opt_state = optimiser.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def update(params, net_state, opt_state):
    def loss(params):
      prediction, after = network.apply(params, net_state, x)
      return squares(prediction, y), after

    (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
    extras = optimizer.extras(lambda p: loss(p)[0], params, value)
    updates, opt_state = optimiser.update(grads, opt_state, params, **extras)
    return optax.apply_updates(params, updates), after, opt_state, value

  losses = []
  for _ in range(STEPS):
    params, net_state, opt_state, value = update(params, net_state, opt_state)
    losses.append(value)
  return losses
