# SPDX-License-Identifier: Apache-2.0
"""The problem `digits_bn`, the commands `diagonality` and `partial_hessian`, and what docstrings say of them."""

import json

import jax
import numpy as np
import pytest

import dpsgd_optax as dpo
from benchmarks import hyperparameters
from benchmarks.engine.calls import SpecError
from benchmarks.problems.table import build
from benchmarks.studies import diagonality, partial_hessian
from dpsgd_optax import training


def variables(norm):
  problem = build(f"digits_bn(norm={norm})", None, False)
  return problem, jax.eval_shape(problem.init, jax.random.key(0))


@pytest.mark.parametrize("norm, count", [("batch", 4), ("layer", 4), ("group", 4), ("weight", 2), ("none", 0)])
def test_the_network_has_the_norm_layers_it_is_asked_for(norm, count):
  """All of them 1-D, one entry for each channel; batch norm alone has running statistics, which are not trained."""
  problem, shapes = variables(norm)
  params, statistics = problem.split(shapes)
  chosen = jax.tree.map(lambda x, yes: x if yes else None, params, training.is_norm_param(params))
  assert [x.shape for x in jax.tree.leaves(chosen)] == ([(16,)] * 2 + [(32,)] * 2 if count == 4 else [(16,), (32,)])[
    :count
  ]
  assert bool(jax.tree.leaves(statistics)) == (norm == "batch")
  if not count:
    with pytest.raises(ValueError, match=r"selects none.*nn\.WeightNorm"):
      dpo.sgd_ph(0.1, training.is_norm_param).init(params)


def test_an_unknown_norm_is_refused():
  with pytest.raises(SpecError, match="`norm` must be one of batch, layer, group, weight, none, got 'bach'"):
    build("digits_bn(norm=bach)", None, False)


def result(name):
  return json.loads((hyperparameters.RESULTS / name).read_text())


def test_in_the_networks_measured_41_to_91_percent_of_the_norm_of_a_block_lie_off_its_diagonal():
  """What the docstring of `sgd_ph` says, of the committed measurement."""
  document = result("diagonality.json")
  assert set(diagonality.NORMS) <= set(document["problems"])
  shares = [
    np.median(of[point]["share"])
    for name in diagonality.NORMS
    for of in document["problems"][name]["tensors"].values()
    for point in diagonality.POINTS
  ]
  assert (round(min(shares), 2), round(max(shares), 2)) == (0.41, 0.91)
  assert len(diagonality.table(document).rows) >= 14


def test_a_step_that_probes_every_time_costs_less_than_two_gradients():
  """At most 1.9, gradient and product from one linearization; nothing is compiled twice."""
  document = result("partial_hessian.json")
  fused, apart = (document["ratios"][label]["cpu"][1] for label in list(partial_hessian.RATIOS)[:2])
  assert fused <= 1.9 and fused < apart
  assert document["recompiled"] == 0
  assert len(partial_hessian.table(document).rows) == 4


@pytest.mark.slow
def test_the_command_measures_a_problem(monkeypatch):
  monkeypatch.setattr(diagonality, "STEPS", 1)
  found = diagonality.measured("digits_bn(norm=weight)", 1, None)
  assert len(found) == 2
  for of in found.values():
    assert 0 < of["initial"]["share"][0] < 1 and of["trained"]["share"] != of["initial"]["share"]
