# SPDX-License-Identifier: Apache-2.0
"""NumPyro: stochastic variational inference by `SVI.run`. It hands the value of the loss to `update`, nothing else."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

STEPS = 150


def linear(x, y=None):
  """Bayesian regression: weights of four inputs, noise of unknown size."""
  weights = numpyro.sample("weights", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
  noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
  numpyro.sample("y", dist.Normal(x @ weights, noise), obs=y)


def infer(optim, **options):
  x = jax.random.normal(jax.random.key(0), (64, 4))
  y = x @ jnp.array([1.0, -0.5, 0.3, 0.8]) + 0.1 * jax.random.normal(jax.random.key(1), (64,))
  svi = SVI(linear, AutoNormal(linear), optim, loss=Trace_ELBO())
  return svi.run(jax.random.key(2), STEPS, x, y, progress_bar=False, **options).losses


def svi(optimizer):
  return infer(numpyro.optim.optax_to_numpyro(optimizer.make()))


def stable_update(optimizer):
  """The update inside a `lax.cond` on a finite loss."""
  return infer(optimizer.make(), stable_update=True)
