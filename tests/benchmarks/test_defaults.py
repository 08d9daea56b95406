# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks defaults`: who races, on equal terms, and what the table says."""

import json
import math
from argparse import Namespace

import pytest

from benchmarks import rivals
from benchmarks.__main__ import main
from benchmarks.engine.records import ResumeError, Run
from benchmarks.optimizers import OPTIMIZERS, Races, typed
from benchmarks.problems.table import PROBLEMS
from benchmarks.studies import defaults


@pytest.mark.parametrize("question", defaults.QUESTIONS)
def test_every_contestant_of_a_question_has_as_many_trials(question):
  choices = defaults.QUESTIONS[question]
  assert len({len(choice.rates) for choice in choices.values()}) == 1
  assert {choice.optimizer for choice in choices.values()} <= {*OPTIMIZERS}
  for choice in choices.values():
    assert list(choice.rates) == sorted(set(choice.rates))


def test_geometries_are_compared_for_both_curvatures_on_six_problems_at_least():
  for question in ("whitening geometry", "newton geometry"):
    assert {"pro", "quad", "qeq"} <= {*defaults.QUESTIONS[question]} and len(defaults.problems_of(question)) >= 6
  assert {text.partition("(")[0] for text in defaults.PROBLEMS} <= {*PROBLEMS}
  assert {*defaults.NETWORKS} <= {*defaults.PROBLEMS}


def test_rivals_that_cannot_be_imported_do_not_race(monkeypatch):
  monkeypatch.setattr(rivals, "module", lambda name: None)
  assert [*defaults.choices_of("rivals")] == ["psgd", "muon", "adam"]
  monkeypatch.setattr(rivals, "module", lambda name: name == "psgdax")
  assert [*defaults.choices_of("rivals")] == ["psgd", "psgdax quad", "psgdax pro", "muon", "adam"]


def test_a_run_that_jumps_is_not_taken_for_a_good_one():
  run = lambda *losses, finished=True: Run("psgd", 1, finished, curves={"train_loss": [*losses]})
  assert defaults.settled(run(9.0, 0.3, 8.0, 0.1)) == 8.0 and defaults.settled(run(9.0, 0.3, 0.2, 0.1)) == 0.3
  assert defaults.settled(run(1.0, math.nan, finished=False)) == defaults.settled(run(1.0, finished=False)) == math.inf


def test_the_tables_show_medians_of_what_ran():
  times = {"seconds_ratio": [0.5, 0.4, 0.6], "cpu_seconds": [2.0, 7.0, 1.0]}
  pro = {"settled_loss": [1.0, 2.0, 3.0], "train_loss": [0.1, 0.3, 0.2]} | times
  quad = {"settled_loss": [4.0, None, None], "train_loss": [None, 0.5, None]} | times
  answers = {"logistic": {"choices": {"pro": pro, "quad": quad}}, "digits": {"choices": {"pro": pro}}}
  document = {"seeds": 3, "newton geometry": answers}
  found = defaults.table("newton geometry", document)
  assert found.header == ("problem", "pro", "quad")
  assert found.rows == [("logistic", "2 (0.50)", "– (0.50)"), ("digits", "2 (0.50)", "")]
  assert defaults.finals("newton geometry", document).rows[0] == ("logistic", "0.2 (2 s)", "– (2 s)")


def test_what_is_not_asked_for_is_kept_and_other_seeds_are_refused(tmp_path):
  path = tmp_path / "defaults.json"
  path.write_text(json.dumps({"seeds": 3, "every": {"digits": 1}, "rivals": {"digits": 2}}))
  asked = lambda seeds, resume, *questions: Namespace(seeds=seeds, resume=resume, questions=questions)
  assert defaults.kept(asked(3, False, "rivals"), path) == {"seeds": 3, "every": {"digits": 1}}
  assert defaults.kept(asked(3, True, "rivals"), path) == json.loads(path.read_text())
  assert defaults.kept(asked(5, False), path) == {"seeds": 5}
  with pytest.raises(ResumeError, match="made with 3 seeds"):
    defaults.kept(asked(5, False, "rivals"), path)


def test_a_contestant_is_compiled_once_for_all_races(capsys):
  options = {"epochs": 0.2, "evaluations": 1, "train_size": 640}
  races = Races("digits", lambda name, rate: typed(name, {}, rate), options)
  first = races([("sgd", 0.1), ("sgd", 0.3)], [0])
  second = races([("sgd", 0.3)], [0, 1])
  assert capsys.readouterr().out.count("compiled sgd") == 1
  assert second["sgd", 0.3][0].curves["train_loss"] == first["sgd", 0.3][0].curves["train_loss"]
  assert first["sgd", 0.1][0].final() != first["sgd", 0.3][0].final()


@pytest.mark.full
def test_the_whole_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(defaults, "PROBLEMS", {"quadratic": {"epochs": 0.2, "evaluations": 2}})
  question = "newton geometry"
  asked = ["defaults", question, "--seeds", "1", "--problems", "quadratic", "--out", str(tmp_path)]
  assert main(asked) == 0
  found = json.loads((tmp_path / "defaults.json").read_text())[question]["quadratic"]
  assert [*found["choices"]] == ["pro", "quad", "qeq"] and len(found["choices"]["quad"]["trials"]) == 4
  assert "psgd, newton geometry" in capsys.readouterr().out
  assert main([*asked, "--resume"]) == 0 and "compiled" not in capsys.readouterr().out


def test_a_problem_that_is_not_in_the_study_is_refused(capsys):
  with pytest.raises(SystemExit):
    main(["defaults", "rivals", "--problems", "digits,logitsic"])
  assert "Did you mean `logistic`?" in capsys.readouterr().err
