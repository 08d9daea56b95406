# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization (PPO) as one compiled function: acting, advantages, epochs of minibatches.

Source: arXiv:1707.06347 (PPO, Eq. 7 to 9), arXiv:1506.02438 (advantages, Eq. 16). An episode that ran out of time is
not over: the value of its last observation stands for what would have followed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpsgd_optax as dpo
from benchmarks.engine.calls import SpecError


@dataclass(frozen=True)
class Recipe:
  """PPO's own numbers: those that are usual for small control problems. They are the same for every optimizer."""

  actors: int = 8
  horizon: int = 128  # steps of each actor between two updates
  epochs: int = 4
  minibatches: int = 4
  discount: float = 0.99
  trace: float = 0.95  # λ of the advantages
  clip: float = 0.2  # ε of the ratio
  value_weight: float = 0.5
  entropy_weight: float = 0.01
  hidden: int = 64


USUAL = Recipe()


class World(NamedTuple):
  """An environment that starts anew by itself.

  Attributes:
    reset: key → (observation, state).
    step: (key, state, action) → (observation, state, reward, terminated, truncated, last): `observation` may be of the
      next episode already, `last` is the one that the action led to.
    inputs: length of an observation.
    outputs: number of actions, or length of one.
    discrete: which of the two.
    scale: of an action, which the policy takes to be about 1. Unused if they are discrete.
  """

  reset: Callable
  step: Callable
  inputs: int
  outputs: int
  discrete: bool
  scale: float = 1.0


def world(name: str) -> World:
  """An environment of gymnax."""
  try:
    import gymnax
  except ImportError as error:
    raise SpecError('`rl` needs gymnax. Type: pip install "dpsgd_optax[rl]"') from error
  if name not in gymnax.registered_envs:
    raise SpecError(f"gymnax has no environment `{name}`. It has {', '.join(gymnax.registered_envs)}.")
  environment, settings = gymnax.make(name)
  space = environment.action_space(settings)
  discrete = hasattr(space, "n")

  def reset(key: jax.Array) -> tuple[jax.Array, Any]:
    observation, state = environment.reset(key, settings)
    return observation.ravel(), state

  def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
    seen, state, reward, terminated, truncated, info = environment.step(key, state, action, settings)
    return seen.ravel(), state, reward, terminated, truncated, info["final_observation"].ravel()

  inputs = math.prod(environment.observation_space(settings).shape)
  if discrete:
    return World(reset, step, inputs, int(space.n), True)
  return World(reset, step, inputs, math.prod(space.shape), False, float(np.max(space.high)))


class ActorCritic(nn.Module):
  """Two networks of two tanh layers. Out: logits, or mean and log of the deviation of each action; and the value."""

  outputs: int
  discrete: bool
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[Any, jax.Array]:
    def network(outputs: int, scale: float) -> jax.Array:
      h = x
      for _ in range(2):
        h = nn.tanh(nn.Dense(self.hidden, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))(h))
      return nn.Dense(outputs, kernel_init=nn.initializers.orthogonal(scale))(h)

    policy, value = network(self.outputs, 0.01), network(1, 1.0)[..., 0]
    if self.discrete:
      return policy, value
    return (policy, self.param("log_deviation", nn.initializers.zeros, (self.outputs,))), value


class Policy(NamedTuple):
  """What a distribution over actions has to offer."""

  sample: Callable  # (key, head) → action
  log_probability: Callable  # (head, action) → number
  entropy: Callable  # head → number


def categorical() -> Policy:
  def log_probability(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(nn.log_softmax(logits), action[..., None], -1)[..., 0]

  def entropy(logits: jax.Array) -> jax.Array:
    return -jnp.sum(nn.softmax(logits) * nn.log_softmax(logits), -1)

  return Policy(lambda key, logits: jax.random.categorical(key, logits), log_probability, entropy)


def gaussian() -> Policy:
  def sample(key: jax.Array, head: tuple[jax.Array, jax.Array]) -> jax.Array:
    mean, log_deviation = head
    return mean + jnp.exp(log_deviation) * jax.random.normal(key, mean.shape)

  def log_probability(head: tuple[jax.Array, jax.Array], action: jax.Array) -> jax.Array:
    mean, log_deviation = head
    each = -0.5 * ((action - mean) / jnp.exp(log_deviation)) ** 2 - log_deviation - 0.5 * math.log(2 * math.pi)
    return jnp.sum(each, -1)

  def entropy(head: tuple[jax.Array, jax.Array]) -> jax.Array:
    mean, log_deviation = head
    return jnp.sum(jnp.broadcast_to(log_deviation, mean.shape) + 0.5 * math.log(2 * math.pi * math.e), -1)

  return Policy(sample, log_probability, entropy)


class Moments(NamedTuple):
  """What was seen, (horizon, actors, ...)."""

  observation: jax.Array
  action: jax.Array
  log_probability: jax.Array
  value: jax.Array
  reward: jax.Array
  terminated: jax.Array
  done: jax.Array
  last: jax.Array  # the observation that the action led to, also where the episode ended


def advantages(
  value: jax.Array, following: jax.Array, reward: jax.Array, terminated: jax.Array, done: jax.Array, recipe: Recipe
) -> jax.Array:
  """Â_t = δ_t + γλ (1 − done_t) Â_{t+1} with δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t). Time comes first."""
  delta = reward + recipe.discount * jnp.where(terminated, 0, following) - value

  def back(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    error, ended = now
    found = error + recipe.discount * recipe.trace * jnp.where(ended, 0, later)
    return found, found

  return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, done), reverse=True)[1]


