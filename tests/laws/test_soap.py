# SPDX-License-Identifier: Apache-2.0
"""SOAP's P against dense linear algebra and against Adam: where its fits end, what they keep, what they leave alone.

P is compared, never a basis: eigenvectors of equal eigenvalues are free to turn.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax._trees.branches import if_any

M, N = 4, 3
rng = np.random.default_rng(0)


def spd(d, seed, low=0.3, high=3.0):
  """A symmetric positive matrix with a spread of eigenvalues."""
  q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
  return q * np.geomspace(low, high, d) @ q.T


LEFT, RIGHT = spd(M, 1), spd(N, 2)
INDEFINITE = LEFT - 2.0 * np.eye(M)  # eigenvalues of −1.7 to 1


def whole(**options):
  """Bases on both sides."""
  return dpo.soap(max_skew=jnp.inf, **options)


def run(p, probes, start=None, damping=0.0):
  """The state after fits on (v or None, h), arrays with a leading axis over the fits."""
  v, h = probes
  state = p.init(h[0]) if start is None else start

  def one(state, probe):
    return p.fit(state, dpo.Probe(*probe), key=jax.random.key(0), damping=damping), None

  return jax.jit(lambda state: jax.lax.scan(one, state, (v, h))[0])(state)


def matrix(p, state, shape=(M, N)):
  """P as a matrix on the raveled parameter."""
  eye = jnp.eye(int(np.prod(shape)), dtype=jnp.result_type(float)).reshape(-1, *shape)
  columns = jax.vmap(lambda e: p.apply(state, e).reshape(-1))(eye)
  return np.asarray(columns, np.float64).T


def normal(count, shape=(M, N), seed=0):
  return np.random.default_rng(seed).standard_normal((count, *shape))


def magnitude(h):
  values, vectors = np.linalg.eigh(h)
  return vectors * np.abs(values) @ vectors.T


@pytest.mark.parametrize("moments", [dpo.geometry.shampoo, dpo.geometry.kl], ids=lambda m: m.name)
@pytest.mark.parametrize("left", [np.diag(np.diag(LEFT)), LEFT], ids=["diagonal", "dense"])
def test_fits_on_gradients_reach_the_inverse_root_of_their_covariance(left, moments):
  """g = A z B, z ~ N(0, I): P → (A² ⊗ B²)^(−½) = A⁻¹ ⊗ B⁻¹."""
  g = left @ normal(6000) @ RIGHT
  p = whole(b2=0.999, moments=moments)
  found = matrix(p, run(p, (None, jnp.asarray(g, jnp.float32))))
  np.testing.assert_allclose(found @ np.kron(left, RIGHT), np.eye(M * N), atol=0.12)


@pytest.mark.parametrize("left", [LEFT, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_newton_fits_reach_the_inverse_magnitude_of_the_damped_hessian(left, damping):
  """H v = A v B: E hhᵀ = H², so P → |H|⁻¹; damped, |H + λ|⁻¹ in the bases of H, which H + λ has too."""
  v = normal(6000)
  p = whole(b2=0.999)
  found = matrix(p, run(p, (jnp.float32(v), jnp.float32(left @ v @ RIGHT)), damping=damping))
  h = np.kron(left, RIGHT) + damping * np.eye(M * N)
  np.testing.assert_allclose(found @ magnitude(h), np.eye(M * N), atol=0.15)


def test_a_dense_hessian_is_inverted_as_far_as_a_kronecker_basis_goes():
  """H with no Kronecker structure: P = U diag(1/√diag(UᵀH²U)) Uᵀ, U = Q_L ⊗ Q_R of the eigenvectors of the moments."""
  h = spd(M * N, 5)
  v = normal(8000)
  p = whole(b2=0.9995)
  found = matrix(p, run(p, (jnp.float32(v), jnp.float32((v.reshape(-1, M * N) @ h).reshape(-1, M, N)))))
  square = (h @ h).reshape(M, N, M, N)
  left, right = np.einsum("ijkj->ik", square), np.einsum("ijil->jl", square)
  u = np.kron(np.linalg.eigh(left)[1], np.linalg.eigh(right)[1])
  wanted = u / np.sqrt(np.diag(u.T @ h @ h @ u)) @ u.T
  assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
  "options", [{}, {"moments": dpo.geometry.kl}, {"refresh": dpo.geometry.exact}], ids=["shampoo", "kl", "exact"]
)
def test_a_change_of_basis_changes_p_with_it(options, x64):
  """Gradients U g W, U and W orthogonal: P' = (U ⊗ Wᵀ) P (U ⊗ Wᵀ)ᵀ after any number of fits."""
  u, w = (np.linalg.qr(normal(1, (d, d), seed=d)[0])[0] for d in (M, N))
  g = LEFT @ normal(25) @ RIGHT
  p = whole(basis_every=3, **options)
  plain, turned = (matrix(p, run(p, (None, jnp.asarray(x)))) for x in (g, u @ g @ w))
  both = np.kron(u, w.T)
  np.testing.assert_allclose(turned, both @ plain @ both.T, rtol=1e-6, atol=1e-6 * np.abs(plain).max())


