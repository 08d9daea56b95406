# SPDX-License-Identifier: Apache-2.0
"""Runs from the command line: the demo, interrupts, divergence, tuning."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import hyperparameters
from benchmarks.__main__ import main
from benchmarks.engine.problem import limit
from benchmarks.engine.records import load
from benchmarks.engine.tune_then_race import best
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems.table import PROBLEMS
from tests.benchmarks.test_runs import CHEAP


def schema_of(path: Path) -> dict:
  return json.loads(path.read_text())


def test_demo_runs_resumes_and_reports(tmp_path, capsys):
  arguments = ["demo", "--epochs", "0.2", "--evaluations", "2", "--train-size", "640", "--out", str(tmp_path)]
  assert main([*arguments, "--optimizers", CHEAP, "--seeds", "1"]) == 0
  assert (tmp_path / "demo.png").exists()
  document = schema_of(tmp_path / "demo.json")
  assert set(document) == {"schema", "name", "plan", "contestants", "sessions", "runs"}
  assert {"python", "jax", "jaxlib", "optax", "flax", "numpy", "cpus"} <= set(document["sessions"][0]["environment"])
  (first, second) = document["runs"]
  assert first["curves"]["step"] == [0, 1, 2] and first["finished"] and first["curves"]["seconds"][0] == 0
  assert first["curves"]["train_loss"][0] == second["curves"]["train_loss"][0]
  for entry in document["contestants"].values():
    assert {"name", "options", "parameters", "state_bytes", "compile_seconds"} <= set(entry)

  assert main([*arguments, "--optimizers", CHEAP, "--seeds", "2", "--resume"]) == 0
  resumed = schema_of(tmp_path / "demo.json")
  assert resumed["runs"][:2] == document["runs"] and len(resumed["runs"]) == 4
  assert main([*arguments, "--optimizers", CHEAP, "--seeds", "2", "--resume"]) == 0
  assert "nothing left to do" in capsys.readouterr().out
  assert main(["report", "--out", str(tmp_path)]) == 0
  assert "digits, tuned setting: 2 steps" in capsys.readouterr().out


def test_interrupt_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
  from benchmarks.engine import session

  race, calls = session.race, []

  def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return race(*arguments)

  monkeypatch.setattr(session, "race", interrupted)
  arguments = ["demo", "--epochs", "0.1", "--optimizers", CHEAP, "--seeds", "3", "--out", str(tmp_path)]
  assert main(arguments) == 130
  assert "[1]" in capsys.readouterr().out and load(tmp_path / "demo.json").seeds() == [1]
  assert main([*arguments, "--resume"]) == 0
  assert load(tmp_path / "demo.json").seeds() == [1, 2, 3]


def test_divergence_is_recorded_not_raised(tmp_path):
  arguments = ["digits", "--epochs", "2", "--evaluations", "5", "--seeds", "1", "--out", str(tmp_path)]
  assert main([*arguments, "--optimizers", "sgd(learning_rate=1e30),sgd(learning_rate=0.1)"]) == 0
  bad, good = load(tmp_path / "digits-tuned.json").runs
  assert not bad.finished and bad.final() == math.inf and good.finished


def test_tuning_tries_the_grid_and_says_what_it_chose(tmp_path, capsys, monkeypatch):
  arguments = ["tune", "digits", "--epochs", "0.2", "--optimizers", "sgd,adam", "--out", str(tmp_path)]
  assert main(arguments) == 0
  document = schema_of(tmp_path / "tune-digits.json")
  assert set(document["trials"]) == {"sgd", "adam"} and len(document["trials"]["sgd"]) == len(
    hyperparameters.GRIDS["sgd"]
  )
  assert document["chosen"]["sgd"] in hyperparameters.GRIDS["sgd"]
  assert f"chosen: {document['chosen']}" in capsys.readouterr().out
  assert best({0.1: 3.0, 0.2: 1.0, 0.3: math.inf}) == 0.2


def test_a_wrong_command_line_exits_with_2(tmp_path, capsys):
  assert main(["mnist", "--data-dir", str(tmp_path), "--optimizers", CHEAP, "--out", str(tmp_path)]) == 2
  assert "missing" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main(["cifar"])
  assert main(["xor(lenght=3)", "--out", str(tmp_path)]) == 2
  assert "its options" in capsys.readouterr().err.lower()


def test_files_of_problems_with_options_have_plain_names(tmp_path):
  arguments = ["rosenbrock(size=4, start=0)", "--epochs", "3", "--seeds", "1", "--out", str(tmp_path)]
  assert main([*arguments, "--optimizers", "sgd(learning_rate=0.001)"]) == 0
  assert load(tmp_path / "rosenbrock-size-4-start-0-tuned.json").plan.problem == "rosenbrock(size=4,start=0)"
  assert hyperparameters.targets("xor(length=55)") == (0.1,) and hyperparameters.targets("digits") == ()


@pytest.mark.slow
def test_demo_with_all_optimizers(tmp_path):
  """A few steps of every row of the table that needs no norm layer, fits and judgements included."""
  every = ",".join(f"{name}(learning_rate=0.05)" for name in OPTIMIZERS if not name.startswith("sgd_ph"))
  arguments = ["demo", "--epochs", "0.5", "--seeds", "1", "--out", str(tmp_path), "--optimizers", every]
  assert main(arguments) == 0
  results = load(tmp_path / "demo.json")
  judged = {run.optimizer.split("(")[0] for run in results.runs if "damping" in run.curves}
  assert judged == {"psgd+damping", "dpsgd", "dpsgd_default"} and all(run.finished for run in results.runs)


def test_training_and_test_samples_are_limited_apart():
  whole = PROBLEMS["digits"](None, False)
  part = limit(whole, 128, 50)
  assert (len(part.arrays.train["x"]), len(part.arrays.test["y"])) == (128, 50)
  assert part.arrays.note.endswith("the first 128 of 1438 training samples; the first 50 of 359 test samples")
  np.testing.assert_array_equal(part.arrays.test["x"], whole.arrays.test["x"][:50])
  assert limit(whole, None, 5000) is whole
