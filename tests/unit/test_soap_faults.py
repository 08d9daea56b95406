# SPDX-License-Identifier: Apache-2.0
"""What SOAP does with what it should not be given, and what it keeps in memory."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo

SHAPE = (4, 3)
GRADIENTS = jnp.asarray(np.random.default_rng(0).standard_normal((12, *SHAPE)), jnp.float32)


def whole(**options):
  return dpo.soap(max_skew=jnp.inf, **options)


def stepper(p, curvature=None, **options):
  tx = dpo.scale_by_preconditioner(p, curvature or dpo.whitening(), **options)
  update = jax.jit(lambda g, state, h: tx.update(g, state, jnp.zeros(SHAPE), hvp=lambda v: h * v))
  return tx.init(jnp.zeros(SHAPE)), lambda g, state, h=1.0: update(g, state, jnp.float32(h))


def bucket(state):
  (found,) = state.preconditioner.buckets.values()
  return found


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3e38], ids=str)
@pytest.mark.parametrize("at", [0, 3, 4], ids=["first fit", "between", "where the bases are due"])
def test_what_is_not_finite_is_dropped_and_leaves_no_trace(bad, at):
  """A NaN, or a number whose square is infinite, drops the fit; the run goes on as if that fit had not been."""
  state, step = stepper(whole(basis_every=4))
  clean, clean_step = stepper(whole(basis_every=4))
  for t, g in enumerate(GRADIENTS):
    if t == at:
      _, state = step(g.at[1, 2].set(bad), state)
    _, state = step(g, state)
    _, clean = clean_step(g, clean)
  assert int(state.dropped) == 1 and int(clean.dropped) == 0
  chex.assert_trees_all_equal(state.preconditioner, clean.preconditioner)


def test_no_nan_reaches_the_eigensolver():
  """Also without the check of the optimizer the bases stay finite and orthonormal: only finite moments get in."""
  state, step = stepper(whole(basis_every=1), finite_check=False)
  for g in (GRADIENTS[0].at[0, 0].set(jnp.nan), *GRADIENTS[1:4]):
    _, state = step(g, state)
  for q in bucket(state).bases:
    np.testing.assert_allclose(q[0].T @ q[0], np.eye(len(q[0])), atol=1e-5)


@pytest.mark.parametrize("every", [1, 10])
def test_a_zero_first_gradient_keeps_the_identity_and_takes_nothing(every):
  """Q = I, V = 0, P = I and no count until something is seen; then the fit is the first one."""
  state, step = stepper(whole(basis_every=every))
  first = bucket(state)
  for _ in range(3):
    updates, state = step(jnp.zeros(SHAPE), state)
    np.testing.assert_array_equal(updates, 0)
  chex.assert_trees_all_equal(bucket(state), first)
  np.testing.assert_array_equal(first.bases[0][0], np.eye(SHAPE[0]))
  _, late = step(GRADIENTS[0], state)
  _, early = step(GRADIENTS[0], stepper(whole(basis_every=every))[0])
  chex.assert_trees_all_equal(bucket(late), bucket(early))


def test_products_that_are_zero_teach_nothing_at_any_time():
  """Hv = 0 on a matrix says that it was not in use: P, which would grow to 1/ε, stays."""
  state, step = stepper(whole(), dpo.newton())
  for g in GRADIENTS:
    _, state = step(g, state)
  _, after = step(GRADIENTS[0], state, 0.0)
  chex.assert_trees_all_equal(bucket(after), bucket(state))


def test_it_recovers_at_once_from_two_thousand_zeros():
  """The moments fade to zero; the first gradient after that is a first gradient again."""
  p = whole()
  fit = lambda state, g: (p.fit(state, dpo.Probe(None, g), key=jax.random.key(0), damping=0.0), None)
  g = jnp.concatenate([GRADIENTS[:2], jnp.zeros((2000, *SHAPE)), GRADIENTS])
  state = jax.jit(lambda s: jax.lax.scan(fit, s, g)[0])(p.init(g[0]))
  direct = jax.jit(lambda s: jax.lax.scan(fit, s, GRADIENTS)[0])(p.init(g[0]))
  weight = (1 - 0.95 ** len(GRADIENTS)) ** 0.5  # V̂ of the long run is no more corrected for its start
  ours, wanted = (p.apply(s, GRADIENTS[0]) for s in (state, direct))
  assert np.all(np.isfinite(ours))
  np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(wanted) / weight, rtol=0.3)


@pytest.mark.parametrize("refresh", [dpo.geometry.power_iteration, dpo.geometry.exact])
def test_equal_eigenvalues_leave_p_defined(refresh):
  """Gradients that are multiples of one rotation: every basis is right, P is symmetric positive with any of them."""
  turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
  g = jnp.asarray(turn * np.array([1.0, -2.0, 0.5, 1.5])[:, None, None], jnp.float32)
  p = whole(basis_every=1, refresh=refresh, eps=1e-3)
  state = p.init(g[0])
  for x in g:
    state = jax.jit(p.fit, static_argnames="damping")(state, dpo.Probe(None, x), key=jax.random.key(0), damping=0.0)
  eye = jax.vmap(lambda e: p.apply(state, e).reshape(-1))(jnp.eye(9).reshape(-1, 3, 3))
  assert np.all(np.isfinite(eye)) and np.linalg.eigvalsh(np.asarray(eye))[0] > 0
  np.testing.assert_allclose(eye, np.asarray(eye).T, atol=1e-3 * np.abs(eye).max())


def test_a_rank_of_one_stays_finite():
  """Gradients u vᵀ: all directions but one are never seen, and V is zero there."""
  state, step = stepper(whole(basis_every=2))
  for g in GRADIENTS:
    updates, state = step(jnp.outer(g[:, 0], GRADIENTS[0, 0]), state)
    assert np.all(np.isfinite(updates))
  assert int(state.dropped) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_bases_are_never_in_half_precision(dtype):
  """Parameters or moments in bfloat16: the bases are float32, QᵀQ = I to its precision."""
  p = whole(moment_dtype=jnp.bfloat16, basis_every=2)
  state = p.init(jnp.zeros(SHAPE, dtype))
  for g in GRADIENTS:
    state = p.fit(state, dpo.Probe(None, g.astype(dtype)), key=jax.random.key(0), damping=0.0)
  (found,) = state.buckets.values()
  assert {x.dtype for x in (*found.moments, found.square)} == {jnp.dtype(jnp.bfloat16)}
  for q in found.bases:
    assert q.dtype == jnp.float32
    np.testing.assert_allclose(q[0].T @ q[0], np.eye(len(q[0])), atol=1e-5)
  assert p.apply(state, GRADIENTS[0].astype(dtype)).dtype == dtype


def test_moments_in_half_precision_whiten_nearly_as_well():
  rng = np.random.default_rng(3)
  left = np.diag(np.geomspace(0.3, 3, 4))
  g = jnp.asarray(left @ rng.standard_normal((400, *SHAPE)), jnp.float32)

  def error(**options):
    p = whole(b2=0.99, **options)
    fit = lambda state, x: (p.fit(state, dpo.Probe(None, x), key=jax.random.key(0), damping=0.0), None)
    state = jax.jit(lambda s: jax.lax.scan(fit, s, g)[0])(p.init(g[0]))
    eye = jnp.eye(12).reshape(-1, *SHAPE)
    found = np.asarray(jax.vmap(lambda e: p.apply(state, e).reshape(-1))(eye))
    return np.linalg.norm(found @ np.kron(left, np.eye(3)) - np.eye(12)) / 12**0.5

  assert error(moment_dtype=jnp.bfloat16) < 1.2 * error() < 0.3


def test_moments_that_would_stand_still_are_warned_of():
  with pytest.warns(UserWarning, match="half a unit in the last place.*b2=0.97"):
    dpo.soap(b2=0.999, moment_dtype=jnp.bfloat16)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    dpo.soap(moment_dtype=jnp.bfloat16)
    dpo.soap(b2=0.999, moment_dtype=jnp.float32)


def test_the_state_holds_what_is_said():
  """Numbers of a 64 × 32 matrix: V, and L, R, Q_L, Q_R of the sides that have them; vectors V only."""

  def numbers(**options):
    state = dpo.soap(**options).init({"w": jnp.zeros((64, 32)), "b": jnp.zeros(32)})
    return sum(x.size for x in jax.tree.leaves(state)) - 2  # the counts

  n = 64 * 32
  assert numbers(max_skew=jnp.inf) == n + 2 * 64**2 + 2 * 32**2 + 32
  assert numbers() == n + 2 * 64**2 + 2 * 32**2 + 32  # 64² = 2 · 64 · 32
  assert numbers(max_skew=1.0) == n + 2 * 32**2 + 32
  assert numbers(max_size=1) == n + 32
  assert numbers(factored=True, max_skew=1.0) == 64 + 32 + 2 * 32**2 + 32


def test_the_optimizer_trains_with_every_option():
  """A quadratic with a rotated, ill-conditioned Hessian, by ``psgd(lr, soap(), b1=0.95, every=1)``."""
  rng = np.random.default_rng(0)
  a, b = (np.linalg.qr(rng.standard_normal((d, d)))[0] * np.geomspace(0.1, 3, d) for d in SHAPE)
  loss = lambda x: 0.5 * jnp.sum((a @ (x - 1.0) @ b) ** 2)
  options = [{}, {"moments": dpo.geometry.kl}, {"factored": True}, {"moment_dtype": jnp.bfloat16}, {"max_size": 3}]
  for chosen in options:
    tx = dpo.psgd(optax.linear_schedule(0.05, 0.0, 400), whole(**chosen), b1=0.95, every=1)

    def step(carry, _, tx=tx):
      x, state = carry
      updates, state = tx.update(jax.grad(loss)(x), state, x)
      return (optax.apply_updates(x, updates), state), None

    start = jnp.zeros(SHAPE)
    x, _ = jax.jit(lambda x, s, step=step: jax.lax.scan(step, (x, s), length=400)[0])(start, tx.init(start))
    assert loss(x) < 1e-2 * loss(start), chosen
