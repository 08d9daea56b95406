# SPDX-License-Identifier: Apache-2.0
"""What a step of a small network launches, in units of Adam's: seconds are kernels there, and so is compilation."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest

import dpsgd_optax as dpo
from benchmarks.engine.program import kernels

SIZES = (64, 64, 32, 10)
X, Y = jax.random.normal(jax.random.key(1), (64, 64)), jnp.arange(64) % 10


def loss(params):
  h = X
  for i, layer in enumerate(params):
    h = h @ layer["kernel"] + layer["bias"]
    h = h if i == len(params) - 1 else jnp.tanh(h)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, Y))


def launches(tx, **given):
  params = [{"kernel": jnp.ones((a, b)), "bias": jnp.ones(b)} for a, b in itertools.pairwise(SIZES)]

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    extra = given and {"value": value, "value_fn": loss} | given
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, value

  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params))
  return kernels(lowered.compile().as_text()).total()


@pytest.mark.parametrize(
  ("make", "given", "budget"),
  [
    pytest.param(lambda: dpo.psgd(0.1, b1=0.9), {"refresh": False}, 2.0, id="psgd, no fit"),
    pytest.param(lambda: dpo.psgd(0.1, b1=0.9), {"refresh": True}, 5.0, id="psgd, fit"),
    pytest.param(lambda: dpo.dpsgd(0.1), {"refresh": False, "judge": False}, 2.5, id="dpsgd, no fit"),
    pytest.param(lambda: dpo.dpsgd(0.1), {"refresh": True, "judge": False}, 8.0, id="dpsgd, fit"),
  ],
)
def test_a_step_keeps_its_budget_of_kernels(make, given, budget):
  adam = launches(optax.with_extra_args_support(optax.adam(0.1)))
  found = launches(make(), **given)
  assert found <= budget * adam, f"{found} kernels, {found / adam:.2f} of Adam's {adam}"
