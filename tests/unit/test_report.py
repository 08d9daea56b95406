# SPDX-License-Identifier: Apache-2.0
"""`report`: what a logger is given, through every wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from tests.table import BATCH, PARAMS, PRECONDITIONERS, Fault, compiled, draw, fit, matrix, start

COUNTS = {"steps", "fits", "skipped", "dropped"}
JUDGED = {"damping", "ratio", "actual", "predicted", "rejected"}
ENDS = {"p_smallest", "p_largest", "p_condition"}
SILENT = {"dense", "raveled"}
KINDS = ("diagonal", "kron", "kron quad4p", "scan", "lra", "xmat", "damped_kron additive", *sorted(SILENT))
"""One row for each kind of state; compiling a fit is what these tests cost."""


@pytest.mark.parametrize("name", KINDS)
def test_the_extremes_are_those_of_the_diagonal_of_p(name):
  """Against the explicit matrix; and they bound its condition number from below."""
  state = fit(name, start(name), draw(1, 2, BATCH), draw(2, 2, BATCH), damping=0.1)
  outer = dpo.scale_by_preconditioner(PRECONDITIONERS[name](), dpo.newton()).init(PARAMS)
  first = jax.tree.map(lambda x: x[0], state)
  found = dpo.report(outer._replace(preconditioner=first))
  if name in SILENT:
    assert set(found) == COUNTS
    return
  p = matrix(name, state)[0]
  diagonal = np.diag(p)
  np.testing.assert_allclose([found["p_smallest"], found["p_largest"]], [diagonal.min(), diagonal.max()], rtol=1e-4)
  assert 1 <= float(found["p_condition"]) <= 1.001 * np.linalg.cond(p)


def test_the_numbers_of_dpsgd_are_those_of_its_state():
  case = compiled("dpsgd")
  _, state, _ = case.run(PARAMS, case.tx.init(PARAMS), [Fault()] * 4)
  found = dpo.report(state)
  assert set(found) == COUNTS | JUDGED | ENDS | {"rate"}
  for name in ("damping", "ratio", "rate", "fits", "skipped", "rejected"):
    assert float(found[name]) == float(optax.tree.get(state, name))
  assert int(found["steps"]) == 4 and int(found["fits"]) == 1  # on every fifth step
  assert all(np.shape(x) == () and np.isfinite(x) for x in found.values())


WRAPPERS = {
  "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.clip(1.0)),
  "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx)),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
  "masked": lambda tx: optax.masked(tx, {"b": False, "w": True}),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=1.0),
  "levenberg_marquardt": lambda tx: dpo.levenberg_marquardt(tx),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_sees_through_the_wrappers_under_jit_and_without_values(name):
  tx = WRAPPERS[name](dpo.psgd(0.1, dpo.diagonal()))
  found = jax.eval_shape(lambda params: dpo.report(tx.init(params), params, params), PARAMS)
  assert COUNTS | ENDS | {"cosine", "update_norm", "grad_norm"} <= set(found)
  assert all(x.shape == () for x in found.values())


def test_two_of_a_kind_are_told_apart_by_where_they_stand():
  parts = {"bias": dpo.psgd(0.1, dpo.diagonal()), "kernel": dpo.psgd(0.1, dpo.kron())}
  tx = optax.partition(parts, {"b": "bias", "w": "kernel"})
  found = jax.eval_shape(lambda params: dpo.report(tx.init(params)), PARAMS)
  assert set(found) == {f"{kind}/{key}" for kind in parts for key in COUNTS | ENDS | {"clipped"}}
  twice = optax.chain(dpo.psgd(0.1, dpo.diagonal()), dpo.psgd(0.1, dpo.diagonal()))
  assert {"0/fits", "1/fits"} <= set(jax.eval_shape(lambda params: dpo.report(twice.init(params)), PARAMS))


def test_a_state_without_ours_reports_only_what_it_was_given():
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
  updates = {"a": jnp.array([-1.0, 5.0]), "b": jnp.array([[0.0]])}
  found = dpo.report(optax.adam(1e-3).init(grads), updates, grads)
  assert set(found) == {"update_norm", "grad_norm", "cosine"}
  np.testing.assert_allclose(found["cosine"], 3 / (5 * 26**0.5), rtol=1e-6)
  np.testing.assert_allclose([found["grad_norm"], found["update_norm"]], [5, 26**0.5], rtol=1e-6)


@pytest.mark.parametrize(("scale", "cosine"), [(1e30, 1.0), (1e-30, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_the_cosine_neither_overflows_nor_divides_by_zero(scale, cosine):
  grads = jnp.array([1.0, 2.0])
  np.testing.assert_allclose(dpo.report((), -scale * grads, grads)["cosine"], cosine, rtol=1e-6)


def test_bfloat16_and_complex_updates_have_a_cosine():
  assert dpo.report((), jnp.ones(4, jnp.bfloat16), jnp.ones(4, jnp.bfloat16))["cosine"].dtype == jnp.float32
  grads = jnp.array([1 + 1j, 2j])
  np.testing.assert_allclose(dpo.report((), -grads, grads)["cosine"], 1, rtol=1e-6)


def test_the_cosine_falls_with_the_condition_of_p():
  """Kantorovich: for u = −P g the cosine is at least 2√κ / (1 + κ), and the worst g attains it."""
  p = np.array([1.0, 25.0])
  grads = jnp.asarray(1 / np.sqrt(p))
  found = dpo.report((), -jnp.asarray(p) * grads, grads)
  np.testing.assert_allclose(found["cosine"], 2 * 5 / 26, rtol=1e-6)
