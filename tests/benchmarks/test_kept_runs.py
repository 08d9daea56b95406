# SPDX-License-Identifier: Apache-2.0
"""Runs that are kept, and their analyses: parts with known answers, and the commands on a tiny run."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.engine.calls import SpecError
from benchmarks.engine.records import load
from benchmarks.engine.saved import load_saved
from benchmarks.problems import table as problems
from benchmarks.problems import vision
from benchmarks.problems.table import build
from benchmarks.studies import _kept, entropy, plasticity, sharpness

STUDIES = ("forgetting", "entropy", "sharpness", "plasticity")
CHEAP = "sgd(learning_rate=0.3)"


def test_an_event_is_a_sample_right_before_and_wrong_now():
  """By hand; what was right before training only does not count."""
  correct = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]], bool)
  assert _kept.forgotten(correct).tolist() == [1, 0, 2, 0]


def test_entropy_and_margin_of_known_predictions():
  logits = np.array([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [np.log(3.0), 0.0, -1000.0, -1000.0]])
  found, margin = entropy.uncertainty(logits)
  binary = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(found, [np.log(4), 0, binary], atol=1e-12)
  np.testing.assert_allclose(margin, [0, 1, 0.5], atol=1e-12)


def test_sharpness_is_the_largest_eigenvalue_and_not_the_largest_in_size():
  spectrum = np.array([3.0, -9.0, 1.0, 0.5, 2.0, 2.5])
  basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
  h = jnp.asarray(basis * spectrum @ basis.T)
  loss = lambda p: jnp.concatenate([p["a"], p["b"]]) @ h @ jnp.concatenate([p["a"], p["b"]]) / 2
  assert abs(sharpness.largest_eigenvalue(loss, {"a": jnp.ones(2), "b": jnp.ones(4)}) - 3) < 1e-2


def test_a_run_is_kept_and_analysed(tmp_path, monkeypatch, capsys):
  """Digits with wrong labels; the logits kept are those of the variables kept, the last of `correct` too."""
  digits = problems.PROBLEMS["digits"]

  def noisy(data_dir, folded):
    problem = digits(data_dir, folded)
    return replace(problem, arrays=vision.noisy_labels(problem.arrays, 0.3))

  monkeypatch.setitem(problems.PROBLEMS, "digits", noisy)
  arguments = ["--epochs", "2", "--evaluations", "2", "--train-size", "256", "--out", str(tmp_path)]
  assert main(["digits", "--optimizers", CHEAP, "--seeds", "1", "--save", *arguments]) == 0
  for name in STUDIES:
    assert main([name, "digits-tuned", "--out", str(tmp_path)]) == 0
  found = {n: json.loads((tmp_path / f"study-{n}-digits-tuned.json").read_text())["found"] for n in STUDIES}
  assert all(len(entries) == 1 for entries in found.values())
  first = next(iter(found["plasticity"].values()))[0]
  assert 0 < first["before"] < 1 and first["after"] > first["before"] - 0.1
  problem = _kept.problem_of(load(tmp_path / "digits-tuned.json"), None)
  (saved,) = load_saved(tmp_path, "digits-tuned", problem, ["sgd(learning_rate=0.3)"], [1])
  logits = np.asarray(problem.outputs(saved.variables, problem.arrays.train["x"]))
  np.testing.assert_allclose(saved.arrays["train_logits"], logits, rtol=1e-4, atol=1e-4)
  assert saved.arrays["correct"].shape == (3, 256)
  assert np.array_equal(
    saved.arrays["correct"][-1], saved.arrays["train_logits"].argmax(-1) == problem.arrays.train["y"]
  )
  capsys.readouterr()
  assert main(["report", "--out", str(tmp_path)]) == 0
  assert "sharpness" not in capsys.readouterr().out


def test_what_was_not_kept_is_explained(tmp_path, capsys):
  assert main(["entropy", "nothing", "--out", str(tmp_path)]) == 2
  assert "there is no run" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main(["sharpness"])
  with pytest.raises(SpecError, match=r"no wrong labels.*fashion_mnist\(noise=0\.4\)"):
    plasticity.with_right_labels(build("digits", None, False))
  with pytest.raises(Exception, match="Run it again with `--save`"):
    load_saved(tmp_path, "digits-tuned", build("digits", None, False), ["sgd"], [1])
