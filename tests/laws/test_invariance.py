# SPDX-License-Identifier: Apache-2.0
"""What a change of variables, of units, of storage or of bookkeeping must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

import dpsgd_optax as dpo
from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.linalg import balancing, largest_diagonal, largest_entry, scaled
from dpsgd_optax.preconditioners._lift import LiftState
from tests.table import BATCH, SIZE, draw, fit, flat, matrix, start, unflat

KRON = ["kron", "kron pro", "kron eq", "kron quad", "kron qeq"]


def close(came, expected, tolerance):
  """Relative to the largest entry of each matrix."""
  came, expected = np.asarray(came), np.asarray(expected)
  return np.all(np.abs(came - expected) <= tolerance * np.abs(expected).max((-2, -1), keepdims=True))


@settings(deadline=None, max_examples=8)
@given(shape=st.lists(st.integers(1, 4), max_size=3).map(tuple), seed=st.integers(0, 1000))
def test_kron_is_the_explicit_kronecker_product(shape, seed):
  """P vec(x) = (p_1 ⊗ … ⊗ p_k) vec(x), axes of length 1 left out."""
  rng, p = np.random.default_rng(seed), dpo.kron(max_skew=jnp.inf)
  state = p.init(jnp.zeros(shape))
  ((name, bucket),) = state.buckets.items()
  factors = [rng.standard_normal(x.shape[1:]) for x in bucket.q]
  x = rng.standard_normal(shape)
  explicit = np.ones((1, 1))
  for factor in factors:
    explicit = np.kron(explicit, factor.T @ factor if factor.ndim == 2 else np.diag(factor**2))
  state = LiftState({name: bucket._replace(q=tuple(jnp.float32(f)[None] for f in factors))})
  expected = (explicit @ x.reshape(-1)).reshape(shape)
  np.testing.assert_allclose(p.apply(state, jnp.float32(x)), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=10)
@given(sizes=st.lists(st.floats(-30, 30), min_size=2, max_size=2), seed=st.integers(0, 1000))
@pytest.mark.parametrize("size", [largest_entry, largest_diagonal])
def test_balance_leaves_the_product_and_makes_the_factors_equal_in_size(size, sizes, seed):
  """⊗ q_i stays, size(q_i) = (Π_j size(q_j))^(1/k), whatever the sizes were: 1e±30 each."""
  rng = np.random.default_rng(seed)
  shapes = [(3, 3), (2,)]
  q = [(rng.standard_normal(s) * 10.0**e).astype(np.float32) for s, e in zip(shapes, sizes, strict=True)]
  new = [np.asarray(x, np.float64) for x in scaled(q, balancing(q, size))]
  product = lambda a, b: np.kron(a.astype(np.float64), np.diag(b.astype(np.float64)))
  assert close(product(*new), product(*q), 1e-4)
  np.testing.assert_allclose(size(jnp.asarray(new[0])), size(jnp.asarray(new[1])), rtol=1e-4)


@pytest.mark.parametrize("name", ["kron eq", "damped_kron undamped"])
def test_eq_factors_stay_triangular_with_positive_diagonals(name):
  """q ← (I − μ triu E) q with ‖μE‖ ≤ 0.1 never leaves the group: 1000 fits on pairs of any size."""
  size = np.exp(3 * np.random.default_rng(2).standard_normal((1000, BATCH, 1)))
  state = fit(name, start(name), draw(0, 1000, BATCH), unflat(flat(draw(1, 1000, BATCH)) * size))
  factors = [getattr(group, "kron", group).q for group in state.buckets.values()]
  for q in (np.asarray(q) for qs in factors for q in qs):
    assert np.all(np.isfinite(q))
    if q.ndim == 4:  # experiments, leaves of this shape, rows, columns
      np.testing.assert_array_equal(q, np.triu(q))
      q = np.diagonal(q, axis1=-2, axis2=-1)
    assert np.all(q > 0)


def changed_variables(name, state, s_b, s_left, s_right):
  """Experiments 1, 2 and 3 become experiment 0 in the variables θ̃ = S⁻¹ θ: q → q S⁻ᵀ."""
  inverse = {"2": [s_b], "3x2": [s_left, s_right]}

  def change(q, s):
    q = np.array(q)
    moved = q[:1] @ np.linalg.inv(s).T if q.ndim == 4 else q[:1]
    return jnp.asarray(np.concatenate([q[:1], *[moved] * (BATCH - 1)]), jnp.float32)

  def group(key, old):
    kron = getattr(old, "kron", old)
    sides = [*inverse[key.removesuffix("_float32")], np.eye(1)]
    q = tuple(change(x, s) for x, s in zip(kron.q, sides, strict=False))
    p = tuple(jnp.swapaxes(x, -1, -2) @ x if x.ndim == 4 else x**2 for x in q)
    first = jnp.broadcast_to(kron.lipschitz[:1], kron.lipschitz.shape)
    kron = kron._replace(q=q, p=p, lipschitz=first)
    return old._replace(kron=kron) if hasattr(old, "kron") else kron

  return LiftState({key: group(key, old) for key, old in state.buckets.items()})


@pytest.mark.parametrize(
  ("name", "invariant"), [("kron eq", True), ("damped_kron undamped", True), ("kron qeq", False)]
)
def test_eq_commutes_with_a_change_of_variables_in_its_group(name, invariant):
  """θ = S θ̃, so v → S⁻¹v, h → Sᵀh, q → qS⁻ᵀ with S = S_L ⊗ S_R, each lower triangular: then P → S⁻¹ P S⁻ᵀ for ever."""
  rng = np.random.default_rng(0)
  s_b, s_left, s_right = (
    np.tril(0.4 * rng.standard_normal((d, d)), -1) + np.diag(rng.uniform(0.5, 2, d)) for d in (2, 3, 2)
  )
  s = block_diag(s_b, np.kron(s_left, s_right))
  v, h = (flat(draw(k, 25, BATCH)) for k in (1, 2))
  state = fit(name, start(name), unflat(v[:5]), unflat(h[:5]))
  state = changed_variables(name, state, s_b, s_left, s_right)
  v, h = v[5:], h[5:]
  v[:, 1:] = v[:, :1] @ np.linalg.inv(s).T
  h[:, 1:] = h[:, :1] @ s
  p = matrix(name, fit(name, state, unflat(v), unflat(h)))
  expected = np.linalg.inv(s) @ p[0] @ np.linalg.inv(s).T
  assert not close(p[0], expected, 0.1)
  assert close(p[1], expected, 1e-3) == invariant


@pytest.mark.parametrize("name", ["diagonal", *KRON])
def test_p_scales_as_one_over_the_loss(name):
  """h → c h gives P → P / c, from P_0 / c; `kron` finds that start by itself."""
  c = np.array([1.0, 1e-6, 1e6, 16.0])
  v, h = draw(1, 30, BATCH), draw(2, 30, BATCH)
  v, h = (np.repeat(flat(x)[:, :1], BATCH, axis=1) for x in (v, h))
  state = start(name)
  if name == "diagonal":
    state = jax.tree.map(lambda q: q * np.float32(c**-0.5).reshape(-1, *[1] * (q.ndim - 1)), state)
  p = matrix(name, fit(name, state, unflat(v), unflat(h * c[:, None])))
  assert close(p * c[:, None, None], p[:1], 1e-3)
  assert not close(p[0], np.eye(SIZE), 0.1)


def test_qeq_on_q_is_quad_on_p():
  """q' = q − μqE makes P' = (I − μE) P (I − μE) of P = qᵀq, with E = Ph hᵀP − vvᵀ."""
  rng = np.random.default_rng(0)
  q, v, h = np.eye(4) + 0.3 * rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal(4)
  p, step_size = q.T @ q, 0.3
  (new,), lip = fit_factors(
    (jnp.asarray(q),),
    (jnp.asarray(p),),
    jnp.zeros(1),
    v,
    h,
    geometry=dpo.qeq,
    normalizer=dpo.geometry.lipschitz,
    step_size=step_size,
  )
  left = np.eye(4) - step_size / float(lip[0]) * (np.outer(p @ h, p @ h) - np.outer(v, v))
  np.testing.assert_allclose(new.T @ new, left @ p @ left.T, atol=1e-5)


def test_swapping_left_and_right_transposes_the_step():
  """P of (Vᵀ, Hᵀ) applied to Gᵀ is the transpose of P of (V, H) applied to G: averages, π and damping included."""
  p = dpo.damped_kron()
  one_fit = jax.jit(lambda state, v, h: p.fit(state, dpo.Probe(v, h), key=jax.random.key(0), damping=0.5))
  rng = np.random.default_rng(0)
  states = [p.init(jnp.zeros((3, 2))), p.init(jnp.zeros((2, 3)))]
  for _ in range(10):
    v, h = (rng.standard_normal((2, 3, 2)) * np.array([1.0, 3.0]).reshape(2, 1, 1)).astype(np.float32)
    states = [one_fit(states[0], v, h), one_fit(states[1], v.T, h.T)]
  g = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
  one, other = p.apply(states[0], g), p.apply(states[1], g.T)
  np.testing.assert_allclose(one, other.T, rtol=1e-3, atol=1e-4)
  assert not np.allclose(one, g, atol=0.1)


@pytest.mark.parametrize("name", ["kron", "damped_kron factored"])
def test_a_stack_of_layers_is_fitted_like_its_layers_one_by_one(name):
  """Every statistic is one per matrix: gradients of 1e-3 and of 1e3 in one stack do not see each other."""
  make = {"kron": dpo.kron, "damped_kron factored": dpo.damped_kron}[name]
  p = make(step_size=0.1, stacked={"apart": {str(i): 0 for i in range(BATCH)}, "stack": 1})
  v, h = draw(1, 5, BATCH), draw(2, 5, BATCH)
  h = unflat(flat(h) * np.array([1e-3, 1.0, 1e3, 1.0])[:, None])
  alone = matrix(name, fit(name, start(name), v, h, damping=0.1))[:, 2:, 2:]
  tree = lambda x: {"apart": {str(i): jnp.float32(x[i]) for i in range(BATCH)}, "stack": jnp.float32(x)}

  @jax.jit
  def one_fit(state, v, h):
    return p.fit(state, dpo.Probe(v, h), key=jax.random.key(0), damping=0.1)

  state = p.init(tree(np.zeros((BATCH, 3, 2))))
  for t in range(5):
    state = one_fit(state, tree(v["w"][t]), tree(h["w"][t]))
  g = np.random.default_rng(3).standard_normal((BATCH, 3, 2))
  applied = p.apply(state, tree(g))
  expected = (alone @ g.reshape(BATCH, 6, 1)).reshape(g.shape)
  assert close(applied["stack"], expected, 1e-4)
  assert close(np.stack([applied["apart"][str(i)] for i in range(BATCH)]), expected, 1e-4)


@pytest.mark.parametrize("name", ["eq", "qep", "qeq", "quad", "pro", "quad4p", "pro4p"])
def test_multiples_of_the_factors_may_be_taken_after_the_move(name):
  """move(c q, E, μ) = c move(q, E, μ), so that fitting c_i q_i is fitting q_i, the results multiplied by c_i."""
  rng = np.random.default_rng(3)
  geometry = getattr(dpo.geometry, name)
  root = lambda d: np.linalg.cholesky(np.eye(d) + 0.1 * np.ones((d, d))).T
  full = root(4) if name == "eq" else root(4).T @ root(4)
  q = jnp.asarray(full, jnp.float32), jnp.asarray(rng.uniform(0.5, 2, 3), jnp.float32)
  v, h = jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32)
  multiples = jnp.asarray([4.0, 1 / 16])
  of = lambda factors: (tuple(geometry.factor_of_p(x) for x in factors), jnp.zeros(2), v, h)
  options = dict(geometry=geometry, normalizer=dpo.geometry.lipschitz, step_size=0.3)
  expected, lip = fit_factors(scaled(q, multiples), *of(scaled(q, multiples)), **options)
  new, found = fit_factors(q, *of(scaled(q, multiples)), multiples=multiples, **options)
  for a, b in zip((*new, found), (*expected, lip), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert np.abs(a).max() > 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("normalizer", ["spectral", "max_abs"])
@pytest.mark.parametrize("name", ["eq", "qeq", "quad", "pro"])
def test_one_product_of_difference_and_sum_is_the_difference_of_both_moments(name, normalizer, dtype):
  """a aᴴ − b bᴴ is the Hermitian part of (a − b)(a + b)ᴴ, along each axis of a tensor, beside a diagonal factor too."""
  rng = np.random.default_rng(4)
  draw_one = lambda *shape: (
    rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype == np.complex64 else 0)
  )
  geometry, once = getattr(dpo.geometry, name), getattr(dpo.geometry, normalizer)
  assert once.of_difference
  q = tuple(jnp.asarray(np.eye(d) + 0.2 * np.triu(draw_one(d, d), 1), dtype) for d in (4, 3))
  if name != "eq":
    q = tuple(jnp.conj(x.T) @ x for x in q)
  q = (*q, jnp.asarray([0.5, 2.0], np.float32))
  v, h = (jnp.asarray(draw_one(4, 3, 2), dtype) for _ in range(2))
  given = q, tuple(geometry.factor_of_p(x) for x in q), jnp.zeros(3), v, h
  new, lip = fit_factors(*given, geometry=geometry, normalizer=once, step_size=0.2)
  expected, twice = fit_factors(*given, geometry=geometry, normalizer=once._replace(of_difference=False), step_size=0.2)
  for a, b in zip((*new, lip), (*expected, twice), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
