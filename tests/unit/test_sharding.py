# SPDX-License-Identifier: Apache-2.0
"""Specs and their errors need no devices; all that needs eight runs in one process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import dpsgd_optax as dpo
from benchmarks.engine.devices import QUICK_TO_COMPILE

ROOT = Path(__file__).parents[2]
EIGHT = AbstractMesh((8,), ("data",))
TWO_BY_FOUR = AbstractMesh((2, 4), ("data", "model"))


def layers(count: int, rows: int = 4) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct((rows, 4), jnp.float32) for _ in range(count)]


def factors(params, mesh, axes=None, tx=None):
  """The spec of the first factor of each bucket, by the rows of its matrices."""
  specs = dpo.partition_specs(tx or dpo.psgd(0.1, dpo.kron(max_padding=1.0)), params, P(), mesh, axes)
  return {int(name.split("x")[0]): state.q[0] for name, state in optax.tree.get(specs, "buckets").items()}


def virtual_devices(count: int) -> dict[str, str]:
  flags = f"--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count={count} {QUICK_TO_COMPILE}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "XLA_FLAGS": flags}


@pytest.mark.parametrize("tier", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("full", "slow")])
def test_on_eight_devices(tier):
  """All of on_eight_devices.py."""
  options = ["-q", "--tier", tier, "-p", "no:cacheprovider", "-p", "no:xdist"]
  command = [sys.executable, "-m", "pytest", *options, "tests/on_eight_devices.py"]
  done = subprocess.run(command, cwd=ROOT, env=virtual_devices(8), capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_buckets_are_divided_where_their_size_allows():
  params = layers(16) + layers(12, rows=5) + layers(3, rows=6)
  assert factors(params, EIGHT) == {4: P("data"), 5: P(), 6: P()}


def test_of_two_axes_those_are_used_whose_product_is_largest():
  params = layers(16) + layers(12, rows=5) + layers(2, rows=6) + layers(3, rows=7)
  assert factors(params, TWO_BY_FOUR) == {4: P(("data", "model")), 5: P("model"), 6: P("data"), 7: P()}
  assert factors(params, TWO_BY_FOUR, axes="data") == {4: P("data"), 5: P("data"), 6: P("data"), 7: P()}


def test_a_bucket_smaller_than_the_number_of_devices_is_replicated():
  assert factors(layers(7), EIGHT) == {4: P()}


def test_momentum_lies_like_the_params_and_scalars_everywhere():
  params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
  specs = dpo.partition_specs(dpo.psgd(0.1, b1=0.9), params, {"w": P("data"), "b": P()}, EIGHT)
  assert optax.tree.get(specs, "ema") == {"w": P("data"), "b": P()}
  assert optax.tree.get(specs, "key") == optax.tree.get(specs, "fits") == P()


@pytest.mark.parametrize(
  "tx",
  [
    dpo.dpsgd(0.1),
    dpo.psgd(0.1, dpo.lra(rank=2), b1=0.9),
    dpo.gls(0.1, fallback=optax.adam(0.1)),
    optax.adamw(0.1),
    optax.chain(optax.clip(1.0), dpo.levenberg_marquardt(optax.sgd(0.1, momentum=0.9))),
    optax.partition({"a": dpo.psgd(0.1, b1=0.9), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}),
  ],
)
def test_specs_have_the_structure_of_the_state_and_fit_its_shapes(tx):
  params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(8)}
  state = jax.eval_shape(tx.init, params)
  specs = dpo.partition_specs(tx, params, P("data"), EIGHT)
  assert jax.tree.structure(specs) == jax.tree.structure(state)
  for x, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
    assert len(spec) <= len(x.shape)


def test_a_part_of_the_leaves_may_be_sharded():
  """`partition` gives each transform params with holes; the specs have none."""
  inner = dpo.sharded(dpo.psgd(0.1, b1=0.9), one_device(), {"w": P("data"), "b": P()})
  tx = optax.partition({"a": inner, "b": optax.adam(0.1)}, {"w": "a", "b": "b"})
  params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(8)}
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)


def one_device(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
  return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(kind,))


@pytest.mark.parametrize(
  ("axes", "specs", "message"),
  [
    ("dta", P(), r"`axes` must name axes of the mesh.*\('data',\).*'dta'"),
    (None, P("model"), r"the spec of \['b'\].*must name axes of the mesh.*'model'"),
    (None, {"w": P()}, r"`param_specs` must have the structure of the params"),
    (None, [P(), P()], r"`param_specs` must have the structure of the params"),
    (None, {"w": P(None, None, "data"), "b": P()}, r"the spec of \['w'\] must have at most 2 entries"),
    (None, {"w": "data", "b": P()}, r"must hold a PartitionSpec for \['w'\], got 'data'"),
  ],
)
def test_wrong_axes_and_specs_say_what_to_type(axes, specs, message):
  params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(8)}
  with pytest.raises(ValueError, match=message):
    dpo.partition_specs(dpo.psgd(0.1), params, specs, EIGHT, axes)
  with pytest.raises(ValueError, match=message):
    dpo.sharded(dpo.psgd(0.1), one_device(), specs, axes).init(params)


def test_a_mesh_with_explicit_axes_says_how_to_make_one_without():
  with pytest.raises(ValueError, match=r"axes of type Auto.*jax.make_mesh\(shape, names, axis_types="):
    dpo.sharded(dpo.psgd(0.1), one_device(AxisType.Explicit))
