# SPDX-License-Identifier: Apache-2.0
"""Penalties in original and in preconditioned variables, for every preconditioner that has a root.

With P held as fitted, a step in θ must be that of gradient descent in z = R⁻¹θ, written with dense matrices in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import dpsgd_optax as dpo
from dpsgd_optax.transforms.fitted import Fitted
from tests.table import PARAMS, SIZE

LAM, RATE = 0.3, 0.2

KEY = jax.random.key(0)

ROWS = {
  "second_moment": dpo.second_moment,
  "diagonal": dpo.diagonal,
  "kron": functools.partial(dpo.kron, max_skew=jnp.inf),
  "kron diagonal": functools.partial(dpo.kron, max_skew=0),
  "damped_kron factored": dpo.damped_kron,
  "damped_kron additive": functools.partial(dpo.damped_kron, form=dpo.tikhonov.additive, max_vector_size=None),
  "dense": dpo.dense,
  "lra": functools.partial(dpo.lra, rank=2),
  "xmat": dpo.xmat,
  "affine": dpo.affine,
  "scan": dpo.scan,
}

POWERS = [name for name in ROWS if name not in ("lra", "xmat")]

DIAGONAL = ["second_moment", "diagonal"]

rows = pytest.mark.parametrize("name", ROWS)

flat, unflat = ravel_pytree(PARAMS)


def loss(params):
  """Neither quadratic nor convex."""
  return jnp.sum((jnp.tanh(params["w"]) @ params["b"] - 1.0) ** 2) + 0.1 * jnp.sum(params["w"] ** 2)


def held(preconditioner, state):
  """P as it is, whatever is observed."""
  return preconditioner._replace(init=lambda params: state, fit=lambda state, probe, *, key, damping: state)


def one_update(tx, params=PARAMS, **extra):
  extra = {"hvp": dpo.hvp(loss, params), "value_fn": loss, "refresh": True} | extra
  return ravel_pytree(tx.update(jax.grad(loss)(params), tx.init(params), params, **extra)[0])[0]


@functools.cache
def case(name):
  """Everything about a row in one compiled program: P, R and powers as matrices, and the updates of the variants."""
  make = ROWS[name]

  def everything(keys):
    p = make()

    def fit(state, key):
      v, h = (unflat(x) for x in jax.random.normal(key, (2, SIZE)))
      return p.fit(state, dpo.Probe(v, jax.tree.map(lambda a, b: 2 * a + b, h, v)), key=key, damping=0.1), None

    state, _ = jax.lax.scan(fit, p.init(PARAMS), keys)
    fitted = Fitted(p, state, PARAMS)
    columns = lambda f: jax.vmap(lambda e: ravel_pytree(f(unflat(e)))[0])(jnp.eye(SIZE)).T
    found = {
      "P": columns(fitted.apply),
      "R": columns(fitted.root),
      "R⁻¹": columns(lambda x: fitted.root(x, inverse=True)),
    }
    if name in POWERS:
      found |= {str(e): columns(lambda x: fitted.power(x, e)) for e in (0.3, 0.7, -1.0)}
    scale = functools.partial(dpo.scale_by_preconditioner, held(p, state), dpo.whitening())
    found |= {
      "l2": one_update(optax.chain(scale(), optax.add_decayed_weights(LAM))),
      "l1": one_update(scale(after=dpo.penalties.add_l1_penalty(LAM, power=1))),
      "l1 prox": one_update(scale(after=dpo.penalties.proximal_l1(LAM, RATE, power=1))),
      "l2 prox": one_update(scale(after=dpo.penalties.proximal_l2(LAM, RATE, power=1))),
      "gradient": one_update(scale(direction=dpo.gradient_norm(LAM))),
      "gradient, momentum": one_update(scale(momentum=dpo.add_gradient_norm_penalty(LAM, preconditioned=True))),
      "sharpness": one_update(scale(momentum=dpo.penalties.sharpness_aware(0.1, preconditioned=True))),
      "l2, s=0": one_update(scale(after=dpo.penalties.add_l2_penalty(LAM, power=0))),
      "l2, s=1": one_update(scale(after=dpo.penalties.add_l2_penalty(LAM, power=1))),
    }
    if name in POWERS:
      found["l2, s=0.3"] = one_update(scale(after=dpo.penalties.add_l2_penalty(LAM, power=0.3)))

    def penalised(theta):
      g = jax.grad(loss)(theta)
      return loss(theta) + LAM / 2 * optax.tree.vdot(g, fitted.apply(g))

    found["grad of the penalised loss"] = ravel_pytree(jax.grad(penalised)(PARAMS))[0]
    moved = lambda v, r: ravel_pytree(jax.grad(loss)(optax.tree.add_scale(PARAMS, r, v)))[0]
    g = jax.grad(loss)(PARAMS)
    pg = fitted.apply(g)
    found["gradient at the worst point"] = moved(pg, 0.1 / jnp.sqrt(optax.tree.vdot(g, pg)))
    return found

  found = jax.jit(everything)(jax.random.split(jax.random.key(1), 8))
  return {key: np.asarray(x, np.float64) for key, x in found.items()}


theta = np.asarray(flat, np.float64)

g = np.asarray(ravel_pytree(jax.grad(loss)(PARAMS))[0], np.float64)

close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)


@rows
def test_the_root_is_a_root_and_its_inverse_its_inverse(name):
  found = case(name)
  r = found["R"]
  assert np.linalg.norm(found["P"] - np.eye(SIZE)) > 0.1
  close(r @ r.T, found["P"])
  close(r @ found["R⁻¹"], np.eye(SIZE), atol=1e-3)


@pytest.mark.parametrize("name", POWERS)
def test_powers_are_those_of_the_eigenvalues(name):
  found = case(name)
  values, vectors = np.linalg.eigh((found["P"] + found["P"].T) / 2)
  for exponent in (0.3, 0.7, -1.0):
    expected = vectors * values**exponent @ vectors.T
    close(found[str(exponent)], expected, atol=2e-3 * np.abs(expected).max())


@rows
def test_decoupled_decay_is_l2_in_preconditioned_variables(name):
  """AdamW: P g + λθ = R ∇_z (L + λ/2 ‖z‖²), for every P = R Rᵀ."""
  found = case(name)
  r = found["R"]
  expected = r @ (r.T @ g + LAM * np.linalg.solve(r, theta))
  close(found["l2"], expected)
  close(found["l2, s=1"], found["l2"], rtol=1e-5, atol=1e-6)


@rows
def test_l1_in_z_is_gradient_descent_in_z(name):
  """P g + λ R sign(R⁻¹θ) = R ∇_z (L + λ‖z‖₁)."""
  r = case(name)["R"]
  close(case(name)["l1"], r @ (r.T @ g + LAM * np.sign(np.linalg.solve(r, theta))))


@rows
def test_proximal_l1_in_z_is_proximal_gradient_descent_in_z(name):
  """z ← S_aλ(z − a Rᵀg): in z the metric is Euclidean, for every P."""
  r = case(name)["R"]
  z = np.linalg.solve(r, theta) - RATE * r.T @ g
  close(theta + case(name)["l1 prox"], r @ (np.sign(z) * np.maximum(np.abs(z) - RATE * LAM, 0)))


@rows
def test_proximal_l2_in_z_is_proximal_gradient_descent_in_z(name):
  r = case(name)["R"]
  z = np.linalg.solve(r, theta) - RATE * r.T @ g
  close(theta + case(name)["l2 prox"], r @ (z / (1 + RATE * LAM)))


@rows
def test_the_gradient_penalty_in_z_is_the_derivative_of_the_penalised_loss(name):
  """∇(L + λ/2 gᵀPg) = g + λ jvp(∇L)(P g), and P times it is the step of gradient descent in z."""
  found = case(name)
  close(found["gradient"], found["P"] @ found["grad of the penalised loss"], atol=1e-3)
  close(found["gradient, momentum"], found["gradient"])


@rows
def test_preconditioned_sharpness_is_the_gradient_at_the_worst_point_of_a_ball_in_z(name):
  """Δz = ρ ∇_z L / ‖∇_z L‖, so Δθ = ρ P g / √(gᵀPg)."""
  found = case(name)
  close(found["sharpness"], found["P"] @ found["gradient at the worst point"], atol=1e-3)


@pytest.mark.parametrize("name", POWERS)
def test_the_family_runs_from_l2_to_adamw(name):
  """P g + λ P^(1−s) θ, the step of λ/2 ‖P^(−s/2) θ‖²."""
  found = case(name)
  values, vectors = np.linalg.eigh((found["P"] + found["P"].T) / 2)
  for s in (0, 0.3, 1):
    penalty = vectors * values ** (1 - s) @ vectors.T @ theta
    close(found[f"l2, s={s}"], found["P"] @ g + LAM * penalty, atol=1e-3)


def adam(**around):
  return dpo.scale_by_preconditioner(dpo.second_moment(0.99), dpo.whitening(), momentum=optax.ema(0.9), **around)


def test_proximal_l1_gives_exact_zeros_and_the_explicit_form_does_not():
  """L = ½‖θ − c‖² with small and large c: at the end of the proximal run the small ones are zero."""
  target = jnp.array([2.0, -1.0, 0.01, -0.02, 0.0])
  rate = optax.exponential_decay(0.1, 10, 0.9)

  def train(tx, params):
    def body(carry, _):
      params, state = carry
      updates, state = tx.update(params - target, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), length=200)[0][0]

  scaled = lambda *parts: optax.chain(*parts, optax.scale_by_learning_rate(rate))
  forms = {
    ("prox", 1): adam(after=dpo.penalties.proximal_l1(0.5, rate, power=1)),
    ("prox", 0): adam(after=dpo.penalties.proximal_l1(0.5, rate, power=0)),
    ("explicit", 1): scaled(adam(after=dpo.penalties.add_l1_penalty(0.5, power=1))),
    ("explicit", 0): scaled(adam(after=dpo.penalties.add_l1_penalty(0.5, power=0))),
  }
  found = jax.jit(lambda x: {key: train(tx, x) for key, tx in forms.items()})(jnp.array([1.0, 0.5, 0.3, -0.4, 0.2]))
  for (form, _), params in found.items():
    assert np.all(np.asarray(params[:2]) != 0)
    assert np.all((np.asarray(params[2:]) == 0) == (form == "prox")), (form, params)


@pytest.mark.parametrize("s", [0, 0.5, 1, 2])
def test_the_threshold_of_a_diagonal_preconditioner_is_a_power_of_it(s):
  """(θ − q)²/2P + aλ|P^(−s/2) θ| is least at S_c(q), c = aλ P^(1−s/2); with θ² / 2 at q / (1 + aλ P^(1−s))."""
  grads, params = np.array([4.0, 0.25, 1.0]), np.array([1.0, -2.0, 0.2])
  p = 1 / np.abs(grads)
  q = params - RATE * p * grads
  level = RATE * LAM * p ** (1 - s / 2)
  expected = np.sign(q) * np.maximum(np.abs(q) - level, 0), q / (1 + RATE * LAM * p ** (1 - s))
  for prox, value in zip((dpo.penalties.proximal_l1, dpo.penalties.proximal_l2), expected, strict=True):
    tx = adam(after=prox(LAM, RATE, power=s))
    updates, _ = tx.update(jnp.asarray(grads, jnp.float32), tx.init(params), jnp.asarray(params, jnp.float32))
    np.testing.assert_allclose(params + updates, value, rtol=1e-4, atol=1e-6)


def test_the_adaptive_methods_are_those_of_optax():
  ours = lambda p: dpo.scale_by_preconditioner(p, dpo.whitening())
  pairs = {
    "rmsprop": (ours(dpo.second_moment(0.9, debias=False)), optax.scale_by_rms(0.9, 1e-8, eps_in_sqrt=False)),
    "adagrad": (ours(dpo.second_moment(None, eps=0.0)), optax.scale_by_rss(0.0, eps=0.0)),
    "adam": (ours(dpo.second_moment(0.9)), optax.scale_by_adam(0.0, 0.9)),
  }
  gradients = jax.random.normal(jax.random.key(0), (5, 4))
  states = {name: [tx.init(gradients[0]) for tx in pair] for name, pair in pairs.items()}
  for x in gradients:
    for name, pair in pairs.items():
      updates, states[name] = zip(
        *(tx.update(x, state) for tx, state in zip(pair, states[name], strict=True)), strict=True
      )
      np.testing.assert_allclose(*updates, rtol=1e-5)


def test_newton_fits_of_the_second_moment_reach_the_row_norms_of_the_hessian():
  """E (Hv)_i² = ‖H_i‖²: row equilibration, not Jacobi's diagonal. With damping, of H + λI."""
  h = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, -2.0], [0.0, -2.0, 0.5]])
  p = dpo.second_moment(None, eps=0.0)
  v = jax.random.normal(jax.random.key(0), (4000, 3))
  fit = lambda state, v: (p.fit(state, dpo.Probe(v, h @ v), key=KEY, damping=0.5), None)
  state, _ = jax.lax.scan(fit, p.init(v[0]), v)
  mean = 1 / np.asarray(p.apply(state, jnp.ones(3))) / 4000**0.5
  np.testing.assert_allclose(mean, np.linalg.norm(h + 0.5 * np.eye(3), axis=1), rtol=0.05)


