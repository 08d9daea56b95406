# SPDX-License-Identifier: Apache-2.0
"""The commands `condition` and `regularization`: their parts against known answers, at sizes that cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from benchmarks.studies import condition, regularization


def test_the_spectrum_leaves_out_the_null_space():
  found = condition.spectrum(np.array([-8.0, 1e-16, 4.0, 2.0, 0.0, 0.5]))
  assert found["kappa"] == 16 and found["rank"] == 4
  np.testing.assert_allclose(found["spectrum"], [1, 0.5, 0.25, 0.0625])
  np.testing.assert_allclose(found["bulk"], 1 / 0.375)


def test_a_newton_fit_makes_a_quadratic_well_conditioned(monkeypatch):
  """κ(H) = 1e4, H = diag(d): the row norms of H are d too, and the group is on its way there after 400 fits."""
  monkeypatch.setattr(condition, "FITS", 400)
  fits = {name: condition.FITTED[name] for name in ("diagonal, Hv", "second_moment, Hv")}
  monkeypatch.setattr(condition, "FITTED", fits)
  d = jnp.geomspace(1e-2, 1e2, 6).reshape(3, 2)
  rows = condition.dense_rows(condition.Block(jnp.zeros((3, 2)), lambda v: d * v, jnp.zeros((400, 3, 2))))
  np.testing.assert_allclose(rows["none"]["kappa"], 1e4, rtol=1e-4)
  assert rows["second_moment, Hv"]["kappa"] < 1.5 and rows["diagonal, Hv"]["kappa"] < 100


def test_both_networks_have_the_loss_of_their_widths():
  params = [jnp.ones((5, 3)), jnp.ones((4, 2))]
  x = jax.random.normal(jax.random.key(0), (7, 4))
  for normalized in (False, True):
    assert condition.network((4, 3, 2), normalized)(params, x).shape == (7, 2)
  shifted = [params[0].at[-1].add(3.0), params[1]]
  forward = condition.network((4, 3, 2), True)
  np.testing.assert_allclose(forward(params, x), forward(shifted, x), atol=1e-5)  # the bias before a normalization


@pytest.mark.parametrize("variant", regularization.VARIANTS)
@pytest.mark.parametrize("name", regularization.PRECONDITIONERS)
def test_every_variant_is_a_transform_whose_state_keeps_its_shapes(name, variant):
  params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
  loss = lambda p: jnp.sum(jnp.cosh(p["kernel"]) @ p["bias"])

  def step(strength, rate):
    make, build = regularization.PRECONDITIONERS[name], regularization.VARIANTS[variant][1]
    tx = regularization.optimizer(make(), build(strength, rate), rate)
    state = tx.init(params)
    extra = {"hvp": dpo.hvp(loss, params), "value_fn": loss, "refresh": True}
    return state, tx.update(jax.grad(loss)(params), state, params, **extra)

  before, (updates, after) = jax.eval_shape(step, 0.1, 0.1)
  assert before == after and jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
