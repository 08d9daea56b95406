# SPDX-License-Identifier: Apache-2.0
"""What third-party loops rely on and never broke: one test for each, that it may not break."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.conformance.rows import one_step
from tests.conformance.trees import copied, identical
from tests.table import PARAMS, counted, loss

OURS = {
  "psgd": (functools.partial(dpo.psgd, b1=0.9), frozenset()),
  "newton": (lambda lr: dpo.psgd(lr, dpo.kron(), dpo.newton(), every=1), frozenset({"hvp"})),
  "dpsgd": (functools.partial(dpo.dpsgd, every=1, judge_every=2), frozenset({"value", "value_fn", "hvp"})),
}
ours = pytest.mark.parametrize("name", ["psgd", "dpsgd"])
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def trained(name, loss, params, steps, rate=0.05, tx=None):
  """Params and state after so many steps, in one scan."""
  make, extras = OURS[name]
  tx = make(rate) if tx is None else tx
  body = lambda carry, _: (one_step(tx, extras, loss)(*carry)[:2], None)
  return jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[0])((params, tx.init(params)))


@ours
def test_the_learning_rate_can_be_an_argument_of_jit_and_of_vmap(name):
  """One program for all rates, and under `vmap` the runs of each rate alone."""
  make, extras = OURS[name]
  run = lambda rate, params, state: one_step(make(rate), extras, loss)(params, state)[0]
  state = make(0.1).init(PARAMS)
  jitted, traces = counted(run)
  rates = np.float32([0.01, 0.1, 0.3])
  alone = [jitted(rate, PARAMS, state) for rate in rates]
  assert len(traces) == 1
  side_by_side = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(rates, PARAMS, state)
  for i, params in enumerate(alone):
    jax.tree.map(lambda a, b: close(a[i], b), side_by_side, params)
  assert not np.allclose(alone[0]["w"], alone[2]["w"])


SADDLES = {
  "kron": lambda: dpo.psgd(0.05, dpo.kron(), dpo.newton(), every=1),
  "dense": lambda: dpo.psgd(0.05, dpo.dense(), dpo.newton(), every=1),
  "dpsgd": lambda: dpo.dpsgd(0.05),
}


@pytest.mark.parametrize("method", SADDLES)
def test_a_saddle_is_left(method):
  """f = Σ x² − y² + y⁴/2, minimal at y = ±1; a Newton step with H⁻¹ for |H|⁻¹ would go to the saddle at 0."""
  saddle = lambda p: jnp.sum(p["w"][0] ** 2 - p["w"][1] ** 2 + p["w"][1] ** 4 / 2)
  start = {"w": jnp.array([[0.5, -0.3], [1e-3, -1e-3]])}
  name = "dpsgd" if method == "dpsgd" else "newton"
  params, _ = trained(name, saddle, start, 300, tx=SADDLES[method]())
  assert saddle(params) < -0.95


def test_orbax_restores_params_and_state_under_integer_keys_bit_for_bit(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  params = {0: PARAMS["w"], 7: {1: PARAMS["b"]}}
  bowl = lambda p: sum(jnp.sum(jnp.cosh(x)) for x in jax.tree.leaves(p))
  tree = trained("psgd", bowl, params, 2)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", tree)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: tree))
  identical(restored, tree)


@ours
def test_zero_nans_inside_multi_steps_takes_the_place_of_a_nan(name):
  """The micro-gradient is zero where it was NaN; nothing of it reaches the state, and the step is not lost."""
  make, extras = OURS[name]
  tx = optax.MultiSteps(optax.chain(optax.zero_nans(), make(0.1)), every_k_schedule=2)

  @jax.jit
  def step(params, state, fault):
    value, grads = jax.value_and_grad(loss)(params)
    grads = {**grads, "w": grads["w"].at[0, 0].add(fault)}
    offers = {"value": value, "value_fn": loss, "hvp": dpo.hvp(loss, params)}
    updates, state = tx.update(grads, state, params, **{k: v for k, v in offers.items() if k in extras})
    return optax.apply_updates(params, updates), state, updates

  params, state = PARAMS, tx.init(PARAMS)
  for fault in (0.0, np.nan, 0.0, 0.0):
    params, state, updates = step(params, state, fault)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, updates)))
  assert all(np.any(x != 0) for x in jax.tree.leaves(updates))
  assert int(optax.tree.get(state, "fits")) == 2


@ours
def test_projections_that_start_at_zero_are_trained(name):
  """LoRA's B, a residual branch, a policy head: the layer before has no gradient in the first step."""
  x = jax.random.normal(jax.random.key(0), (32, 4))
  net = lambda p: jnp.mean((jnp.tanh(x @ p["into"]) @ p["out"] - jnp.sin(x[:, :1])) ** 2)
  start = {"into": jax.random.normal(jax.random.key(1), (4, 8)) / 2, "out": jnp.zeros((8, 1))}
  params, _ = trained(name, net, start, 100)
  assert net(params) < 0.2 * net(start)
  assert np.any(params["into"] != start["into"])


