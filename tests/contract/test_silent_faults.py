# SPDX-License-Identifier: Apache-2.0
"""What went wrong without a word, by the letters of the field report (B), and what went wrong beside it."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.contract.test_field_faults import rms, run
from tests.table import OPTIMIZERS, PARAMS, loss


def replicas(tx, name, count=2, steps=6):
  """The params of each replica after some steps on its own share of the batch; `vmap` with an axis stands for pmap."""
  inputs = jax.random.normal(jax.random.key(0), (count, 8, 3))
  targets = jax.random.normal(jax.random.key(1), (count, 8, 2))

  def replica(params, state, x, y):
    local = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) + p["b"] - y) ** 2)

    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(local)(params)
      offers = {"value": value, "value_fn": local, "hvp": dpo.hvp(local, params), "layer_inputs": {"w": x}}
      extras = {k: v for k, v in offers.items() if k in OPTIMIZERS[name].extras}
      updates, state = tx.update(jax.lax.pmean(grads, "i"), state, params, **extras)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=steps)[0]

  start = {"b": PARAMS["b"], "w": PARAMS["w"]}
  return jax.jit(jax.vmap(replica, in_axes=(None, None, 0, 0), axis_name="i"))(start, tx.init(start), inputs, targets)


@pytest.mark.parametrize("name", ["psgd whitening", "psgd newton", "dpsgd", "sgd_ph", "bnp", "gls"])
def test_b1_replicas_stay_equal_bit_for_bit(name):
  tx = OPTIMIZERS[name].make()
  for x in jax.tree.leaves(replicas(dpo.data_parallel(tx, "i"), name)):
    np.testing.assert_array_equal(x[0], x[1])


def test_b1_replicas_make_the_step_of_the_whole_batch():
  """A mean of equal shares: the gradient, the product and the loss are those of one device."""
  name, make = "dpsgd", OPTIMIZERS["dpsgd"].make
  many, _ = replicas(dpo.data_parallel(make(), "i"), name, count=4, steps=5)
  x = jax.random.normal(jax.random.key(0), (4, 8, 3)).reshape(-1, 3)
  y = jax.random.normal(jax.random.key(1), (4, 8, 2)).reshape(-1, 2)
  one, _ = run(make(), PARAMS, 5, loss=lambda p: jnp.mean((jnp.tanh(x @ p["w"]) + p["b"] - y) ** 2))
  for k, expected in one.items():
    np.testing.assert_allclose(many[k][0], expected, rtol=1e-4, atol=1e-5)


def test_b1_the_derivatives_of_a_loss_are_averaged_even_where_it_is_all_that_was_given():
  """`pmean` of a loss has the local gradient and the local product; only `value_fn` is given here."""
  tx = dpo.data_parallel(optax.chain(dpo.penalties.sharpness_aware(0.1), dpo.psgd(0.1, dpo.kron(), dpo.newton())), "i")

  def replica(x):
    local = lambda p: jnp.mean(jax.lax.pmean((x @ p["w"] + p["b"]) ** 2, "i"))
    return tx.update(jax.grad(local)(PARAMS), tx.init(PARAMS), PARAMS, value_fn=local)

  for x in jax.tree.leaves(jax.jit(jax.vmap(replica, axis_name="i"))(jax.random.normal(jax.random.key(0), (2, 4, 3)))):
    np.testing.assert_array_equal(x[0], x[1])


def test_b1_a_step_made_of_the_local_outputs_is_refused():
  """`gls(from_outputs=True)` does not look at the gradient, the only thing that would have been averaged."""
  tx, params = dpo.data_parallel(dpo.gls(0.1, from_outputs=True), "i"), {"w": jnp.ones((3, 2))}

  def replica(x):
    value, grads, inputs = dpo.capture(lambda p: jnp.sum((x @ p["w"]) ** 2), gradients=True)(params)
    return tx.update(grads, tx.init(params), params, value=value, layer_inputs=inputs)[0]

  with pytest.raises(ValueError, match=r"local batch.*from_outputs=False"):
    jax.vmap(replica, axis_name="i")(jnp.ones((2, 4, 3)))


def test_b1_an_axis_that_is_not_bound_is_named():
  tx = dpo.data_parallel(dpo.psgd(0.1), "batch")
  with pytest.raises(ValueError, match=r"'batch', which is not bound.*axis_name='batch'"):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_b2_levenberg_marquardt_does_not_lock_at_a_minimum():
  """There reductions are below the rounding of the loss, and no verdict. From a new place it goes on."""
  tx = dpo.levenberg_marquardt(dpo.psgd(0.3, dpo.diagonal(), dpo.newton(), every=1))

  def descend(x, state, at, steps):
    f = lambda x: 1 + jnp.sum((x - at) ** 2)

    def step(carry, _):
      x, state = carry
      updates, state = tx.update(jax.grad(f)(x), state, x, value_fn=f)
      return (x + updates, state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])((x, state))

  x, state = descend(jnp.ones(3), tx.init(jnp.ones(3)), 0.0, 600)
  assert float(state.damping) <= 1
  x, state = descend(x, state, 3.0, 1000)
  np.testing.assert_allclose(x, 3.0, atol=1e-2)
  # a damping that was locked by an older version is let go
  locked = state._replace(damping=jnp.float32(1e10))
  x, state = descend(x, locked, -2.0, 1000)
  np.testing.assert_allclose(x, -2.0, atol=1e-2)


def test_b2_a_reduction_below_rounding_is_no_verdict():
  f = lambda x: 1000.0 + 1e-9 * jnp.sum(x**2)
  tx, x = dpo.levenberg_marquardt(optax.sgd(0.1), damping=0.5), jnp.ones(3)
  _, state = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
  assert float(state.damping) == 0.5 and float(state.predicted) == 0


@pytest.mark.parametrize("name", ["psgd newton", "dpsgd", "sgd_ph", "chain"])
def test_b3_a_lasting_product_that_is_not_finite_does_not_freeze_training(name):
  """|x|^1.5 has a finite gradient and an infinite second derivative at 0."""
  f = lambda p: sum(jnp.sum(jnp.abs(x) ** 1.5 + (x - 1) ** 2) for x in jax.tree.leaves(p))
  nothing = {"hvp": lambda v: jax.tree.map(lambda x: jnp.nan * x, v)}
  params = jax.tree.map(jnp.zeros_like, PARAMS)
  extra = {} if name == "dpsgd" else {"value": None, "value_fn": None}
  found, state = run(OPTIMIZERS[name].make(), params, 50, loss=f, **nothing, **extra)
  assert f(found) < f(params) - 0.1
  fits = 10 if name == "dpsgd" else 50  # it fits on every fifth step
  assert int(optax.tree.get(state, "dropped")) == fits and int(optax.tree.get(state, "skipped")) == 0


ROWS, BUSY = 256, 32

IDLE = {
  "kron": dpo.kron,
  "kron quad": functools.partial(dpo.kron, geometry=dpo.quad),
  "kron eq": functools.partial(dpo.kron, geometry=dpo.eq),
  "dense factors": functools.partial(dpo.kron, max_skew=jnp.inf),
  "affine": dpo.affine,
  "diagonal": dpo.diagonal,
  "xmat": dpo.xmat,
  "lra": functools.partial(dpo.lra, rank=2),
  "blocks": lambda: dpo.blocked(dpo.kron(max_skew=jnp.inf), 64),
}


def embedding(make, criterion, tiny=0.0, steps=300):
  """Updates of an embedding of which 32 rows are busy: before, and when a row wakes up that was never used."""
  curvature = dpo.whitening() if criterion == "whitening" else dpo.newton()
  tx, params = dpo.psgd(1e-2, make(), curvature, b1=0.9, every=1), {"e": jnp.zeros((ROWS, 8))}

  @jax.jit
  def step(state, key, awake):
    noise = jax.random.normal(key, (ROWS, 8))
    rows = jnp.arange(ROWS)
    scale = jnp.where((rows < BUSY) | (awake & (rows == 100)), 1.0, tiny)[:, None]
    hvp = lambda v: jax.tree.map(lambda x: scale * x, v)
    updates, state = tx.update({"e": scale * noise}, state, params, hvp=hvp)
    return updates["e"], state

  state = tx.init(params)
  for key in jax.random.split(jax.random.key(0), steps):
    before, state = step(state, key, False)
  woken, _ = step(state, jax.random.key(1), True)
  return before, woken


@pytest.mark.parametrize("criterion", ["whitening", "newton"])
@pytest.mark.parametrize("name", IDLE)
def test_b4_a_row_that_was_long_without_gradient_does_not_take_the_whole_step(name, criterion):
  """P of what is not seen does not grow: the woken row moves like the others, and they go on as before."""
  before, woken = embedding(IDLE[name], criterion)
  assert rms(woken[100]) < 10 * rms(woken[:BUSY])
  assert rms(woken[:BUSY]) > 0.5 * rms(before[:BUSY])


def test_b4_a_row_of_tiny_gradients_does_not_take_the_whole_step_either():
  """Its P may grow, as whitening wants; the entries of its step are cut."""
  before, woken = embedding(dpo.kron, "whitening", tiny=1e-7)
  assert np.max(np.abs(woken[100])) <= 1e-2 * 10 * 2 * 1.01
  assert rms(woken[:BUSY]) > 0.2 * rms(before[:BUSY])


@pytest.mark.parametrize("criterion", ["whitening", "newton"])
@pytest.mark.parametrize("name", [name for name in IDLE if name != "lra"])  # lra starts with all entries coupled
def test_b5_a_row_that_never_had_a_gradient_has_an_update_of_exactly_zero(name, criterion):
  before, woken = embedding(IDLE[name], criterion, steps=120)
  assert np.all(before[BUSY:] == 0) and np.all(woken[101:] == 0)


@pytest.mark.parametrize("form", ["stack", "blocks"])
def test_b6_a_matrix_is_clipped_by_itself(form):
  """A spike in one layer of a stack, or in one block, leaves the others as they are."""
  p = dpo.kron(stacked={"w": 1}) if form == "stack" else dpo.blocked(dpo.kron(max_skew=jnp.inf), 8)
  shape = (3, 8, 8) if form == "stack" else (24, 8)
  tx, params = dpo.psgd(0.1, p), {"w": jnp.zeros(shape)}
  update = jax.jit(tx.update)
  state = tx.init(params)
  for t, key in enumerate(jax.random.split(jax.random.key(0), 40)):
    g = jax.random.normal(key, (3, 8, 8))
    g = g.at[2].multiply(1e4) if t == 39 else g
    updates, state = update({"w": g.reshape(shape)}, state, params)
  parts = updates["w"].reshape(3, 8, 8)
  assert rms(parts[0]) > 0.05 and rms(parts[1]) > 0.05 and 0.1 < rms(parts[2]) < 0.201


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_b6_a_clip_that_is_not_positive_is_refused(clip):
  with pytest.raises(ValueError, match=r"`clip` must be positive, an optax transform, or None, got"):
    dpo.psgd(0.1, clip=clip)


def test_b6_the_clip_is_an_argument():
  spike = jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), PARAMS)
  size = lambda clip: rms(dpo.psgd(1.0, dpo.diagonal(), clip=clip).update(spike, tx(clip).init(PARAMS), PARAMS)[0]["w"])
  tx = lambda clip: dpo.psgd(1.0, dpo.diagonal(), clip=clip)
  assert size(0.5) == pytest.approx(0.5, rel=1e-3)
  assert size(None) > 10
  assert size(optax.clip(0.25)) == pytest.approx(0.25, rel=1e-3)


def test_b7_nothing_is_fitted_whose_result_is_thrown_away():
  """`accumulating` and `refresh` both say so to the transform inside `MultiSteps`: 4 products for 4 fits, not 16."""
  for say in (lambda s: {"accumulating": s.mini_step < 3}, lambda s: {"refresh": s.mini_step == 3}):
    calls = []
    tx = optax.MultiSteps(dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=1), 4)

    @jax.jit
    def step(params, state):
      def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return dpo.hvp(loss, params)(v)

      updates, state = tx.update(jax.grad(loss)(params), state, params, hvp=product, **say(state))
      return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(16):
      params, state = step(params, state)
    jax.effects_barrier()
    assert len(calls) == 4 and int(state.inner_opt_state[0].fits) == 4


@pytest.mark.parametrize("name", ["refresh", "judge"])
def test_b7_a_state_in_place_of_a_choice_is_refused(name):
  tx = optax.MultiSteps(dpo.dpsgd(0.1), 2)
  state = tx.init(PARAMS)
  with pytest.raises(ValueError, match=rf"`{name}` must be True, False.*MultiStepsState.*mini_step == k - 1"):
    tx.update(PARAMS, state, PARAMS, value=1.0, value_fn=loss, **{name: state})


@pytest.mark.parametrize("tx", [dpo.dpsgd(0.1), dpo.scale_by_preconditioner(dpo.kron(), dpo.newton())])
def test_b7_the_state_of_a_wrapper_is_refused(tx):
  state = optax.MultiSteps(tx, 2).init(PARAMS)
  with pytest.raises(ValueError, match=r"needs the state that `init`.*got MultiStepsState.*`update` of the wrapper"):
    tx.update(PARAMS, state, PARAMS, value=1.0, hvp=lambda v: v)


@pytest.mark.parametrize("criterion", ["whitening", "newton"])
@pytest.mark.parametrize(("spike", "steps"), [(1e3, 10), (1e18, 20)])
def test_b8_a_spike_in_the_gradient_is_soon_forgotten(spike, steps, criterion):
  """With momentum, beside a twin without the spike; disturbed: the update differs by more than its length."""
  curvature = dpo.whitening() if criterion == "whitening" else dpo.newton()
  tx, params = dpo.psgd(0.01, dpo.kron(), curvature, b1=0.9), jnp.ones((6, 4))
  scale = jnp.linspace(0.5, 3, 6)[:, None]

  @jax.jit
  def updates(factor):
    def step(state, inputs):
      key, size = inputs
      g = size * jax.random.normal(key, params.shape)
      updates, state = tx.update(g, state, params, hvp=lambda v: scale * v)
      return state, updates

    sizes = jnp.ones(400).at[200].set(factor)
    return jax.lax.scan(step, tx.init(params), (jax.random.split(jax.random.key(0), 400), sizes))[1]

  calm, hurt = updates(1.0), updates(spike)
  length = lambda x: np.linalg.norm(np.reshape(x, (400, -1)), axis=1)
  disturbed = length(hurt - calm) > length(calm)
  assert disturbed.sum() <= steps and not disturbed[:200].any()


def test_b8_a_lasting_change_of_size_is_followed():
  tx = dpo.clip_spikes()
  state = tx.init(PARAMS)
  for scale in [1.0] * 5 + [1000.0] * 30:
    grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), PARAMS)
    clipped, state = tx.update(grads, state)
  chex.assert_trees_all_equal(clipped, grads)
  assert int(state.clipped) < 25


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_b8_what_is_not_finite_passes_the_guard_to_be_skipped(bad):
  tx = dpo.psgd(0.1)
  state = tx.init(PARAMS)
  _, state = tx.update(PARAMS, state, PARAMS)
  spoilt = {**PARAMS, "w": PARAMS["w"].at[0, 0].set(bad)}
  updates, after = tx.update(spoilt, state, PARAMS)
  assert all(np.all(x == 0) for x in jax.tree.leaves(updates)) and int(optax.tree.get(after, "skipped")) == 1
  np.testing.assert_array_equal(optax.tree.get(after, "sizes"), optax.tree.get(state, "sizes"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a12_a_transform_can_be_taken_apart_and_hashed(name):
  """As optimistix does with the closures of a solver: what they hold is hashable, and every function has a source."""
  seen = set()

  def walk(x):
    if id(x) in seen:
      return
    seen.add(id(x))
    if isinstance(x, functools.partial):
      walk(x.func)
    if isinstance(x, tuple):
      for part in x:
        walk(part)
    elif getattr(x, "__closure__", None) and getattr(x, "__module__", "").split(".")[0] in ("dpsgd_optax", "optax"):
      inspect.getsource(x)
      for cell in x.__closure__:
        if not isinstance(cell.cell_contents, dict | list):
          walk(cell.cell_contents)
    elif not isinstance(x, jax.Array | np.ndarray | dict | list):
      hash(x)

  walk(tuple(OPTIMIZERS[name].make()))
  assert len(seen) > 3


@pytest.mark.parametrize("make", [dpo.lra, dpo.xmat, dpo.scan])
def test_complex_parameters_are_refused_where_p_would_not_be_hermitian(make):
  with pytest.raises(ValueError, match=r"of real parameters, got complex64.*split_real_and_imaginary"):
    make().init({"w": jnp.zeros((3, 2), jnp.complex64)})
