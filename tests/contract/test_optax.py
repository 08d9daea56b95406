# SPDX-License-Identifier: Apache-2.0
"""What optax and JAX promise of a gradient transformation, where it takes values to show it.

What is asked of every row is in `tests.conformance`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.conformance.injected import INJECTED
from tests.conformance.rows import CALM, one_step, raw, same
from tests.table import OPTIMIZERS, PARAMS, compiled, counted, loss


def test_a_scan_is_the_loop():
  case = compiled("chain")
  state = case.tx.init(PARAMS)
  params, looped, _ = case.run(PARAMS, state, [CALM] * 4)
  body = lambda carry, _: (one_step(case.tx, case.row.extras, loss)(*carry)[:2], None)
  scanned = jax.jit(lambda c: jax.lax.scan(body, c, length=4)[0])((PARAMS, state))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, raw(scanned), raw((params, looped)))


def test_multi_steps_is_one_step_with_the_mean_gradient():
  base = OPTIMIZERS["psgd whitening"].make()
  tx = optax.MultiSteps(base, every_k_schedule=2)
  update = jax.jit(tx.update)
  state = tx.init(PARAMS)
  grads = [jax.tree.map(lambda x: k * jnp.cos(x), PARAMS) for k in (1.0, 3.0)]
  waiting, state = update(grads[0], state, PARAMS)
  assert all(np.all(x == 0) for x in jax.tree.leaves(waiting))
  updates, state = update(grads[1], state, PARAMS)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
  expected, _ = jax.jit(base.update)(mean, base.init(PARAMS), PARAMS)
  chex.assert_trees_all_close(updates, expected, rtol=1e-4)
  assert int(state.inner_opt_state[0].fits) == 1


def test_newton_inside_partition_fits_the_diagonal_block():
  """hvp(loss, params) holds what it does not get at zero: H_ww v_w, as if b were a constant of the loss."""
  row = OPTIMIZERS["chain"]
  both = optax.partition({"ours": row.make(), "theirs": optax.sgd(0.1)}, {"b": "theirs", "w": "ours"})
  alone = row.make()
  _, _, updates = jax.jit(one_step(both, row.extras, loss))(PARAMS, both.init(PARAMS))
  block = {"w": PARAMS["w"]}
  block_loss = lambda p: loss({**p, "b": PARAMS["b"]})
  _, state, expected = jax.jit(one_step(alone, row.extras, block_loss))(block, alone.init(block))
  np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4)
  assert int(optax.tree.get(state, "fits")) == 1
  np.testing.assert_allclose(updates["b"], -0.1 * jax.grad(loss)(PARAMS)["b"], rtol=1e-4)


@pytest.mark.parametrize("name", ["psgd whitening", "dpsgd", "dpsgd, its factors"])
def test_injected_hyperparameters_give_the_plain_run(name):
  """Every number is traced; only what decides shapes or is a function stays static."""
  make, numbers, static = INJECTED[name]
  extras, params = OPTIMIZERS[name.partition(",")[0]].extras, {"w": PARAMS["w"]}
  found = []
  for tx in (make(**numbers), optax.inject_hyperparams(make, static_args=static)(**numbers)):
    (step, traces), point, state = counted(one_step(tx, extras)), params, tx.init(params)
    for _ in range(3):
      point, state, _ = step(point, state)
    assert len(traces) == 1
    found.append(point["w"])
  assert set(state.hyperparams) >= set(numbers)
  np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
  assert not np.allclose(found[0], params["w"], atol=1e-3)


def test_map_params_reaches_the_momentum():
  tx = compiled("chain").tx
  mapped = optax.tree.map_params(tx, lambda x: x + 1, tx.init(PARAMS))
  same(optax.tree.get(mapped, "ema"), jax.tree.map(jnp.ones_like, PARAMS))


def test_a_direction_of_another_dtype_is_cast_back():
  wide = lambda apply, updates, params, **extra: optax.tree.cast(apply(updates), jnp.float32)
  tx = dpo.scale_by_preconditioner(dpo.diagonal(), dpo.whitening(), direction=wide)
  grads = jnp.ones(2, jnp.bfloat16)
  updates, _ = jax.eval_shape(tx.update, grads, tx.init(grads))
  assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["psgd whitening", "dpsgd"])
def test_scalars_and_empty_leaves_are_trained_beside_others(name):
  row, tx = OPTIMIZERS[name], compiled(name).tx
  params = {"n": None, "s": jnp.float32(1.5), "z": jnp.zeros((0, 3))}
  moved, _, _ = jax.jit(one_step(tx, row.extras))(params, tx.init(params))
  assert moved["z"].shape == (0, 3) and moved["n"] is None
  assert np.isfinite(moved["s"]) and moved["s"] < 1.5
