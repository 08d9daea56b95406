# SPDX-License-Identifier: Apache-2.0
"""What holds on eight devices. Run by test_sharding.py in a process that has them; not collected by itself."""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import monitoring
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dpsgd_optax as dpo

WIDTH, LAYERS, OUT, BATCH = 8, 8, 3, 16


def mesh(**axes: int) -> jax.sharding.Mesh:
  """A mesh of the first devices, as many as are asked for."""
  count = int(np.prod(list(axes.values())))
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count], axis_types=kinds)


def network() -> Any:
  """Eight equal layers and a head: buckets of 8 and of 1."""
  draw = np.random.default_rng(0).standard_normal
  layer = lambda out: {"w": (0.4 * draw((WIDTH, out))).astype(np.float32), "b": np.zeros(out, np.float32)}
  return {**{f"layer{i}": layer(WIDTH) for i in range(LAYERS)}, "head": layer(OUT)}


def batch() -> Any:
  """Rows that differ by orders of magnitude, so that the gradient of any eighth of them is far from the whole."""
  draw = np.random.default_rng(1).standard_normal
  x, y = draw((BATCH, WIDTH)) * np.geomspace(0.1, 10, BATCH)[:, None], draw((BATCH, OUT))
  return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def loss(params: Any, data: Any) -> jax.Array:
  """Eight networks of one hidden layer side by side, with one head: little to compile."""
  hidden = [params[f"layer{i}"] for i in range(LAYERS)]
  w, b = (jnp.stack([layer[name] for layer in hidden]) for name in ("w", "b"))
  x = jnp.tanh(jnp.einsum("ni,kio->kno", data["x"], w) + b[:, None]).mean(0)
  return jnp.mean((x @ params["head"]["w"] + params["head"]["b"] - data["y"]) ** 2)


def loss_by_layers(params: Any, data: Any) -> jax.Array:
  """The same, as layers that can be captured."""
  hidden = [jnp.tanh(data["x"] @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"]) for i in range(LAYERS)]
  return jnp.mean((sum(hidden) / LAYERS @ params["head"]["w"] + params["head"]["b"] - data["y"]) ** 2)


def specs(kernel: P, bias: P) -> Any:
  """The head is on every device."""
  return {**{f"layer{i}": {"w": kernel, "b": bias} for i in range(LAYERS)}, "head": P()}


class Row(NamedTuple):
  """Attributes:
  needs: arguments of `update`.
  chosen: those that are True, which chooses a branch when traced.
  """

  tx: Callable[[], optax.GradientTransformationExtraArgs]
  axes: dict[str, int]
  specs: Any
  needs: tuple[str, ...] = ()
  chosen: tuple[str, ...] = ()


ROWS = {
  "whitening, data parallel": Row(lambda: dpo.psgd(1e-2, b1=0.9, every=2), {"data": 8}, P()),
  "Newton by triangular solves, FSDP and tensor parallel": Row(
    lambda: dpo.psgd(0.1, dpo.kron(geometry=dpo.eq), dpo.newton(), every=1),
    {"data": 2, "model": 4},
    specs(P("data", "model"), P("data")),
    ("hvp",),
    ("refresh",),
  ),
}
SLOW_ROWS = {
  "DPSGD, tensor parallel": Row(
    lambda: dpo.dpsgd(0.1, judge_every=1),
    {"data": 2, "model": 4},
    specs(P(None, "model"), P()),
    ("value", "value_fn"),
    ("refresh", "judge"),
  ),
  "blocks, FSDP": Row(
    lambda: dpo.psgd(0.1, dpo.blocked(dpo.kron(max_skew=jnp.inf), WIDTH // 2), dpo.newton(), every=1),
    {"data": 8},
    specs(P("data"), P("data")),
    ("hvp",),
    ("refresh",),
  ),
  "one vector, FSDP": Row(
    lambda: dpo.psgd(0.1, dpo.lra(rank=2), every=1), {"data": 8}, specs(P(None, "data"), P()), (), ("refresh",)
  ),
  "least squares, data parallel": Row(lambda: dpo.gls(0.1), {"data": 8}, P(), ("layer_inputs",), ("refresh",)),
}
ALL_ROWS = ROWS | SLOW_ROWS
rows = pytest.mark.parametrize("name", [*ROWS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_ROWS)])


def make_step(tx: optax.GradientTransformationExtraArgs, row: Row) -> Callable:
  def step(params: Any, state: Any, data: Any) -> tuple[Any, Any]:
    objective = lambda p: loss(p, data)
    extra: dict[str, Any] = {"value_fn": objective, "hvp": dpo.hvp(objective, params)}
    if "layer_inputs" in row.needs:
      value, grads, extra["layer_inputs"] = dpo.capture(lambda p: loss_by_layers(p, data))(params)
    else:
      value, grads = jax.value_and_grad(objective)(params)
    extra |= {"value": value, "refresh": True, "judge": True}
    updates, state = tx.update(grads, state, params, **{name: extra[name] for name in (*row.needs, *row.chosen)})
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def place(on: jax.sharding.Mesh, tree: Any, spec: Any) -> Any:
  each = jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), spec, tree, is_leaf=lambda x: isinstance(x, P))
  return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(on, s)), tree, each)


