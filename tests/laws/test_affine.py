# SPDX-License-Identifier: Apache-2.0
"""Two-sided preconditioners against explicit matrices: the layout of `affine`, the arrow-heads, the pairs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.linalg import gram, multiply, solve_adjoint, square
from dpsgd_optax.geometry.moves import eq, lipschitz
from dpsgd_optax.geometry.structured import Arrow, arrow_identity
from dpsgd_optax.preconditioners._factors import Layout
from dpsgd_optax.preconditioners._lift import LiftState
from dpsgd_optax.preconditioners.affine import squarest

D = 5


@settings(deadline=None, max_examples=50)
@given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple))
def test_affine_sees_the_matrix_of_least_m2_plus_n2(shape):
  """Against all ways to distribute the axes; every axis is used once."""
  rows, columns = squarest(shape)
  assert sorted(rows + columns) == list(range(len(shape)))
  m, n = (math.prod(shape[i] for i in part) for part in (rows, columns))
  sides = [
    math.prod(side)
    for chosen in itertools.product((False, True), repeat=len(shape))
    for side in [[d for d, left in zip(shape, chosen, strict=True) if left]]
  ]
  assert m * m + n * n == min(d * d + (math.prod(shape) // d) ** 2 for d in sides)


@settings(deadline=None, max_examples=6)
@given(order=st.permutations(range(4)), cut=st.integers(1, 3))
def test_a_layout_is_undone_by_its_way_back(order, cut):
  shape = (2, 3, 4, 5)
  sides = [math.prod(shape[i] for i in part) for part in (order[:cut], order[cut:])]
  x = np.arange(120).reshape(shape)
  layout = Layout(tuple(sides), (), tuple(order))
  np.testing.assert_array_equal(layout.to_parameter(layout.to_tensor(jnp.asarray(x)), shape), x)
  np.testing.assert_array_equal(layout.to_tensor(jnp.asarray(x)), x.transpose(order).reshape(sides))


@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 3), (2, 2, 3, 2)])
def test_affine_is_the_explicit_product(shape):
  """vec(P G) = (P_l ⊗ P_r) vec(G), G the parameter with its axes in the order that was chosen."""
  rng, p = np.random.default_rng(0), dpo.affine(max_skew=jnp.inf)
  ((name, bucket),) = p.init(jnp.zeros(shape)).buckets.items()
  left, right = (rng.standard_normal(x.shape[1:]) for x in bucket.q)
  state = LiftState({name: bucket._replace(q=(jnp.float32(left)[None], jnp.float32(right)[None]))})
  g = rng.standard_normal(shape)
  order = sum(squarest(shape), ())
  merged = np.kron(left.T @ left, right.T @ right) @ g.transpose(order).reshape(-1)
  expected = merged.reshape([shape[i] for i in order]).transpose(np.argsort(order))
  np.testing.assert_allclose(p.apply(state, jnp.float32(g)), expected, rtol=1e-4, atol=1e-5)


def explicit(q):
  """The matrix that an arrow-head stands for."""
  dense = np.diag(np.asarray(q.diagonal))
  dense[:, -1] += np.asarray(q.column)
  return dense + np.triu(dense, 1).T if q.symmetric else dense


def arrow(rng):
  column = rng.standard_normal(D)
  column[-1] = 0
  return Arrow(jnp.asarray(rng.uniform(0.5, 2, D)), jnp.asarray(column))


@pytest.mark.usefixtures("x64")
def test_arrow_heads_are_a_group(rng):
  """Closed under products and inverses, identity included: each against the explicit matrix."""
  q, other = arrow(rng), arrow(rng)
  np.testing.assert_allclose(explicit(q @ other), explicit(q) @ explicit(other), atol=1e-12)
  np.testing.assert_array_equal(explicit(arrow_identity(D, jnp.float64)), np.eye(D))
  inverse = np.linalg.inv(explicit(q))
  pattern = Arrow(jnp.diagonal(inverse), jnp.asarray(inverse[:, -1]).at[-1].set(0))
  np.testing.assert_allclose(explicit(pattern), inverse, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_arrow_head_does_what_its_matrix_does(rng, axis):
  """Q x, Q⁻ᵀ x, P x with P = QᵀQ along each axis, and the part of x xᵀ that lies in the algebra."""
  q, x = arrow(rng), jnp.asarray(rng.standard_normal((D, D, D)))
  dense = explicit(q)
  along = lambda m: np.moveaxis(np.tensordot(m, np.asarray(x), (1, axis)), 0, axis)
  np.testing.assert_allclose(multiply(x, q, axis), along(dense), atol=1e-12)
  np.testing.assert_allclose(solve_adjoint(x, q, axis), along(np.linalg.inv(dense).T), atol=1e-12)
  np.testing.assert_allclose(explicit(square(q)), dense.T @ dense, atol=1e-12)
  np.testing.assert_allclose(multiply(x, square(q), axis), along(dense.T @ dense), atol=1e-12)
  whole = np.asarray(gram(x, axis, jnp.eye(D)))
  part = np.diag(np.diag(whole))
  part[:-1, -1] = whole[:-1, -1]
  np.testing.assert_allclose(explicit(gram(x, axis, q)), part, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_v_integrated_out_of_eq_is_the_mean_over_v(rng):
  """E ⟨b bᵀ⟩_i is a partial trace of Q⁻ᵀQ⁻¹: for a dense, an arrow-head and a diagonal factor at once."""
  dense, diagonal = np.triu(rng.standard_normal((3, 3)), 1) + 2 * np.eye(3), np.array([0.5, 2.0])
  head = arrow(rng)
  inverse = np.linalg.inv(np.kron(np.kron(dense, explicit(head)), np.diag(diagonal)))
  covariance = (inverse.T @ inverse).reshape(3, D, 2, 3, D, 2)
  whole = [np.einsum(f"{i}->{o}", covariance) for i, o in [("abcxbc", "ax"), ("abcaxc", "bx"), ("abcabx", "cx")]]
  came = eq.expected((jnp.asarray(dense), head, jnp.asarray(diagonal)), (3, D, 2))
  np.testing.assert_allclose(came[0], whole[0], rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(came[1].diagonal, np.diag(whole[1]), rtol=1e-10)
  np.testing.assert_allclose(came[1].column[:-1], whole[1][:-1, -1], rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(came[2], np.diag(whole[2]), rtol=1e-10)


RAW = np.random.default_rng(1).standard_normal((60, D - 1)) * [1.0, 30.0, 0.1, 5.0] + [0.0, 50.0, 1.0, -20.0]
LABELS = np.argmax((RAW - RAW.mean(0)) / RAW.std(0) @ np.random.default_rng(2).standard_normal((D - 1, 3)), 1)


def extended(features):
  return np.concatenate([features, np.ones((len(features), 1))], 1)


def trained(name, features, start, left, probes):
  """Losses of 40 Newton steps with the given v, from the left factor of Q that was given."""
  p = {"scan": dpo.scan, "scaw": dpo.scaw}[name](init_scale=1.0, step_size=0.5)
  ((bucket, kron),) = p.init(start).buckets.items()
  with_lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
  kept = kron.p and (with_lead(square(left)), kron.p[1])
  state = LiftState({bucket: kron._replace(q=(with_lead(left), kron.q[1]), p=kept)})

  def loss(kernel):
    logits = features @ kernel
    return jnp.mean(jax.nn.logsumexp(logits, 1) - logits[jnp.arange(len(LABELS)), LABELS])

  def step(carry, v):
    kernel, state = carry
    grad, h = jax.jvp(jax.grad(loss), (kernel,), (v,))
    state = p.fit(state, dpo.Probe(v, h), key=jax.random.key(0), damping=0.0)
    return (kernel - 0.2 * p.apply(state, grad), state), loss(kernel)

  return jax.lax.scan(step, (start, state), probes)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["scan", "scaw"])
def test_training_on_transformed_features_is_training_on_the_raw_ones(name, rng):
  """[z, 1] = [x, 1] S, so W_raw = S W, v_raw = S v, Q_raw = Q Sᵀ; then all losses are the same.

  `scan`: z are the normalised features, each with mean 0 and variance 1. `scaw`: the whitened ones, by the lower
  triangular S that does it.
  """
  flip = slice(None, None, -1)
  upper = np.linalg.cholesky(np.cov(RAW.T)[flip, flip])[flip, flip]  # covariance = upper · upperᵀ
  scaling = np.diag(1 / RAW.std(0)) if name == "scan" else np.linalg.inv(upper).T
  s = np.eye(D)
  s[:-1, :-1], s[-1, :-1] = scaling, -RAW.mean(0) @ scaling
  features = np.stack([extended(RAW), extended(RAW) @ s])
  if name == "scaw":
    np.testing.assert_allclose(np.cov(features[1, :, :-1].T), np.eye(D - 1), atol=1e-10)
  head = lambda m: Arrow(jnp.diagonal(m), jnp.asarray(m[:, -1]).at[-1].set(0)) if name == "scan" else jnp.asarray(m)
  left = jax.tree.map(lambda *x: jnp.stack(x), head(s.T), head(np.eye(D)))
  start, v = 0.1 * rng.standard_normal((D, 3)), rng.standard_normal((40, D, 3))
  both = jax.vmap(lambda *x: trained(name, *x))
  on_raw, on_features = both(features, np.stack([s @ start, start]), left, np.stack([s @ v, v]))
  np.testing.assert_allclose(on_raw, on_features, rtol=1e-8)
  assert on_features[-1] < 0.5 * on_features[0]


@pytest.mark.usefixtures("x64")
def test_eq_keeps_an_arrow_head_in_its_group(rng):
  """200 fits on pairs of any size: the diagonal stays positive, the last entry of the column 0."""
  fit = jax.jit(lambda q, lip, v, h: fit_factors(q, None, lip, v, h, geometry=eq, normalizer=lipschitz, step_size=0.9))
  q, lip = (arrow_identity(D, jnp.float64), jnp.ones(3)), jnp.zeros(2)
  for size in np.exp(3 * rng.standard_normal(200)):
    q, lip = fit(q, lip, rng.standard_normal((D, 3)), size * rng.standard_normal((D, 3)))
  assert np.all(q[0].diagonal > 0) and q[0].column[-1] == 0 and np.all(q[1] > 0)
  assert np.all(np.isfinite(explicit(q[0])))
