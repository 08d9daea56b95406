# SPDX-License-Identifier: Apache-2.0
"""Packages of other people: left out where they cannot be had, compared on equal terms where they can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from benchmarks import rivals
from benchmarks.engine.calls import SpecError
from benchmarks.engine.timing import Workload
from benchmarks.optimizers import contestant
from benchmarks.studies import _calls as calls

needs = lambda module: pytest.mark.skipif(rivals.module(module) is None, reason=f"{module} is not installed")


@pytest.fixture
def broken(tmp_path, monkeypatch):
  (tmp_path / "broken_peer.py").write_text("raise TypeError('a name is gone')")
  monkeypatch.syspath_prepend(tmp_path)
  return "broken_peer"


def test_a_package_that_fails_to_import_is_left_out_and_said_once(broken, capsys):
  assert rivals.module(broken) is None and rivals.module(broken) is None
  assert capsys.readouterr().out.count("TypeError: a name is gone") == 1


def test_a_package_that_is_not_installed_is_left_out_in_silence(capsys):
  assert rivals.module("no_such_package.part") is None and not capsys.readouterr().out
  with pytest.raises(SpecError, match="pip install 'dpsgd_optax\\[peers\\]'"):
    rivals.needed("no_such_package")


@pytest.mark.parametrize("name", rivals.KRONS)
def test_a_rival_trains_in_silence_and_knows_no_extra_arguments(name, capsys):
  package, geometry = rivals.KRONS[name]
  if rivals.module(package) is None:
    pytest.skip(f"{package} is not installed")
  capsys.readouterr()
  params = {"w": jnp.ones((12, 9)), "b": jnp.ones(9)}
  tx = rivals.kron(package, geometry, 0.1, probability=1.0, key=3)
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  assert all(jnp.isfinite(x).all() and (x < 0).any() for x in jax.tree.leaves(updates))
  assert not capsys.readouterr().out


@pytest.mark.parametrize("name", rivals.KRONS)
def test_one_program_of_a_rival_fits_or_does_not_as_its_probability_says(name):
  if name not in rivals.installed():
    pytest.skip(f"{name} is not installed")
  steps = calls._of_rival(rivals.installed()[name], Workload({"w": jnp.ones((12, 9))}))
  assert steps["fit"][0] is steps["no fit"][0]
  factors = {}
  for fit, (call, state, *arguments) in steps.items():
    first, _ = jax.jit(call)(state, *arguments)  # sets the scale
    second, _ = jax.jit(call)(first, *arguments)
    of = lambda state: jax.tree.leaves(state[0].Qs_preconditioners)
    factors[fit] = [bool(jnp.array_equal(q, after)) for q, after in zip(of(first), of(second), strict=True)]
  assert not any(factors["fit"]) and all(factors["no fit"])


@needs("psgdax")
@pytest.mark.parametrize("workload", ["small", "mlp", "charlm"])
def test_the_same_factors_are_dense(workload):
  params = jax.eval_shape(lambda: calls.WORKLOADS[workload]().params)
  sizes = lambda qs: sorted(q.shape[-1] for q in qs if q.ndim == 2)
  with rivals.quiet():
    theirs = jax.eval_shape(rivals.kron("psgdax", "pro", 0.1).init, params)[0]
  state = jax.eval_shape(dpo.kron().init, params)
  ours = [np.empty(q.shape[1:]) for group in state.buckets.values() for q in group.q for _ in range(q.shape[0])]
  assert sizes(ours) == sizes(jax.tree.leaves(theirs.Qs_preconditioners)) != []


@needs("distributed_kron.pro")
def test_distributed_kron_is_reached_past_the_annotation_that_breaks_it():
  tx, params = rivals.distributed_kron(0.1, 4), {"w": jnp.ones((6, 5))}
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  assert (updates["w"] < 0).all()


@pytest.mark.parametrize("name", ["psgdax", "rollfast"])
def test_a_rival_is_entered_by_its_name(name):
  entered = contestant(name, name, {"learning_rate": 0.1, "geometry": "quad"})
  build = lambda: entered.build(1.0, 10, key=0).init({"w": jnp.ones((3, 3))})
  if rivals.module(name) is None:
    with pytest.raises(SpecError, match="cannot be imported here"):
      build()
  else:
    build()
