# SPDX-License-Identifier: Apache-2.0
"""Diffrax: the neural ODE of its examples on Equinox, fitted to damped oscillators."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import dpsgd_optax as dpo

STEPS = 40


class NeuralODE(eqx.Module):
  mlp: eqx.nn.MLP

  def __call__(self, ts, y0):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(lambda t, y, args: self.mlp(y)),
      diffrax.Tsit5(),
      t0=ts[0],
      t1=ts[-1],
      dt0=ts[1] - ts[0],
      y0=y0,
      saveat=diffrax.SaveAt(ts=ts),
      max_steps=16,
    )
    return solution.ys


def oscillators():
  """8 orbits at 8 times."""
  ts = jnp.linspace(0.0, 2.0, 8)
  y0 = jax.random.normal(jax.random.key(0), (8, 2))
  turn = jax.vmap(lambda t: jax.scipy.linalg.expm(t * jnp.array([[-0.3, 1.5], [-1.5, -0.3]])))(ts)
  return ts, jnp.einsum("tij,nj->nti", turn, y0)


def fit(optimizer, product):
  """The default adjoint of `diffeqsolve` has no derivative in forward mode, which an exact product needs."""
  ts, ys = oscillators()
  model = NeuralODE(eqx.nn.MLP(2, 2, 16, 1, jax.nn.tanh, key=jax.random.key(1)))
  optim = optimizer.make()
  opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))

  def loss_of(model, ts, ys):
    y_pred = jax.vmap(model, in_axes=(None, 0))(ts, ys[:, 0])
    return jnp.mean((ys - y_pred) ** 2)

  @eqx.filter_jit(donate="all-except-first")
  def make_step(batch, model, opt_state):
    value, grads = eqx.filter_value_and_grad(loss_of)(model, *batch)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda params: loss_of(eqx.combine(params, static), *batch)
    updates, opt_state = optim.update(grads, opt_state, params, **optimizer.extras(loss, params, value, product))
    return eqx.apply_updates(model, updates), opt_state, value

  losses = []
  for _ in range(STEPS):
    model, opt_state, value = make_step((ts, ys), model, opt_state)
    losses.append(value)
  return losses


def exact(optimizer):
  return fit(optimizer, dpo.hvp)


def finite_differences(optimizer):
  return fit(optimizer, dpo.hvp_finite_difference)
