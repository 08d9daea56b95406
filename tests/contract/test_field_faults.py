# SPDX-License-Identifier: Apache-2.0
"""What real loops broke, one small input for each kind of fault. Each test was red before its fault was mended."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.table import OPTIMIZERS, PARAMS, loss


def bowl(params):
  return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def run(tx, params, steps, loss=loss, **extra):
  """The params and the state after some steps with every extra argument."""

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    offers = {"value": value, "value_fn": loss, "hvp": dpo.hvp(loss, params), **extra}
    updates, state = tx.update(grads, state, params, **{k: v for k, v in offers.items() if v is not None})
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def rms(x):
  return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.parametrize("make", [dpo.psgd, dpo.dpsgd, lambda lr: dpo.levenberg_marquardt(optax.sgd(lr))])
def test_a1_a_fresh_state_can_be_donated(make):
  tx, params = make(0.1), {"w": jnp.ones((4, 3))}
  step = lambda p, s: tx.update(jax.grad(bowl)(p), s, p, value=bowl(p), value_fn=bowl)
  updates, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
  assert np.all(np.isfinite(updates["w"]))


@pytest.mark.parametrize(
  "wrap", [lambda tx: tx, dpo.levenberg_marquardt, lambda tx: optax.chain(tx, optax.scale(-0.1))]
)
def test_a1_a_state_that_shares_its_arrays_is_taken_apart(wrap):
  """A preconditioner of one's own may keep one array twice, or the params themselves: none of it reaches the state."""

  def init(params):
    zero = jnp.zeros(())
    return {"first": zero, "second": zero, "start": params}

  own = dpo.Preconditioner(init, lambda state, probe, *, key, damping: state, lambda state, updates: updates)
  tx, params = wrap(dpo.scale_by_preconditioner(own, dpo.whitening())), {"w": jnp.ones((4, 3))}
  step = lambda p, s: tx.update(jax.grad(bowl)(p), s, p, value=bowl(p), value_fn=bowl)
  updates, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
  assert np.all(np.isfinite(updates["w"]))


def test_a1_a_key_of_the_caller_survives_the_donation_of_the_state():
  key, params = jax.random.key_data(jax.random.key(3)), jnp.ones(3)
  tx = dpo.psgd(0.1, key=key)
  jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=1)(params, tx.init(params))
  assert not key.is_deleted()


