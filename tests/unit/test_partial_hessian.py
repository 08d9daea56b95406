# SPDX-License-Identifier: Apache-2.0
"""SGD with partial Hessian: the theorems about the Hessian of norm layers, and what the optimizer makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.preconditioners.diagonal_newton import cycle_count
from dpsgd_optax.training.norm_layers import is_norm_param
from tests.laws.test_norm_layer_hessian import HEAD, KEY, LAYERS, X, close, cross_entropy, norm, normal

# -- the probes -------------------------------------------------------------------------------------------------------

SIZES = {"a": (3,), "b": (2, 2), "k": (2, 3), "s": ()}  # a vector, a stack of two, held, a scalar

TREE = {name: np.full(shape, 0.5) for name, shape in SIZES.items()}

WHERE = {"a": True, "b": True, "k": False, "s": True}

FLAT = {"a": slice(0, 3), "b": slice(3, 7), "s": slice(7, 8)}

MATRIX = normal(10, 8, 8) + normal(10, 8, 8).T


def multiplied(vector):
  """H v for the dense MATRIX over what is not held."""
  assert isinstance(vector["k"], optax.MaskedNode)
  flat = MATRIX @ jnp.concatenate([vector[name].reshape(-1) for name in FLAT])
  return vector | {name: flat[part].reshape(np.shape(TREE[name])) for name, part in FLAT.items()}


def observed(probe, cycle=False, fits=0):
  seen = dpo.hessian_diagonal(probe, where=WHERE, cycle=cycle)(KEY, TREE, TREE, hvp=multiplied, fits=fits)
  return [
    np.concatenate([np.reshape(tree[name], -1) for name in FLAT])
    for tree in (seen.vector, jax.tree.map(jnp.multiply, seen.vector, seen.product))
  ]


TENSORS = {"a": slice(0, 3), "b0": slice(3, 5), "b1": slice(5, 7), "s": slice(7, 8)}

ORDERS = {
  "tree": (True, ["a", "b0", "b1", "s"]),
  "explicit": (("s", "b", "a"), ["s", "b0", "b1", "a"]),
  "pause": (("b", None, "a", "s"), ["b0", "b1", None, "a", "s"]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_probes_one_tensor_in_each_fit_and_a_stack_slice_by_slice(x64, order):
  """Only the tensor's own block enters; `exact` is its diagonal, `ones` its row sums."""
  cycle, names = ORDERS[order]
  for fits in range(2 * len(names) + 1):
    name = names[fits % len(names)]
    expected = {"vector": np.zeros(8), "sums": np.zeros(8), "diagonal": np.zeros(8)}
    if name is not None:
      part = TENSORS[name]
      expected["vector"][part] = 1
      expected["sums"][part] = MATRIX[part, part].sum(1)
      expected["diagonal"][part] = np.diag(MATRIX)[part]
    for probe, kind in ((dpo.probes.ones, "sums"), (dpo.probes.exact, "diagonal")):
      close(observed(probe, cycle, fits), [expected["vector"], expected[kind]])


def test_all_at_once_ones_sees_all_blocks_and_exact_none_but_the_diagonal(x64):
  close(observed(dpo.probes.ones)[1], MATRIX.sum(1))
  close(observed(dpo.probes.exact)[1], np.diag(MATRIX))
  vector, estimate = observed(dpo.probes.rademacher)
  close(np.abs(vector), np.ones(8))
  close(estimate, vector * (MATRIX @ vector))


def fitted(p, probes, damping=1e-4):
  state = p.init(jnp.zeros(3))
  for v, h in probes:
    state = p.fit(state, dpo.Probe(v, h), key=KEY, damping=damping)
  return state


def multiplier(p, state):
  return p.apply(state, jnp.ones(3))


