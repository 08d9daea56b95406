# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization (PPO) on the environments of gymnax, with any optimizer of the table.

python -m benchmarks rl                                  ENVIRONMENTS, every optimizer tuned alike
python -m benchmarks rl Acrobot-v1 --optimizers "adam(clip=0.5),psgd_whiten(b1=0.9)"

Needs the extra `rl`. A whole run (acting, advantages, epochs of minibatches) is one compiled function. Each optimizer
has its five learning rates on seed TUNING_SEED; the one of the highest return over the whole run is run on seeds 1, 2,
... The final return is the mean over the episodes that ended in the last tenth of the run.

Source: arXiv:1707.06347 (PPO, Eq. 7 to 9), arXiv:1506.02438 (advantages, Eq. 16). An episode that ran out of time is
not over: the value of its last observation stands for what would have followed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpsgd_optax as dpo
from benchmarks.engine.analysis import spread
from benchmarks.engine.calls import SpecError
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment as machine
from benchmarks.engine.records import load_average
from benchmarks.engine.report import Table, number
from benchmarks.hyperparameters import GRIDS, TUNING_SEED
from benchmarks.optimizers import Contestant, contestants, parse, split
from benchmarks.studies.cost import save

ENVIRONMENTS = {"CartPole-v1": 60, "Acrobot-v1": 60, "Pendulum-v1": 200}  # iterations; DEFAULT of any other
DEFAULT = 300
OPTIMIZERS = "adam(clip=0.5),muon(clip=0.5),psgd_whiten(b1=0.9),psgd_newton(every=10),dpsgd"


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

  def act(params: Any) -> Callable:
    def move(carry: tuple, key: jax.Array) -> tuple[tuple, tuple[Moments, Episodes]]:
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

    return move

  def learn(carry: tuple, rows: jax.Array, data: Any) -> tuple[tuple, None]:
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
    around, (seen, ended) = jax.lax.scan(act(params), around, jax.random.split(act_key, recipe.horizon))
    following = model.apply(params, seen.last)[1]
    gain = advantages(seen.value, following, seen.reward, seen.terminated, seen.done, recipe)
    data = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), (seen, gain, gain + seen.value))
    orders = [jax.random.permutation(key, steps) for key in jax.random.split(learn_key, recipe.epochs)]
    rows = jnp.concatenate(orders).reshape(recipe.epochs * recipe.minibatches, -1)
    carry, _ = jax.lax.scan(lambda carry, rows: learn(carry, rows, data), (params, opt_state), rows)
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


@dataclass
class Outcome:
  """One run: the mean return of each tenth of it, NaN where no episode ended, and the seconds it took."""

  returns: list[float]
  seconds: float

  @property
  def final(self) -> float:
    """Of the last tenth; minus infinity if nothing ended there."""
    return self.returns[-1] if math.isfinite(self.returns[-1]) else -math.inf

  @property
  def whole(self) -> float:
    """Of the run, every tenth counting alike; minus infinity if nothing ended at its end."""
    return float(np.nanmean(self.returns)) if math.isfinite(self.final) else -math.inf


def tenths(ended: Episodes) -> list[float]:
  total, count = (np.array([part.sum() for part in np.array_split(np.asarray(x), 10)]) for x in ended)
  return [float(t / n) if n else math.nan for t, n in zip(total, count, strict=True)]


def runner(place: World, recipe: Recipe, iterations: int, contestant: Contestant) -> Callable[[float, int], Outcome]:
  """(learning rate, seed) → a run. Compiled once: the rate is a number in the optimizer's state."""

  def transform(rate: float, seed: int) -> optax.GradientTransformationExtraArgs:
    options = contestant.options | {"learning_rate": rate}
    return Contestant(contestant.label, contestant.name, options).build(1.0, 1, seed)

  def start(rate: float, seed: int) -> tuple:
    params = initial(place, recipe, seed)
    return params, transform(rate, seed).init(params), jax.random.key(1000 + seed)

  train = trainer(place, recipe, iterations, transform(1.0, 0)).lower(*start(1.0, 0)).compile()

  def play(rate: float, seed: int) -> Outcome:
    arguments = start(rate, seed)
    begin = time.perf_counter()
    _, _, ended = jax.block_until_ready(train(*arguments))
    return Outcome(tenths(ended), time.perf_counter() - begin)

  return play


