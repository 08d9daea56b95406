# SPDX-License-Identifier: Apache-2.0
"""What optax and JAX promise of a gradient transformation, for every row of the table.

Most of it is about shapes, dtypes and structure, which `jax.eval_shape` answers without compiling anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.table import OPTIMIZERS, PARAMS, Fault, compiled, layer_inputs, loss

CALM = Fault()
rows = pytest.mark.parametrize("name", OPTIMIZERS)


def squares(params):
  """A loss of any tree, smooth and not quadratic."""
  return sum((jnp.sum(jnp.cosh(x.astype(jnp.float32)) - 0.5 * x) for x in jax.tree.leaves(params)), jnp.zeros(()))


def one_step(tx, extras, loss=squares, **more):
  """(params, state) -> (params, state, updates), with the extra arguments that the row needs."""

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    offers = {"value": value, "value_fn": loss, "hvp": dpo.hvp(loss, params), "layer_inputs": layer_inputs(params)}
    updates, state = tx.update(grads, state, params, **{k: v for k, v in offers.items() if k in extras}, **more)
    return optax.apply_updates(params, updates), state, updates

  return step


def avals(tree):
  """Structure, and shape, dtype and weak type of each leaf."""
  leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda x: x, tree))
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, raw(a), raw(b))


def raw(tree):
  typed = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


@rows
def test_the_second_call_does_not_compile_again(name):
  case = compiled(name)
  state = case.tx.init(PARAMS)
  case.run(PARAMS, state, [CALM] * 3)
  assert case.step._cache_size() == 1 and len(case.traces) == 1


@rows
def test_the_state_keeps_structure_shape_dtype_and_weak_type(name):
  """So it can be the carry of a scan, the operand of a cond, and is never compiled twice."""
  row, tx = OPTIMIZERS[name], compiled(name).tx
  state = tx.init(PARAMS)
  assert avals(jax.eval_shape(one_step(tx, row.extras), PARAMS, state)[:2]) == avals((PARAMS, state))
  assert not any(weak for _, _, weak in avals(state)[1])


@rows
def test_same_key_same_run_bit_for_bit_and_another_key_another_run(name):
  case = compiled(name)
  first, second = (case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 5) for _ in range(2))
  same(first, second)
  if case.row.takes_key:
    other, *_ = case.run(PARAMS, case.row.make(key=1).init(PARAMS), [CALM] * 5)
    drawn = "hvp" in case.row.extras  # whitening with v integrated out draws nothing but damping noise of 1e-9
    assert not drawn or not np.array_equal(other["w"], first[0]["w"])
    typed = case.row.make(key=jax.random.key(0)).init(PARAMS)
    same(typed, case.tx.init(PARAMS))


@rows
def test_the_loss_falls(name):
  case = compiled(name)
  params, *_ = case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 60)
  assert loss(params) < 0.7 * loss(PARAMS)


@rows
def test_unknown_extra_arguments_are_ignored(name):
  row, tx = OPTIMIZERS[name], compiled(name).tx
  state = tx.init(PARAMS)
  plain = jax.eval_shape(one_step(tx, row.extras), PARAMS, state)
  unknown = jax.eval_shape(one_step(tx, row.extras, unknown=object(), another=None), PARAMS, state)
  assert avals(plain) == avals(unknown)


@rows
def test_a_step_runs_under_scan(name):
  row, tx = OPTIMIZERS[name], compiled(name).tx
  body = lambda carry, _: (one_step(tx, row.extras)(*carry)[:2], None)
  carry = PARAMS, tx.init(PARAMS)
  assert avals(jax.eval_shape(lambda c: jax.lax.scan(body, c, length=3)[0], carry)) == avals(carry)


def test_a_scan_is_the_loop():
  case = compiled("chain")
  state = case.tx.init(PARAMS)
  params, looped, _ = case.run(PARAMS, state, [CALM] * 4)
  body = lambda carry, _: (one_step(case.tx, case.row.extras, loss)(*carry)[:2], None)
  scanned = jax.jit(lambda c: jax.lax.scan(body, c, length=4)[0])((PARAMS, state))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, raw(scanned), raw((params, looped)))


@rows
def test_multi_steps_accepts_it(name):
  row, tx = OPTIMIZERS[name], optax.MultiSteps(compiled(name).tx, every_k_schedule=2)
  state = tx.init(PARAMS)
  assert avals(jax.eval_shape(one_step(tx, row.extras), PARAMS, state)[1]) == avals(state)


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
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), updates, expected)
  assert int(state.inner_opt_state[0].fits) == 1


@rows
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_masked_and_partition_accept_it(name, wrapper):
  """With `hvp` and `value`: `value_fn` cannot be called with holes in the params."""
  row, tx = OPTIMIZERS[name], compiled(name).tx
  if wrapper == "masked":
    tx = optax.masked(tx, {"b": False, "w": True})
  else:
    tx = optax.partition({"ours": tx, "theirs": optax.sgd(0.1)}, {"b": "theirs", "w": "ours"})
  state = tx.init(PARAMS)
  step = one_step(tx, row.extras - {"value_fn"} | ({"value"} if "value_fn" in row.extras else set()))
  assert avals(jax.eval_shape(step, PARAMS, state)[:2]) == avals((PARAMS, state))


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


INJECTED = {
  "psgd": (
    dpo.psgd,
    dict(b1=0.9, weight_decay=1e-2, damping=1e-6),
    ("preconditioner", "curvature", "every", "mask", "key"),
  ),
  "dpsgd": (
    dpo.dpsgd,
    dict(average=0.6, eta=1e-4, max_update_norm=0.3, damping=0.8, factor=0.9, max_damping=0.8, step_size=0.2),
    ("every", "judge_every", "repeats", "key", "form", "geometry", "normalizer", "curvature", "model", "max_size")
    + ("max_vector_size", "stacked", "reject"),
  ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_give_the_plain_run(name):
  """Every number is traced; only what decides shapes or is a function stays static."""
  make, numbers, static = INJECTED[name]
  extras = OPTIMIZERS[{"psgd": "psgd whitening"}.get(name, name)].extras
  params = {"w": PARAMS["w"]}
  found = []
  for tx in (make(0.05, **numbers), optax.inject_hyperparams(make, static_args=static)(learning_rate=0.05, **numbers)):
    step, point, state = jax.jit(one_step(tx, extras)), params, tx.init(params)
    for _ in range(3):
      point, state, _ = step(point, state)
    assert step._cache_size() == 1
    found.append(point["w"])
  assert set(state.hyperparams) >= {"learning_rate", *numbers}
  np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
  assert not np.allclose(found[0], params["w"], atol=1e-3)


@rows
def test_map_params_accepts_it(name):
  """optax calls `init` on a tree without leaves and maps over the result."""
  tx = compiled(name).tx
  state = tx.init(PARAMS)
  same(optax.tree.map_params(tx, lambda x: x, state), state)


def test_map_params_reaches_the_momentum():
  tx = compiled("chain").tx
  mapped = optax.tree.map_params(tx, lambda x: x + 1, tx.init(PARAMS))
  same(optax.tree.get(mapped, "ema"), jax.tree.map(jnp.ones_like, PARAMS))


@rows
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_dtype_of_the_gradients_and_state_is_at_least_float32(name, dtype):
  row, tx = OPTIMIZERS[name], compiled(name).tx
  params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
  state = tx.init(params)
  moved, after, updates = jax.eval_shape(one_step(tx, row.extras), params, state)
  assert {x.dtype for x in jax.tree.leaves((moved, updates))} == {jnp.dtype(dtype)}
  assert avals(after) == avals(state)
  if name != "chain":  # its ema is optax's, in the dtype of the params
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) <= {jnp.dtype(jnp.float32)}


def test_a_direction_of_another_dtype_is_cast_back():
  wide = lambda apply, updates, params, **extra: optax.tree.cast(apply(updates), jnp.float32)
  tx = dpo.scale_by_preconditioner(dpo.diagonal(), dpo.whitening(), direction=wide)
  grads = jnp.ones(2, jnp.bfloat16)
  updates, _ = jax.eval_shape(tx.update, grads, tx.init(grads))
  assert updates.dtype == jnp.bfloat16


@rows
def test_weakly_typed_scalar_parameters_do_not_change_the_state(name):
  """`optax.apply_updates` makes the params strong at the first step; nothing of ours changes, then or later."""
  row, tx = OPTIMIZERS[name], compiled(name).tx
  params = {"temperature": jnp.asarray(0.5)}
  assert params["temperature"].weak_type
  state = tx.init(params)
  moved, after, _ = jax.eval_shape(one_step(tx, row.extras), params, state)
  again = jax.eval_shape(one_step(tx, row.extras), moved, after)[:2]
  third = jax.eval_shape(one_step(tx, row.extras), *again)[:2]
  assert avals(third) == avals(again)
  if name != "chain":  # its ema is optax's, made like the params
    assert avals(after) == avals(state) == avals(again[1])


ODD_TREES = {
  "empty": {},
  "none": {"w": PARAMS["w"], "n": None},
  "zero_size": {"w": PARAMS["w"], "z": jnp.zeros((0, 3))},
  "only_zero_size": {"z": jnp.zeros((0, 3))},
  "scalar": jnp.float32(0.5),
  "tuple": (jnp.float32(0.5), [PARAMS["b"], ()]),
}


@rows
@pytest.mark.parametrize("tree", ODD_TREES)
def test_odd_trees_are_defined(name, tree):
  row, tx, params = OPTIMIZERS[name], compiled(name).tx, ODD_TREES[tree]
  state = tx.init(params)
  assert avals(jax.eval_shape(one_step(tx, row.extras), params, state)[:2]) == avals((params, state))


@pytest.mark.parametrize("name", ["psgd whitening", "dpsgd"])
def test_scalars_and_empty_leaves_are_trained_beside_others(name):
  row, tx = OPTIMIZERS[name], compiled(name).tx
  params = {"n": None, "s": jnp.float32(1.5), "z": jnp.zeros((0, 3))}
  moved, _, _ = jax.jit(one_step(tx, row.extras))(params, tx.init(params))
  assert moved["z"].shape == (0, 3) and moved["n"] is None
  assert np.isfinite(moved["s"]) and moved["s"] < 1.5


@rows
def test_numpy_arrays_are_parameters_too(name):
  case, arrays = compiled(name), jax.tree.map(np.asarray, PARAMS)
  state = case.tx.init(arrays)
  same(state, case.tx.init(PARAMS))
  same(case.run(arrays, state, [CALM]), case.run(PARAMS, state, [CALM]))
  assert case.step._cache_size() <= 2  # jit tells numpy from JAX arguments in its fast path, without compiling
  assert len(case.traces) == 1


@rows
def test_init_needs_only_shapes(name):
  """Under eval_shape, on jax.ShapeDtypeStruct, and inside jit: the same state."""
  tx = compiled(name).tx
  expected = avals(tx.init(PARAMS))
  assert avals(jax.eval_shape(tx.init, PARAMS)) == expected
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
  assert avals(jax.eval_shape(tx.init, shapes)) == expected
  assert avals(tx.init(shapes)) == expected