D = np.array([2.0, -3.0, 0.0])


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_on_a_diagonal_hessian_p_is_its_damped_inverse_from_the_first_visit_on(x64, decay):
  """h = c d, P = τ c/(|h| + λ) = τ/(|d| + λ/c), c = 1 − μⁿ; τ/λ is never passed, and without momentum c = 1."""
  p = dpo.diagonal_newton(decay=decay, scale=0.01)
  for n in (1, 2, 5):
    state = fitted(p, [(np.ones(3), D)] * n)
    close(state.buckets["3_float64"].curvature[0], (1 - decay**n) * D)
    close(multiplier(p, state), 0.01 / (np.abs(D) + 1e-4 / (1 - decay**n)))
    assert np.all(multiplier(p, state) <= 0.01 / 1e-4)


def test_only_visits_count_and_before_the_first_the_step_is_that_of_sgd(x64):
  """By the defaults τ (1 − μ)/λ = 1; the released code's count goes on while other tensors are probed."""
  idle, seen = (np.zeros(3), np.zeros(3)), (np.ones(3), D)
  p = dpo.diagonal_newton(scale=1e-3)
  close(multiplier(p, fitted(p, [idle] * 4)), np.ones(3))
  state = fitted(p, [idle, idle, seen, idle])
  close(multiplier(p, state), 1e-4 / (0.1 * np.abs(D) + 1e-4))
  close(multiplier(p, p.advance(state, damping=1.0)), 1e-4 / (0.1 * np.abs(D) + 1))
  p = dpo.diagonal_newton(scale=1e-3, bias_correction=cycle_count(2))
  c = 1 - 0.9 ** (4 // 2 + 1)
  close(multiplier(p, fitted(p, [idle, idle, seen, idle])), 1e-3 * c / (0.1 * np.abs(D) + 1e-4))


def test_a_signed_mean_cancels_the_noise_that_a_mean_of_absolute_values_keeps(x64):
  noisy = [(np.ones(3), D + 10), (np.ones(3), D - 10)] * 200
  signed, absolute = (dpo.diagonal_newton(decay=0.99, signed=s) for s in (True, False))
  close(multiplier(signed, fitted(signed, noisy)), 1 / (np.abs(D - 0.05) + 1e-4), rtol=0.5)
  assert np.all(multiplier(absolute, fitted(absolute, noisy)) < 0.11)


def test_on_gradients_it_is_the_inverse_of_their_second_moment(x64):
  """v integrated out: the diagonal of the empirical Fisher matrix."""
  p = dpo.diagonal_newton()
  g = normal(1, 3)
  close(multiplier(p, fitted(p, [(None, g)])), 1 / (g**2 + 1e-4 / 0.1))


def test_without_curvature_and_damping_the_step_stays_finite():
  p = dpo.diagonal_newton()
  assert np.all(np.isfinite(multiplier(p, fitted(p, [(jnp.ones(3), jnp.zeros(3))], damping=0.0))))


# -- the optimizer ----------------------------------------------------------------------------------------------------

PARAMS = {
  "kernel": 0.5 * normal(11, 6, 6),
  "norm": dict(LAYERS["batch"]),
  "head": {"kernel": HEAD, "bias": np.zeros(3)},
}


def network_loss(p):
  return cross_entropy(jnp.tanh(norm(p["norm"], "batch", X @ p["kernel"])) @ p["head"]["kernel"] + p["head"]["bias"])


def trained(tx, params=PARAMS, loss=network_loss, steps=4, use="hvp"):
  """Parameters after each step."""
  params = jax.tree.map(jnp.asarray, params)

  @jax.jit
  def step(params, state):
    grads = jax.grad(loss)(params)
    extra = {"hvp": dpo.hvp(loss, params)} if use == "hvp" else {"value_fn": loss}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  state, found = tx.init(params), []
  for _ in range(steps):
    params, state = step(params, state)
    found.append(params)
  return found, state


OPTIONS = dict(weight_decay=0.01, damping=1e-2, tau=1e-2, b1=0.8, hessian_decay=0.7)


@functools.cache
def our_run():
  return trained(dpo.sgd_ph(0.1, is_norm_param, **OPTIONS))[0]


def test_the_optimizer_is_its_parts_under_partition(x64):
  """Heavy ball with decay inside the momentum elsewhere, with decay after P on the norm layer."""
  second = dpo.scale_by_preconditioner(
    dpo.diagonal_newton(decay=0.7, scale=1e-2), dpo.hessian_diagonal(), damping=1e-2, momentum=optax.trace(0.8)
  )
  parts = {
    True: optax.chain(second, optax.add_decayed_weights(0.01)),
    False: optax.chain(optax.add_decayed_weights(0.01), optax.trace(0.8)),
  }
  theirs, _ = trained(optax.chain(optax.partition(parts, is_norm_param), optax.scale_by_learning_rate(0.1)))
  close(our_run(), theirs)


def test_schedules_and_injected_hyperparameters_give_the_plain_run_and_so_does_the_loss_in_place_of_the_product(x64):
  static = ("where", "probe", "cycle", "signed", "bias_correction", "every", "key")
  injected = optax.inject_hyperparams(dpo.sgd_ph, static_args=static)
  tx = injected(optax.constant_schedule(0.1), where=is_norm_param, **OPTIONS)
  close(trained(tx, use="value_fn")[0], our_run(), rtol=1e-6)


def test_a_tensor_that_has_not_had_its_turn_takes_the_step_of_sgd_with_momentum(x64):
  """With the defaults; the tensor that had it does not."""
  found, _ = trained(dpo.sgd_ph(0.1, is_norm_param, cycle=("norm/scale", "norm/bias")), steps=1)
  plain = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.jit(jax.grad(network_loss))(PARAMS))
  close(found[0]["norm"]["bias"], plain["norm"]["bias"])
  close([found[0]["kernel"], found[0]["head"]], [plain["kernel"], plain["head"]])
  assert not np.allclose(found[0]["norm"]["scale"], plain["norm"]["scale"])


