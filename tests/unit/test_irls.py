# SPDX-License-Identifier: Apache-2.0
"""One layer by reweighted least squares: its identities, and that what it finds is stationary for the true loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpsgd_optax.layers import irls

LINKS = {name: getattr(irls, name) for name in ("identity", "sigmoid", "tanh", "softplus", "leaky_relu")}
RNG = np.random.default_rng(0)
N, D = 60, 3
X = RNG.standard_normal((N, D))
THETA, BIAS = np.array([[1.0, -0.5], [0.3, 1.2], [-0.7, 0.4]]), np.array([0.2, -0.1])
U = X @ THETA + BIAS
close = np.testing.assert_allclose


@pytest.fixture(autouse=True)
def in_float64(x64):
  pass


def noisy(link, noise=0.05):
  return np.asarray(link.value(jnp.asarray(U))) + noise * RNG.standard_normal(U.shape)


@pytest.mark.parametrize("name", [name for name in LINKS if name != "leaky_relu"])
def test_a_fixed_point_is_a_stationary_point_of_the_true_loss(name):
  """∇ mean ½(f(u) − y)² = 0 by jax.grad, with targets outside the range of f among them and a ridge on the step."""
  link, y = LINKS[name], noisy(LINKS[name])
  fit = irls.irls_fit(X, y, irls.squared(link), damping=1e-3, tolerance=1e-10)
  total = lambda kernel, bias: 0.5 * jnp.sum((link.value(X @ kernel + bias) - y) ** 2) / N
  for g in jax.grad(total, argnums=(0, 1))(fit.kernel, fit.bias):
    close(g, 0, atol=1e-8)
  assert np.all(fit.iterations < 100) and np.all(fit.gradient < 1e-8)
  close(fit.loss.sum(), total(fit.kernel, fit.bias))
  if name != "identity":
    close(fit.kernel, THETA, atol=0.5)


def test_with_a_kink_in_the_link_the_noiseless_solution_is_found():
  """With noise a sweep may end with a row on the kink, where the loss has no gradient."""
  y = irls.leaky_relu.value(jnp.asarray(U))
  fit = irls.irls_fit(X, y, irls.squared(irls.leaky_relu))
  close(fit.kernel, THETA, atol=1e-6)
  close(fit.bias, BIAS, atol=1e-6)


def test_a_linear_link_is_ordinary_least_squares_in_one_sweep():
  y = noisy(irls.identity)
  fit = irls.irls_fit(X, y, irls.squared(irls.identity), damping=0.0, max_iterations=1)
  close(np.vstack([fit.kernel, fit.bias]), np.linalg.lstsq(np.c_[X, np.ones(N)], y, rcond=None)[0], rtol=1e-9)


@pytest.mark.parametrize("name", LINKS)
def test_one_example_is_fitted_in_one_sweep(name):
  """The secant to the target: u + f(u)-step lands on z exactly."""
  link = LINKS[name]
  y = link.value(jnp.array([[0.7]]))
  fit = irls.irls_fit(X[:1], y, irls.squared(link), damping=1e-12, max_iterations=1)
  close(X[:1] @ fit.kernel + fit.bias, [[0.7]], rtol=1e-6)


@pytest.mark.parametrize("name", LINKS)
def test_weights_are_positive_and_tend_to_the_squared_slope(name):
  """w ≥ 0 for increasing f; w → f′(z)² as u → z; and w (u − z) = s, which makes the sweep that of the note."""
  link, loss = LINKS[name], irls.squared(LINKS[name])
  u, z = jnp.asarray(U[:, 0]), jnp.asarray(U[::-1, 1])
  y = jnp.clip(link.value(z), *link.range)
  w = loss.weight(u, y)
  assert np.all(w > 0)
  close(w * (u - link.inverse(y)), loss.slope(u, y), rtol=1e-9)
  slope = jax.vmap(jax.grad(link.value))(link.inverse(y))
  for gap in (0.0, 1e-9, 1e-5):
    close(loss.weight(link.inverse(y) + gap, y), slope**2, rtol=1e-3)


def test_logistic_regression_is_newtons_and_stationary():
  y = (RNG.random(U.shape) < 1 / (1 + np.exp(-U))).astype(float)
  fit = irls.irls_fit(X, y, irls.logistic, damping=0.0, tolerance=1e-10)
  p = 1 / (1 + np.exp(-(X @ fit.kernel + fit.bias)))
  close(np.c_[X, np.ones(N)].T @ (p - y), 0, atol=1e-7)
  assert np.all(fit.iterations <= 12)


def test_sample_weights_count_rows():
  """A row of weight 2 is that row twice."""
  y = noisy(irls.tanh)
  weights = np.ones(N)
  weights[:5] = 2
  weighted = irls.irls_fit(X, y, irls.squared(irls.tanh), sample_weights=weights, tolerance=1e-11)
  again = irls.irls_fit(np.r_[X, X[:5]], np.r_[y, y[:5]], irls.squared(irls.tanh), tolerance=1e-11)
  close(weighted.kernel, again.kernel, rtol=1e-6)


def test_saturated_starts_and_constant_features_stay_finite():
  fit = irls.irls_fit(np.c_[X, np.zeros(N)], noisy(irls.sigmoid), start=(np.full((D + 1, 2), 300.0), np.zeros(2)))
  assert all(np.all(np.isfinite(x)) for x in fit)


def test_what_cannot_be_inverted_is_refused():
  with pytest.raises(ValueError, match=r"Link.*inverse.*leaky_relu"):
    irls.squared(jax.nn.relu)
  with pytest.raises(ValueError, match=r"\(60, 3\).*\(59, 2\)"):
    irls.irls_fit(X, U[1:])
  with pytest.raises(ValueError, match="damping"):
    irls.irls_fit(X, U, damping=-1.0)
