# SPDX-License-Identifier: Apache-2.0
"""SGD with partial Hessian: the theorems about the Hessian of norm layers, and what the optimizer makes of it."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpsgd_optax as dpo
from dpsgd_optax import training
from dpsgd_optax.preconditioners.diagonal_newton import cycle_count
from dpsgd_optax.training.norm_layers import is_norm_param

KEY = jax.random.PRNGKey(0)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def close(came, expected, **tolerances):
  tolerances = {"rtol": 1e-12, "atol": 1e-12} | tolerances
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), came, expected)


# -- theorems about the Hessian ---------------------------------------------------------------------------------------

NORMS = {"batch": lambda x: (x, 0), "layer": lambda x: (x, 1), "group": lambda x: (x.reshape(len(x), -1, 3), 2)}


def normalised(kind, x):
  """x̂: zero mean and unit variance over the batch, over the channels, or over groups of three of them."""
  y, axis = NORMS[kind](x)
  y = (y - y.mean(axis, keepdims=True)) / jnp.sqrt(y.var(axis, keepdims=True))
  return y.reshape(x.shape)


def norm(p, kind, x):
  return p["scale"] * normalised(kind, x) + p["bias"]


X, CLASSES, CHANNELS = normal(0, 16, 6), np.arange(16) % 3, 6
LAYERS = {kind: {"scale": 1 + 0.1 * normal(1, 6), "bias": 0.1 * normal(2, 6)} for kind in NORMS}
HEAD = normal(3, 6, 3)


def cross_entropy(logits):
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, CLASSES))


def test_the_hessian_of_a_norm_layer_is_diagonal_if_the_remainder_is_channel_separable(x64):
  """Elementwise maps and a loss that is a sum over channels: no entry off the diagonal, and H·1 is the diagonal."""
  target = normal(4, 16, 6)

  def loss(p):
    return sum(jnp.mean((jnp.tanh(norm(p[kind], kind, X)) - target) ** 2) for kind in NORMS)

  found = jax.jit(lambda p: dpo.diagonality(loss, p))(LAYERS)
  assert set(found) == {f"{kind}/{leaf}" for kind in NORMS for leaf in ("scale", "bias")}
  for of in found.values():
    assert of.share < 1e-12 and of.error < 1e-12


def test_it_is_not_diagonal_if_a_dense_layer_follows(x64):
  """One norm layer, ReLU, and a softmax classifier: a fifth of the norm of a block, or more, lies off its diagonal."""

  def loss(p):
    return sum(cross_entropy(jax.nn.relu(norm(p[kind], kind, X)) @ HEAD) for kind in NORMS)

  for of in jax.jit(lambda p: dpo.diagonality(loss, p))(LAYERS).values():
    assert of.share > 0.2 and of.error > 0.2


def test_each_entry_is_the_correlation_of_two_channels_weighted_with_the_second_derivative_between_them(x64):
  """F(y) = ½ Σ yᵀAy:  ∂²L/∂γ_c∂γ_d = A_cd Σ x̂_c x̂_d, ∂²L/∂β_c∂β_d = N A_cd: zero off the diagonal iff A is."""
  a = normal(5, 6, 6)
  a = (a + a.T) / 2
  xhat = normalised("batch", X)

  def loss(p):
    y = norm(p, "batch", X)
    return 0.5 * jnp.sum(y @ a * y)

  found = jax.jit(lambda p: jax.hessian(loss)(p))(LAYERS["batch"])
  close(found["scale"]["scale"], a * (xhat.T @ xhat))
  close(found["bias"]["bias"], 16 * a)


def test_the_row_sums_of_a_classifier_bias_are_zero_and_its_diagonal_is_not(x64):
  """F1: H = mean(diag p − ppᵀ), so that H·1 = 0 and the diagonal is mean p(1 − p)."""
  logits = normal(6, 16, 3)
  loss, bias = lambda b: cross_entropy(logits + b), 0.1 * normal(7, 3)
  seen = {}
  for probe in (dpo.probes.ones, dpo.probes.exact):
    observed = dpo.hessian_diagonal(probe)(KEY, bias, bias, hvp=dpo.hvp(loss, bias))
    seen[probe] = observed.vector * observed.product
  p = jax.nn.softmax(logits + bias)
  close(seen[dpo.probes.ones], np.zeros(3))
  close(seen[dpo.probes.exact], np.mean(p * (1 - p), 0))


def test_between_norm_layers_the_product_with_the_parameters_themselves_is_minus_the_gradient(x64):
  """F2: norm – ReLU – linear – norm: gᵀw = 0 and H_ww w = −g, w = (γ; β); at γ = 1, β = 0: H_γγ·1 = −g_γ."""
  inner, outer = normal(8, 6, 6), LAYERS["layer"]

  def loss(w):
    hidden = jax.nn.relu(norm(w, "batch", X)) @ inner
    return cross_entropy(norm(outer, "layer", hidden) @ HEAD)

  both = jax.jit(lambda w, v: (jax.grad(loss)(w), dpo.hvp(loss, w)(v)))
  w = LAYERS["batch"]
  g, product = both(w, w)
  assert abs(optax.tree.vdot(g, w)) < 1e-12 and optax.tree.norm(g) > 0.1
  close(product, jax.tree.map(jnp.negative, g))
  start = {"scale": np.ones(6), "bias": np.zeros(6)}
  g, product = both(start, start)
  close(product["scale"], -g["scale"])


def test_random_signs_are_unbiased_with_the_variance_of_the_rest_of_the_row(x64):
  """Over all 2ⁿ sign vectors: E v⊙Hv is the diagonal, Var_i = Σ_{j≠i} H_ij²."""
  h = normal(9, 6, 6)
  h = h + h.T
  signs = np.array(list(itertools.product((-1.0, 1.0), repeat=6)))
  estimates = signs * (signs @ h)
  close(estimates.mean(0), np.diag(h))
  close(estimates.var(0), (h**2).sum(1) - np.diag(h) ** 2)
  drawn = [dpo.hessian_diagonal()(jax.random.PRNGKey(i), X[0], X[0], hvp=lambda v: h @ v) for i in range(20)]
  assert {tuple(map(float, np.unique(d.vector))) for d in drawn} <= {(-1.0, 1.0), (1.0,), (-1.0,)}
  assert len({tuple(map(float, d.vector)) for d in drawn}) > 10
  close(np.array([d.product for d in drawn]), np.array([d.vector for d in drawn]) @ h)


def test_diagonality_measures_the_blocks_of_a_dense_hessian(x64):
  """Also of each slice of a stack, and of a scalar; the other parameters are held."""
  params = {"kernel": normal(1, 2, 2), "stack": normal(2, 2, 3), "temperature": normal(3)}

  def loss(p):
    mixed = jnp.sum(jnp.outer(p["stack"][0], p["stack"][1]) ** 2 * p["temperature"] ** 2) + jnp.sum(p["kernel"] ** 4)
    return mixed + jnp.prod(p["stack"][0]) - jnp.sum(p["stack"][1] ** 4)

  where = {"kernel": False, "stack": True, "temperature": True}
  found = jax.jit(lambda p: dpo.diagonality(lambda q: (loss(q), None), p, where, has_aux=True))(params)
  assert set(found) == {"stack", "temperature"}
  assert found["temperature"].share == 0
  h = jax.jit(jax.hessian(lambda s: loss(params | {"stack": s})))(params["stack"])
  for i in range(2):
    block = h[i, :, i]
    d = np.diag(block)
    off = block - np.diag(d)
    close(found["stack"].share[i], np.linalg.norm(off) / np.linalg.norm(block))
    close(found["stack"].error[i], np.linalg.norm(off.sum(1)) / np.linalg.norm(d))
    close(found["stack"].negative[i], np.mean(d < 0))


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


# -- the preconditioner -----------------------------------------------------------------------------------------------


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


# -- Flax -------------------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3,), name="conv")(x)
    x = nn.BatchNorm(use_running_average=False, name="my_own_name")(x)
    x = nn.LayerNorm(use_bias=False)(x)
    x = nn.GroupNorm(2)(x) + nn.RMSNorm()(x) + nn.InstanceNorm()(x)
    x = nn.WeightNorm(nn.Dense(4, name="normed"))(x)
    x = nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x)
    x = nn.PReLU()(x)
    body = lambda m, x, _: (nn.LayerNorm(name="scanned")(nn.Dense(4, name="plain")(x)), None)
    block = type("Block", (nn.Module,), {"__call__": nn.compact(body)})
    x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="stack")(x, None)
    return nn.Dense(3, name="classifier")(x)


def test_the_norm_parameters_of_linen_models_are_found_whatever_they_are_called():
  params = jax.eval_shape(Zoo().init, jax.random.key(0), jnp.ones((2, 5, 4)))["params"]
  found = jax.tree_util.tree_leaves_with_path(training.is_norm_param(params))
  chosen = {"/".join(k.key for k in path) for path, yes in found if yes}
  both = lambda name: {f"{name}/scale", f"{name}/bias"}
  attention = "MultiHeadDotProductAttention_0"
  expected = both("my_own_name") | {"LayerNorm_0/scale"} | both("GroupNorm_0") | {"RMSNorm_0/scale"}
  expected |= both("InstanceNorm_0") | {"WeightNorm_0/normed/kernel/scale"} | both("stack/scanned")
  expected |= {f"{attention}/query_ln/scale", f"{attention}/key_ln/scale"}
  assert chosen == expected


def test_running_statistics_advance_once_per_step_and_the_product_does_not_read_them(x64):
  """A linen training loop, gradient and product from one linearization: the statistics are those of the gradient."""
  model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False, momentum=0.9), nn.relu, nn.Dense(3)])
  x = jnp.asarray(X)
  variables = jax.jit(model.init)(KEY, x)
  tx = dpo.sgd_ph(0.1, training.is_norm_param)

  @jax.jit
  def train_step(params, stats, opt_state):
    def loss(p):
      out, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
      return cross_entropy(out), new["batch_stats"]

    (_, new), grads, hvp = dpo.value_and_grad_then_hvp(loss, True, where=training.is_norm_param)(params)
    updates, opt_state = tx.update(grads, opt_state, params, hvp=hvp)
    return optax.apply_updates(params, updates), new, opt_state

  params, stats = variables["params"], variables["batch_stats"]
  opt_state, mean = tx.init(params), np.zeros(4)
  for _ in range(3):
    dense = params["layers_0"]
    mean = 0.9 * mean + 0.1 * np.mean(X @ dense["kernel"] + dense["bias"], 0)
    params, stats, opt_state = train_step(params, stats, opt_state)
  close(stats["layers_1"]["mean"], mean, rtol=1e-6, atol=1e-7)
  other, _, _ = train_step(params, jax.tree.map(lambda s: 7 + s, stats), opt_state)
  close(other, train_step(params, stats, opt_state)[0], rtol=0, atol=0)


class Normed(nnx.Module):
  """Without a norm layer before the last, but with 1-D lengths."""

  def __init__(self, rngs):
    self.conv = training.WeightNorm(nnx.Conv(1, 4, (3,), rngs=rngs))
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.head = training.WeightNorm(nnx.Linear(4, 3, rngs=rngs))

  def __call__(self, x):
    return self.head(jnp.tanh(self.norm(self.conv(x[..., None]))).mean(1))


def test_an_nnx_model_with_weight_normalised_layers_is_trained():
  """`nnx.Optimizer` hands `hvp` on; the lengths are second order; v moves at right angles to itself."""
  model = Normed(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, dpo.sgd_ph(0.1, training.is_norm_param), wrt=nnx.Param)
  chosen = training.is_norm_param(nnx.as_pure(nnx.state(model, nnx.Param)))
  paths = jax.tree_util.tree_leaves_with_path(chosen)
  names = {"/".join(str(k.key) for k in path) for path, yes in paths if yes}
  assert names == {"conv/length/scale", "norm/scale", "norm/bias", "head/length/scale"}

  @nnx.jit
  def train_step(model, optimizer):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p: cross_entropy(nnx.merge(graphdef, p, rest, copy=True)(jnp.asarray(X, jnp.float32)))
    value, grads, hvp = dpo.value_and_grad_then_hvp(loss, where=training.is_norm_param)(nnx.as_pure(params))
    grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))  # `nnx.Param`s, as it expects
    optimizer.update(model, grads, hvp=hvp)
    return value, grads

  v = model.conv.layer.kernel[...]
  first, grads = train_step(model, optimizer)
  inner = jnp.sum(v * nnx.as_pure(grads)["conv"]["layer"]["kernel"], (0, 1))
  np.testing.assert_allclose(inner, np.zeros(4), atol=1e-6)
  for _ in range(40):
    value, _ = train_step(model, optimizer)
  assert value < 0.95 * first


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
