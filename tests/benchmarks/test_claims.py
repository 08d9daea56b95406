# SPDX-License-Identifier: Apache-2.0
"""The page of claims: written from the committed results, judged by rules, and every law it names is a test."""

import ast
import importlib
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks.__main__ import STUDIES, main
from benchmarks.engine.analysis import Spread
from benchmarks.engine.arguments import RESULTS
from benchmarks.hyperparameters import setting
from benchmarks.optimizers import contestants
from benchmarks.studies import claims
from benchmarks.studies._claims import (
  CONFIRMED,
  REFUTED,
  UNCHECKED,
  UNDECIDED,
  Claim,
  Figure,
  Law,
  Not,
  Rule,
  above,
  below,
)

TESTS = Path(__file__).parents[1]
ALL = [claim for found in claims.SOURCES.values() for claim in found]
LAWS = sorted({case.test for claim in ALL for case in claim.cases if isinstance(case, Law)})


def test_the_figures_of_the_claims_page_are_those_of_the_committed_results():
  page = claims.PAGE.read_text()
  assert page == claims.updated(page, RESULTS), "type `python -m benchmarks claims`"


@pytest.mark.parametrize("law", LAWS)
def test_a_law_that_the_page_names_is_a_test(law):
  file, function = law.split("::")
  assert function in {
    node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)
  }


@pytest.mark.parametrize(
  ("rule", "lower", "median", "upper", "word"),
  [
    (below(0.43), 0.2, 0.3, 0.429, CONFIRMED),
    (below(0.43), 0.2, 0.3, 0.43, UNDECIDED),
    (below(0.43), 0.43, 0.43, 0.43, REFUTED),
    (below(0.43), 0.2, 0.3, 0.44, UNDECIDED),
    (below(0.43), 0.4, 0.5, math.inf, UNDECIDED),
    (below(0.43), 0.44, 0.5, 0.6, REFUTED),
    (below(0.43), math.inf, math.inf, math.inf, REFUTED),
    (above(0.0), 0.1, 1.0, math.inf, CONFIRMED),
    (above(0.0), 0.0, 1.0, math.inf, UNDECIDED),
    (above(0.0), 0.0, 0.0, 0.0, REFUTED),
    (above(0.0), -2.0, -1.0, -0.1, REFUTED),
    (Rule(1.0, 2.2), 1.5, 1.7, 1.9, CONFIRMED),
    (Rule(1.0, 2.2), 1.0, 1.7, 2.2, CONFIRMED),
    (Rule(1.0, 2.2), 0.9, 1.7, 1.9, UNDECIDED),
    (Rule(1.0, 2.2), 0.9, 1.7, 2.3, UNDECIDED),
    (Rule(1.0, 2.2), 2.3, 2.4, 2.5, REFUTED),
    (below(1.0), math.nan, math.nan, math.nan, UNDECIDED),
  ],
)
def test_the_truth_table_of_a_rule(rule, lower, median, upper, word):
  assert rule.judge(Spread(median, lower, upper)) == word


def _case(word):
  return Not("why") if word == UNCHECKED else Law("a::b", "what", word)


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ((CONFIRMED, CONFIRMED), CONFIRMED),
    ((CONFIRMED, UNCHECKED), CONFIRMED),
    ((CONFIRMED, UNDECIDED), UNDECIDED),
    ((CONFIRMED, UNDECIDED, REFUTED), REFUTED),
    ((UNCHECKED,), UNCHECKED),
  ],
)
def test_one_case_refutes_and_all_confirm(words, expected, tmp_path):
  assert Claim("says", tuple(map(_case, words))).word(tmp_path) == expected


def test_every_sentence_has_a_case_and_stands_once_in_its_source():
  for found in claims.SOURCES.values():
    assert len({claim.says for claim in found}) == len(found)
  assert all(claim.cases for claim in ALL) and len(ALL) >= 90


def test_no_figure_is_missing_from_the_committed_results():
  """A file or a contestant that went would turn its claims to "not checked here" without a word."""
  for claim in ALL:
    for case in claim.cases:
      assert not isinstance(case, Figure) or case.verdict(RESULTS).word != UNCHECKED, case.verdict(RESULTS).evidence


def test_a_new_run_changes_the_verdict_by_itself(tmp_path):
  """curves-author.json refutes the 57 %; with the losses of PSGD held up, it confirms them."""
  name = "curves-author.json"
  case = claims.SOURCES["DPSGD: damped preconditioned SGD"][0].cases[-1]
  assert "curves" in case.what
  shutil.copy(RESULTS / name, tmp_path / name)
  assert case.verdict(tmp_path).word == REFUTED
  document = json.loads((RESULTS / name).read_text())
  for run in document["runs"]:
    if run["optimizer"] == "psgd":
      losses = run["curves"]["train_loss"]
      losses[:-1], losses[-1] = [2 * losses[0]] * (len(losses) - 1), losses[0]
  (tmp_path / name).write_text(json.dumps(document))
  assert case.verdict(tmp_path).word == CONFIRMED


def test_without_its_file_a_figure_is_not_checked_and_says_so(tmp_path):
  case = claims.SOURCES["DPSGD: damped preconditioned SGD"][0].cases[0]
  verdict = case.verdict(tmp_path)
  assert verdict.word == UNCHECKED and "mnist-author.json" in verdict.evidence


def _commands():
  found: dict[str, int] = {}
  for source, sentences in claims.SOURCES.items():
    claims.section(source, sentences, RESULTS, found)
  return [command.strip("`") for command in found]


@pytest.mark.parametrize("command", _commands())
def test_a_command_that_the_page_names_is_understood(command, monkeypatch):
  """Its words are those of its study, and its optimizers are contestants; what it would run is left out."""
  python, flag, module, study, *words = shlex.split(command)
  assert (python, flag, module) == ("python", "-m", "benchmarks")
  name = study if study in STUDIES else "train"
  asked = []
  monkeypatch.setattr(importlib.import_module(f"benchmarks.studies.{name}"), "run", asked.append)
  assert main([study, *words]) == 0
  (args,) = asked
  if name == "train":
    defaults = setting(args.setting, args.problems[0]).optimizers
    assert contestants(args.optimizers or ",".join(defaults), defaults, args.problems[0])
