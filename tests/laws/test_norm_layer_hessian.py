# SPDX-License-Identifier: Apache-2.0
"""Theorems about the Hessian of norm layers, of arXiv:2403.02681 and against it."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo

KEY = jax.random.PRNGKey(0)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def close(came, expected, **tolerances):
  tolerances = {"rtol": 1e-12, "atol": 1e-12} | tolerances
  chex.assert_trees_all_close(came, expected, **tolerances)


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
