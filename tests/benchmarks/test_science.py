# SPDX-License-Identifier: Apache-2.0
"""The group `science`: references that agree with themselves at half the fineness, problems, and their study."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.engine.calls import SpecError
from benchmarks.optimizers import prepare
from benchmarks.problems import references, science
from benchmarks.problems.table import PROBLEMS
from benchmarks.studies import science as study


def test_burgers_agrees_with_fewer_nodes_and_with_the_equation():
  """200 nodes and 120 to rounding; u_t + u u_x = ν u_xx by differences, away from the front."""
  t, x = (g.ravel() for g in np.meshgrid(np.linspace(0.1, 1, 10), np.linspace(-0.95, 0.95, 21), indexing="ij"))
  u = references.burgers(t, x)
  np.testing.assert_allclose(references.burgers(t, x, 120), u, atol=1e-13)
  h = 1e-4
  at = lambda dt, dx: references.burgers(t + dt, x + dx)
  slope, second = (at(0, h) - at(0, -h)) / (2 * h), (at(0, h) - 2 * u + at(0, -h)) / h**2
  fault = (at(h, 0) - at(-h, 0)) / (2 * h) + u * slope - references.VISCOSITY * second
  assert np.median(abs(fault)) < 1e-6
  np.testing.assert_allclose(references.burgers(np.full(5, 1e-9), np.linspace(-1, 1, 5)), [0, 1, 0, -1, 0], atol=1e-4)


def test_allen_cahn_agrees_with_coarser_steps_and_points():
  fine = references.allen_cahn()
  np.testing.assert_allclose(references.allen_cahn(2048, 1000), fine, atol=1e-8)
  np.testing.assert_allclose(references.allen_cahn(1024, 2000)[5:], fine[5:, ::2], atol=1e-5)  # the start has a kink


def test_concentrations_are_those_of_small_steps():
  """(I + hA/2 …) by the classical Runge-Kutta method in 20000 steps."""
  A, c, h = references.pharmacokinetics(), np.array([1.0, 0, 0]), 1e-4
  step = np.eye(3) + h * A @ (np.eye(3) + h / 2 * A @ (np.eye(3) + h / 3 * A @ (np.eye(3) + h / 4 * A)))
  np.testing.assert_allclose(references.concentrations(np.array([2.0]))[0], np.linalg.matrix_power(step, 20000) @ c)
  np.testing.assert_allclose(references.concentrations(np.zeros(1))[0], c, atol=1e-12)


@pytest.mark.parametrize("length", (4, 6, 8))
def test_the_ground_state_of_the_ring_is_that_of_free_fermions(length):
  """E₀ = −Σ_k √(1 + h² + 2h cos k), k = (2n + 1)π/L."""
  k = (2 * np.arange(length) + 1) * np.pi / length
  for field in (0.5, 1.0, 2.0):
    exact = -np.sum(np.sqrt(1 + field**2 + 2 * field * np.cos(k)))
    np.testing.assert_allclose(references.ising_energy(length, field), exact, rtol=1e-10)


def test_the_points_fill_the_square_evenly():
  points = science.halton(2000)
  counts, *_ = np.histogram2d(*points.T, bins=10, range=((0, 1), (0, 1)))
  assert counts.min() >= 15 and counts.max() <= 25


@pytest.mark.parametrize("name", [row.__name__ for row in science.ROWS if row is not science.uci_network])
def test_the_loss_is_that_of_the_residuals_and_has_an_error(name):
  """At the start; of the spin chain the gradient of the energy is that of its rows."""
  problem = PROBLEMS[name](None, False, bits=32, **({"length": 4} if name == "tfim" else {}))
  params = problem.init(jax.random.key(0))
  found = jax.jit(lambda p: problem.metrics(p, {}))(params)
  assert np.isfinite(found["loss"]) and 0 < found["error"] < 30
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  if name != "tfim":
    np.testing.assert_allclose(found["loss"], np.sum(np.asarray(problem.residuals(params)(params)) ** 2) / 2, rtol=1e-4)


def test_the_rows_of_the_chain_have_the_gradient_of_its_energy():
  from dpsgd_optax.curvature._tangents import block_of

  problem = science.tfim(None, False, length=4, bits=32)
  params = problem.init(jax.random.key(0))
  given = problem.residuals(params).linearize(block_of("test", params, params))
  grads = jax.grad(lambda p: problem.loss(p, {}))(params)
  np.testing.assert_allclose(given.pull(given.residual), given.to_vector(grads), rtol=1e-3, atol=1e-5)


def test_gauss_newton_needs_residuals():
  with pytest.raises(SpecError, match="needs residuals"):
    prepare("digits", "tuned", "gauss_newton(learning_rate=1.0)")


def test_a_problem_of_science_runs_like_the_others(tmp_path):
  """`python -m benchmarks poisson` with two optimizers, resumed."""
  asked = ["poisson(bits=32, width=4)", "--optimizers", "adam(learning_rate=0.01),gauss_newton(learning_rate=1.0)"]
  asked += ["--epochs", "6", "--evaluations", "2", "--seeds", "1", "--name", "p", "--out", str(tmp_path), "--resume"]
  assert main(asked) == 0 and main(asked) == 0
  document = json.loads((tmp_path / "p.json").read_text())
  runs = {run["optimizer"].partition("(")[0]: run["curves"] for run in document["runs"]}
  assert runs["gauss_newton"]["train_loss"][-1] < 0.2 * runs["gauss_newton"]["train_loss"][0]
  assert len(runs["adam"]["train_error"]) == 3


@pytest.mark.full
def test_the_study_races_for_equal_seconds(tmp_path, capsys):
  asked = ["science", "waves(bits=32, width=4)", "--seconds", "0.05", "--seeds", "1", "--out", str(tmp_path)]
  assert main([*asked, "--only", "lbfgs,gauss_newton", "--fixed", "gauss_newton=1.0", "--resume"]) == 0
  document = json.loads((tmp_path / "science-waves-bits-32-width-4.json").read_text())
  assert 3 <= len(document["runs"]["lbfgs"]["trials"]) <= 5 and not document["runs"]["gauss_newton"]["trials"]
  assert document["runs"]["gauss_newton"]["seeds"]["1"]["error"][-1] < 1
  assert "equal" not in capsys.readouterr().err


def test_trials_go_on_beyond_the_end_of_a_grid_where_the_best_stands():
  """Five at most, and none more once the best is inside."""
  for target, wanted in ((10.0, [1, 2, 4, 8, 16]), (2.0, [1, 2, 4]), (0.6, [0.5, 1, 2, 4, 0.25])):
    found, runs = [], {"trials": {}, "seeds": {}}

    class Fake:
      compiling = 0.0

      def __init__(self, *given):
        pass

      def of(self, value):
        return self

      def timed(self, value, seed, seconds, found=found, target=target):
        found.append(value)
        return {"loss": [abs(np.log(value / target))]}

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(study, "Program", Fake)
      study.tuned(None, study.Entrant(None, (1.0, 2.0, 4.0)), None, 1.0, runs)
    assert sorted(found) == sorted(wanted), found
    assert runs["number"] == min(wanted, key=lambda x: abs(np.log(x / target)))
    assert runs["at edge"] == (runs["number"] in (min(wanted), max(wanted)))


@pytest.mark.full
def test_the_parts_of_a_solved_step_are_measured(tmp_path):
  assert main(["solved_step", "--width", "3", "--rounds", "2", "--calls", "1", "--out", str(tmp_path)]) == 0
  document = json.loads((tmp_path / "solved_step.json").read_text())
  assert document["trials"]["gauss_newton"] >= 1 and len(document["cpu_seconds"]["J + Cholesky"]) == 2
  assert document["compile_cpu_seconds"]["gauss_newton"] > document["compile_cpu_seconds"]["adam"]
