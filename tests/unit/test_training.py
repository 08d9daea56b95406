# SPDX-License-Identifier: Apache-2.0
"""What Flax hands to a transform, and which steps the host chooses."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import dpsgd_optax as dpo
from dpsgd_optax.curvature.products import hvp
from dpsgd_optax.training.cadence import host_cadence
from dpsgd_optax.training.train_state import TrainState


class SeenState(NamedTuple):
  value: Any
  product: Any
  count: Any


def recorder(learning_rate=0.1):
  """A transform that keeps the `value` it was given and the Hessian-vector product of its gradient."""

  def init(params):
    return SeenState(jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, *, value, hvp, bonus=0, **extra):
    del params, extra
    new = SeenState(jnp.asarray(value), hvp(updates), state.count + 1 + bonus)
    return jax.tree.map(lambda g: -learning_rate * g, updates), new

  return optax.GradientTransformationExtraArgs(init, update)


def linen_problem(tx, state_class=TrainState):
  x = jnp.linspace(-1, 1, 12, dtype=jnp.float32).reshape(4, 3)
  model = nn.Dense(2)
  params = model.init(jax.random.key(0), x)["params"]
  loss = lambda p: jnp.mean((model.apply({"params": p}, x) - 1) ** 2)
  return state_class.create(apply_fn=model.apply, params=params, tx=tx), loss


# -------------------------------------------------------------------------------------------------------- TrainState


def test_train_state_forwards_extra_arguments():
  """The transform receives what `extra_args` holds, under jit, functions included, and trains."""
  state, loss = linen_problem(recorder())
  traces = []

  @jax.jit
  def train_step(state):
    traces.append(1)
    value, grads = jax.value_and_grad(loss)(state.params)
    extra = {"value": value, "hvp": hvp(loss, state.params), "bonus": 5, "unknown": None}
    return state.apply_gradients(grads=grads, extra_args=extra), value, grads

  before = state.params
  state, value, grads = train_step(state)
  seen = state.opt_state
  assert seen.count == 6
  np.testing.assert_allclose(seen.value, loss(before))
  assert_close(seen.product, hvp(loss, before)(grads))
  assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, before, grads))
  state, second, _ = train_step(state)
  assert second < value
  assert state.step == 2
  # the second call has a step counter that is an array, where Flax's `create` put an int; from then on all is cached
  train_step(state)
  assert len(traces) <= 2


def assert_close(actual, desired):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, rtol=1e-5, atol=1e-6), actual, desired)


def test_train_state_is_flax_s_without_extra_arguments():
  """A drop-in: same leaves, same step, and the transform in it is the one that was given."""
  tx = optax.adam(1e-2)
  ours, loss = linen_problem(tx)
  theirs, _ = linen_problem(tx, train_state.TrainState)
  grads = jax.grad(loss)(ours.params)
  ours, theirs = ours.apply_gradients(grads=grads), theirs.apply_gradients(grads=grads)
  assert isinstance(ours, TrainState) and isinstance(ours, train_state.TrainState)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)
  assert ours.tx is tx


def test_extra_arguments_are_harmless_for_a_transform_that_takes_none():
  old_style = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jax.tree.map(jnp.negative, g), s))
  state, loss = linen_problem(old_style)
  grads = jax.grad(loss)(state.params)
  after = state.apply_gradients(grads=grads, extra_args={"value": 1.0})
  assert_close(after.params, jax.tree.map(jnp.subtract, state.params, grads))


def test_a_missing_extra_argument_is_the_transform_s_own_error():
  state, loss = linen_problem(recorder())
  with pytest.raises(TypeError, match=r"value.*hvp"):
    state.apply_gradients(grads=jax.grad(loss)(state.params))


def test_train_state_replaces_further_attributes():
  """`**kwargs` go where Flax puts them, a new `tx` among them."""

  class WithStats(TrainState):
    stats: Any = None

  state, loss = linen_problem(optax.sgd(0.1), WithStats)
  other = optax.sgd(0.5)
  grads = jax.grad(loss)(state.params)
  after = state.apply_gradients(grads=grads, extra_args={"value": 0.0}, stats={"mean": 1.0}, tx=other)
  assert isinstance(after, WithStats)
  assert after.stats == {"mean": 1.0}
  assert after.tx is other


def test_averaged_params_are_the_debiased_mean_of_what_every_step_left():
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(3, 2)))}
  state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.5), average=0.8)
  assert jnp.array_equal(state.averaged_params["w"], params["w"])
  step, left = jax.jit(lambda state, grads: state.apply_gradients(grads=grads)), []
  for _ in range(5):
    state = step(state, {"w": jnp.asarray(rng.normal(size=(3, 2)))})
    left.append(np.asarray(state.params["w"]))
  weights = 0.8 ** np.arange(5)[::-1]
  want = np.tensordot(weights / weights.sum(), np.stack(left), 1)
  assert np.allclose(state.averaged_params["w"], want, rtol=1e-5)


def test_without_an_average_nothing_is_kept_and_nothing_changes():
  state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.5))
  state = state.apply_gradients(grads={"w": jnp.ones(3)})
  assert state.mean is None and state.averaged_params is state.params


def test_the_mean_of_half_precision_parameters_does_not_stand_still():
  """0.001 of what is missing falls below half a unit in the last place of bfloat16 once a third of it is there."""
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0), average=0.999)
  step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
  state = step(state, {"w": jnp.full(3, -1, jnp.bfloat16)})
  for _ in range(1000):
    state = step(state, {"w": jnp.zeros(3, jnp.bfloat16)})
  assert state.averaged_params["w"].dtype == jnp.bfloat16 and state.mean.ema["w"].dtype == jnp.float32
  np.testing.assert_allclose(np.float32(state.averaged_params["w"]), 2.0, rtol=1e-2)


def test_a_subclass_has_fields_without_a_default():
  class WithStatistics(TrainState):
    batch_stats: Any

  fields = {"apply_fn": None, "params": {"w": jnp.ones(3)}, "tx": optax.sgd(0.5)}
  state = WithStatistics.create(**fields, batch_stats=jnp.zeros(2), average=0.9)
  state = state.apply_gradients(grads={"w": jnp.ones(3)}, batch_stats=jnp.ones(2))
  assert state.batch_stats[0] == 1 and jnp.allclose(state.averaged_params["w"], state.params["w"])


@pytest.mark.parametrize("average", [-0.1, 1.0])
def test_an_average_outside_the_unit_interval_is_a_value_error(average):
  with pytest.raises(ValueError, match="average"):
    TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.5), average=average)


def test_train_state_keeps_flax_s_overwrite_with_gradient():
  """That collection (fp8's) is replaced by its gradient and does not reach the transform."""
  name = "_overwrite_with_gradient"
  params = {"params": {"w": jnp.ones(2)}, name: {"scale": jnp.zeros(3)}}
  state = TrainState.create(apply_fn=None, params=params, tx=recorder())
  assert set(state.opt_state.product) == {"w"}
  grads = {"params": {"w": jnp.full(2, 2.0)}, name: {"scale": jnp.full(3, 7.0)}}
  after = state.apply_gradients(grads=grads, extra_args={"value": 3.0, "hvp": lambda v: jax.tree.map(jnp.square, v)})
  np.testing.assert_allclose(after.params[name]["scale"], 7.0)
  np.testing.assert_allclose(after.params["params"]["w"], 0.8)
  np.testing.assert_allclose(after.opt_state.product["w"], 4.0)


def test_multi_steps_in_a_train_state_is_handed_the_extra_arguments():
  """Its transform is a plain `GradientTransformation`, whose `update` takes them: a fit for each real step."""
  k = 4
  tx = optax.MultiSteps(dpo.dpsgd(0.1, every=1, judge_every=1), k)
  state, loss = linen_problem(tx)

  @jax.jit
  def train_step(state):
    value, grads = jax.value_and_grad(loss)(state.params)
    extra = {"value": value, "value_fn": loss, "accumulating": state.opt_state.mini_step < k - 1}
    return state.apply_gradients(grads=grads, extra_args=extra), value

  values = []
  for _ in range(5 * k):
    state, value = train_step(state)
    values.append(float(value))
  inner = state.opt_state.inner_opt_state
  assert state.tx is tx and optax.tree.get(inner, "fits") == 5 and optax.tree.get(inner, "ratio") > 0
  assert len(set(values)) == 5 and values[-1] < 0.9 * values[0]
  plain, _ = linen_problem(dpo.dpsgd(0.1, every=1, judge_every=1))
  for _ in range(5):
    value, grads = jax.value_and_grad(loss)(plain.params)
    plain = plain.apply_gradients(grads=grads, extra_args={"value": value, "value_fn": loss})
  assert_close(state.params, plain.params)  # the gradients of the k calls are one and the same


@pytest.mark.parametrize("wrapped", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()])
def test_only_what_update_names_is_handed_on(wrapped):
  """A plain transform that takes one extra argument by name gets that one."""
  seen = []

  def update(updates, state, params=None, *, value=None):
    seen.append(value)
    return updates, state

  tx = wrapped(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
  state, loss = linen_problem(tx)
  state.apply_gradients(grads=jax.grad(loss)(state.params), extra_args={"value": 3.0, "value_fn": loss})
  assert seen == [3.0] if tx.update is update else seen[:1] == [None]  # Optax's MultiSteps drops them for such


@pytest.mark.parametrize("make", [dpo.dpsgd, lambda lr: dpo.psgd(lr, dpo.kron(), dpo.newton()), dpo.bnp])
def test_the_messages_of_flax_s_own_train_state_name_ours(make):
  state, loss = linen_problem(make(0.1), train_state.TrainState)
  with pytest.raises(
    ValueError, match=r"`dpsgd_optax.training.TrainState`.*`apply_gradients\(grads=grads, extra_args="
  ):
    state.apply_gradients(grads=jax.grad(loss)(state.params))


def test_nnx_optimizer_forwards_extra_arguments():
  """`nnx.Optimizer.update(model, grads, **extra)` needs no wrapper.

  It wants gradients in `nnx.Param`, but its transform sees pure arrays: `hvp` is taken at the pure parameters.
  """
  pure = getattr(nnx, "as_pure", None) or nnx.pure
  x = jnp.linspace(-1, 1, 12, dtype=jnp.float32).reshape(4, 3)
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, recorder(), wrt=nnx.Param)

  def loss_of(graph, rest):
    return lambda p: jnp.mean((nnx.merge(graph, p, rest)(x) - 1) ** 2)

  @nnx.jit
  def train_step(model, optimizer):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = loss_of(graph, rest)
    value, grads = jax.value_and_grad(loss)(params)
    optimizer.update(model, grads, value=value, hvp=hvp(loss, pure(params)))
    return value, pure(grads)

  graph, before, rest = nnx.split(model, nnx.Param, ...)
  before = jax.tree.map(jnp.copy, pure(before))
  value, grads = train_step(model, optimizer)
  seen = optimizer.opt_state
  np.testing.assert_allclose(jnp.asarray(seen.value), loss_of(graph, rest)(before), rtol=1e-6)
  expected = jax.tree.leaves(hvp(loss_of(graph, rest), before)(grads))
  for a, b in zip(jax.tree.leaves(seen.product), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert train_step(model, optimizer)[0] < value


# ------------------------------------------------------------------------------------------------------ host_cadence


def choices(run, counts):
  return [tuple(bool(x) for x in run(count)) for count in counts]


def report(*, refresh, judge):
  return jnp.array(refresh), jnp.array(judge)


@pytest.mark.parametrize("refresh_every, judge_every", [(1, 1), (1, 5), (3, 2), (np.int64(4), 7)])
def test_periods_fire_as_in_the_transforms(refresh_every, judge_every):
  """refresh ⇔ t mod T1 = 0;  judge ⇔ (t + 1) mod T2 = 0."""
  run = host_cadence(report, refresh_every=refresh_every, judge_every=judge_every)
  expected = [(t % refresh_every == 0, (t + 1) % judge_every == 0) for t in range(20)]
  assert choices(run, range(20)) == expected


def test_the_choices_are_static_and_each_pair_compiles_once():
  """`if refresh:` works, and twenty steps of periods 2 and 5 make four programs."""
  traces = []

  def step(x, *, refresh, judge):
    assert isinstance(refresh, bool) and isinstance(judge, bool)
    traces.append((refresh, judge))
    return x + (10.0 if refresh else 1.0)

  run, x = host_cadence(step, refresh_every=2, judge_every=5), jnp.zeros(())
  for count in range(20):
    x = run(count, x)
  assert sorted(traces) == [(False, False), (False, True), (True, False), (True, True)]
  assert x == 110


@pytest.mark.parametrize("p", [0.1, 0.3, 1 / 3, 0.7, 1.0, 0.0])
def test_a_constant_probability_has_the_exact_rate(p):
  """After n steps ⌊n p⌋ fits were done, whatever the rounding of p."""
  run = host_cadence(report, refresh_every=lambda t: jnp.full_like(t, p, jnp.float32))
  fired = np.cumsum([refresh for refresh, _ in choices(run, range(300))])
  exact = Fraction(float(np.float32(p)))
  assert fired.tolist() == [math.floor(exact * (t + 1)) for t in range(300)]


def test_a_falling_probability_follows_its_sum():
  """A schedule of Optax, also beyond the first chunk of counts that is evaluated at once."""
  schedule = optax.exponential_decay(1.0, 100, 0.5, end_value=0.05)
  run = host_cadence(report, refresh_every=schedule)
  fired = [refresh for refresh, _ in choices(run, range(600))]
  sums = np.cumsum([float(schedule(t)) for t in range(600)])
  assert fired[0]
  assert abs(sum(fired) - sums[-1]) < 1
  np.testing.assert_array_less(np.abs(np.cumsum(fired) - sums), 1 + 1e-3)


def test_a_resumed_run_makes_the_same_choices():
  """The choice depends on the count alone: a loop that starts at 400, or asks twice, gets what the whole loop got."""
  schedule = optax.linear_schedule(1.0, 0.1, 300)
  whole = choices(host_cadence(report, refresh_every=schedule, judge_every=3), range(500))
  late = host_cadence(report, refresh_every=schedule, judge_every=3)
  assert choices(late, range(400, 500)) == whole[400:]
  assert choices(late, [7, 7, 450]) == [whole[7], whole[7], whole[450]]


def test_buffers_are_donated_when_asked():
  def step(x, y, *, refresh, judge):
    return x + y

  x, y = jnp.ones(1000), jnp.ones(1000)
  host_cadence(step)(0, x, y)
  assert not x.is_deleted()
  host_cadence(step, donate_argnums=0)(0, x, y)
  assert x.is_deleted() and not y.is_deleted()


@pytest.mark.parametrize("value", [0, -1, 2.5, None, "3"])
@pytest.mark.parametrize("name", ["refresh_every", "judge_every"])
def test_a_period_below_one_is_a_value_error(name, value):
  with pytest.raises(ValueError, match=f"`{name}`.*at least 1"):
    host_cadence(report, **{name: value})


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_probability_outside_the_unit_interval_is_a_value_error(p):
  with pytest.raises(ValueError, match=r"`refresh_every`.*\[0, 1\]"):
    host_cadence(report, refresh_every=lambda t: jnp.full_like(t, p, jnp.float32))(0)


def test_a_negative_count_is_a_value_error():
  with pytest.raises(ValueError, match="steps done so far"):
    host_cadence(report)(-1)


def test_the_whole_loop_with_train_state():
  """The recorder's `bonus` is given on fitting steps only: the two parts of this module together."""
  state, loss = linen_problem(recorder())

  def step(state, *, refresh, judge):
    value, grads = jax.value_and_grad(loss)(state.params)
    extra = {"value": value, "hvp": hvp(loss, state.params) if refresh else lambda v: v, "bonus": int(judge)}
    return state.apply_gradients(grads=grads, extra_args=extra)

  run = host_cadence(step, refresh_every=3, judge_every=2, donate_argnums=0)
  for count in range(6):
    state = run(count, state)
  assert state.opt_state.count == 6 + 3
  assert state.step == 6