def adam_beside(p, shape, steps=7):
  """P m beside Adam's update, bit for bit, operation by operation: a compiler may contract a product and a sum.

  β = ¾, whose powers are exact: JAX has two ways to raise a number to a power.
  """
  ours = dpo.scale_by_preconditioner(p, dpo.whitening(), momentum=optax.ema(0.9))
  params = {"x": jnp.zeros(shape), "b": jnp.zeros(3)}
  grads = {"x": jnp.float32(normal(steps, shape, seed=1)), "b": jnp.float32(normal(steps, (3,), seed=2))}

  def updates(tx):
    state = tx.init(params)
    for t in range(steps):
      found, state = tx.update({name: x[t] for name, x in grads.items()}, state, params)
      yield found

  with jax.disable_jit():
    chex.assert_trees_all_equal(list(updates(ours)), list(updates(optax.scale_by_adam(0.9, 0.75))))


@pytest.mark.parametrize("shape", [(), (5,), (1, 6), (4, 3), (2, 2, 3)], ids=str)
def test_without_bases_it_is_adam_bit_for_bit(shape):
  """Q = I: on vectors, scalars and rows always, on all else with ``max_size=1`` or ``max_skew=0``."""
  adam_beside(dpo.soap(b2=0.75) if len(shape) < 2 or 1 in shape else dpo.soap(b2=0.75, max_size=1), shape)
  adam_beside(dpo.soap(b2=0.75, max_skew=0), shape)


def test_with_exact_vectors_on_every_fit_it_is_the_idealised_method(x64):
  """P_t = U diag(1/√V̂) Uᵀ with U of the eigenvectors of the moments before, V summed in the basis of each fit."""
  g = LEFT @ normal(6) @ RIGHT
  p = whole(basis_every=1, refresh=dpo.geometry.exact, eps=0.0)
  found = matrix(p, run(p, (None, jnp.asarray(g))))
  falling = lambda s: np.linalg.eigh(s)[1][:, ::-1]
  left, right, v = np.zeros((M, M)), np.zeros((N, N)), np.zeros((M, N))
  ql, qr = np.eye(M), np.eye(N)
  for t, x in enumerate(g):
    mixed = lambda s, new: 0.95 * s + 0.05 * new
    if t:  # V goes on with the direction of the same rank
      order = [np.argsort(-np.diag(q.T @ s @ q)) for q, s in ((ql, left), (qr, right))]
      ql, qr, v = falling(left), falling(right), v[np.ix_(*order)]
    left, right = mixed(left, x @ x.T), mixed(right, x.T @ x)
    if not t:
      ql, qr = falling(left), falling(right)
    v = mixed(v, (ql.T @ x @ qr) ** 2)
  u = np.kron(ql, qr)
  wanted = u / np.sqrt(v.reshape(-1) / (1 - 0.95 ** len(g))) @ u.T
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_v_stays_with_its_directions_when_they_are_sorted():
  """Moments whose order is the reverse of that of the basis: the refresh sorts columns and V alike."""
  from dpsgd_optax.preconditioners._eigenbasis import SoapState, refreshed

  values, v = np.array([1.0, 2.0, 3.0]), np.float32(np.abs(normal(1, (3, 2))[0]) + 0.1)
  basis = np.float32(np.linalg.qr(normal(1, (3, 3))[0])[0])
  moment = np.float32(basis * values @ basis.T)
  for square, factored in ((jnp.asarray(v), False), ((jnp.asarray(v[:, 0]), jnp.asarray(v[0])), True)):
    old = SoapState(jnp.array(1), (jnp.asarray(moment), ()), (jnp.asarray(basis), ()), square)
    new = refreshed(old, jnp.array(True), dpo.geometry.power_iteration)
    np.testing.assert_allclose(np.abs(new.bases[0]), np.abs(basis[:, ::-1]), atol=1e-5)
    kept = new.square[0] if factored else new.square
    np.testing.assert_array_equal(kept, (v[:, 0] if factored else v)[::-1])


@pytest.mark.parametrize("basis_every", [1, 4, 50])
def test_the_second_moment_moves_on_every_fit_and_the_bases_on_some(basis_every):
  """V changes on each of 9 fits; Q on the first, and on those that come ``basis_every`` after it."""
  p = whole(basis_every=basis_every)
  state, moved = p.init(jnp.zeros((M, N))), []
  fit = jax.jit(lambda state, g: p.fit(state, dpo.Probe(None, g), key=jax.random.key(0), damping=0.0))
  for g in jnp.float32(LEFT @ normal(9) @ RIGHT):
    (old,), (new,) = state.buckets.values(), (state := fit(state, g)).buckets.values()
    assert np.all(old.square != new.square)
    moved.append(bool(np.any(old.bases[0] != new.bases[0])))
  assert moved == [t % basis_every == 0 for t in range(9)]


