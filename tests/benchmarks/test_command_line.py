# SPDX-License-Identifier: Apache-2.0
"""One parser for each study, names that are misspelt, and `tune_then_race`, by which all studies tune."""

import importlib

import pytest

from benchmarks.__main__ import STUDIES, main
from benchmarks.engine.tune_then_race import TUNING_SEED, tune_then_race
from benchmarks.problems.table import PROBLEMS


def helped(capsys, *argv):
  try:
    assert main([*argv, "--help"]) == 0
  except SystemExit as end:
    assert end.code == 0
  return capsys.readouterr().out


def test_a_study_shows_its_own_options_and_no_others(capsys):
  cost, rl = helped(capsys, "cost"), helped(capsys, "rl")
  assert "--threads" in cost and "--optimizers" not in cost and "--optimizers" in rl and "--threads" not in rl
  with pytest.raises(SystemExit):
    main(["cost", "--devices", "8"])


def test_every_study_and_problem_has_a_line(capsys):
  lines = helped(capsys).splitlines()
  for name in [*STUDIES, *PROBLEMS]:
    assert any(line.startswith(f"  {name} ") and len(line.split()) > 2 for line in lines), name


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_the_functions_that_are_asked_of_it(name):
  study = importlib.import_module(f"benchmarks.studies.{name}")
  assert callable(study.run) and callable(getattr(study, "add_arguments", study.run))


@pytest.mark.parametrize(("argv", "meant"), [(["digts"], "digits"), (["cost", "lenet"], "lenet5"), (["swep"], "sweep")])
def test_a_misspelt_name_is_answered_with_the_closest_one(argv, meant, capsys):
  with pytest.raises(SystemExit) as end:
    main(argv)
  assert end.value.code == 2 and f"Did you mean `{meant}`?" in capsys.readouterr().err


def test_each_contestant_races_at_the_rate_of_its_lowest_trial(capsys):
  """Loss (rate - best)^2, the best of a is inside its grid, that of b outside."""
  where, asked = {"a": 0.2, "b": 9.0}, []

  def play(entries, seeds):
    asked.append((len(entries), list(seeds)))
    return {(label, rate): [(rate - where[label]) ** 2 + 10 * seed for seed in seeds] for label, rate in entries}

  found = tune_then_race({"a": (0.1, 0.2, 0.3), "b": (1.0, 2.0, 3.0)}, play, [1, 2], loss=lambda run: run)
  assert asked == [(6, [TUNING_SEED]), (2, [1, 2])]
  assert found["a"].learning_rate == 0.2 and found["b"].learning_rate == 3.0
  assert found["a"].runs == [10, 20] and list(found["b"].trials) == ["1", "2", "3"]
  assert "at the edge of the grid: b" in capsys.readouterr().out


@pytest.mark.parametrize(("grids", "seeds"), [({"a": (1, 2), "b": (1,)}, [1]), ({"a": (1, 2)}, [TUNING_SEED, 1])])
def test_an_unfair_comparison_is_refused(grids, seeds):
  with pytest.raises(ValueError, match="as many trials as the others and other seeds"):
    tune_then_race(grids, lambda entries, seeds: {}, seeds)