def compare(
  name: str, optimizers: str, seeds: Sequence[int], iterations: int, recipe: Recipe, place: World
) -> dict[str, Any]:
  """One environment: tune, then run."""
  defaults = {parse(part)[0]: {"learning_rate": 1.0} for part in split(optimizers)}
  found: dict[str, Any] = {}
  for contestant in contestants(optimizers, defaults, name):
    play = runner(place, recipe, iterations, contestant)
    trials = {rate: play(rate, TUNING_SEED) for rate in GRIDS[contestant.name]}
    rate = max(trials, key=lambda rate: trials[rate].whole)
    runs = [play(rate, seed) for seed in seeds]
    found[contestant.label] = {
      "learning_rate": rate,
      "trials": {f"{rate:g}": trial.whole for rate, trial in trials.items()},
      "whole": [run.whole for run in runs],
      "final": [run.final for run in runs],
      "returns": [run.returns for run in runs],
      "seconds": [run.seconds for run in runs],
    }
    say(f"{name}, {contestant.label}: rate {rate:g}, final returns {', '.join(number(run.final) for run in runs)}")
  return found


def table(name: str, document: dict[str, Any]) -> Table:
  """A row per optimizer, the best first."""

  def cell(values: Sequence[float | None]) -> str:
    median, low, high = spread([-math.inf if x is None else x for x in values])
    return f"{number(median)} [{number(low)}, {number(high)}]"

  found = document["optimizers"]
  best_first = sorted(found, key=lambda label: -spread(found[label]["whole"]).median)
  rows = [
    (
      label,
      f"{found[label]['learning_rate']:g}",
      cell(found[label]["whole"]),
      cell(found[label]["final"]),
      number(spread(found[label]["seconds"]).median),
    )
    for label in best_first
  ]
  return Table(
    f"PPO on {name}, {document['steps']} steps: mean return, median [quartiles] over {len(document['seeds'])} seeds",
    ("optimizer", "learning rate", "whole run", "last tenth", "seconds"),
    rows,
  )


def plot(name: str, document: dict[str, Any], path: Path) -> None:
  """Return against steps: median and quartiles."""
  from benchmarks.engine.plots import STYLE, plt

  with plt.rc_context(STYLE):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = document["steps"] * np.arange(1, 11) / 10
    for i, (label, entry) in enumerate(document["optimizers"].items()):
      low, median, high = np.nanpercentile(np.array(entry["returns"], float), [25, 50, 75], axis=0)
      axes.plot(steps, median, color=f"C{i}", label=label)
      axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
    axes.set(title=f"PPO on {name}", xlabel="steps of the environment", ylabel="mean return")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def measure(
  out: Path,
  names: Sequence[str] = (),
  optimizers: str = "",
  seeds: int = 5,
  make: Callable[[str], World] = world,
  recipe: Recipe = Recipe(),
) -> None:
  """Every environment: train, show, save rl-NAME.json and a picture beside it."""
  worlds = {name: make(name) for name in names or ENVIRONMENTS}
  out.mkdir(parents=True, exist_ok=True)
  for name, place in worlds.items():
    iterations = ENVIRONMENTS.get(name, DEFAULT)
    load = load_average()
    document = {
      "environment": machine(),
      "recipe": asdict(recipe),
      "steps": iterations * recipe.horizon * recipe.actors,
      "seeds": list(range(1, 1 + seeds)),
      "optimizers": compare(name, optimizers or OPTIMIZERS, range(1, 1 + seeds), iterations, recipe, place),
      "load_average": [load, load_average()],
    }
    table(name, document).show()
    save(document, out / f"rl-{name}.json")
    plot(name, document, out / f"rl-{name}.png")
