# SPDX-License-Identifier: Apache-2.0
"""BlackJAX: mean-field variational inference. It hands gradients and params to `update`, nothing else."""

import blackjax
import jax
import jax.numpy as jnp

STEPS = 150


def logdensity(position):
  """A normal distribution with mean (1, −2), standard deviations (1, ½) and the integral 1."""
  standard = (position["x"] - jnp.array([1.0, -2.0])) * jnp.array([1.0, 2.0])
  return -0.5 * jnp.sum(standard**2) - jnp.log(2 * jnp.pi) + jnp.log(2.0)


def meanfield(optimizer):
  """The objective is the divergence from the target, which is 0 at the end."""
  vi = blackjax.meanfield_vi(logdensity, optimizer.make(), num_samples=20)
  state = vi.init({"x": jnp.zeros(2)})

  @jax.jit
  def one_step(state, key):
    state, info = vi.step(key, state)
    return state, info.elbo

  _, divergences = jax.lax.scan(one_step, state, jax.random.split(jax.random.key(0), STEPS))
  return divergences
