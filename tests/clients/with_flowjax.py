# SPDX-License-Identifier: Apache-2.0
"""FlowJAX: its two loops, maximum likelihood and variational. They hand gradients and params to `update`, no more."""

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from flowjax.train import fit_to_data, fit_to_key_based_loss
from flowjax.train.losses import ElboLoss

MEAN, SCALE = jnp.array([1.0, -1.0]), jnp.array([0.3, 0.5])


def small_flow():
  return coupling_flow(jax.random.key(0), base_dist=Normal(jnp.zeros(2)), flow_layers=1, nn_width=8, nn_depth=1)


def maximum_likelihood(optimizer):
  """The negative log-likelihood above its least, the entropy of the data."""
  x = MEAN + SCALE * jax.random.normal(jax.random.key(1), (200, 2))
  _, losses = fit_to_data(
    jax.random.key(2), small_flow(), x, optimizer=optimizer.make(), max_epochs=30, batch_size=90, show_progress=False
  )
  entropy = np.log(2 * np.pi * np.e) + np.log(SCALE).sum()
  return np.array(losses["train"]) - entropy


def variational(optimizer):
  """The divergence from a distribution that integrates to 1."""
  loss = ElboLoss(Normal(MEAN, SCALE).log_prob, num_samples=50)
  options = dict(loss_fn=loss, steps=80, optimizer=optimizer.make(), show_progress=False)
  return fit_to_key_based_loss(jax.random.key(2), small_flow(), **options)[1]