def test_fits_on_gradients_reach_the_damped_root_of_their_second_moment():
  """P → (E g² + λ²)^(−½)."""
  p = dpo.second_moment(0.9, eps=0.0)
  state = p.fit(p.init(jnp.zeros(2)), dpo.Probe(None, jnp.array([3.0, 0.0])), key=KEY, damping=4.0)
  np.testing.assert_allclose(p.apply(state, jnp.ones(2)), [1 / 5, 1 / 4], rtol=1e-4)


MASK = {"b": False, "w": True}

MASKED = {
  "optax.masked, after": lambda p: dict(after=optax.masked(dpo.penalties.add_l1_penalty(LAM, power=p), MASK)),
  "optax.masked, momentum": lambda p: dict(momentum=optax.masked(dpo.penalties.add_l1_penalty(LAM), MASK)),
  "optax.masked, hvp": lambda p: dict(
    momentum=optax.masked(dpo.add_gradient_norm_penalty(LAM, preconditioned=True), MASK)
  ),
  "mask=": lambda p: dict(after=dpo.penalties.proximal_l1(LAM, 0.1, power=p, mask=MASK)),
  "mask=, callable": lambda p: dict(after=dpo.penalties.proximal_l2(LAM, 0.1, power=p, mask=lambda tree: MASK)),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("preconditioner", [dpo.second_moment, dpo.kron])
def test_masked_leaves_take_the_step_without_the_penalty(name, preconditioner):
  p = preconditioner()
  around = MASKED[name](1)
  bare = dict(after=optax.scale_by_learning_rate(0.1)) if name.startswith("mask=") else {}
  both = lambda: tuple(one_update(dpo.scale_by_preconditioner(p, dpo.whitening(), **kind)) for kind in (around, bare))
  updates, plain = map(unflat, jax.jit(both)())
  np.testing.assert_allclose(updates["b"], plain["b"], rtol=1e-5, atol=1e-7)
  assert np.all(np.abs(updates["w"] - plain["w"]) > 1e-5)


def test_the_strength_may_be_a_schedule_of_the_steps():
  """The third step has strength 2, wherever the penalty stands."""
  grow = lambda count: count * 1.0
  terms = {
    "l1": (dpo.penalties.add_l1_penalty(grow), np.sign(theta)),
    "direction": (
      dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), direction=dpo.gradient_norm(grow)),
      None,
    ),
  }
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  for name, (tx, term) in terms.items():
    state, grads = tx.init(PARAMS), zero if term is not None else jax.grad(loss)(PARAMS)
    found = []
    for _ in range(3):
      updates, state = tx.update(grads, state, PARAMS, hvp=lambda v: v)
      found.append(np.asarray(ravel_pytree(updates)[0]))
    if name == "l1":
      np.testing.assert_allclose(found[2], 2 * term)
    else:  # H = I and P = 1/|g| throughout: P (g + λ P g)
      p = 1 / np.abs(g)
      np.testing.assert_allclose(found[2], p * (g + 2 * p * g), rtol=1e-3)


def test_injected_strengths_and_powers_give_the_plain_run():
  """Traced numbers: no Python branch looks at them."""

  def make(strength, power, rate):
    return dpo.scale_by_preconditioner(
      dpo.second_moment(0.9),
      dpo.whitening(),
      momentum=dpo.add_gradient_norm_penalty(strength),
      after=dpo.penalties.proximal_l1(strength, rate, power=power),
    )

  numbers = dict(strength=0.2, power=0.7, rate=0.1)
  plain = one_update(make(**numbers))
  np.testing.assert_allclose(one_update(optax.inject_hyperparams(make)(**numbers)), plain, rtol=1e-5)


def test_the_penalties_are_zero_at_strength_zero_and_where_there_is_no_gradient():
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  tx = dpo.penalties.sharpness_aware(0.1)
  bowl = lambda p: optax.tree.vdot(p, p)
  updates, _ = tx.update(zero, tx.init(zero), zero, value_fn=bowl)
  assert all(np.all(x == 0) for x in jax.tree.leaves(updates))
  tx = dpo.penalties.sharpness_aware(0.0)
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=bowl)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b), updates, PARAMS)
