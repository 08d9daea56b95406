# SPDX-License-Identifier: Apache-2.0
"""Nothing that goes wrong in one step corrupts the next."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax._trees.by_shape import all_finite
from dpsgd_optax.preconditioners._damped import unless_zero
from tests.table import OPTIMIZERS, PARAMS, Fault, compiled

CALM = Fault()
rows = pytest.mark.parametrize("name", OPTIMIZERS)
BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def with_extra(extra):
  return pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if extra in row.extras])


def learned(state):
  """What the optimizer has learned: preconditioner and momentum."""
  if not optax.tree.get_all_with_path(state, "preconditioner"):
    return ()
  return optax.tree.get(state, "preconditioner"), optax.tree.get(state, "momentum")


def same(a, b):
  chex.assert_trees_all_equal(a, b)


def zero(tree):
  return all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(tree))


def finite(tree):
  arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return all(np.all(np.isfinite(x)) for x in arrays)


def interrupted(name, fault, counter):
  """Three steps, one with the fault, one more: the fault leaves no trace but its count."""
  case = compiled(name)
  params, state, _ = case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 3)
  after, hurt, updates = case.run(params, state, [fault])
  assert zero(updates)
  same(after, params)
  same(learned(hurt), learned(state))
  assert int(optax.tree.get(hurt, counter)) == int(optax.tree.get(state, counter)) + 1
  later, healed, updates = case.run(after, hurt, [CALM])
  assert finite((later, updates, learned(healed))) and not zero(updates)
  assert int(optax.tree.get(healed, counter)) == int(optax.tree.get(hurt, counter))
  return state, hurt


@BAD
@rows
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(name, bad):
  interrupted(name, Fault(gradient=bad), OPTIMIZERS[name].skips)


@BAD
@with_extra("hvp")
def test_a_product_that_is_not_finite_drops_the_fit_and_not_the_step(name, bad):
  """The old P is kept and applied; the drop is counted, and the step is not among the skipped."""
  case = compiled(name)
  params, state, _ = case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 3)
  count = lambda name, state: [int(x) for _, x in optax.tree.get_all_with_path(state, name) if x.ndim == 0]
  fits = count("fits", state)
  after, hurt, updates = case.run(params, state, [Fault(product=bad)])
  if count("fits", case.run(params, state, [CALM])[1]) == fits:
    pytest.skip("no fit was due")
  if name in ("gradient penalty",):  # the product is part of its gradient
    assert zero(updates) and count("skipped", hurt) == [1]
    return
  assert finite((after, updates)) and not zero(updates)
  same(dropless(hurt), dropless(state))
  assert count("dropped", hurt) == [1] and count("skipped", hurt) == [0] and count("fits", hurt) == fits
  later, healed, updates = case.run(after, hurt, [CALM])
  assert finite((later, updates, learned(healed))) and not zero(updates) and count("dropped", healed) == [1]


def dropless(state):
  """P itself, which a dropped fit leaves as it was."""
  return optax.tree.get(state, "preconditioner")


@BAD
@with_extra("value")
def test_a_loss_that_is_not_finite_is_rejected_and_counted(name, bad):
  before, after = interrupted(name, Fault(value=bad), "rejected")
  assert float(before.damping) == float(after.damping)


@with_extra("value_fn")
def test_a_loss_that_is_not_finite_after_the_step_is_rejected_and_counted(name):
  """Only where the step is judged; there it is a bad step, so λ turns as for one."""
  case = compiled(name)
  before, state, _ = case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 3)  # `dpsgd` judges the fourth
  after, state, updates = case.run(before, state, [Fault(ahead=np.nan)])
  assert zero(updates) and int(state.rejected) == 1 and np.isfinite(state.damping)
  same(after, before)


@rows
def test_a_first_step_that_is_not_finite_is_survived(name):
  case = compiled(name)
  params, state, _ = case.run(PARAMS, case.tx.init(PARAMS), [Fault(gradient=np.nan, product=np.nan)])
  same(params, PARAMS)
  params, state, updates = case.run(params, state, [CALM] * 3)
  assert finite((params, learned(state))) and not zero(updates)


def real_step_after(name, count):
  case = compiled(name)
  params, state, updates = case.run(PARAMS, case.tx.init(PARAMS), [Fault(scale=0.0)] * count)
  assert zero(updates) and finite(learned(state))
  params, state, updates = case.run(params, state, [CALM])
  assert finite((params, updates, learned(state))) and not zero(updates)
  assert all(np.any(x != 0) for x in jax.tree.leaves(updates))
  if case.row.bound is not None:
    for x in jax.tree.leaves(updates):
      assert np.sqrt(np.mean(np.square(x))) <= 1.01 * case.row.bound
  params, state, updates = case.run(params, state, [CALM] * 20)
  assert finite((params, updates, learned(state))) and not zero(updates)


@rows
def test_a_zero_first_gradient_is_survived(name):
  real_step_after(name, 1)


@rows
def test_300_zero_gradients_do_not_let_p_run_away(name):
  """P stays ≤ 1/λ, and the first real gradient gives a finite, clipped step that is not zero."""
  real_step_after(name, 300)


@pytest.mark.parametrize("vector", [None, 1.0])
def test_a_leaf_whose_product_is_zero_keeps_its_p(vector):
  """Whitening and Newton: λ alone teaches nothing; the leaf beside it learns."""
  p, like = dpo.diagonal(), {"idle": jnp.ones(2), "used": jnp.ones(3)}
  start = p.init(like)
  v = vector and jax.tree.map(lambda x: vector * x, like)
  probe = dpo.Probe(v, {"idle": jnp.zeros(2), "used": 5 * jnp.ones(3)})
  applied = p.apply(p.fit(start, probe, key=jax.random.key(0), damping=1e-9), like)
  np.testing.assert_array_equal(applied["idle"], 1)
  assert np.all(applied["used"] < 0.99)


PRECONDITIONED = pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.takes_key])


@PRECONDITIONED
def test_integer_leaves_are_named(name):
  with pytest.raises(ValueError, match=r"\['layer'\]\['steps'\].*int32.*optax.masked"):
    OPTIMIZERS[name].make().init({"layer": {"steps": jnp.arange(3), "w": jnp.zeros(3)}})


@PRECONDITIONED
def test_updates_of_another_structure_are_refused(name):
  if name == "gauss_newton":
    pytest.skip("its state knows no leaves; the step is solved anew from the residuals of whatever is given")
  tx = compiled(name).tx
  state = tx.init(PARAMS)
  for other in ({"w": PARAMS["w"]}, {**PARAMS, "c": jnp.zeros(5)}, {**PARAMS, "c": jnp.zeros(2)}):
    extras = {"hvp": lambda v: v, "value": 0.0, "value_fn": lambda p: 0.0}
    extras = {k: v for k, v in extras.items() if k in OPTIMIZERS[name].extras}
    # where there is a momentum, optax's own words come first
    with pytest.raises(ValueError, match=r"leaves that the params had at `init`|pytree structure"):
      jax.eval_shape(lambda state: tx.update(other, state, other, **extras), state)


def test_a_product_of_another_structure_is_refused():
  tx = compiled("chain").tx
  with pytest.raises(ValueError, match=r"`hvp\(v\)` must return a tree of the structure of the updates"):
    jax.eval_shape(lambda s: tx.update(PARAMS, s, PARAMS, hvp=lambda v: v["w"]), tx.init(PARAMS))


def test_without_the_check_nothing_is_skipped():
  tx = dpo.scale_by_preconditioner(dpo.diagonal(), dpo.whitening(), finite_check=False)
  updates, state = jax.jit(tx.update)(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
  assert np.isnan(updates).any() and int(state.skipped) == 0


def bowl(params):
  return jnp.sum(params**2)


def test_reject_zeroes_a_step_that_raises_the_loss_and_moves_the_damping():
  params = jnp.array([1.0, -2.0])
  for reject in (True, False):
    tx = dpo.levenberg_marquardt(optax.sgd(10.0), reject=reject)
    updates, state = tx.update(jax.grad(bowl)(params), tx.init(params), params, value_fn=bowl)
    assert zero(updates) == reject and int(state.rejected) == int(reject)
    np.testing.assert_allclose(state.damping, 20 / 19, rtol=1e-6)
    assert float(state.ratio) < 0
  tx = dpo.levenberg_marquardt(optax.sgd(0.1), reject=True)
  updates, state = tx.update(jax.grad(bowl)(params), tx.init(params), params, value_fn=bowl)
  assert not zero(updates) and int(state.rejected) == 0


def test_a_rejected_step_of_dpsgd_turns_the_damping_down():
  """More damping of the factors is a longer step: away from it."""
  params = jnp.array([1.0, -2.0])
  tx = dpo.dpsgd(100.0, max_update_norm=jnp.inf, reject=True, judge_every=1, bounds=(1e-5, 2.0))

  @jax.jit
  def step(state):
    return tx.update(jax.grad(bowl)(params), state, params, value_fn=bowl)

  updates, state = step(tx.init(params))
  assert zero(updates) and int(state.rejected) == 1
  np.testing.assert_allclose(state.damping, 0.95, rtol=1e-6)


def test_an_infinite_loss_before_a_judged_step_is_no_verdict_on_it():
  """Neither as `value` nor from `value_fn`: inf − loss(θ + s) is not a reduction."""
  params = jnp.array([1.0, -2.0])
  tx = dpo.levenberg_marquardt(optax.sgd(0.1))
  start = tx.init(params)
  _, state = tx.update(jax.grad(bowl)(params), start, params, value_fn=lambda p: jnp.where(p[0] == 1, jnp.inf, bowl(p)))
  assert float(state.damping) == float(start.damping) and float(state.predicted) == 0


def test_integer_leaves_beside_a_transform_that_takes_them_do_not_disturb_the_damping():
  params = {"w": jnp.ones(2), "steps": jnp.arange(3)}
  tx = dpo.levenberg_marquardt(optax.masked(optax.sgd(0.1), {"w": True, "steps": False}))
  assert tx.init(params).damping.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 3), (64, 100), (1000, 33)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_wherever_it_is(shape, dtype, wrong):
  """In large arrays too, where the maximum that XLA computes on a CPU loses a NaN."""
  finite = jax.jit(all_finite)
  fine = jnp.full(shape, jnp.finfo(dtype).max, dtype)
  assert finite({"a": fine, "b": jnp.zeros((0, 3)), "c": jnp.arange(3)})
  for row in (0, shape[0] // 2, -1):
    spoilt = fine.at[(row, *(0,) * (len(shape) - 1))].set(wrong)
    assert not finite({"a": spoilt, "b": jnp.ones(3)})


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("entry", [1.0, 3e38, 1e-30, float(np.finfo(np.float32).tiny), np.inf, np.nan])
def test_one_entry_that_is_not_zero_is_seen_however_small_or_large(entry, dtype):
  """Only a product that is zero throughout leaves the factors as they were; a small batch of experiments alike."""
  fitted = lambda x: unless_zero(x, lambda probe: jnp.ones(()), dpo.Probe(None, x), jnp.zeros(()))
  for size in (7, 5000):  # a loop of its own, and a library's
    x = jnp.zeros(size, dtype).at[size // 2].set(entry)
    assert jax.jit(fitted)(x) == 1
    assert jax.jit(fitted)(jnp.zeros_like(x)) == 0
    np.testing.assert_array_equal(jax.jit(jax.vmap(fitted))(jnp.stack([x, 0 * jnp.ones_like(x)])), [1, 0])
