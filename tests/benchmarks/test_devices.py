# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one compiled call, training in several processes, and the model of scale."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import dpsgd_optax as dpo
from benchmarks.engine import devices as layouts
from benchmarks.engine.calls import SpecError
from benchmarks.engine.problem import Arrays, Problem, batches
from benchmarks.studies import distributed, scale, sweep
from tests.table import counted

RATES, SEEDS, STEPS, EVERY = (0.01, 0.1), (1, 2), 5, 2


def regression() -> Problem:
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((12, 3)).astype(np.float32), rng.standard_normal((12, 2)).astype(np.float32)
  arrays = Arrays({"x": x, "y": y}, {"x": x, "y": y}, "made up")
  metrics = lambda params, batch: {"loss": jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)}
  init = lambda key: {"w": jax.random.normal(key, (3, 2))}
  return Problem(init, metrics, arrays, batch_size=4, epochs=1, evaluations=1)


@pytest.mark.full
def test_one_call_of_all_runs_equals_the_separate_runs():
  """The separate runs go step by step and are fitted on the steps that their own count says."""
  problem = regression()
  rows = sweep.rows_of(problem, SEEDS, STEPS)
  run, traces = counted(sweep.whole_run(problem, sweep.whiten, every=EVERY))
  losses, params = run(jnp.array(RATES), jnp.array(SEEDS), rows, problem.arrays.train)
  assert losses.shape == (len(RATES), len(SEEDS), STEPS) and len(traces) == 1

  @jax.jit
  def step(rate, params, state, batch):
    value, grads = jax.value_and_grad(problem.loss)(params, batch)
    updates, state = sweep.whiten(rate, 0, EVERY).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  for (i, rate), (j, seed) in itertools.product(enumerate(RATES), enumerate(SEEDS)):
    own = problem.init(jax.random.key(seed))
    state = sweep.whiten(rate, jax.random.key(seed), EVERY).init(own)
    for t, taken in enumerate(itertools.islice(batches(problem, seed), STEPS)):
      own, state, value = step(rate, own, state, problem.take(problem.arrays.train, taken))
      np.testing.assert_allclose(losses[i, j, t], value, rtol=1e-4)
    np.testing.assert_allclose(params["w"][i, j], own["w"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_the_fit_stays_a_branch_under_vmap_if_it_is_decided_once_for_all_runs(shared):
  """A predicate of each run would make a select of it, which computes every fit."""
  problem = regression()
  run = sweep.whole_run(problem, sweep.whiten, every=EVERY, shared=shared)
  program = jax.make_jaxpr(run)(
    jnp.array(RATES), jnp.array(SEEDS), sweep.rows_of(problem, SEEDS, STEPS), problem.arrays.train
  )
  assert (" cond[" in str(program)) == shared


# --- many devices -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_four_devices_train_as_one_does_in_one_process_and_in_two_over_loopback(processes):
  found = distributed.measure("digits", devices=4, processes=processes, steps=4)
  for name, layout in found["layouts"].items():
    assert layout["largest_difference"] < 1e-4, name
  sharded, whole = (found["layouts"][name] for name in reversed(layouts.LAYOUTS))
  assert sharded["params_bytes_per_device"] < 0.3 * whole["params_bytes_per_device"]


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_with_it_and_says_why():
  with pytest.raises(SpecError, match="the batch of 64 must be a multiple of `--devices`, got 6"):
    distributed.measure("digits", devices=6, processes=2, steps=1)


def test_devices_that_the_processes_cannot_share_are_refused():
  with pytest.raises(SpecError, match="must be a multiple of `--processes`, got 8 and 3"):
    distributed.measure("digits", devices=8, processes=3)


def test_fully_sharded_params_are_cut_along_the_first_axis_that_can_be():
  shapes = {"a": jnp.zeros((8, 3)), "b": jnp.zeros((3, 16)), "c": jnp.zeros(3)}
  mesh = AbstractMesh((8,), ("data",))
  assert layouts.specs_of("fully sharded", shapes, mesh) == {"a": P("data"), "b": P(None, "data"), "c": P()}
  assert layouts.specs_of("data parallel", shapes, mesh) == {"a": P(), "b": P(), "c": P()}


# --- the model of scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (6, 18), (24, 6), (100, 4), (5,), (1, 7)])
def test_the_model_counts_the_dense_factors_that_kron_has(shape):
  state = jax.eval_shape(dpo.kron(max_size=jnp.inf).init, jnp.zeros(shape))
  dense = [q.shape[-1] for s in state.buckets.values() for q in s.q if len(q.shape) == 3]
  assert scale.dense_sizes(shape) == dense


def test_each_device_applies_its_share_and_what_cannot_be_divided_whole():
  params = [jnp.zeros((4, 4))] * 8 + [jnp.zeros((2, 2))]
  found = scale.shares(params, AbstractMesh((2, 2), ("a", "b")))
  assert [(b.matrices, b.divided) for b in found] == [(8, 4), (1, 1)]
  fit = {"fit_s": 3.0, "fit_c": 5.0}
  assert scale.optimizer_flops(found, fit, 0.0) == 2 * (2 * 2 * 4**3) + 2 * 2 * 2**3
  per_matrix = lambda d: 2 * 2 * d**3 * (1 + 3 + 5)
  assert scale.optimizer_flops(found, fit, 1.0) == 2 * per_matrix(4) + per_matrix(2)


def test_collectives_are_read_from_the_text_of_a_program():
  text = """
  %g = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %t = (f32[1,2]{1,0}, f32[1,2]{1,0}) all-to-all(%a, %b), channel_id=2
  ROOT %r = f32[] all-reduce(%y), to_apply=%add
  """
  found = scale.bytes_sent(SimpleNamespace(as_text=lambda: text), 8)
  assert found["all-gather"] == 4 * 128 * 7 / 8 and found["all-to-all"] == 4 * 4 * 7 / 8
  assert found["all-reduce"] == 2 * 4 * 7 / 8 and found["reduce-scatter"] == 0


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_more_devices_never_hold_more_each(layout):
  model = scale.Model(8, 128, 64, 32)
  fit, hardware = {"fit_s": 3.0, "fit_c": 5.0}, {name: value for name, (value, _) in scale.HARDWARE.items()}
  rows = [scale.predict(model, devices, layout, fit, hardware) for devices in (2, 8, 64)]
  for fewer, more in itertools.pairwise(rows):
    assert more["state_bytes"] <= fewer["state_bytes"] and more["params_bytes"] <= fewer["params_bytes"]
  assert max(rows[1]["divided_by"]) == max(rows[2]["divided_by"]) == 8
  assert all(row["floor"]["step_ms"] < row["every step"]["step_ms"] for row in rows)
