# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: all of it in the tiny form, and what it does when a part does not work out."""

import json
from argparse import Namespace

import jax
import pytest

from benchmarks.__main__ import main
from benchmarks.engine.problem import Problem
from benchmarks.problems.data import DataError
from benchmarks.studies import gpu


@pytest.mark.full
def test_the_tiny_form_runs_every_part_and_writes_one_document(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  assert main(["gpu", "--tiny", "--out", str(tmp_path)]) == 0
  (path,) = tmp_path.glob("*.json")
  document = json.loads(path.read_text())
  assert path.name == "gpu-tiny.json" and document["tiny"] and document["platform"] == jax.devices()[0].platform
  assert document["tests"]["passed"] >= 1 and document["tests"]["failed"] == 0
  assert {part: of["ended"] for part, of in document["parts"].items()} == {"cost": "ended", "training": "ended"}
  for found in document["cost"].values():
    assert not found["failed"] and {*gpu.SHOWN} == {*found["wall_ms"]}
    for mixture, weights in gpu.MIXTURES.items():
      low, high = sorted(found["wall_ms"][name][1] for name in weights)
      assert 0.5 * low <= found["wall_ms"][mixture][1] <= 2 * high
  runs = document["training"]["runs"]
  assert len(runs) == 2 and all(run["finished"] and run["curves"]["step"][-1] == 8 for run in runs)
  cost, training = (table.markdown() for table in gpu.tables(document))
  assert "| charlm " in cost and "made up" in training


def test_a_part_that_fails_or_lasts_too_long_is_reported_with_what_it_left(monkeypatch):
  args = Namespace(minutes=10.0, tiny=True, data_dir=None)
  asked = []

  def broken(command, *, timeout, env):
    asked.append((command, timeout))
    folder = command[command.index("--out") + 1]
    (tmp := gpu.Path(folder) / "cost.json").write_text('{"mlp": 1}')
    assert tmp.exists()
    raise gpu.subprocess.TimeoutExpired(command, timeout)

  monkeypatch.setattr(gpu.subprocess, "run", broken)
  found = gpu.in_process("cost", args)
  assert found["found"] == {"mlp": 1} and found["ended"] == "stopped after 252 s"
  assert asked[0][0][-1] == "--tiny" and asked[0][1] == pytest.approx(252)
  monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: Namespace(returncode=1))
  assert gpu.in_process("training", args) | {"seconds": 0} == {"found": {}, "ended": "failed with code 1", "seconds": 0}


def test_tests_that_fail_or_do_not_end_are_named(monkeypatch):
  args = Namespace(minutes=10.0, tiny=False, data_dir=None)
  text = (
    "..F\nFAILED tests/unit/test_products.py::test_one - assert 1 == 2\n1 failed, 12 passed, 3 deselected in 5.0s\n"
  )
  monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: Namespace(returncode=1, stdout=text))
  found = gpu.tests(args)
  assert (found["passed"], found["failed"], found["ended"]) == (12, 1, "ended")
  assert found["failures"] == ["tests/unit/test_products.py::test_one"]

  def endless(command, **options):
    raise gpu.subprocess.TimeoutExpired(command, options["timeout"], output=b"....")

  monkeypatch.setattr(gpu.subprocess, "run", endless)
  assert gpu.tests(args)["ended"] == gpu.tests(args)["summary"] == "stopped after 120 s"


def test_the_shares_of_the_time_are_all_of_it():
  assert sum(gpu.SHARES.values()) == pytest.approx(1) and {*gpu.PARTS, "tests"} == {*gpu.SHARES}


def test_a_call_that_does_not_fit_into_memory_leaves_the_others(monkeypatch):
  def too_large():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a long story")

  work = gpu.TINY["mlp"]()
  fits = gpu.calls_on(work)["gradient"]
  monkeypatch.setattr(gpu, "calls_on", lambda work: {"gradient": fits, "psgd, fit": too_large})
  found = gpu.cost_of(work, rounds=2, shortest=0.0)
  assert found["failed"] == {"psgd, fit": "RESOURCE_EXHAUSTED: out of memory"} and [*found["wall_ms"]] == ["gradient"]
  document = {"environment": {"device": "a card", "jax": "1"}, "tiny": False, "cost": {"mlp": found}}
  row = gpu.cost_table(document | {"parts": {}, "tests": {"summary": "none"}}).rows[0]
  assert row[2] != "–" and "failed" in row


def test_without_the_data_the_images_are_made_up(monkeypatch):
  def missing(*arguments, **options):
    raise DataError("no such file")

  monkeypatch.setattr(gpu, "build", missing)
  monkeypatch.setattr(gpu, "MADE_UP", (64, 32))
  problem = gpu.images(False, None)
  assert isinstance(problem, Problem) and problem.arrays.train["x"].shape == (64, 32, 32, 3)
  assert "made up" in problem.arrays.note and problem.name == "made-up images"
