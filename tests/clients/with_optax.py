# SPDX-License-Identifier: Apache-2.0
"""Optax's own wrappers, in the loop of its documentation: a dict of arrays and a jitted step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tests.clients.columns import Optimizer, regression, squares

STEPS = 60


def network(params, x):
  return jnp.tanh(x @ params["first"]["w"] + params["first"]["b"]) @ params["second"]["w"] + params["second"]["b"]


def start():
  keys = jax.random.split(jax.random.key(1))
  layer = lambda key, m, n: {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
  return {"first": layer(keys[0], 4, 16), "second": layer(keys[1], 16, 1)}


def loop(tx: optax.GradientTransformation, extras: Callable, params=None, donate=(0, 1)):
  """Getting started. `extras`: (loss, params, value, grads) -> further arguments of `update`."""
  x, y = regression()
  params = start() if params is None else params

  def step(params, state):
    fast = getattr(params, "fast", params)  # of `optax.lookahead`

    def loss(p, hvp=None, layer_inputs=None):  # a line search wants all arguments to be known to the loss
      return squares(network(p, x), y)

    value, grads = jax.value_and_grad(loss)(fast)
    updates, state = tx.update(grads, state, params, **extras(loss, fast, value, grads))
    return optax.apply_updates(params, updates), state, value

  step, state, losses = jax.jit(step, donate_argnums=donate), tx.init(params), []
  for _ in range(STEPS):
    params, state, value = step(params, state)
    losses.append(value)
  return losses


def asked(optimizer: Optimizer) -> Callable:
  return lambda loss, params, value, grads: optimizer.extras(loss, params, value)


def nothing(loss, params, value, grads):
  return {}


def plain(optimizer):
  return loop(optimizer.make(), asked(optimizer))


def multi_steps(optimizer):
  """Gradient accumulation: every second call changes the params."""
  return loop(optax.MultiSteps(optimizer.make(), every_k_schedule=2), asked(optimizer))


def line_search(optimizer):
  """What the search needs and what ours need goes through the chain together."""

  def extras(loss, params, value, grads):
    return optimizer.extras(loss, params, value) | {"value": value, "grad": grads, "value_fn": loss}

  return loop(optax.chain(optimizer.make(), optax.scale_by_backtracking_linesearch(15)), extras)


def partition(optimizer):
  """The second layer alone is trained, and the loss takes both: the product has to be made outside."""
  labels = lambda params: {name: jax.tree.map(lambda _: name, part) for name, part in params.items()}
  more = {"hvp"} if "value_fn" in optimizer.needs else set()
  tx = optax.partition({"first": optax.set_to_zero(), "second": optimizer.make()}, labels)
  return loop(tx, asked(optimizer._replace(needs=optimizer.needs | more)))


def sam(optimizer):
  """Sharpness-aware minimization, transparent: every second call of the loop is an ascent. It keeps the params."""
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  return loop(optax.contrib.sam(optimizer.make(), ascent, sync_period=2), nothing, donate=())


def lookahead(optimizer):
  """The two copies of the params are one array at first."""
  tx = optax.lookahead(optimizer.make(), sync_period=5, slow_step_size=0.7)
  return loop(tx, nothing, optax.LookaheadParams.init_synced(start()), donate=())
