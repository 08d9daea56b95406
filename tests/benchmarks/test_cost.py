# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks cost`: what is timed, how ratios are formed, what is asked where."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import rivals
from benchmarks.__main__ import main
from benchmarks.engine import timing
from benchmarks.engine.timing import Workload
from benchmarks.studies import _calls as calls
from benchmarks.studies import cost


def test_a_step_goes_on_from_its_own_result_and_compiles_once():
  step = timing.Step(lambda carry, x: (carry + x, carry), jnp.zeros(3), jnp.ones(3))
  for _ in range(4):
    step()
  assert step.carry.tolist() == [5.0] * 3  # one call at construction
  assert step.recompiled == 0
  assert step.counts()["flops"] >= 3


def test_a_step_like_another_uses_its_program_on_its_own_arguments():
  first = timing.Step(lambda carry, x: (carry + x, carry), jnp.zeros(3), jnp.ones(3))
  second = timing.Step(lambda carry, x: (carry + x, carry), jnp.zeros(3), 2 * jnp.ones(3), like=first)
  second()
  assert second.compiled is first.compiled and second.carry.tolist() == [4.0] * 3 and first.carry.tolist() == [1.0] * 3


def test_a_state_of_another_type_than_at_first_counts_as_a_recompilation():
  weak = timing.Step(lambda carry, x: (carry * 2.0, x), jnp.asarray(1.0), jnp.ones(3))
  assert weak.recompiled == 0
  assert timing.process_types(1.0 * jnp.ones(2)) != timing.process_types(jnp.ones(2, jnp.bfloat16))


def test_a_cadence_is_the_weighted_mean_of_its_parts():
  weights = cost.every(10, "psgd")
  found = timing.mean_of({"psgd, fit": [30.0, 60.0], "psgd, no fit": [10.0, 20.0]}, weights)
  np.testing.assert_allclose(found, [12.0, 24.0])


def test_the_same_row_asks_different_things_of_different_workloads():
  names = {name for row in cost.ROWS for name in row.names}
  must = {name: {row.label: row.must for row in cost.rows_of(name, names)} for name in ("mlp", "lenet5")}
  assert must["mlp"]["dpsgd step, Hvp and fit"] == 0.75
  assert must["lenet5"]["dpsgd step, Hvp and fit"] == 0.3


