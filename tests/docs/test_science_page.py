# SPDX-License-Identifier: Apache-2.0
"""The page on science: its figures are those of the committed results, and its blocks run and train."""

import math

import jax
import pytest

from benchmarks import hyperparameters
from benchmarks.studies import science
from tests.docs.test_docs import can_run, python_blocks


def test_the_figures_are_those_of_the_committed_results():
  text = science.PAGE.read_text()
  assert text == science.page(hyperparameters.RESULTS), "type `python -m benchmarks science --page`"


def test_what_was_raced_was_tuned_alike_on_other_seeds():
  """At least five seeds for each contestant, none of them that of the trials; three to five trials if any."""
  found = science.documents(hyperparameters.RESULTS)
  assert found
  for name, document in found.items():
    for label, runs in document["runs"].items():
      assert len(runs["seeds"]) >= 5 and str(document["tuning_seed"]) not in runs["seeds"], (name, label)
      assert len(runs["trials"]) in (0, 3, 4, 5), (name, label)
      assert bool(runs["trials"]) == (label not in science.PEERS), (name, label)
      for run in runs["seeds"].values():  # no run ends early, and none by more than a step late
        over = run["seconds"][-1] - document["seconds"]
        assert 0 <= over <= 0.1 * document["seconds"] + 2e-3 * run["ms_per_step"], (name, label)


@pytest.mark.full
def test_the_blocks_run_and_train():
  """By a factor of a hundred, in forty steps, wherever one trains."""
  namespace, trained = {}, 0
  before = jax.config.jax_enable_x64
  for block in filter(can_run, python_blocks(science.PAGE.read_text())):
    earlier = namespace.get("losses")
    exec(compile(block, "science.md", "exec"), namespace)
    if namespace.get("losses") is not earlier:
      trained += 1
      assert math.isfinite(namespace["losses"][-1]) and namespace["losses"][-1] < 1e-2 * namespace["losses"][0], block
  assert trained >= 2
  jax.config.update("jax_enable_x64", before)  # NetKet switches it on
