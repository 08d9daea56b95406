# SPDX-License-Identifier: Apache-2.0
"""Both dampings, and the rule that chooses them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from tests.table import BATCH, PARAMS, PRECONDITIONERS, SIZE, draw, fit, flat, matrix, start, unflat

H = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)
NEWTON = optax.stateless(lambda updates, _: jnp.linalg.solve(H, updates))  # P = H⁻¹


def quadratic(params):
  return 0.5 * params @ H @ params


@jax.jit
def judged(alpha, params):
  """(ratio, predicted, actual) of one Newton step s = −α H⁻¹ g, by each model."""
  rows = {
    "half_slope": (dpo.half_slope, optax.scale_by_learning_rate(alpha)),
    "newton_model": (dpo.newton_model, dpo.clipped_learning_rate(alpha, jnp.inf)),
    "clipped": (dpo.newton_model, dpo.clipped_learning_rate(alpha, 0.1)),
    "quadratic_model": (dpo.quadratic_model, optax.scale_by_learning_rate(alpha)),
  }
  found = {}
  for name, (model, tail) in rows.items():
    tx = dpo.levenberg_marquardt(optax.chain(NEWTON, tail), model=model)
    _, state = tx.update(jax.grad(quadratic)(params), tx.init(params), params, value_fn=quadratic)
    found[name] = state.ratio
  # the quadratic model is right for any direction, here for plain descent
  tx = dpo.levenberg_marquardt(optax.sgd(alpha), model=dpo.quadratic_model)
  _, state = tx.update(jax.grad(quadratic)(params), tx.init(params), params, value_fn=quadratic)
  return {**found, "descent": state.ratio}


@settings(deadline=None, max_examples=20)
@given(alpha=st.floats(0.05, 1.5), x=st.floats(0.5, 3), y=st.floats(-3, -0.5))
def test_the_reduction_ratio_of_a_newton_step_on_a_quadratic(alpha, x, y):
  """M = −½⟨g, s⟩: ratio 2 − α. M = −⟨g, s⟩(1 − a/2), a clipped or not, and M = −⟨g, s⟩ − ½⟨s, Hs⟩: ratio 1."""
  found = judged(np.float32(alpha), np.array([x, y], np.float32))
  expected = {"half_slope": 2 - alpha, "newton_model": 1, "clipped": 1, "quadratic_model": 1, "descent": 1}
  for name, ratio in found.items():
    np.testing.assert_allclose(ratio, expected[name], rtol=2e-3, err_msg=name)


TAUS = np.array([0.0, 0.1, 1.0, 10.0])


@pytest.mark.parametrize("name", ["damped_kron factored", "damped_kron additive"])
def test_more_damping_of_the_factors_is_a_longer_step(name):
  """‖(Pbar_L + √π c I) G (Pbar_R + c/√π I)‖ grows with c = √(τ + η)."""
  v, h = (np.repeat(flat(draw(k, 5, 1)), BATCH, 1) for k in (1, 2))
  p = matrix(name, fit(name, start(name), unflat(v), unflat(h), damping=TAUS))
  lengths = np.linalg.norm(p @ np.linspace(-1, 1, SIZE), axis=1)
  assert np.all(lengths[1:] > 1.02 * lengths[:-1])


def test_damping_does_nothing_to_undamped_factors():
  name = "damped_kron undamped"
  v, h = (np.repeat(flat(draw(k, 5, 1)), BATCH, 1) for k in (1, 2))
  p = matrix(name, fit(name, start(name), unflat(v), unflat(h), damping=TAUS))
  np.testing.assert_array_equal(p, np.repeat(p[:1], BATCH, 0))


def test_factors_without_damping_are_undamped():
  """`damping=None` is U = Pbar_L G Pbar_R, whatever form and η are."""
  found = []
  for p, tau in (
    (PRECONDITIONERS["damped_kron undamped"](), 0.1),
    (dpo.damped_kron(average=None, geometry=dpo.eq), None),
  ):
    state = p.init(PARAMS)
    for k in range(5):
      v, h = (optax.tree.random_like(jax.random.key(10 * k + i), PARAMS) for i in (1, 2))
      state = p.fit(state, dpo.Probe(v, h), key=jax.random.key(k), damping=tau)
    found.append(p.apply(state, PARAMS))
  chex.assert_trees_all_close(*found, rtol=1e-6)


@pytest.mark.parametrize("vector", [PARAMS, None], ids=["newton", "whitening"])
def test_a_curvature_without_damping_is_one_with_damping_zero(vector):
  """`damping=None` of a Lie group, as in `dpsgd(lr, kron(), damping=None)`: nothing is added to the product."""
  p = dpo.kron()
  fit = lambda tau: p.fit(p.init(PARAMS), dpo.Probe(vector, PARAMS), key=jax.random.key(0), damping=tau)
  chex.assert_trees_all_equal(fit(None), fit(0.0))


@pytest.mark.parametrize("name", ["diagonal", "kron", "kron eq", "kron quad", "kron qeq"])
def test_more_damping_of_the_curvature_is_a_shorter_step(name):
  """P → (H + λI)⁻¹: ‖Pg‖ falls as λ grows."""
  v = np.repeat(flat(draw(1, 400, 1)), BATCH, 1)
  h = v * np.linspace(0.5, 2, SIZE)
  p = matrix(name, fit(name, start(name), unflat(v), unflat(h), damping=TAUS))
  lengths = np.linalg.norm(p @ np.linspace(-1, 1, SIZE), axis=1)
  assert np.all(lengths[1:] < 0.98 * lengths[:-1])
  np.testing.assert_allclose(lengths[-1], np.linalg.norm(np.linspace(-1, 1, SIZE)) / 11.25, rtol=0.2)


SHRINK, STAY, GROW = 0.95, 1.0, 1 / 0.95


@pytest.mark.parametrize(
  ("actual", "predicted", "change"),
  [
    (0.9, 1.0, SHRINK),
    (0.75, 1.0, STAY),  # exactly at the upper threshold: not above it
    (0.5, 1.0, STAY),
    (0.25, 1.0, STAY),  # exactly at the lower threshold: not below it
    (0.2, 1.0, GROW),
    (-5.0, 1.0, GROW),  # an increase of the loss is a failure, however large
    (0.9e-30, 1e-30, SHRINK),  # compared, not divided
    (0.1e-30, 1e-30, GROW),
    (1.0, 0.0, GROW),  # a model that promises nothing cannot be confirmed
    (1.0, -1.0, GROW),
    (-1.0, -1.0, GROW),
    (np.nan, 1.0, GROW),
    (1.0, np.nan, GROW),
    (-np.inf, 1.0, GROW),
  ],
)
def test_the_truth_table_of_the_rule(actual, predicted, change):
  """λ ← ωλ if actual > hi·M, λ/ω unless actual ≥ lo·M; anything else, NaN too, is bad."""
  np.testing.assert_allclose(dpo.adapt_damping(2.0, actual, predicted), 2.0 * change, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(damping=st.floats(0, 1e6), actual=st.floats(-1e3, 1e3), predicted=st.floats(-1e3, 1e3))
def test_the_damping_stays_within_its_bounds(damping, actual, predicted):
  new = float(dpo.adapt_damping(damping, actual, predicted, bounds=(0.5, 8.0)))
  assert 0.5 <= new <= 8.0


def test_a_factor_above_one_turns_the_rule_round():
  good, bad = (float(dpo.adapt_damping(1.0, actual, 1.0, factor=2.0)) for actual in (1.0, 0.0))
  assert (good, bad) == (2.0, 0.5)


def test_looking_back_gives_the_verdict_of_looking_ahead_one_call_later():
  """On one and the same batch the loss of the next call is the loss after this step."""
  params = jnp.array([1.0, -2.0])
  ahead, back = (dpo.levenberg_marquardt(optax.sgd(0.1)) for _ in range(2))
  ahead_state, back_state = ahead.init(params), back.init(params)
  for _ in range(3):
    grads, value, before = jax.grad(quadratic)(params), quadratic(params), ahead_state
    updates, ahead_state = ahead.update(grads, ahead_state, params, value=value, value_fn=quadratic)
    same, back_state = back.update(grads, back_state, params, value=value)
    np.testing.assert_array_equal(updates, same)
    np.testing.assert_allclose(back_state.ratio, before.ratio, rtol=1e-4)
    np.testing.assert_allclose(back_state.damping, before.damping, rtol=1e-6)
    params = optax.apply_updates(params, updates)
  assert float(ahead_state.damping) < 1.0
