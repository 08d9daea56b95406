# SPDX-License-Identifier: Apache-2.0
"""`gauss_newton` against dense linear algebra: J from `jacrev` of the whole vector, the step from numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import dpsgd_optax as dpo
from dpsgd_optax.curvature._tangents import block_of

FEW, MANY = 6, 40  # samples; 13 parameters


def model(p, x):
  return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def start(dtype=jnp.float64):
  rng = np.random.default_rng(0)
  shapes = {"b": (3,), "v": (3,), "w": (2, 3)}
  return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in shapes.items()} | {"c": jnp.asarray(0.3, dtype)}


def data(samples, dtype=jnp.float64):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.standard_normal((samples, 2)), dtype), jnp.asarray(rng.standard_normal(samples), dtype)


def fit(samples, dtype=jnp.float64):
  x, y = data(samples, dtype)
  square = lambda p, x: jnp.stack([p["c"] * x[0], jnp.sin(p["c"] + x[1])])  # an array for each sample
  return dpo.residuals((lambda p, x, y: model(p, x) - y, x, y), (square, x[: samples // 2]))


def dense(system, params):
  """r, J and unravel, of the vector as a whole."""
  flat, unravel = ravel_pytree(params)
  of = lambda flat: system(unravel(flat))
  return np.asarray(of(flat), np.float64), np.asarray(jax.jacrev(of)(flat), np.float64), unravel


def step_of(system, params, state=None, tx=None, **options):
  tx = tx or dpo.gauss_newton(adapt=False, acceleration=False, **options)
  state = tx.init(params) if state is None else state
  updates, state = jax.jit(lambda g, s, p: tx.update(g, s, p, residual_fn=system))(
    jax.grad(system.loss)(params), state, params
  )
  return updates, state


SOLVERS = {
  "by shape": None,
  "rows": dpo.solvers.rows(),
  "columns": dpo.solvers.columns(),
  "columns in chunks": dpo.solvers.columns(chunk=4),
  "conjugate gradients": dpo.solvers.conjugate_gradients(iterations=200, tolerance=1e-12),
  "preconditioned": dpo.solvers.conjugate_gradients(dpo.kron(), iterations=200, tolerance=1e-12),
}


@pytest.mark.parametrize("samples", (FEW, MANY))
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_step_is_that_of_dense_linear_algebra(solver, samples, x64):
  """s = −(JᵀJ + λI)⁻¹ Jᵀ r, whichever way it is solved, for more and for fewer residuals than parameters."""
  params, system = start(), fit(samples)
  r, J, _ = dense(system, params)
  updates, _ = step_of(system, params, damping=0.1, solver=SOLVERS[solver])
  wanted = -np.linalg.solve(J.T @ J + 0.1 * np.eye(J.shape[1]), J.T @ r)
  np.testing.assert_allclose(ravel_pytree(updates)[0], wanted, rtol=1e-7, atol=1e-9)


def test_the_jacobian_sample_by_sample_is_that_of_the_vector(x64):
  params, system = start(), fit(MANY)
  r, J, _ = dense(system, params)
  given = system.linearize(block_of("test", params, params))
  np.testing.assert_allclose(given.residual, r, rtol=1e-12)
  np.testing.assert_allclose(given.jacobian(), J, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(given.gram(7), J.T @ J, rtol=1e-10, atol=1e-12)
  s, u = np.cos(np.arange(J.shape[1])), np.sin(np.arange(len(r)))
  np.testing.assert_allclose(given.push(jnp.asarray(s)), J @ s, rtol=1e-10)
  np.testing.assert_allclose(given.pull(jnp.asarray(u)), u @ J, rtol=1e-10)


def test_momentum_is_spring(x64):
  """s = argmin ‖J s + r‖² + λ‖s − ν s₋‖², s₋ the last step; from dense least squares."""
  params, system, nu, lam = start(), fit(FEW), 0.7, 0.2
  tx = dpo.gauss_newton(adapt=False, acceleration=False, damping=lam, momentum=nu)
  first, state = step_of(system, params, tx=tx)
  params = optax.apply_updates(params, first)
  second, _ = step_of(system, params, state, tx)
  (r, J, _), last = dense(system, params), np.asarray(ravel_pytree(first)[0])
  stacked = np.concatenate([J, np.sqrt(lam) * np.eye(J.shape[1])])
  wanted = np.linalg.lstsq(stacked, np.concatenate([-r, np.sqrt(lam) * nu * last]), rcond=None)[0]
  np.testing.assert_allclose(ravel_pytree(second)[0], wanted, rtol=1e-8)


def test_without_momentum_spring_is_the_plain_step(x64):
  """The first step, where nothing came before, and ν = 0."""
  params, system = start(), fit(FEW)
  plain, _ = step_of(system, params)
  for momentum in (0.0, 0.9):
    other, _ = step_of(system, params, momentum=momentum)
    np.testing.assert_allclose(ravel_pytree(other)[0], ravel_pytree(plain)[0], rtol=1e-12)


def test_acceleration_is_the_second_order_of_the_path(x64):
  """a = −½ (JᵀJ + λI)⁻¹ Jᵀ sᵀ∇²r s, from the dense tensor of second derivatives."""
  params, system, lam = start(), fit(FEW), 30.0
  plain, _ = step_of(system, params, damping=lam)
  both, _ = step_of(system, params, tx=dpo.gauss_newton(adapt=False, damping=lam))
  _, J, unravel = dense(system, params)
  flat, s = ravel_pytree(params)[0], np.asarray(ravel_pytree(plain)[0])
  second = jnp.einsum("nij,i,j->n", jax.hessian(lambda flat: system(unravel(flat)))(flat), s, s)
  wanted = -np.linalg.solve(J.T @ J + lam * np.eye(J.shape[1]), J.T @ second) / 2
  np.testing.assert_allclose(ravel_pytree(both)[0] - s, wanted, rtol=1e-7, atol=1e-12)


def crossentropy(z, x, label):
  return -jax.nn.log_softmax(z)[label]


def classifier(samples):
  x, _ = data(samples)
  label = jnp.arange(samples) % 3
  return dpo.residuals((lambda p, x, label: x @ p["w"] + p["b"], x, label), loss=crossentropy), x, label


def test_a_convex_loss_of_outputs_is_the_generalized_gauss_newton_step(x64):
  """s = −(G + λI)⁻¹ g with G and g from `ggnvp` and `grad`; the Hessian of a softmax is singular."""
  system, x, label = classifier(MANY)
  params = {k: start()[k] for k in ("b", "w")}
  flat, unravel = ravel_pytree(params)
  outputs = lambda p: x @ p["w"] + p["b"]
  of_outputs = lambda z: jnp.sum(jax.vmap(crossentropy)(z, x, label))
  product = dpo.ggnvp(of_outputs, params, outputs=outputs)
  G = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(flat.size))
  g = jax.grad(lambda flat: of_outputs(outputs(unravel(flat))))(flat)
  updates, state = step_of(system, params, damping=0.1)
  wanted = -np.linalg.solve(G + 0.1 * np.eye(flat.size), g)
  np.testing.assert_allclose(ravel_pytree(updates)[0], wanted, rtol=1e-5, atol=1e-8)
  assert int(state.mismatched) == 0


def test_of_squares_the_generalized_step_is_the_plain_one(x64):
  """ℓ(z) = ½‖z − y‖² of outputs z: r = z − y."""
  x, y = data(MANY)
  params = start()
  plain = dpo.residuals((lambda p, x, y: model(p, x) - y, x, y))
  general = dpo.residuals((lambda p, x, y: model(p, x), x, y), loss=lambda z, x, y: (z - y) ** 2 / 2)
  (a, _), (b, _) = step_of(plain, params), step_of(general, params)
  np.testing.assert_allclose(ravel_pytree(a)[0], ravel_pytree(b)[0], rtol=1e-9)


def test_complex_residuals_and_parameters_are_pairs_of_real_ones(x64):
  """r = θ z − y over ℂ: the step of the real problem of real and imaginary parts."""
  rng = np.random.default_rng(2)
  z, y = (jnp.asarray(rng.standard_normal(5) + 1j * rng.standard_normal(5)) for _ in range(2))
  params = {"a": jnp.asarray(0.5 + 1j), "b": jnp.asarray(0.2)}
  system = dpo.residuals((lambda p, z, y: p["a"] * z + p["b"] * z**2 - y, z, y))
  updates, state = step_of(system, params, damping=0.1)
  J = np.stack([np.concatenate([c.real, c.imag]) for c in (z, 1j * z, z**2)], 1)
  residual = np.asarray(params["a"] * z + params["b"] * z**2 - y)
  r = np.concatenate([residual.real, residual.imag])
  s = -np.linalg.solve(J.T @ J + 0.1 * np.eye(3), J.T @ r)
  np.testing.assert_allclose(updates["a"], s[0] + 1j * s[1], rtol=1e-9)
  np.testing.assert_allclose(updates["b"], s[2], rtol=1e-9)
  assert int(state.mismatched) == 0  # the gradient of JAX is the conjugate


def graded(rows, columns):
  """J with singular values from 1 down to 1e-5, and a residual in its range."""
  rng = np.random.default_rng(3)
  k = min(rows, columns)
  left, _ = np.linalg.qr(rng.standard_normal((rows, k)))
  right, _ = np.linalg.qr(rng.standard_normal((columns, k)))
  J = left * np.geomspace(1, 1e-5, k) @ right.T
  return J, -J @ rng.standard_normal(columns)


@pytest.mark.parametrize("solver", ("rows", "columns"))
@pytest.mark.parametrize("lam", (1e-9, 1e-8, 1e-6, 1e-4))
def test_float32_keeps_its_digits_at_small_damping(solver, lam):
  """Below the rounding of J Jᵀ, 1e-7, and just above: the error is that of J itself, not of its square.

  The normal equations, solved in float32, are wrong by 100 % at the first λ; here it is eps ‖J‖ / √λ at most.
  """
  J, r = graded(30, 50) if solver == "rows" else graded(50, 30)
  wanted = -np.linalg.solve(J.T @ J + lam * np.eye(J.shape[1]), J.T @ r)
  A, b = jnp.asarray(J, jnp.float32), jnp.asarray(r, jnp.float32)
  system = dpo.residuals((lambda p, a, b: a @ p + b, A, b))
  updates, _ = step_of(system, jnp.zeros(J.shape[1], jnp.float32), damping=lam, solver=SOLVERS[solver])
  error = np.linalg.norm(updates - wanted) / np.linalg.norm(wanted)
  assert error < 20 * np.finfo(np.float32).eps / np.sqrt(lam), error


@pytest.mark.parametrize("solver", ("rows", "columns", "columns in chunks"))
def test_a_singular_jacobian_without_damping_gives_a_finite_step(solver):
  """Equal rows and a parameter that nothing depends on: the shortest solution, which solves it."""
  rng = np.random.default_rng(4)
  a = np.repeat(rng.standard_normal((4, 6)), 2, 0)
  a[:, 5] = 0
  y = a @ rng.standard_normal(6)
  A, b = jnp.asarray(a, jnp.float32), jnp.asarray(y, jnp.float32)
  system = dpo.residuals((lambda p, a, b: a @ p - b, A, b))
  updates, state = step_of(system, jnp.zeros(6), damping=0.0, solver=SOLVERS[solver])
  np.testing.assert_allclose(updates, np.linalg.pinv(a) @ y, rtol=2e-2, atol=2e-3)
  assert int(state.skipped) == int(state.rejected) == 0


def test_the_predicted_reduction_is_exact_for_a_linear_model(x64):
  """Actual / predicted = 1 for every λ and rate; and λ shrinks."""
  x, y = data(MANY)
  system = dpo.residuals((lambda p, x, y: p["w"] @ x - y, x, y))
  params = {"w": jnp.array([2.0, -1.0])}
  for rate in (1.0, 0.3):
    _, state = step_of(system, params, tx=dpo.gauss_newton(rate, damping=5.0))
    np.testing.assert_allclose(float(state.ratio), 1.0, rtol=1e-10)
    np.testing.assert_allclose(float(state.damping), 5.0 / 3)


def test_a_step_that_raises_the_loss_is_tried_again_with_more_damping(x64):
  """r = atan(θ) from far out: the full step overshoots by far; the loss never rises, one Jacobian serves all trials."""
  system = dpo.residuals((lambda p, x: jnp.arctan(p * x), jnp.ones(1)))
  params = jnp.asarray(3.0)
  tx = dpo.gauss_newton(damping=1e-6, acceleration=False, tries=12)
  plain, _ = step_of(system, params, damping=1e-6)
  assert system.loss(params + plain) > system.loss(params)
  updates, state = step_of(system, params, tx=tx)
  assert 0 < system.loss(params + updates) < system.loss(params)
  assert int(state.trials) > 1 and int(state.rejected) == 0
  once = dpo.gauss_newton(damping=1e-6, acceleration=False, tries=1)
  updates, state = step_of(system, params, tx=once)
  assert float(updates) == 0 and int(state.rejected) == 1
  np.testing.assert_allclose(float(state.damping), 4e-6)


def test_the_loss_never_rises(x64):
  params, system = start(), fit(MANY)
  tx = dpo.gauss_newton()
  step = jax.jit(functools.partial(advance, tx, system))
  losses, state = [float(system.loss(params))], tx.init(params)
  for _ in range(30):
    params, state = step(params, state)
    losses.append(float(system.loss(params)))
  assert all(after <= before for before, after in itertools.pairwise(losses))
  assert losses[-1] < 0.6 * losses[0]


def advance(tx, system, params, state):
  updates, state = tx.update(jax.grad(system.loss)(params), state, params, residual_fn=system)
  return optax.apply_updates(params, updates), state


def wave(p, spins):
  """log ψ of a chain of three spins, complex."""
  return jax.lax.complex(jnp.sum(p["a"] * spins), jnp.tanh(p["b"] @ spins))


def test_stochastic_reconfiguration_is_the_natural_gradient_of_the_energy(x64):
  """s = −(2S + λI)⁻¹ 2F, S = Re⟨ΔO* ΔO⟩, F = Re⟨ΔO* E_loc⟩; and 2F is the gradient of ⟨H⟩, by `jax.grad`."""
  spins = jnp.array([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)])
  rng = np.random.default_rng(5)
  H = jnp.asarray(rng.standard_normal((8, 8)))
  H = H + H.T
  params = {"a": jnp.asarray(0.3 * rng.standard_normal(3)), "b": jnp.asarray(0.3 * rng.standard_normal(3))}

  def energy(p):
    psi = jnp.exp(jax.vmap(wave, (None, 0))(p, spins))
    return jnp.real(jnp.vdot(psi, H @ psi) / jnp.vdot(psi, psi))

  psi = jnp.exp(jax.vmap(wave, (None, 0))(params, spins))
  weights, local = jnp.abs(psi) ** 2 / jnp.vdot(psi, psi).real, (H @ psi) / psi
  system = dpo.log_derivatives(wave, spins, local, weights)
  grads = jax.grad(energy)(params)
  flat, unravel = ravel_pytree(params)
  logs = lambda flat: jax.vmap(wave, (None, 0))(unravel(flat), spins)
  D = jax.jacrev(lambda f: logs(f).real)(flat) + 1j * jax.jacrev(lambda f: logs(f).imag)(flat)
  D = np.asarray(D - weights @ D)
  S, F = (D.conj().T * np.asarray(weights) @ D).real, (D.conj().T * np.asarray(weights) @ np.asarray(local)).real
  np.testing.assert_allclose(ravel_pytree(grads)[0], 2 * F, rtol=1e-9)
  tx = dpo.gauss_newton(damping=0.1, adapt=False)
  updates, state = tx.update(grads, tx.init(params), params, residual_fn=system)
  np.testing.assert_allclose(
    ravel_pytree(updates)[0], -np.linalg.solve(2 * S + 0.1 * np.eye(6), 2 * F), rtol=1e-7, atol=1e-12
  )
  tx = dpo.gauss_newton(0.2)  # judged by the energy, if it is given
  updates, state = tx.update(grads, tx.init(params), params, residual_fn=system, value_fn=energy)
  assert int(state.rejected) == 0 and float(state.actual) > 0
  after = energy(optax.apply_updates(params, updates))
  np.testing.assert_allclose(float(state.actual), float(energy(params) - after), rtol=1e-9)