@pytest.mark.parametrize("basis_every", [1, 3])
def test_stacked_and_separate_matrices_have_the_same_p(basis_every):
  """A stack is a bucket: each matrix counts for itself, also where the first is zero for two fits."""
  g = np.float32(LEFT @ normal(8, (3, M, N)) @ RIGHT)
  g[:2, 0] = 0
  p, q = whole(basis_every=basis_every, stacked=1), whole(basis_every=basis_every)
  x = jnp.float32(normal(1, (3, M, N), seed=3)[0])
  together = p.apply(run(p, (None, jnp.asarray(g))), x)
  apart = [q.apply(run(q, (None, jnp.asarray(g[:, i]))), x[i]) for i in range(3)]
  np.testing.assert_allclose(together, jnp.stack(apart), rtol=2e-4, atol=1e-5)


def test_a_refresh_is_one_branch_for_a_whole_bucket():
  """No eigensolver and no QR outside a branch, however many matrices there are, and under a vmap."""
  p = whole(stacked=1)
  fit = lambda state, g: p.fit(state, dpo.Probe(None, g), key=jax.random.key(0), damping=0.0)
  g = jnp.ones((5, 3, M, N))
  states = jax.tree.map(lambda x: jnp.stack([x] * 5), p.init(g[0]))

  def outside(jaxpr):
    """The primitives that run on every fit."""
    names = set()
    for eqn in jaxpr.eqns:
      names.add(eqn.primitive.name)
      if eqn.primitive.name != "cond":
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
          names |= (
            outside(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") or hasattr(inner, "jaxpr") else set()
          )
    return names

  for found in (jax.make_jaxpr(fit)(p.init(g[0]), g[0]), jax.make_jaxpr(jax.vmap(fit))(states, g)):
    names = outside(found.jaxpr)
    assert "dot_general" in names and "cond" in names
    assert not names & {"eigh", "qr", "geqrf", "householder_product", "cholesky"}, names


def test_only_the_members_that_are_due_change():
  """`if_any` under one and two vmaps is `where`, whichever of its arguments are batched."""
  change = lambda x, y: x + y
  due = jnp.arange(6).reshape(2, 3) % 2 == 0
  x = jnp.arange(6.0).reshape(2, 3)
  for y, axis in ((jnp.ones(()), None), (2 * x, 0)):
    twice = jax.vmap(jax.vmap(functools.partial(if_any), (0, None, 0, axis)), (0, None, 0, axis))
    np.testing.assert_array_equal(twice(due, change, x, y), jnp.where(due, x + y, x))
  np.testing.assert_array_equal(jax.vmap(lambda d: if_any(d, change, x[0], x[1]))(due[0])[1], x[0])


def test_the_root_is_a_root_and_the_powers_are_those_of_p():
  """R Rᵀ = P, R R⁻¹ = I, P^½ P^½ = P."""
  p = whole()
  state = run(p, (None, jnp.float32(LEFT @ normal(15) @ RIGHT)))
  columns = lambda f: np.asarray(jax.vmap(lambda e: f(e).reshape(-1))(jnp.eye(M * N).reshape(-1, M, N))).T
  r, back, half = (
    columns(f)
    for f in (
      lambda e: p.root(state, e, False),
      lambda e: p.root(state, e, True),
      lambda e: p.power(state, e, 0.5),
    )
  )
  np.testing.assert_allclose(r @ r.T, matrix(p, state), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(half @ half, matrix(p, state), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(r @ back, np.eye(M * N), atol=1e-4)


def test_the_psgd_whitening_fixed_point_is_that_of_the_coupled_moments():
  """Kron's criterion is the Kullback–Leibler one: where E ggᵀ is a Kronecker product both end at its inverse root."""
  g = jnp.float32(LEFT @ normal(4000) @ RIGHT)
  p, q = whole(b2=0.999, moments=dpo.geometry.kl), dpo.kron(max_skew=jnp.inf, step_size=0.02)
  ours, theirs = matrix(p, run(p, (None, g))), matrix(q, run(q, (None, g)))
  assert np.linalg.norm(ours - theirs) < 0.25 * np.linalg.norm(theirs)


def test_a_complex_covariance_is_whitened():
  """g = A z B with a Hermitian A: P → A⁻¹ ⊗ B⁻¹, Hermitian too."""
  turn = np.linalg.qr(normal(1, (M, M))[0] + 1j * normal(1, (M, M), seed=7)[0])[0]
  left = turn * np.geomspace(0.5, 2, M) @ turn.conj().T
  z = (normal(4000) + 1j * normal(4000, seed=9)) / 2**0.5
  g = jnp.asarray(left @ z @ RIGHT, jnp.complex64)
  p = whole(b2=0.999)
  state = run(p, (None, g))
  x = np.asarray(normal(1)[0] + 1j * normal(1, seed=4)[0], np.complex64)
  wanted = np.linalg.solve(left, x) @ np.linalg.inv(RIGHT)
  assert np.linalg.norm(p.apply(state, jnp.asarray(x)) - wanted) < 0.1 * np.linalg.norm(wanted)
