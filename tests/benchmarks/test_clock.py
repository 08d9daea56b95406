# SPDX-License-Identifier: Apache-2.0
"""Runs that end by the clock, and the search over kinds of freedom before them."""

import json
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.__main__ import main
from benchmarks.engine.arguments import RESULTS
from benchmarks.engine.contestant import mean_of, with_mean
from benchmarks.engine.records import load
from benchmarks.engine.search import best, bracketed, search
from benchmarks.optimizers import contestant
from benchmarks.studies import clock, demo


def bowl(at):
  """A loss whose logarithm is a parabola in the logarithm of the rate, lower with a schedule."""
  return lambda point: math.log(point["learning_rate"] / at) ** 2 + (point.get("schedule") != "linear")


@pytest.mark.parametrize("at", [1e-4, 0.02, 0.3, 7.0])
def test_the_search_brackets_the_best_rate_wherever_it_starts(at):
  trials = search({"learning_rate": 0.1}, {"schedule": ("linear",)}, 14, bowl(at))
  found = best(trials).point
  assert len(trials) == 14 and bracketed(trials)
  assert found["schedule"] == "linear" and abs(math.log10(found["learning_rate"] / at)) < 0.15


def test_every_search_has_the_same_number_of_trials_and_repeats_none():
  asked = []
  for freedoms in ({}, {"schedule": ("linear",), "clip": (1.0, 2.0)}):
    trials = search({"learning_rate": 0.1}, freedoms, 9, lambda point: asked.append(point) or bowl(0.03)(point))
    assert len(trials) == 9 and len({json.dumps(trial.point, sort_keys=True) for trial in trials}) == 9
  assert len(asked) == 18


def test_a_trial_that_breaks_off_is_the_worst():
  trials = search({"learning_rate": 1.0}, {}, 6, lambda point: math.nan if point["learning_rate"] > 0.5 else 1.0)
  assert best(trials).loss == 1.0


def test_a_best_rate_at_the_end_of_the_trials_is_said_not_to_be_bracketed():
  assert not bracketed(search({"learning_rate": 1.0}, {}, 4, lambda point: point["learning_rate"]))


def test_the_mean_of_the_iterates_is_that_of_all_parameters_after_a_step():
  tx, params, seen = with_mean(optax.sgd(0.5), 0.7), {"w": jnp.arange(3.0)}, []
  state = tx.init(params)
  for k in range(4):
    updates, state = tx.update({"w": jnp.full(3, float(k))}, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params["w"])
  weights = 0.7 ** np.arange(4)[::-1]
  assert np.allclose(mean_of(state, 0.7)["w"], np.tensordot(weights / weights.sum(), np.stack(seen), 1), rtol=1e-6)


def test_a_linear_schedule_falls_to_zero_over_the_total_and_a_constant_one_does_not():
  for schedule, wanted in (("linear", [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]), ("constant", [1.0] * 6)):
    entered = contestant("sgd", "sgd", {"learning_rate": 0.5, "schedule": schedule})
    tx, steps = entered.build(1.0, 10, key=0, total=4), []
    state = tx.init({"w": jnp.zeros(())})
    for _ in wanted:
      updates, state = tx.update({"w": jnp.ones(())}, state)
      steps.append(-2 * float(updates["w"]))
    assert np.allclose(steps, wanted)


def test_a_race_by_the_clock_tunes_alike_and_ends_by_seconds(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  only = ["--only", "adam,dpsgd,psgd of the papers", "--trials", "3", "--seeds", "2", "--seconds", "0.05"]
  assert main(["clock", "digits", *only, "--out", str(tmp_path)]) == 0
  tuned = json.loads((tmp_path / "search-digits.json").read_text())
  assert {len(trials) for trials in tuned["trials"].values()} == {3}
  results = load(tmp_path / "clock-digits.json")
  assert [*results.contestants] == ["adam", "psgd of the papers", "dpsgd", "default dpsgd"] and results.seeds() == [
    1,
    2,
  ]
  for run in results.runs:
    assert run.curves["cpu_seconds"][-1] >= 0.05 and run.curves["step"][-1] > 0
    assert np.all(np.diff(run.curves["step"]) >= 0)
  steps = {label: results.of(label)[0].curves["step"][-1] for label in results.contestants}
  assert steps["adam"] > steps["psgd of the papers"]  # who is cheap takes more of them
  assert "to Adam's" in capsys.readouterr().out
  assert main(["clock", "digits", *only[:-1], "0.06", "--resume", "--out", str(tmp_path)]) == 2  # other trials
  assert (tmp_path / "clock-digits.png").exists()


def test_the_demo_gives_everyone_the_same_seconds_at_what_was_committed(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(demo, "SHOWN", ("momentum", "adam"))
  assert main(["demo", "--seconds", "0.05", "--seeds", "1", "--out", str(tmp_path)]) == 0
  results = load(tmp_path / "demo.json")
  committed = json.loads((RESULTS / "search-digits.json").read_text())["chosen"]
  for label, about in results.contestants.items():
    assert about["options"] == committed[label]
    assert results.of(label)[0].curves["seconds"][-1] >= 0.05
  assert "after 0.05 seconds of training" in capsys.readouterr().out and (tmp_path / "demo.png").exists()


def test_the_demo_can_show_every_contestant_that_was_committed():
  assert {*demo.SHOWN} <= clock.chosen("digits").keys() & clock.FIELD.keys()
