# SPDX-License-Identifier: Apache-2.0
"""Optimistix: `minimise` with an `OptaxMinimiser`, which hands `value`, `grad` and `value_fn` to `update`."""

import jax
import jax.numpy as jnp
import optimistix as optx


def fn(y, args):
  """Not quite quadratic, of a dict of arrays."""
  residual = y["a"] @ args - y["b"]
  return jnp.sum(residual**2) + jnp.sum((y["b"] - 1.0) ** 2) + 0.1 * jnp.sum(y["a"] ** 4)


def minimise(optimizer):
  """The optimizer goes into a pytree: Equinox takes its functions apart, down to what they close over."""
  args = jax.random.normal(jax.random.key(0), (3,))
  y0 = {"a": jnp.full((2, 3), 0.5), "b": jnp.array([2.0, -1.0])}
  solver = optx.OptaxMinimiser(optimizer.make(), rtol=1e-6, atol=1e-6)
  solution = optx.minimise(fn, solver, y0, args, max_steps=200, throw=False)
  return [fn(y, args) for y in (y0, solution.value)]