class Ran(NamedTuple):
  params: Any
  state: Any
  later: int  # compilations after the first step


@functools.cache
def ran(name: str, devices: int, steps: int = 3) -> Ran:
  """The run of a row on one device, or on its mesh of eight."""
  row, compiled = ALL_ROWS[name], []
  tx, params, data = row.tx(), network(), batch()
  if devices > 1:
    on = mesh(**row.axes)
    tx, params, data = dpo.sharded(tx, on, row.specs), place(on, params, row.specs), place(on, data, P("data"))
  state, step = jax.jit(tx.init)(params), make_step(tx, row)
  params, state = step(params, state, data)
  heard = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  monitoring.register_event_duration_secs_listener(heard)
  for _ in range(steps - 1):
    params, state = step(params, state, data)
  later = len(compiled)
  compiled.clear()
  return Ran(params, state, later)


def test_there_are_eight_devices():
  assert jax.device_count() == 8


@rows
def test_the_same_key_gives_the_same_steps_as_on_one_device_from_the_global_gradient(name):
  """θ after three steps, and all statistics: the mean over the batch, not over the rows of one device."""
  one, many = ran(name, 1), ran(name, 8)
  start = network()
  for path, expected in jax.tree_util.tree_leaves_with_path(one.params):
    found, first = (functools.reduce(lambda t, k: t[k.key], path, tree) for tree in (many.params, start))
    moved = np.abs(np.asarray(expected) - first).max()
    assert moved > 1e-4
    np.testing.assert_allclose(found, expected, atol=2e-3 * moved, err_msg=jax.tree_util.keystr(path))


@rows
def test_the_state_lies_as_partition_specs_says(name):
  row, state = ALL_ROWS[name], ran(name, 8).state
  on = mesh(**row.axes)
  wanted = dpo.partition_specs(row.tx(), network(), row.specs, on)
  for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
    assert x.sharding.is_equivalent_to(NamedSharding(on, spec), x.ndim), (jax.tree_util.keystr(path), x.sharding, spec)


@rows
def test_the_second_step_does_not_compile_again(name):
  assert ran(name, 8).later == 0


def exchanges(text: str) -> collections.Counter[str]:
  """How often each collective stands in a compiled program."""
  kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
  return collections.Counter(
    k for line in text.splitlines() for k in kinds if f" {k}(" in line or f" {k}-start(" in line
  )


@functools.cache
def fit_and_apply(devices: int, spec: P) -> jax.stages.Compiled:
  """The preconditioner alone, on eight matrices and eight vectors; gradients arrive as the params lie."""
  tx = dpo.scale_by_preconditioner(dpo.kron(), dpo.whitening(), finite_check=False)
  params = {f"layer{i}": {"w": np.ones((32, 32), np.float32), "b": np.ones(32, np.float32)} for i in range(8)}
  if devices > 1:
    on = mesh(data=8)
    tx, params = dpo.sharded(tx, on, spec), place(on, params, spec)
  update = jax.jit(lambda g, s: tx.update(g, s, refresh=True))
  return update.lower(params, jax.jit(tx.init)(params)).compile()


def test_data_parallel_updates_take_one_all_gather_for_each_shape_and_nothing_else():
  assert exchanges(fit_and_apply(8, P()).as_text()) == {"all-gather": 2}


def test_fully_sharded_updates_take_one_exchange_of_each_shape_in_each_direction():
  """In: the gradient for the fit, the gradient for P g; out: P g. No device ever holds all of either."""
  assert exchanges(fit_and_apply(8, P("data")).as_text()) == {"all-to-all": 2 * 3}


def test_clip_and_check_exchange_no_leaves_where_those_of_one_shape_lie_differently():
  """As under tensor parallelism, where one kernel is cut by rows and the next by columns."""
  lie = {f"layer{i}": P("data") if i % 2 else P(None, "data") for i in range(8)}
  on, params = mesh(data=8), {name: np.ones((32, 32), np.float32) for name in lie}
  alone = dpo.scale_by_preconditioner(dpo.kron(), dpo.whitening(), momentum=optax.ema(0.9), finite_check=False)
  counts = []
  for tx in (alone, dpo.psgd(0.1)):
    tx, placed = dpo.sharded(tx, on, lie), place(on, params, lie)
    update = jax.jit(lambda g, s, tx=tx: tx.update(g, s, g, refresh=True))
    found = exchanges(update.lower(placed, jax.jit(tx.init)(placed)).compile().as_text())
    counts.append(found["all-to-all"] + found["collective-permute"] + found["all-gather"])
  assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("spec", [P(), P("data")], ids=["data parallel", "FSDP"])
