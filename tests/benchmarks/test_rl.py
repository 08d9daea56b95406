# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks rl`: the formulas of PPO, and runs in environments whose best policy is known."""

import json
import sys
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import stats

from benchmarks.__main__ import main
from benchmarks.optimizers import contestants
from benchmarks.studies import _ppo as ppo
from benchmarks.studies import rl

RECIPE = ppo.Recipe(actors=4, horizon=16, epochs=2, minibatches=2, hidden=8)


def bandit(discrete):
  """Episodes of one step. Observation ±1; best is action 1 where it is positive and 0 elsewhere, or the sign itself."""

  def reset(key):
    sign = jax.random.rademacher(key, (1,), jnp.float32)
    return sign, sign

  def step(key, state, action):
    seen, after = reset(key)
    reward = jnp.where((action > 0) == (state[0] > 0), 1.0, 0.0) if discrete else -((action[0] - state[0]) ** 2)
    return seen, after, reward, jnp.array(True), jnp.array(False), seen

  return ppo.World(reset, step, 1, 2 if discrete else 1, discrete)


def endless(reward=1.0):
  """Always the same observation and reward; out of time at every fourth step."""
  start = (jnp.ones(1), jnp.zeros((), jnp.int32))

  def step(key, state, action):
    late = state == 3
    return jnp.ones(1), jnp.where(late, 0, state + 1), reward, jnp.array(False), late, jnp.ones(1)

  return ppo.World(lambda key: start, step, 1, 2, True)


def test_advantages_are_the_weighted_sum_of_the_errors_that_follow_in_the_episode():
  rng = np.random.default_rng(0)
  value, following, reward = rng.standard_normal((3, 7, 2))
  terminated = rng.random((7, 2)) < 0.3
  done = terminated | (rng.random((7, 2)) < 0.3)
  found = ppo.advantages(*map(jnp.asarray, (value, following, reward, terminated, done)), RECIPE)
  error = reward + RECIPE.discount * following * ~terminated - value
  for actor in range(2):
    for t in range(7):
      expected, weight = 0.0, 1.0
      for later in range(t, 7):
        expected += weight * error[later, actor]
        if done[later, actor]:
          break
        weight *= RECIPE.discount * RECIPE.trace
      np.testing.assert_allclose(found[t, actor], expected, rtol=1e-5)


def test_the_policies_are_those_of_jax_scipy_and_their_entropy_is_minus_the_mean_log_probability():
  keys = jax.random.split(jax.random.key(0), 20_000)
  logits = jnp.array([0.3, -1.0, 2.0])
  mean, log_deviation = jnp.array([0.5, -1.0]), jnp.array([0.2, -0.7])
  density = lambda x: stats.norm.logpdf(x, mean, jnp.exp(log_deviation)).sum(-1)
  for policy, head, reference in (
    (ppo.categorical(), logits, lambda x: jax.nn.log_softmax(logits)[x]),
    (ppo.gaussian(), (mean, log_deviation), density),
  ):
    drawn = jax.vmap(lambda key, policy=policy, head=head: policy.sample(key, head))(keys)
    each = jax.vmap(lambda x, policy=policy, head=head: policy.log_probability(head, x))(drawn)
    np.testing.assert_allclose(each, jax.vmap(reference)(drawn), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(policy.entropy(head), -each.mean(), rtol=0.03)


def test_at_the_old_policy_the_gradient_is_that_of_the_plain_policy_gradient():
  """Ratio 1: nothing is clipped, and ∇ratio = ∇log π."""
  recipe = ppo.Recipe(hidden=8, value_weight=0.0, entropy_weight=0.0)
  model, policy = ppo.ActorCritic(3, True, 8), ppo.categorical()
  x, action = jax.random.normal(jax.random.key(1), (32, 2)), jnp.arange(32) % 3
  gain = jax.random.normal(jax.random.key(2), (32,))
  params = model.init(jax.random.key(0), x)
  log_probability = lambda p: policy.log_probability(model.apply(p, x)[0], action)
  zero = jnp.zeros(32)
  seen = ppo.Moments(x, action, log_probability(params), zero, zero, zero, zero, x)
  ours = jax.grad(ppo.surrogate(model, policy, recipe))(params, (seen, gain, zero))
  normal = (gain - gain.mean()) / (gain.std() + 1e-8)
  plain = jax.grad(lambda p: -jnp.mean(log_probability(p) * normal))(params)
  for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_value_of_an_episode_that_ran_out_of_time_is_that_of_one_that_goes_on():
  """Reward 1 for ever: V = 1/(1 − γ) = 10, not the 4 that an episode of four steps would give."""
  recipe = ppo.Recipe(actors=4, horizon=16, epochs=4, minibatches=2, hidden=8, discount=0.9)
  [contestant] = contestants("adam(learning_rate=0.03)", {}, "endless")
  tx = contestant.build(1.0, 1, 0)
  params = ppo.initial(endless(), recipe, 0)
  params, _, ended = ppo.trainer(endless(), recipe, 60, tx)(params, tx.init(params), jax.random.key(0))
  value = ppo.ActorCritic(2, True, 8).apply(params, jnp.ones((1, 1)))[1]
  np.testing.assert_allclose(value, 10, rtol=0.05)
  np.testing.assert_array_equal(ended.count, 16)  # 4 actors x 16 steps, episodes of 4
  np.testing.assert_allclose(ended.total / ended.count, 4)


@pytest.mark.full
@pytest.mark.parametrize(
  ("discrete", "optimizers", "good"),
  [(True, "psgd_newton(every=5)", 0.9), (False, "adam", -1.2)],
  ids=["discrete", "continuous"],
)
def test_the_best_rate_is_run_and_the_best_policy_found(discrete, optimizers, good, tmp_path, monkeypatch):
  monkeypatch.setattr(rl, "DEFAULT", 60)
  monkeypatch.setitem(rl.GRIDS, "adam", (1e-6, 1e-2))
  monkeypatch.setitem(rl.GRIDS, "psgd_newton", (1e-6, 0.05))
  args = Namespace(out=tmp_path, environments=["bandit"], optimizers=optimizers, seeds=2)
  rl.run(args, make=lambda name: bandit(discrete), recipe=RECIPE)
  document = json.loads((tmp_path / "rl-bandit.json").read_text())
  assert document["steps"] == 60 * 4 * 16
  assert (tmp_path / "rl-bandit.png").exists()
  for entry in document["optimizers"].values():
    assert entry["learning_rate"] > 1e-6
    assert min(entry["final"]) > good
    assert entry["returns"][0][-1] == entry["final"][0]


def test_an_environment_of_gymnax_is_stepped(tmp_path):
  pytest.importorskip("gymnax")
  for name, discrete, inputs in (("CartPole-v1", True, 4), ("Pendulum-v1", False, 3)):
    place = ppo.world(name)
    seen, state = place.reset(jax.random.key(0))
    action = jnp.array(0) if discrete else jnp.zeros(1)
    after = place.step(jax.random.key(1), state, action)
    assert (place.discrete, place.inputs, seen.shape, after[-1].shape) == (discrete, inputs, (inputs,), (inputs,))
  assert place.scale == 2
  assert main(["rl", "Cartpole", "--out", str(tmp_path)]) == 2


def test_without_gymnax_the_error_says_what_to_install(monkeypatch, capsys, tmp_path):
  monkeypatch.setitem(sys.modules, "gymnax", None)
  assert main(["rl", "--out", str(tmp_path)]) == 2
  assert 'pip install "dpsgd_optax[rl]"' in capsys.readouterr().err