def test_every_row_has_contestants_on_some_workload():
  """A name that is misspelt would drop its row in silence."""
  known = set()
  for name in calls.USUAL:
    work = calls.deep(2, 4)
    known |= set(calls.updates(work, name))
    output = lambda params: jnp.ones((4, 3)) @ params["w"] * params["norm"]["scale"] + params["norm"]["bias"]
    loss = lambda params, statistics, batch: (jnp.sum(output(params) ** 2), statistics)
    work = Workload({"w": jnp.ones((3, 2)), "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}, (), (), loss)
    known |= set(calls.steps(work, name))
  names = {name for row in cost.ROWS for name in row.names}
  packages = {"psgdax": "psgdax", "rollfast": "rollfast", "distributed-kron": "distributed_kron.pro"}
  packages |= {"SOAP_JAX": "soap_jax"}
  for package, module in (packages | {"psgd-jax": "psgd_jax.kron"}).items():
    if not rivals.module(module):
      known |= {name for name in names if package in name}
  assert names <= known


def test_of_several_rivals_the_fastest_counts_and_those_that_are_missing_do_not():
  row = cost.row("a fit", "ours", ("slow", "fast", "not installed"))
  times = {
    "cpu": {"ours": [1.0, 2.0, 3.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 4.0, 6.0]},
    "wall": {"ours": [1.0, 1.0, 1.0], "slow": [1.0, 1.0, 1.0], "fast": [4.0, 4.0, 4.0]},
  }
  assert row.known(times["cpu"]) and not row.known(["ours", "someone"]) and not row.known(["slow", "fast"])
  found = cost.ratio_of(row, {"seconds": times})
  assert found == {"against": "fast", "cpu": [0.5] * 3, "wall": [0.25] * 3}


def test_a_row_against_nothing_is_the_number_itself():
  row = cost.row("seconds to compile", "ours", None, 5.0, what="compiling")
  assert cost.ratio_of(row, {"compiling": {"cpu": {"ours": [7.0]}}}) == {"against": "", "cpu": [7.0] * 3}


def test_contestants_that_are_compared_on_compiling_are_compiled_by_turns_unless_it_lasts(monkeypatch):
  calls_made = []
  monkeypatch.setattr(cost, "compile_anew", lambda name: calls_made.append(name) or (None, 2.0))
  entered = {name: (name,) for name in ("ours", "theirs", "alone", "timed")}
  rows = [
    cost.row("compiling", "ours", ("theirs", "absent"), what="compiling"),
    cost.row("seconds to compile", "alone", None, what="compiling"),
    cost.row("seconds", "timed", "ours"),
  ]
  made = {name: SimpleNamespace(compile_seconds=1.0) for name in entered}
  found = cost.compilations(entered, made, rows)
  assert found == {"ours": [1.0, 2.0, 2.0], "theirs": [1.0, 2.0, 2.0], "alone": [1.0], "timed": [1.0]}
  assert calls_made == ["ours", "theirs"] * 2
  made["theirs"].compile_seconds = 1 + cost.LONG
  assert cost.compilations(entered, made, rows)["ours"] == [1.0]


def test_the_table_shows_seconds_counts_and_rows_against_nothing():
  names = ("adam", "psgd, fit", "psgd, no fit", "dpsgd, fit")
  quantities = {
    "seconds": {kind: {name: [2.0 + (name != "adam")] * 3 for name in names} for kind in ("cpu", "wall")},
    "kernels": {"count": {name: [50.0 * (1 + (name != "adam"))] for name in names}},
    "compiling": {"cpu": {name: [7.0] for name in names}},
  }
  rows = cost.rows_of("small", names)
  mode = {"load_average": [0, 0], "recompiled": 0, "contestants": {name: {} for name in names}}
  mode["ratios"] = {row.label: cost.ratio_of(row, quantities) for row in rows}
  del mode["ratios"]["psgd step, no fit"]  # as in a document that is older than the row
  found = cost.table({"workload": "small", "rounds": 3, "calls": 1, "threads": {"one": mode}}).rows
  assert ("psgd step, a fit", "adam", "1.50 [1.50, 1.50]", "1.50 [1.50, 1.50]", "3.5", "2.5") in found
  assert ("kernels: psgd step, a fit", "adam", "2.00", "", "5", "3.5") in found
  assert ("first compilation of a dpsgd step, CPU seconds", "", "7.00 [7.00, 7.00]", "", "5", "3") in found
  assert not [row for row in found if row[0] == "psgd step, no fit"]


def test_leaf_by_leaf_is_the_same_rule():
  params = {"a": jnp.ones((4, 3)), "b": 2 * jnp.ones((4, 3))}
  apart = calls.per_leaf(lambda: optax.scale_by_adam(), params)
  together = optax.scale_by_adam()
  for tx in (apart, together):
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], np.ones((4, 3)), rtol=1e-5)


@pytest.mark.full
def test_the_whole_command(tmp_path, monkeypatch):
  monkeypatch.setitem(calls.WORKLOADS, "deep", lambda: calls.deep(2, 8))
  monkeypatch.setattr(rivals, "module", lambda name: None)
  monkeypatch.setenv("XLA_FLAGS", "")
  assert main(["cost", "deep", "--threads", "one", "--rounds", "2", "--calls", "1", "--out", str(tmp_path)]) == 0
  document = json.loads((tmp_path / "cost-deep.json").read_text())
  assert "leaf by leaf" in cost.table(document).markdown()
  assert document["threads"]["one"]["contestants"]["update: adam"]["kernels"] > 0


def test_an_unknown_workload_is_refused(capsys):
  with pytest.raises(SystemExit):
    main(["cost", "no_such"])
  assert "known are small, mlp, lenet5" in capsys.readouterr().err
