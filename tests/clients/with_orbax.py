# SPDX-License-Identifier: Apache-2.0
"""Orbax: a `CheckpointManager` keeps params and state in the middle of a run, which goes on from there bit for bit."""

import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from tests.clients.columns import regression, squares
from tests.clients.with_optax import network, start

STEPS = 60


def resumed(optimizer):
  x, y = regression()
  tx, params = optimizer.make(), start()

  @jax.jit
  def train_step(now):
    params, state = now["params"], now["opt_state"]
    loss = lambda p: squares(network(p, x), y)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, **optimizer.extras(loss, params, value))
    return {"params": optax.apply_updates(params, updates), "opt_state": state}, value

  def run(now):
    losses = []
    for _ in range(STEPS // 2):
      now, value = train_step(now)
      losses.append(value)
    return now, losses

  half, first = run({"params": params, "opt_state": tx.init(params)})
  with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
    manager.save(STEPS // 2, args=ocp.args.StandardSave(half))
    manager.wait_until_finished()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
    restored = manager.restore(STEPS // 2, args=ocp.args.StandardRestore(abstract))
  (end, second), (again, _) = run(half), run(restored)
  jax.tree.map(np.testing.assert_array_equal, end, again)
  return [*first, *second]