def surrogate(model: ActorCritic, policy: Policy, recipe: Recipe) -> Callable:
  """(params, batch) → the loss of PPO.

  It is − clipped gain + value_weight · ½ squared error of the value − entropy_weight · entropy.
  """

  def loss(params: Any, batch: tuple[Moments, jax.Array, jax.Array]) -> jax.Array:
    seen, advantage, target = batch
    head, value = model.apply(params, seen.observation)
    ratio = jnp.exp(policy.log_probability(head, seen.action) - seen.log_probability)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - recipe.clip, 1 + recipe.clip)
    gain = jnp.minimum(ratio * advantage, clipped * advantage).mean()
    error = 0.5 * jnp.mean((value - target) ** 2)
    return -gain + recipe.value_weight * error - recipe.entropy_weight * policy.entropy(head).mean()

  return loss


class Episodes(NamedTuple):
  """Returns of the episodes that ended in one iteration: their sum and number."""

  total: jax.Array
  count: jax.Array


def trainer(place: World, recipe: Recipe, iterations: int, tx: optax.GradientTransformationExtraArgs) -> Callable:
  """(params, opt_state, key) → (params, opt_state, Episodes of each iteration), compiled as a whole."""
  model = ActorCritic(place.outputs, place.discrete, recipe.hidden)
  policy = categorical() if place.discrete else gaussian()
  loss = surrogate(model, policy, recipe)
  steps = recipe.horizon * recipe.actors

  def act(params: Any, carry: tuple, key: jax.Array) -> tuple[tuple, tuple[Moments, Episodes]]:
    observation, state, so_far = carry
    choose_key, step_key = jax.random.split(key)
    head, value = model.apply(params, observation)
    action = policy.sample(choose_key, head)
    keys = jax.random.split(step_key, recipe.actors)
    sent = action if place.discrete else place.scale * action
    seen, state, reward, terminated, truncated, last = jax.vmap(place.step)(keys, state, sent)
    reward, done = reward.astype(jnp.float32), terminated | truncated
    so_far = so_far + reward
    ended = Episodes(jnp.sum(jnp.where(done, so_far, 0)), jnp.sum(done))
    moment = Moments(observation, action, policy.log_probability(head, action), value, reward, terminated, done, last)
    return (seen, state, jnp.where(done, 0, so_far)), (moment, ended)

  def learn(data: Any, carry: tuple, rows: jax.Array) -> tuple[tuple, None]:
    params, opt_state = carry
    batch = jax.tree.map(lambda x: x[rows], data)
    of_params = lambda p: loss(p, batch)
    value, grads = jax.value_and_grad(of_params)(params)
    extra = dict(value=value, value_fn=of_params, hvp=dpo.hvp(of_params, params))
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return (optax.apply_updates(params, updates), opt_state), None

  def iterate(carry: tuple, key: jax.Array) -> tuple[tuple, Episodes]:
    params, opt_state, around = carry
    act_key, learn_key = jax.random.split(key)
    around, (seen, ended) = jax.lax.scan(partial(act, params), around, jax.random.split(act_key, recipe.horizon))
    following = model.apply(params, seen.last)[1]
    gain = advantages(seen.value, following, seen.reward, seen.terminated, seen.done, recipe)
    data = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), (seen, gain, gain + seen.value))
    orders = [jax.random.permutation(key, steps) for key in jax.random.split(learn_key, recipe.epochs)]
    rows = jnp.concatenate(orders).reshape(recipe.epochs * recipe.minibatches, -1)
    carry, _ = jax.lax.scan(partial(learn, data), (params, opt_state), rows)
    return (*carry, around), jax.tree.map(jnp.sum, ended)

  def train(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any, Episodes]:
    start_key, key = jax.random.split(key)
    observation, state = jax.vmap(place.reset)(jax.random.split(start_key, recipe.actors))
    around = (observation, state, jnp.zeros(recipe.actors))
    carry, ended = jax.lax.scan(iterate, (params, opt_state, around), jax.random.split(key, iterations))
    return carry[0], carry[1], ended

  return jax.jit(train)


def initial(place: World, recipe: Recipe, seed: int) -> Any:
  model = ActorCritic(place.outputs, place.discrete, recipe.hidden)
  return model.init(jax.random.key(seed), jnp.zeros((1, place.inputs)))