@pytest.mark.parametrize("where", [{"a": True, "rest": False}, dpo.is_vector])
def test_one_parameter_and_no_momentum_are_newtons_method(x64, where):
  """M = 1, b₁ = 0 (with which the released code breaks): on a diagonal quadratic the step is τ g/(|d| + λ)."""
  d = np.array([1.0, 4.0, 100.0])
  loss = lambda p: jnp.sum(d * p["a"] ** 2) / 2 + jnp.sum(p["rest"] ** 2)
  params = {"a": np.ones(3), "rest": np.ones((2, 2))}
  tx = dpo.sgd_ph(1.0, where, b1=0.0, tau=0.5, damping=1e-3, cycle=True)
  found, _ = trained(tx, params, loss, steps=2)
  kept = 1 - 0.5 * d / (d + 1e-3)
  close([p["a"] for p in found], [kept, kept**2])


def test_a_stack_of_norm_layers_is_trained_as_the_layers_apart(x64):
  """`nn.scan` keeps the layers of a stack in one leaf (L, C): each has its turn, its visits and its curvature."""
  names = [f"norm{i}" for i in range(2)]
  apart = {name: {"bias": 0.1 * normal(i, 6), "scale": 1 + 0.1 * normal(i + 9, 6)} for i, name in enumerate(names)}
  stacked = {"norms": jax.tree.map(lambda *x: np.stack(x), *apart.values())}

  def of_layers(layers):
    x = X
    for p in layers:
      x = jnp.tanh(norm(p, "batch", x)) @ PARAMS["kernel"]
    return cross_entropy(x @ HEAD)

  cycle = [f"{name}/{leaf}" for leaf in ("bias", "scale") for name in names]
  options = dict(b1=0.5, probe=dpo.probes.ones)
  found, _ = trained(dpo.sgd_ph(0.1, None, cycle=cycle, **options), apart, lambda p: of_layers(p.values()), steps=6)
  layer = lambda p, i: jax.tree.map(lambda x: x[i], p["norms"])
  loss = lambda p: of_layers([layer(p, i) for i in range(2)])
  same, state = trained(
    dpo.sgd_ph(0.1, is_norm_param, cycle=("norms/bias", "norms/scale"), **options), stacked, loss, 6
  )
  close(same[-1]["norms"], jax.tree.map(lambda *x: np.stack(x), *found[-1].values()))
  (state,) = optax.tree.get(state, "buckets").values()
  assert state.visits.tolist() == [2, 2, 1, 1]