def test_each_of_eight_devices_holds_and_does_an_eighth(spec):
  """Of the preconditioner's bytes and of the flops of fit and apply, as the compiled programs tell them."""
  one, many = fit_and_apply(1, P()), fit_and_apply(8, spec)
  flops = [program.cost_analysis()["flops"] for program in (one, many)]
  assert flops[1] <= 0.16 * flops[0], flops
  held = [program.memory_analysis().argument_size_in_bytes for program in (one, many)]
  gradients = 8 * (32 * 32 + 32) * 4
  held = held[0] - gradients, held[1] - gradients // (1 if spec == P() else 8)
  assert held[1] <= 0.16 * held[0], held


@pytest.mark.slow
def test_a_whole_run_in_one_scan_equals_the_steps_one_by_one():
  name = "whitening, data parallel"
  row, on = ALL_ROWS[name], mesh(**ALL_ROWS[name].axes)
  tx = dpo.sharded(row.tx(), on, row.specs)
  step = make_step(tx, row)

  @jax.jit
  def run(params, data):
    carry = (params, tx.init(params))
    return jax.lax.scan(lambda c, _: (step(*c, data), None), carry, length=3)[0]

  params, state = run(place(on, network(), row.specs), place(on, batch(), P("data")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, ran(name, 8).params)
  assert dpo.diagnostics.bytes_per_device(state) == dpo.diagnostics.bytes_per_device(ran(name, 8).state)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
def test_a_run_saved_on_eight_devices_goes_on_with_another_number(devices, tmp_path):
  """Orbax, both ways: the state has no trace of the number of devices."""
  import orbax.checkpoint as ocp

  row = ALL_ROWS["whitening, data parallel"]
  before = ran("whitening, data parallel", 8)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", {"params": before.params, "state": before.state})
  on = mesh(data=devices)
  tx = dpo.sharded(row.tx(), on)
  shapes = jax.eval_shape(network)
  places = {"params": jax.tree.map(lambda _: P(), shapes), "state": dpo.partition_specs(tx, shapes, P(), on)}
  wanted = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, s)),
    {"params": shapes, "state": jax.eval_shape(tx.init, shapes)},
    places,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "run", wanted)
  params, _ = make_step(tx, row)(restored["params"], restored["state"], place(on, batch(), P("data")))
  expected = ran("whitening, data parallel", 1, steps=4).params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)


def local_step(tx: Any, mean: bool) -> Callable:
  """A step from the loss of the local batch, or from its mean over the replicas."""

  def step(params, state, data):
    local = lambda p: jax.lax.pmean(loss(p, data), "data") if mean else loss(p, data)
    value, grads = jax.value_and_grad(local)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=local, hvp=dpo.hvp(local, params))
    return optax.apply_updates(params, updates), state

  return step


REPLICATED = {
  "psgd newton": lambda: dpo.psgd(0.1, dpo.kron(), dpo.newton()),
  "dpsgd": lambda: dpo.dpsgd(0.1, judge_every=2),
}


def stacked_devices(tree: Any) -> Any:
  """What each device holds."""
  return jax.tree.map(lambda x: np.stack([np.asarray(part.data) for part in x.addressable_shards]), tree)


@pytest.mark.parametrize("by", ["pmap", "shard_map", pytest.param("shard_map, checked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dpsgd", pytest.param("psgd newton", marks=pytest.mark.slow)])
def test_b1_replicas_stay_equal_bit_for_bit_and_make_the_step_of_the_whole_batch(name, by):
  tx, params, on = dpo.data_parallel(REPLICATED[name](), "data"), network(), mesh(data=8)
  state = tx.init(params)
  if by == "pmap":
    step = jax.pmap(local_step(tx, mean=False), axis_name="data")
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
    params, state, data = copies(params), copies(state), jax.tree.map(lambda x: x.reshape(8, 2, -1), batch())
  else:
    checked = by.endswith("checked")
    step = jax.jit(
      jax.shard_map(
        local_step(tx, mean=checked), mesh=on, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=checked
      )
    )
    data = batch()
  for _ in range(4):
    params, state = step(params, state, data)
  for x in jax.tree.leaves(stacked_devices((params, state))):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))

  plain, expected = REPLICATED[name](), network()
  one, state = jax.jit(whole_step(plain)), plain.init(expected)
  for _ in range(4):
    expected, state = one(expected, state)
  found = jax.tree.map(lambda x: x[0], params) if by == "pmap" else params
  chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


def whole_step(tx: Any) -> Callable:
  """The same step from the whole batch on one device."""

  def step(params, state):
    whole = lambda p: loss(p, batch())
    value, grads = jax.value_and_grad(whole)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=whole, hvp=dpo.hvp(whole, params))
    return optax.apply_updates(params, updates), state

  return step