def test_a2_a_mask_is_no_schedule():
  """`inject_hyperparams` takes every function for a schedule; the step count would be masked, and nothing decay."""
  mask = lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
  plain = dpo.psgd(0.1, weight_decay=0.5, mask=mask)
  given = optax.inject_hyperparams(dpo.psgd)(learning_rate=0.1, weight_decay=0.5, mask=mask)
  for a, b in zip(jax.tree.leaves(run(plain, PARAMS, 3)[0]), jax.tree.leaves(run(given, PARAMS, 3)[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("make", [dpo.psgd, dpo.dpsgd, functools.partial(dpo.sgd_ph, where=dpo.is_vector), dpo.gls])
def test_a2_an_injected_damping_has_its_name_for_itself(make):
  params = {"w": PARAMS["w"].T, "b": jnp.ones(3)}
  state = optax.inject_hyperparams(make)(learning_rate=0.1, damping=0.5).init(params)
  assert float(optax.tree.get(state, "damping")) == 0.5
  assert optax.tree.get(make(learning_rate=0.1, damping=0.5).init(params), "damping") in (None, 0.5)


def test_a2_numbers_may_be_schedules():
  """Of the step count, as in optax: momentum, damping, clip and jump alike."""
  constant = lambda value: lambda count: value + 0.0 * count
  numbers = {"learning_rate": 0.1, "b1": 0.8, "damping": 1e-3, "clip": 0.5, "max_jump": 3.0}
  scheduled = optax.inject_hyperparams(dpo.psgd)(**{k: constant(v) for k, v in numbers.items()})
  for a, b in zip(*(jax.tree.leaves(run(tx, PARAMS, 4)[0]) for tx in (dpo.psgd(**numbers), scheduled)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", ["psgd newton", "dpsgd"])
def test_a3_levenberg_marquardt_hands_extra_arguments_to_multi_steps(name):
  """Inside it and around it; the transform of `MultiSteps` takes them though its type does not say so."""
  inner = OPTIMIZERS[name].make(every=1)
  for tx in (
    dpo.levenberg_marquardt(optax.MultiSteps(inner, 2)),
    dpo.levenberg_marquardt(optax.MultiSteps(inner, 2).gradient_transformation()),
    optax.MultiSteps(dpo.levenberg_marquardt(inner), 2),
  ):
    params, state = run(tx, PARAMS, 6)
    assert loss(params) < loss(PARAMS)
    fits = next(x for path, x in jax.tree_util.tree_leaves_with_path(state) if "fits" in jax.tree_util.keystr(path))
    assert int(fits) == 3


def test_a4_the_state_has_no_typed_key():
  """It can be cast, raveled, turned into arrays of numpy."""
  state = dpo.psgd(0.1).init(PARAMS)
  assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
  jax.tree.map(np.asarray, state)
  jax.flatten_util.ravel_pytree(state)
  moved, _ = dpo.psgd(0.1).update(PARAMS, optax.tree.cast(state, jnp.bfloat16), PARAMS)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(moved))


def test_a4_sharpness_aware_minimization_of_optax_takes_us():
  tx = optax.contrib.sam(dpo.psgd(0.05), optax.sgd(0.01), sync_period=2)
  params, _ = run(tx, PARAMS, 10, value=None, value_fn=None, hvp=None)
  assert loss(params) < loss(PARAMS)


@pytest.mark.parametrize("key", [7, "typed", "raw"])
def test_a4_every_kind_of_key_gives_the_same_run(key):
  keys = {"typed": jax.random.key(7), "raw": jax.random.key_data(jax.random.key(7))}
  make = lambda key: dpo.psgd(0.1, dpo.kron(), dpo.newton(), key=key)
  expected, _ = run(make(7), PARAMS, 3)
  found, _ = run(make(keys.get(key, key)), PARAMS, 3)
  chex.assert_trees_all_equal(found, expected)


def test_a4_another_generator_is_kept():
  key = jax.random.key(7, impl="rbg")
  state = dpo.psgd(0.1, dpo.kron(), dpo.newton(), key=key).init(PARAMS)
  assert optax.tree.get(state, "key").shape == (4,)
  params, _ = run(dpo.psgd(0.1, dpo.kron(), dpo.newton(), key=key), PARAMS, 3)
  assert loss(params) < loss(PARAMS)


def test_a4_a_state_of_the_old_layout_loads():
  """With a typed key and without the count of dropped fits."""
  tx = dpo.psgd(0.1, dpo.kron(), dpo.newton())
  state = tx.init(PARAMS)
  first = state[0]
  old = (first._replace(key=jax.random.wrap_key_data(first.key), dropped=None), *state[1:])
  update = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, hvp=dpo.hvp(loss, PARAMS)))
  found, expected = update(old), update(state)
  assert jnp.issubdtype(found[1][0].key.dtype, jax.dtypes.prng_key)  # so that it fits a scan that carries it
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  chex.assert_trees_all_equal(jax.tree.map(raw, found), expected)


LABELS = {"b": "theirs", "w": "ours"}

PARTS = {
  "partition": lambda tx: optax.partition({"ours": tx, "theirs": optax.sgd(0.05)}, LABELS),
  "frozen": lambda tx: optax.partition({"ours": tx, "theirs": optax.set_to_zero()}, LABELS),
  "masked": lambda tx: optax.chain(
    optax.masked(tx, {"b": False, "w": True}), optax.masked(optax.sgd(0.05), {"b": True, "w": False})
  ),
  "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask={"b": True, "w": False}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a5_dpsgd_judges_its_part_of_the_parameters(part):
  """`hvp` was taken at all params, so the loss can be evaluated: only the part moves in the judged step."""
  tx = PARTS[part](dpo.dpsgd(0.3, judge_every=1))
  params, state = run(tx, PARAMS, 12)
  assert loss(params) < loss(PARAMS)
  assert float(optax.tree.get(state, "predicted")) != 0
  if part in ("frozen", "selective_transform"):
    np.testing.assert_array_equal(params["b"], PARAMS["b"])


def test_a5_the_judged_step_in_a_part_is_the_step_of_the_others_held():
  """The same verdict as without the partition, the other leaves being constants of the loss."""
  whole = PARTS["frozen"](dpo.dpsgd(0.3, judge_every=1))
  alone = dpo.dpsgd(0.3, judge_every=1)
  _, state = run(whole, PARAMS, 4)
  _, expected = run(alone, {"w": PARAMS["w"]}, 4, loss=lambda p: loss({**p, "b": PARAMS["b"]}))
  for name in ("ratio", "actual", "predicted", "damping"):
    np.testing.assert_allclose(optax.tree.get(state, name), optax.tree.get(expected, name), rtol=1e-3)


@pytest.mark.parametrize("part", PARTS)
def test_a5_with_value_fn_alone_the_error_says_what_to_type(part):
  with pytest.raises(ValueError, match=r"hvp=(dpo\.)?hvp\(loss, params\)"):
    run(PARTS[part](dpo.dpsgd(0.3)), PARAMS, 1, hvp=None, value=None)


@pytest.mark.parametrize("part", PARTS)
def test_a5_with_a_product_of_ones_own_the_step_is_judged_by_looking_back(part):
  product = lambda v: dpo.hvp(loss, PARAMS)(v)
  _, state = run(PARTS[part](dpo.dpsgd(0.3, judge_every=1)), PARAMS, 4, hvp=product)
  assert float(optax.tree.get(state, "predicted")) > 0 and float(optax.tree.get(state, "ratio")) != 0


def test_a8_a_line_search_behind_a_preconditioner():
  """The product is made from `value_fn`; a loss that names `hvp` and ignores it lets a line search pass it by."""
  tx = optax.chain(dpo.psgd(1.0, dpo.kron(), dpo.newton(), every=1), optax.scale_by_backtracking_linesearch(12))
  passed_by = lambda p, hvp=None, layer_inputs=None: loss(p)
  hvp = dpo.hvp(loss, PARAMS)
  for extra in ({"value_fn": loss}, {"value_fn": passed_by, "hvp": hvp}):
    value, grads = jax.value_and_grad(loss)(PARAMS)
    updates, _ = jax.jit(lambda s: tx.update(grads, s, PARAMS, value=value, grad=grads, **extra))(tx.init(PARAMS))
    assert loss(optax.apply_updates(PARAMS, updates)) < value


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rate", [np.float32(0.1), jnp.float32(0.1)])
def test_a13_updates_have_the_dtype_of_the_gradients(name, rate):
  make = OPTIMIZERS[name].make
  if not isinstance(make, functools.partial):
    pytest.skip("it has no learning rate of its own")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  tx = make.func(rate, *make.args[1:], **make.keywords)
  extras = {"value": jnp.float32(1.0), "value_fn": lambda p: jnp.float32(1.0), "hvp": lambda v: v}
  extras["layer_inputs"] = {"w": jnp.ones((4, 3))}
  extras = {k: v for k, v in extras.items() if k in OPTIMIZERS[name].extras}
  updates, _ = jax.eval_shape(lambda s: tx.update(params, s, params, **extras), jax.eval_shape(tx.init, params))
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