def rounded(x):
  return jnp.round(4 * x) / 4


straight_through = jax.custom_vjp(rounded)
straight_through.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


def pooled(p, x):
  h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  h = jax.lax.reduce_window(jax.nn.relu(h), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  return h.reshape(len(x), -1) @ p["w"]


LOSSES = {
  "max-pool": lambda p, x: jnp.mean((pooled(p, x) - 1.0) ** 2),
  "custom_vjp": lambda p, x: (
    jnp.mean((jnp.tanh(straight_through(x.reshape(len(x), -1)[:, :8] @ p["w"])) - 0.5) ** 2)
    + 1e-3 * jnp.sum(p["k"] ** 2)
  ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_max_pooling_and_a_custom_vjp_have_hessian_vector_products(kind):
  x = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
  start = {
    "k": jax.random.normal(jax.random.key(1), (3, 3, 2, 2)) / 3,
    "w": jax.random.normal(jax.random.key(2), (8, 1)) / 3,
  }
  f = functools.partial(LOSSES[kind], x=x)
  params, _ = trained("dpsgd", f, start, 60)
  assert f(params) < 0.8 * f(start)


@ours
@pytest.mark.parametrize("size", [0.0, 1e-7, 6e4])
def test_float16_gradients_of_any_size_give_finite_steps(name, size):
  """0, the smallest that are not zero, and nearly the largest: a P g beyond that is a step skipped, and counted."""
  make, extras = OURS[name] if name != "psgd" else (dpo.psgd, frozenset())  # optax's ema of 1e-7 is 0 in float16
  params = {"w": jnp.ones((3, 2), jnp.float16), "b": jnp.ones(2, jnp.float16)}
  tx = make(0.1)
  grads = jax.tree.map(lambda x: jnp.full_like(x, size), params)
  offers = {"value": jnp.float16(1.0), "value_fn": lambda p: jnp.float16(1.0), "hvp": lambda v: grads}
  update = jax.jit(lambda state: tx.update(grads, state, params, **{k: offers[k] for k in extras}))
  state = tx.init(params)
  for _ in range(3):
    updates, state = update(state)
  assert all(x.dtype == jnp.float16 and np.isfinite(x).all() for x in jax.tree.leaves(updates))
  learned = jax.tree.leaves(optax.tree.get(state, "preconditioner"))
  assert all(np.isfinite(x).all() for x in learned)
  zero = all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates))
  assert zero == (size == 0 or int(optax.tree.get(state, "skipped")) == 3)


@ours
def test_frozen_leaves_stay_exactly_where_they_are(name):
  """Frozen by `stop_gradient` in the loss: not one bit moves, and the others are trained."""
  start = {**PARAMS, "frozen": jnp.array([[0.3, 0.7], [-1.0, 2.0]])}
  f = lambda p: loss(p) + jnp.sum(jax.lax.stop_gradient(p["frozen"]) ** 2) * jnp.sum(p["w"] ** 2) / 10
  params, _ = trained(name, f, start, 20)
  np.testing.assert_array_equal(params["frozen"], start["frozen"])
  assert np.all(params["w"] != start["w"])


@ours
def test_complex_amplitudes_reach_the_ground_state(name):
  """E = ⟨ψ|H|ψ⟩ / ⟨ψ|ψ⟩ of a Hermitian H falls to its smallest eigenvalue. JAX's gradients are conjugated, as ever."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((6, 6)) + 1j * rng.standard_normal((6, 6))
  h = jnp.asarray((a + a.conj().T) / 2, jnp.complex64)

  def energy(psi):
    return jnp.real(jnp.vdot(psi, h @ psi)) / jnp.real(jnp.vdot(psi, psi))

  make, extras = OURS[name]
  tx = make(0.05)

  def step(carry, _):
    psi, state = carry
    value, grad = jax.value_and_grad(energy)(psi)
    offers = {"value": value, "value_fn": energy, "hvp": dpo.hvp(energy, psi)}
    updates, state = tx.update(jnp.conj(grad), state, psi, **{k: offers[k] for k in extras})
    psi = optax.apply_updates(psi, updates)
    return (psi, state), None

  start = jnp.asarray(rng.standard_normal(6) + 1j * rng.standard_normal(6), jnp.complex64)
  (psi, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400)[0:2])((start, tx.init(start)))
  lowest = np.linalg.eigvalsh(np.asarray(h))[0]
  assert energy(psi) - lowest < 0.02 * (energy(start) - lowest)


@ours
def test_a_state_from_a_jitted_init_can_be_donated(name):
  make, extras = OURS[name]
  tx, params = make(0.1), copied(PARAMS)
  state = jax.jit(tx.init)(params)
  step = one_step(tx, extras, loss)
  run = jax.jit(lambda *carry: step(*carry)[:2], donate_argnums=(0, 1))
  for _ in range(2):
    params, state = run(params, state)


@pytest.mark.full
@ours
def test_an_ensemble_under_vmap_is_its_members_one_by_one(name):
  make, extras = OURS[name]
  tx = make(0.1)
  scales = jnp.array([0.5, 1.0, 1.5])
  ensemble = jax.tree.map(lambda x: scales.reshape(3, *[1] * x.ndim) * x, PARAMS)
  step = jax.jit(one_step(tx, extras, loss))
  many = jax.jit(jax.vmap(one_step(tx, extras, loss)))
  params, state = ensemble, jax.vmap(tx.init)(ensemble)
  for _ in range(3):
    params, state, _ = many(params, state)
  for i in range(3):
    one = jax.tree.map(lambda x: x[i], ensemble)
    alone = tx.init(one)
    for _ in range(3):
      one, alone, _ = step(one, alone)
    jax.tree.map(lambda a, b: close(a[i], b, rtol=2e-3, atol=1e-4), params, one)


@pytest.mark.full
@ours
def test_gradients_flow_through_two_updates(name):
  """d loss(θ₂) / d rate, as meta-learning takes it, is the difference quotient."""
  make, extras = OURS[name]

  def after_two(rate):
    tx = make(rate)
    body = lambda carry, _: (one_step(tx, extras, loss)(*carry)[:2], None)
    return loss(jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), length=2)[0][0])

  rate, eps = 0.03, 2e-3
  at = jax.jit(jax.value_and_grad(after_two))
  (left, _), (_, slope), (right, _) = map(at, (rate - eps, rate, rate + eps))
  np.testing.assert_allclose(slope, (right - left) / (2 * eps), rtol=0.05)
  assert slope != 0


@pytest.mark.full
@ours
def test_a_step_is_exported_and_compiled_ahead_of_time(name):
  """Leaves are the arguments: `jax.export` writes no state of a transform unless its type is registered."""
  make, extras = OURS[name]
  tx = make(0.1)
  step = lambda params, state: one_step(tx, extras, loss)(params, state)[:2]
  carry = PARAMS, tx.init(PARAMS)
  expected = jax.jit(step)(*carry)
  identical(jax.jit(step).lower(*carry).compile()(*carry), expected)
  leaves, treedef = jax.tree.flatten(carry)
  flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*treedef.unflatten(leaves))))
  identical(jax.export.export(flat)(*leaves).call(*leaves), jax.tree.leaves(expected))
