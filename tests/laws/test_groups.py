# SPDX-License-Identifier: Apache-2.0
"""What the groups are, against dense linear algebra: explicit matrices, determinants, equivariance. In float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.moves import lipschitz, spectral
from dpsgd_optax.preconditioners import lra, xmat
from dpsgd_optax.preconditioners.dense import DenseState, move_dense

pytestmark = pytest.mark.usefixtures("x64")
NAMES = ("eq", "gl", "qep", "qeq", "quad", "pro", "quad4p", "pro4p")
GEOMETRIES = {name: getattr(dpo.geometry, name) for name in NAMES}
N, R = 6, 2


def lra_state(rng, n=N, rank=R):
  return lra.state_of(
    jnp.asarray(0.5 * rng.standard_normal((n, 2 * rank))), jnp.asarray(rng.uniform(0.5, 2, n)), jnp.zeros(3)
  )


def lra_matrix(state):
  """Q = (I + U Vᵀ) diag(d)."""
  u, v = np.split(np.asarray(state.w), 2, 1)
  return (np.eye(len(u)) + u @ v.T) * np.asarray(state.d)


def x_matrix(a, b):
  return np.diag(np.asarray(a)) + np.diag(np.asarray(b))[:, ::-1]


def columns(product, n=N):
  return np.stack([np.asarray(product(e)) for e in np.eye(n)], 1)


# --- lra ------------------------------------------------------------------------------------------------------------


def test_lra_is_the_explicit_product(rng):
  """P = diag(d) (I + V Uᵀ)(I + U Vᵀ) diag(d)."""
  state = lra_state(rng)
  q = lra_matrix(state)
  np.testing.assert_allclose(columns(lambda x: lra.product(state, x)), q.T @ q, atol=1e-12)


def test_lra_solves_by_the_identity_of_woodbury(rng):
  """(I + UVᵀ)⁻¹ = I − U K⁻¹ Vᵀ: what the fit uses for Q⁻ᵀv and P⁻¹v."""
  state, (v, h) = lra_state(rng), rng.standard_normal((2, N))
  q, close = lra_matrix(state), {"atol": 1e-10, "rtol": 1e-10}
  seen = lra.probe_through_q(state, v, h)
  np.testing.assert_allclose(seen.a, q @ h, **close)
  np.testing.assert_allclose(seen.b, np.linalg.solve(q.T, v), **close)
  np.testing.assert_allclose(seen.e * state.d, q.T @ q @ h, **close)
  np.testing.assert_allclose(seen.f / state.d, np.linalg.solve(q.T @ q, v), **close)


def test_the_determinant_of_lra_is_that_of_a_small_matrix(rng):
  """det Q = Π d · det K, K = I + VᵀU of r rows."""
  state = lra_state(rng)
  k = lra.probe_through_q(state, *rng.standard_normal((2, N))).k
  np.testing.assert_allclose(np.linalg.det(lra_matrix(state)), np.prod(state.d) * np.linalg.det(k), rtol=1e-10)


def test_balancing_of_lra_draws_both_factors_together_and_keeps_their_product(rng):
  """tr UᵀU = tr VᵀV afterwards up to O(ε²); UVᵀ moves by O(ε⁴); the inner products are those of the new factors."""
  state = lra_state(rng)
  state = lra.state_of(state.w * np.repeat([10.0, 0.1], R), *state[2:])
  new = lra.balanced(state)
  (u, v), (new_u, new_v) = (np.split(np.asarray(x.w), 2, 1) for x in (state, new))
  assert abs(np.log(np.trace(new_u.T @ new_u) / np.trace(new_v.T @ new_v))) < 0.1
  np.testing.assert_allclose(new_u @ new_v.T, u @ v.T, atol=1e-3 * np.abs(u @ v.T).max())
  np.testing.assert_allclose(new.gram, new.w.T @ new.w, atol=1e-12)


@pytest.mark.parametrize("of_u", [True, False])
def test_lra_commutes_with_a_diagonal_change_of_variables(rng, of_u):
  """θ = Sθ̃, S diagonal: v → S⁻¹v, h → Sh, d → d/s, and U, V stay what they are."""
  state, s = lra_state(rng), rng.uniform(0.5, 2, N)
  other = state._replace(d=state.d / s)
  for v, h in rng.standard_normal((5, 2, N)):
    state, other = (
      lra.move_low_rank(x, v / f, h * f, jnp.array(of_u), step_size=0.3) for x, f in ((state, np.ones(N)), (other, s))
    )
  np.testing.assert_allclose(other.d * s, state.d, rtol=1e-10)
  np.testing.assert_allclose(other.w, state.w, atol=1e-10)


def test_lra_of_rank_0_is_the_diagonal_of_its_own_rule(rng):
  """d ← d − μ (h Ph − v P⁻¹v) d, μ by max |h Ph| + max |v P⁻¹v|."""
  (d, v, h), size = np.abs(rng.standard_normal((3, N))), 0.3
  state = lra.state_of(jnp.zeros((N, 0)), jnp.asarray(d), jnp.zeros(3))
  a, b = (h * d) ** 2, (v / d) ** 2
  expected = d - size / (a.max() + b.max()) * (a - b) * d
  np.testing.assert_allclose(lra.move_low_rank(state, v, h, jnp.array(True), step_size=size).d, expected, rtol=1e-12)


# --- xmat -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_is_the_explicit_product_and_closed_under_products(rng, n):
  """P = QᵀQ, Q = diag(a) + adiag(b); the product of two such matrices is one."""
  a, b, c, d = rng.standard_normal((4, n))
  if n % 2:
    b[n // 2] = d[n // 2] = 0
  q = x_matrix(a, b)
  state = xmat.XMatState(jnp.asarray(a), jnp.asarray(b), jnp.zeros(()))
  np.testing.assert_allclose(columns(lambda x: xmat.product(state, x), n), q.T @ q, atol=1e-12)
  other = q @ x_matrix(c, d)
  cross = np.eye(n, dtype=bool) | np.eye(n, dtype=bool)[:, ::-1]
  assert np.all(other[~cross] == 0)


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_commutes_with_a_change_of_variables_in_its_group(rng, n):
  """θ = Sθ̃, S an X-matrix: v → S⁻¹v, h → Sᵀh, Q → QS⁻ᵀ for ever."""
  s = x_matrix(rng.uniform(1, 2, n), 0.4 * rng.standard_normal(n))
  q0 = x_matrix(rng.uniform(1, 2, n), 0.3 * rng.standard_normal(n) * (np.arange(n) != n // 2 if n % 2 else 1))
  cut = lambda q: xmat.XMatState(
    jnp.asarray(np.diag(q)),
    jnp.asarray(np.diag(q[:, ::-1]) * (np.arange(n) != n // 2 if n % 2 else 1)),
    jnp.zeros(()),
  )
  state, other = cut(q0), cut(q0 @ np.linalg.inv(s).T)
  for v, h in rng.standard_normal((5, 2, n)):
    state = xmat.move_x(state, v, h, step_size=0.3)
    other = xmat.move_x(other, np.linalg.solve(s, v), s.T @ h, step_size=0.3)
  p = columns(lambda x: xmat.product(state, x), n)
  expected = np.linalg.inv(s) @ p @ np.linalg.inv(s).T
  np.testing.assert_allclose(columns(lambda x: xmat.product(other, x), n), expected, atol=1e-10)


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_without_v_moves_by_the_mean_over_all_v(rng, n):
  """The mean over all 2ⁿ vectors of signs is that over any v with E vvᵀ = I, both being quadratic."""
  a, b, h = rng.uniform(1, 2, n), 0.4 * rng.standard_normal(n), rng.standard_normal(n)
  b[n // 2] *= 1 - n % 2
  state = xmat.XMatState(jnp.asarray(a), jnp.asarray(b), jnp.zeros(()))
  signs = np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
  options = {"step_size": 0.1, "measure": lambda *_: jnp.ones(())}
  each = jax.vmap(lambda v: xmat.move_x(state, v, h, **options))(signs)
  found = xmat.move_x(state, None, h, **options)
  np.testing.assert_allclose(found.a, np.mean(each.a, 0), atol=1e-12)
  np.testing.assert_allclose(found.b, np.mean(each.b, 0), atol=1e-12)


# --- dense ----------------------------------------------------------------------------------------------------------


def dense_state(q, geometry):
  p = q.T @ q
  inverse = jnp.asarray(np.linalg.inv(q)) if geometry.keeps_inverse else ()
  return DenseState(jnp.asarray(p if geometry.fits_p else q), inverse, jnp.zeros(1))


def p_of(state, geometry):
  q = np.asarray(state.q)
  return q if geometry.fits_p else q.T @ q


def run(name, q, pairs):
  geometry = GEOMETRIES[name]
  update = jax.jit(lambda s, v, h: move_dense(s, v, h, geometry=geometry, step_size=0.3, low_rank=True))
  state = dense_state(q, geometry)
  for v, h in pairs:
    state = update(state, v, h)
  return p_of(state, geometry)


def change(q, s):
  """Q S⁻ᵀ, upper triangular where Q is and S is lower triangular."""
  return q @ np.linalg.inv(s).T


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "pro4p"])  # which divides rounding by its size
def test_every_geometry_commutes_with_rotations_and_some_with_more(rng, name):
  """v → S⁻¹v, h → Sᵀh, Q → QS⁻ᵀ makes P → S⁻¹PS⁻ᵀ: `gl` for all S, `eq` for triangular ones, the rest for rotations."""
  pairs = rng.standard_normal((5, 2, N))
  start = np.eye(N) + 0.1 * np.triu(rng.standard_normal((N, N))) * (name in ("eq", "gl"))
  rotation, _ = np.linalg.qr(rng.standard_normal((N, N)))
  lower = np.tril(0.3 * rng.standard_normal((N, N)), -1) + np.diag(rng.uniform(0.7, 1.5, N))
  general = rotation @ lower
  p = run(name, start, pairs)
  holds = {}
  for kind, s in (("rotation", rotation), ("triangular", lower), ("general", general)):
    moved = [(np.linalg.solve(s, v), s.T @ h) for v, h in pairs]
    at = start if name not in ("eq", "gl") and kind == "rotation" else change(start, s)
    came = run(name, at, moved) if np.all(np.isfinite(at)) else p
    expected = np.linalg.inv(s) @ p @ np.linalg.inv(s).T
    holds[kind] = bool(np.max(np.abs(came - expected)) < 1e-8 * np.max(np.abs(expected)))
  wanted = {"eq": {"triangular"}, "gl": {"rotation", "triangular", "general"}}.get(name, {"rotation"})
  assert {kind for kind, true in holds.items() if true} == wanted


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if not GEOMETRIES[name].fits_p])
def test_a_large_step_never_leaves_the_group(rng, name):
  """‖μE‖ ≤ step_size < 1: the determinant of Q keeps its sign under the wildest pairs, with no damping at all."""
  geometry = GEOMETRIES[name]
  update = jax.jit(lambda s, v, h: move_dense(s, v, h, geometry=geometry, step_size=0.9, low_rank=True))
  state = dense_state(np.eye(N), geometry)
  for v, h in rng.standard_normal((60, 2, N)) * np.exp(2 * rng.standard_normal((60, 1, 1))):
    state = update(state, v, h)
    sign, log = np.linalg.slogdet(np.asarray(state.q))
    assert sign > 0 and np.isfinite(log)


def test_qeq_and_quad4p_give_the_same_p(rng):
  """Q ← Q − μQE and P ← (I − μE)P(I − μE) are one rule for P: on Kronecker factors, with the normaliser's memory."""
  q = tuple(np.eye(d) + 0.2 * rng.standard_normal((d, d)) for d in (3, 4))
  states = {"qeq": tuple(map(jnp.asarray, q)), "quad4p": tuple(jnp.asarray(x.T @ x) for x in q)}
  lips = dict.fromkeys(states, jnp.zeros(2))
  for v, h in rng.standard_normal((6, 2, 3, 4)):
    for name, factors in states.items():
      geometry = GEOMETRIES[name]
      p = tuple(map(geometry.factor_of_p, factors))
      states[name], lips[name] = fit_factors(
        factors, p, lips[name], jnp.asarray(v), jnp.asarray(h), geometry=geometry, normalizer=lipschitz, step_size=0.4
      )
  for a, b in zip(states["qeq"], states["quad4p"], strict=True):
    np.testing.assert_allclose(a.T @ a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("name", ["quad", "qeq", "pro", "quad4p"])
def test_a_vector_moves_its_dense_factor_as_the_matrix_of_two_terms_does(rng, name, dtype):
  """DPSGD's E of a vector is sym((a − b)(a + b)ᴴ): the same move as by E written down, divided by its exact norm."""
  draw = lambda *shape: jnp.asarray(
    rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype is complex else 0)
  )
  root, v, h = draw(N, N), draw(N, 1), draw(N, 1)
  positive = jnp.conj(root.T) @ root + jnp.eye(N)
  q = (positive, jnp.ones(1))
  options = {"geometry": GEOMETRIES[name], "normalizer": spectral, "step_size": 0.3}
  p = q if name == "quad4p" else None
  exact = lambda e: jnp.linalg.norm(e, 2)
  by_exact_norm = spectral._replace(measure=lambda t1, t2, e, norm: spectral.measure(t1, t2, e, exact))
  fitted = jnp.linalg.solve(positive if name == "quad4p" else positive @ positive, v)
  for product in (h, fitted * (1 + 1e-6)):  # the second: Ph is nearly v, and nothing may cancel
    found = fit_factors(q, p, jnp.zeros(2), v, product, **options)
    wanted = fit_factors(q, p, jnp.zeros(2), v, product, **options | {"normalizer": by_exact_norm})
    assert not np.allclose(found[0][0], q[0], rtol=1e-3)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