def test_half_precision_parameters_keep_float32_state_and_get_updates_of_their_own():
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
  tx = dpo.sgd_ph(0.1, is_norm_param, weight_decay=1e-4)
  state = tx.init(params)
  updates, after = jax.eval_shape(lambda s: tx.update(params, s, params, hvp=lambda v: v), state)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
  floats = [x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floats) == {jnp.dtype(jnp.float32)}
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_levenberg_marquardt_adapts_its_damping(x64):
  tx = dpo.levenberg_marquardt(dpo.sgd_ph(0.1, is_norm_param), model=dpo.half_slope)
  found, state = trained(tx, steps=3, use="value_fn")
  assert network_loss(found[-1]) < network_loss(PARAMS) and float(state.damping) != 1.0


# -- wrong use --------------------------------------------------------------------------------------------------------

ONE = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "kernel": jnp.ones((2, 2))}


def update(where=is_norm_param, params=ONE, **options):
  extra = {name: options.pop(name) for name in ("hvp", "value_fn") if name in options}
  tx = dpo.sgd_ph(0.1, where, **options)
  return tx.update(params, tx.init(ONE), params, **extra)


CALLS = {
  "nothing selected": (
    lambda: dpo.sgd_ph(0.1, is_norm_param).init({"kernel": ONE["kernel"]}),
    "`where`",
    "none of the 1 parameters",
    "kernel (2, 2)",
    "dpsgd_optax.is_vector",
    "nn.WeightNorm",
  ),
  "labels of another tree": (lambda: update({"norm": True, "other": False}), "`where`", "bools", "is_norm_param"),
  "labels that are no bools": (lambda: update({"norm": "second", "kernel": "first"}), "`where`", "bools", "'first'"),
  "no hvp": (lambda: update(), "`hvp`", "hvp=hvp(loss, params)"),
  "a product without holes": (lambda: update(hvp=lambda v: ONE), "`hvp(v)`", "structure", "hvp=hvp(loss, params)"),
  "a cycle of unknown names": (
    lambda: update(cycle=["norm/scale", "norm/shift"], hvp=lambda v: v),
    "`cycle`",
    "norm/bias, norm/scale",
    "'norm/shift'",
    "cycle=True",
  ),
  "a cycle that lacks one": (lambda: update(cycle=["norm/scale"], hvp=lambda v: v), "`cycle`", "lacks 'norm/bias'"),
  "learning rate": (lambda: dpo.sgd_ph(-0.1, is_norm_param), "learning_rate", "-0.1"),
  "momentum": (lambda: dpo.sgd_ph(0.1, is_norm_param, b1=1.0), "b1", "[0, 1)"),
  "damping": (lambda: dpo.sgd_ph(0.1, is_norm_param, damping=0.0), "damping", "positive", "1e-4"),
  "tau": (lambda: dpo.sgd_ph(0.1, is_norm_param, tau=-1.0), "tau", "-1.0"),
  "hessian decay": (lambda: dpo.sgd_ph(0.1, is_norm_param, hessian_decay=1.5), "hessian_decay", "1.5"),
  "weight decay": (lambda: dpo.sgd_ph(0.1, is_norm_param, weight_decay=-1.0), "weight_decay", "-1.0"),
  "length of a cycle": (lambda: cycle_count(0), "length", "at least 1"),
  "decay": (lambda: dpo.diagonal_newton(decay=1.0), "decay", "[0, 1)"),
  "scale": (lambda: dpo.diagonal_newton(scale=-1.0), "scale", "-1.0"),
  "a vector where the product holds": (
    lambda: dpo.value_and_grad_then_hvp(lambda p: jnp.sum(p["kernel"]), where=is_norm_param)(ONE)[2](ONE),
    "`value_and_grad_then_hvp`",
    "['kernel']",
    "`where`",
  ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_message_names_the_argument_what_came_and_what_to_type(name):
  call, *words = CALLS[name]
  with pytest.raises(ValueError) as error:
    call()
  missing = [word for word in words if word not in str(error.value)]
  assert not missing, f"{missing} not in: {error.value}"
