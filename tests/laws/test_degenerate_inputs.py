# SPDX-License-Identifier: Apache-2.0
"""Least squares and batch-norm preconditioning where the inputs are constant, few, zero or not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.laws.test_least_squares import ONES, B, D, N, W, X, Y, gradient, neurons, stacked, step

pytestmark = pytest.mark.usefixtures("x64")

# -- degenerate input -------------------------------------------------------------------------------------------------

ODD = {
  "all zero": np.zeros((N, D)),
  "constant feature": np.concatenate([X[:, :-1], ONES], 1),
  "one example": X[:1],
  "more features than examples": X[:2],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("make", [dpo.batch_norm, dpo.least_squares])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_degenerate_inputs_give_finite_steps(make, name, damping):
  x = ODD[name]
  done = step(make(), gradient(x, neurons(x, y=Y[: len(x)])), {"w": x}, damping=damping)
  assert np.all(np.isfinite(stacked(done)))


@pytest.mark.parametrize("make", [dpo.bnp, dpo.gls])
def test_inputs_that_are_not_finite_drop_the_fit_and_not_the_step(make):
  """The old P is kept, and applied to the gradient, which is finite."""
  tx = make(0.1)
  grads = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
  update = jax.jit(lambda state, x: tx.update(grads, state, grads, layer_inputs={"w": x}))
  _, state = update(tx.init(grads), X)
  updates, after = update(state, np.where(X > 1, np.nan, X))
  assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in jax.tree.leaves(updates))
  chex.assert_trees_all_equal(after[0].preconditioner, state[0].preconditioner)
  assert int(optax.tree.get(after, "dropped")) == 1 and int(optax.tree.get(after, "skipped")) == 0
