# SPDX-License-Identifier: Apache-2.0
"""Promises × optimizers, one table: what optax promises of its own, asked of every row of ours.

A promise is a function of the name of a row that raises if it is broken. Most of them are about shapes, dtypes and
structure, which `jax.eval_shape` answers without compiling anything. A cell that cannot hold is listed in EXCUSES with
its reason, and its error is part of the table: the test asserts that it comes, and that it says what to do.

``python -m tests.contract`` prints the table.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dpsgd_optax as dpo
from tests.table import OPTIMIZERS, PARAMS, Fault, Row, compiled, first_leaf, layer_inputs, loss, scaling

CALM = Fault()


def whitened(preconditioner: Callable[[], dpo.Preconditioner]) -> Row:
  make = lambda **options: dpo.scale_by_preconditioner(preconditioner(), dpo.whitening(), **options)
  return Row(make, frozenset())


def unkeyed(make: Callable, *extras: str) -> Row:
  return Row(make, frozenset(extras), takes_key=False)


TRANSFORMS = {
  "lra": whitened(functools.partial(dpo.lra, rank=2)),
  "xmat": whitened(dpo.xmat),
  "dense": whitened(dpo.dense),
  "affine": whitened(functools.partial(dpo.affine, max_skew=jnp.inf)),
  "blocked": whitened(lambda: dpo.blocked(dpo.kron(max_skew=jnp.inf), 2)),
  "second_moment": whitened(dpo.second_moment),
  "raveled": whitened(lambda: dpo.raveled(scaling())),
  "clipped_learning_rate": unkeyed(lambda: dpo.clipped_learning_rate(0.1)),
  "add_gradient_norm_penalty": unkeyed(lambda: dpo.add_gradient_norm_penalty(0.1), "hvp"),
  "sharpness_aware": unkeyed(lambda: dpo.penalties.sharpness_aware(0.1), "value_fn"),
  "add_l1_penalty": unkeyed(lambda: dpo.penalties.add_l1_penalty(0.1)),
  "proximal_l1": unkeyed(lambda: dpo.penalties.proximal_l1(0.1, 0.1)),
  "proximal_l2": unkeyed(lambda: dpo.penalties.proximal_l2(0.1, 0.1)),
  "clip_output_change": unkeyed(lambda: dpo.layers.clip_output_change(), "layer_inputs"),
  "clip_spikes": unkeyed(lambda: dpo.clip_spikes()),
}
"""Those that are no optimizers by themselves, each alone."""

ROWS: dict[str, Row] = {**OPTIMIZERS, **TRANSFORMS}


@functools.cache
def transform(name: str) -> optax.GradientTransformationExtraArgs:
  return compiled(name).tx if name in OPTIMIZERS else TRANSFORMS[name].make()


def squares(params):
  """A loss of any tree, smooth and not quadratic."""
  return sum((jnp.sum(jnp.cosh(x.astype(jnp.float32)) - 0.5 * x) for x in jax.tree.leaves(params)), jnp.zeros(()))


def one_step(tx, extras, loss=squares, **more):
  """(params, state) -> (params, state, updates), with the extra arguments that the row needs."""

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    offers = {"value": value, "value_fn": loss, "hvp": dpo.hvp(loss, params), "layer_inputs": layer_inputs(params)}
    updates, state = tx.update(grads, state, params, **{k: v for k, v in offers.items() if k in extras}, **more)
    return optax.apply_updates(params, updates), state, updates

  return step


def avals(tree):
  """Structure, and shape, dtype and weak type of each leaf."""
  leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda x: x, tree))
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def raw(tree):
  typed = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, raw(a), raw(b))


def keeps(tx: Any, extras: Any, params: Any = PARAMS, loss: Callable = squares, **more: Any) -> None:
  """A step changes neither structure, shape, dtype nor weak type of params and state; nor does it need values."""
  state = jax.eval_shape(tx.init, params)
  assert avals(jax.eval_shape(one_step(tx, extras, loss, **more), params, state)[:2]) == avals((params, state))


def wrapped(wrap: Callable[[Any], Any], *more: str) -> Callable[[str], None]:
  """The promise that a wrapper of optax accepts the row; ``more``: extra arguments that the wrapper needs."""
  return lambda name: keeps(wrap(transform(name)), ROWS[name].extras | set(more))


def unknown_extra_arguments(name: str) -> None:
  keeps(transform(name), ROWS[name].extras, unknown=object(), another=None)


def strong_types(name: str) -> None:
  """So the state can be the carry of a scan, the operand of a cond, and nothing is ever compiled twice."""
  keeps(transform(name), ROWS[name].extras)
  assert not any(weak for _, _, weak in avals(jax.eval_shape(transform(name).init, PARAMS))[1])


def no_recompilation(name: str) -> None:
  case = compiled(name)
  case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 3)
  assert len(case.traces) == 1


def scan(name: str) -> None:
  step = one_step(transform(name), ROWS[name].extras)
  carry = jax.eval_shape(lambda: (PARAMS, transform(name).init(PARAMS)))
  body = lambda carry, _: (step(*carry)[:2], None)
  assert avals(jax.eval_shape(lambda c: jax.lax.scan(body, c, length=3)[0], carry)) == avals(carry)


def with_holes(name: str) -> frozenset[str]:
  """`value_fn` cannot be called with holes in the params; `value` can be given in its place."""
  extras = ROWS[name].extras
  return extras - {"value_fn"} | {"value"} if {"value", "value_fn"} <= extras else extras


def masked(name: str) -> None:
  keeps(optax.masked(transform(name), {"b": False, "w": True}), with_holes(name))


def partition(name: str) -> None:
  parts = {"ours": transform(name), "theirs": optax.sgd(0.1)}
  keeps(optax.partition(parts, {"b": "theirs", "w": "ours"}), with_holes(name))


def lookahead(name: str, reset_state: bool = False) -> None:
  tx = optax.lookahead(transform(name), sync_period=2, slow_step_size=0.5, reset_state=reset_state)
  params = optax.LookaheadParams.init_synced(PARAMS)

  def step(params, state):
    updates, state = tx.update(params.fast, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, params)
  assert avals(jax.eval_shape(step, params, state)) == avals((params, state))


def map_params(name: str) -> None:
  """optax calls `init` on a tree without leaves and maps over the result."""
  state = transform(name).init(PARAMS)
  same(optax.tree.map_params(transform(name), lambda x: x, state), state)


def floating(state: Any) -> set[Any]:
  return {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}


def dtype_kept(dtype: Any) -> Callable[[str], None]:
  """Updates have the dtype of the gradients; the state is float32 at least."""

  def promise(name: str) -> None:
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    keeps(transform(name), ROWS[name].extras, params)
    if name != "chain":  # its ema is optax's, in the dtype of the params
      assert floating(jax.eval_shape(transform(name).init, params)) <= {jnp.dtype(jnp.float32)}

  return promise


def x64(name: str) -> None:
  """float64 params have float64 updates, and no float32 in what is like the params."""
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), PARAMS)
    tx = ROWS[name].make()
    keeps(tx, ROWS[name].extras, params)
    arrays = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.ndim]
    assert jnp.dtype(jnp.float32) not in floating(arrays)


def numpy_inputs(name: str) -> None:
  arrays = jax.tree.map(np.asarray, PARAMS)
  if name not in OPTIMIZERS:
    keeps(transform(name), ROWS[name].extras, arrays)
    return
  case = compiled(name)
  state = case.tx.init(arrays)
  same(state, case.tx.init(PARAMS))
  same(case.run(arrays, state, [CALM]), case.run(PARAMS, state, [CALM]))
  assert len(case.traces) == 1


@flax.struct.dataclass
class Struct:
  b: jax.Array
  w: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dataclass:
  b: jax.Array
  w: jax.Array


class Module(nnx.Module):
  def __init__(self):
    self.b, self.w = nnx.Param(PARAMS["b"]), nnx.Param(PARAMS["w"])


CONTAINERS = {
  "frozen dict": flax.core.freeze,
  "dataclass": lambda params: Dataclass(**params),
  "flax.struct": lambda params: Struct(**params),
  "nnx state": lambda params: nnx.state(Module(), nnx.Param),
}


def container(kind: str) -> Callable[[str], None]:
  """Params of another container: the leaves, and so the steps, are the same."""

  def promise(name: str) -> None:
    tx, params = transform(name), CONTAINERS[kind](PARAMS)
    inputs = {"layer_inputs": {"w": layer_inputs(PARAMS)["w"]}} if "layer_inputs" in ROWS[name].extras else {}
    keeps(tx, ROWS[name].extras - {"layer_inputs"}, params, **inputs)
    shapes = lambda params: avals(jax.eval_shape(tx.init, params))[1]
    assert shapes(params) == shapes(PARAMS)

  return promise


def init_from_shapes(name: str) -> None:
  """Under eval_shape, on jax.ShapeDtypeStruct, and inside vmap: the same state."""
  tx = transform(name)
  expected = avals(tx.init(PARAMS))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
  assert avals(jax.eval_shape(tx.init, PARAMS)) == avals(jax.eval_shape(tx.init, shapes)) == expected
  assert avals(tx.init(shapes)) == expected
  many = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
  stacked = jax.eval_shape(jax.vmap(tx.init), many)
  assert [x.shape[1:] for x in jax.tree.leaves(stacked)] == [shape for shape, _, _ in expected[1]]


class Injected(NamedTuple):
  """Attributes:
  make: constructor.
  numbers: those that are traced, every one it has.
  static: what decides shapes or is a function.
  """

  make: Callable
  numbers: dict[str, Any]
  static: tuple[str, ...] = ()


INJECTED = {
  "psgd whitening": Injected(
    dpo.psgd,
    {"learning_rate": 0.1, "b1": 0.9, "weight_decay": 1e-2, "damping": 1e-6},
    ("preconditioner", "curvature", "every", "mask", "key"),
  ),
  "dpsgd": Injected(
    dpo.dpsgd,
    {"learning_rate": 0.1, "max_update_norm": 0.3, "damping": 0.8, "factor": 0.9},
    ("preconditioner", "curvature", "every", "judge_every", "key", "bounds", "model", "reject"),
  ),
  "dpsgd, its factors": Injected(
    lambda average, eta, step_size: dpo.dpsgd(0.1, dpo.damped_kron(average=average, eta=eta, step_size=step_size)),
    {"average": 0.6, "eta": 1e-4, "step_size": 0.2},
  ),
  "bnp": Injected(
    dpo.bnp,
    {"learning_rate": 0.1, "decay": 0.5, "damping": 1e-2, "relative_damping": 0.1, "b1": 0.9, "weight_decay": 1e-4},
    ("q2", "every", "fallback", "debias", "within_batch", "average_calls", "layers"),
  ),
  "gls": Injected(
    functools.partial(dpo.gls, fallback=optax.sgd(0.1)),
    {"learning_rate": 0.1, "decay": 0.5, "damping": 1e-2, "b1": 0.9, "weight_decay": 1e-4},
    ("match", "every", "fallback", "max_size", "layers"),
  ),
  "levenberg_marquardt": Injected(
    functools.partial(dpo.levenberg_marquardt, optax.sgd(0.1)),
    {"damping": 0.5, "factor": 0.9, "reject_factor": 2.0},
    ("thresholds", "bounds", "every", "model", "reject"),
  ),
  "chain": Injected(
    lambda step_size, init_scale, damping: optax.chain(
      dpo.scale_by_preconditioner(dpo.diagonal(step_size, init_scale), dpo.newton(), damping=damping),
    ),
    {"step_size": 0.2, "init_scale": 0.5, "damping": 0.1},
  ),
  "lra": Injected(
    lambda step_size: dpo.scale_by_preconditioner(dpo.lra(step_size=step_size), dpo.whitening()), {"step_size": 0.2}
  ),
  "clipped_learning_rate": Injected(dpo.clipped_learning_rate, {"learning_rate": 0.1, "max_norm": 0.5}),
  "add_gradient_norm_penalty": Injected(dpo.add_gradient_norm_penalty, {"strength": 0.1}, ("preconditioned",)),
  "sharpness_aware": Injected(dpo.penalties.sharpness_aware, {"radius": 0.1}, ("preconditioned", "normalize")),
  "add_l1_penalty": Injected(dpo.penalties.add_l1_penalty, {"strength": 0.1}, ("power",)),
  "proximal_l1": Injected(dpo.penalties.proximal_l1, {"strength": 0.1, "learning_rate": 0.1}, ("power", "mask")),
  "proximal_l2": Injected(dpo.penalties.proximal_l2, {"strength": 0.1, "learning_rate": 0.1}, ("power", "mask")),
}


def inject_hyperparams(name: str) -> None:
  """No Python branch on a number; the other rows are asked with a factor behind them."""
  scaled = Injected(lambda scale: optax.chain(transform(name), optax.scale(scale)), {"scale": 0.5})
  make, numbers, static = INJECTED.get(name, scaled)
  tx = optax.inject_hyperparams(make, static_args=static)(**numbers)
  keeps(tx, ROWS[name].extras)
  assert set(jax.eval_shape(tx.init, PARAMS).hyperparams) >= set(numbers)


def same_key_same_run(name: str) -> None:
  """Bit for bit; and another key is another run."""
  case = compiled(name)
  first, second = (case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 5) for _ in range(2))
  same(first, second)
  if case.row.takes_key:
    other, *_ = case.run(PARAMS, case.row.make(key=1).init(PARAMS), [CALM] * 5)
    drawn = "hvp" in case.row.extras  # whitening with v integrated out draws nothing but damping noise of 1e-9
    assert not drawn or not np.array_equal(other["w"], first[0]["w"])
    same(case.row.make(key=jax.random.key(0)).init(PARAMS), case.tx.init(PARAMS))


def loss_falls(name: str) -> None:
  case = compiled(name)
  params, *_ = case.run(PARAMS, case.tx.init(PARAMS), [CALM] * 60)
  assert loss(params) < 0.7 * loss(PARAMS)


def weak_scalars(name: str) -> None:
  """`optax.apply_updates` makes the params strong at the first step; nothing of ours changes, then or later."""
  step, params = one_step(transform(name), ROWS[name].extras), {"temperature": jnp.asarray(0.5)}
  assert params["temperature"].weak_type
  state = jax.eval_shape(transform(name).init, params)
  moved, after, _ = jax.eval_shape(step, params, state)
  again = jax.eval_shape(step, moved, after)[:2]
  assert avals(jax.eval_shape(step, *again)[:2]) == avals(again)
  if name != "chain":  # its ema is optax's, made like the params
    assert avals(after) == avals(state) == avals(again[1])


ODD_TREES = {
  "empty tree": {},
  "None leaf": {"w": PARAMS["w"], "n": None},
  "zero-size leaf": {"w": PARAMS["w"], "z": jnp.zeros((0, 3))},
  "only a zero-size leaf": {"z": jnp.zeros((0, 3))},
  "scalar": jnp.float32(0.5),
  "tuple": (jnp.float32(0.5), [PARAMS["b"], ()]),
}


def odd_tree(kind: str) -> Callable[[str], None]:
  return lambda name: keeps(transform(name), ROWS[name].extras, ODD_TREES[kind])


def copied(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def shared_buffers(*trees: Any) -> list[str]:
  """The leaves whose buffer is that of another leaf."""
  arrays = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(trees) if isinstance(x, jax.Array) and x.size]
  at = [x.unsafe_buffer_pointer() for _, x in arrays]
  return [jax.tree_util.keystr(path) for (path, _), pointer in zip(arrays, at, strict=True) if at.count(pointer) > 1]


def donation(name: str) -> None:
  """Params and state are eaten by the first step, and what it returns by the second."""
  tx, params = transform(name), copied(PARAMS)
  state = tx.init(params)
  assert not shared_buffers(params, state)
  whole = one_step(tx, ROWS[name].extras)
  step = jax.jit(lambda *carry: whole(*carry)[:2], donate_argnums=(0, 1))
  for _ in range(2):
    params, state = step(params, state)
    assert not shared_buffers(params, state)


def filled(state: Any) -> Any:
  """A state of the same shapes and dtypes, as if it had seen much."""
  rng = np.random.default_rng(0)

  def leaf(x):
    values = rng.standard_normal(x.shape) * 100
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
      return jnp.asarray(rng.integers(0, 2**32, x.shape), x.dtype)
    return jnp.asarray(values, x.dtype)

  return jax.tree.map(leaf, state)


def identical(a: Any, b: Any) -> None:
  """Bit for bit, with dtypes."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True):
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def flax_serialization(name: str) -> None:
  fresh = transform(name).init(PARAMS)
  state = filled(fresh)
  identical(flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state)), state)


def numpy_serialization(name: str) -> None:
  """Each leaf by `np.save(np.asarray(leaf))`, as `eqx.tree_serialise_leaves` writes and reads them."""

  def again(x):
    file = io.BytesIO()
    np.save(file, np.asarray(x))
    file.seek(0)
    return jnp.asarray(np.load(file, allow_pickle=False))

  state = filled(transform(name).init(PARAMS))
  identical(jax.tree.map(again, state), state)


def debug_nans(name: str) -> None:
  """Not even in passing: without `jit` every intermediate value is looked at. Nor is an infinity kept in the state."""
  tx = transform(name)
  step = one_step(tx, ROWS[name].extras, loss)
  with jax.debug_nans(True):
    for run in (step, jax.jit(step)):
      params, state = PARAMS, tx.init(PARAMS)
      for _ in range(2):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
        params, state, _ = run(params, state)


def strictly(context: Callable[[Any], Any], setting: Any) -> Callable[[str], None]:
  """A promise that `init` and a step are traced under a setting of JAX by which it refuses what it otherwise mends."""

  def promise(name: str) -> None:
    tx = ROWS[name].make()
    with context(setting):
      keeps(tx, ROWS[name].extras, loss=loss)
      tx.init(PARAMS)

  return promise


@contextlib.contextmanager
def compilations():
  """A list of what JAX compiles inside: `jax.log_compiles`, as messages."""
  found: list[str] = []

  class Listener(logging.Handler):
    def emit(self, record):
      if "Finished XLA compilation" in record.getMessage():
        found.append(record.getMessage())

  logger, listener = logging.getLogger("jax"), Listener()
  logger.addHandler(listener)
  try:
    with jax.log_compiles():
      yield found
  finally:
    logger.removeHandler(listener)


def unjitted_loop(name: str) -> None:
  """After two steps, which warm the loss too, nothing is compiled any more, and so nothing is kept."""
  tx = transform(name)
  step, params, state = one_step(tx, ROWS[name].extras, loss), PARAMS, tx.init(PARAMS)
  for _ in range(2):
    params, state, _ = step(params, state)
  with compilations() as found:
    for _ in range(2):
      params, state, _ = step(params, state)
  assert not found, found


PLAIN_FORMS = {
  "levenberg_marquardt": functools.partial(dpo.levenberg_marquardt, optax.sgd(0.1)),
  "chain": functools.partial(dpo.scale_by_preconditioner, dpo.diagonal(), dpo.newton(), momentum=optax.ema(0.9)),
  "gradient penalty": functools.partial(dpo.add_gradient_norm_penalty, 0.01),
  "clipped_learning_rate": functools.partial(dpo.clipped_learning_rate, 0.1),
  "add_gradient_norm_penalty": functools.partial(dpo.add_gradient_norm_penalty, 0.1),
  "sharpness_aware": functools.partial(dpo.penalties.sharpness_aware, 0.1),
  "add_l1_penalty": functools.partial(dpo.penalties.add_l1_penalty, 0.1),
  "proximal_l1": functools.partial(dpo.penalties.proximal_l1, 0.1, 0.1),
  "proximal_l2": functools.partial(dpo.penalties.proximal_l2, 0.1, 0.1),
  "clip_output_change": functools.partial(dpo.layers.clip_output_change, 0.1),
  "clip_spikes": functools.partial(dpo.clip_spikes, 8.0),
}
"""Constructors with their arguments, of the rows that are not made by one themselves."""


def plain_form(name: str) -> functools.partial:
  made = PLAIN_FORMS.get(name, ROWS[name].make)
  given = functools.partial(dpo.scale_by_preconditioner, dpo.dense(), dpo.whitening())
  return made if isinstance(made, functools.partial) else given


def inject_plainly(name: str) -> None:
  """`optax.inject_hyperparams(constructor)(…)` with the arguments of the plain run and no `static_args`: that run."""
  make = plain_form(name)
  injected = optax.inject_hyperparams(make.func)(*make.args, **make.keywords)
  runs = []
  for tx in (make(), injected):
    step, params, state = jax.jit(one_step(tx, ROWS[name].extras, loss)), PARAMS, tx.init(PARAMS)
    for _ in range(3):
      params, state, _ = step(params, state)
    runs.append(params)
  assert set(state.hyperparams) >= {"learning_rate"} & set(inspect.signature(make.func).parameters)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *runs)


def explicit_axes(name: str) -> None:
  """Params that lie on a mesh of explicit axes, `jax.make_mesh`'s own: a step, or an error that says what to type."""
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
  put = lambda spec: jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, spec))
  tx = ROWS[name].make()
  extras = ROWS[name].extras
  with jax.set_mesh(mesh):
    keeps(tx, extras, put(jax.sharding.PartitionSpec()))
    params = put(jax.sharding.PartitionSpec("x"))
    try:
      jax.eval_shape(one_step(tx, extras), params, jax.eval_shape(tx.init, params))
    except ValueError as error:
      assert re.search(r"AxisType\.Auto.*sharded", str(error)), error


def wide_numbers(name: str) -> None:
  """bf16 in, bf16 out, though each number is a float32 array, as a schedule's value or an injected one is."""
  array = lambda x: jnp.float32(x) if isinstance(x, float) else x
  make = plain_form(name)
  numbers = make.keywords | (INJECTED[name].numbers if name in INJECTED and INJECTED[name].make == make.func else {})
  first = next(iter(inspect.signature(make.func).parameters))
  args = () if first in numbers else make.args
  tx = make.func(*map(array, args), **{k: array(v) for k, v in numbers.items()})
  params = optax.tree.cast(PARAMS, jnp.bfloat16)
  *_, updates = jax.eval_shape(one_step(tx, ROWS[name].extras), params, jax.eval_shape(tx.init, params))
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def rosenbrock(params):
  (x, y) = params["b"]
  return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def parabola(target: Any) -> Callable[[Any], jax.Array]:
  return lambda params: sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, target)))


class Problem(NamedTuple):
  """Attributes:
  start, end: params and minimum.
  loss: params -> scalar.
  """

  start: Any
  end: Any
  loss: Callable[[Any], jax.Array]


def bowl(start: dict[str, Any], end: dict[str, Any]) -> Problem:
  start, end = (jax.tree.map(jnp.float32, tree, is_leaf=lambda x: isinstance(x, list)) for tree in (start, end))
  return Problem(start, end, parabola(end))


PROBLEMS = {
  "parabola": bowl({"b": [-1, 10, 1]}, {"b": [1, -1, 1]}),
  "Rosenbrock": Problem({"b": jnp.zeros(2)}, {"b": jnp.ones(2)}, rosenbrock),
  "matrix parabola": bowl({"w": [[0, 0], [0, 0]]}, {"w": [[3, -2], [1, 4]]}),
  "mixed tensors": bowl({"b": [0, 0, 0], "w": [[0, 0], [0, 0]]}, {"b": [1, -1, 2], "w": [[1, 0], [-1, 1]]}),
}
"""Those of optax's own suite, with its tolerance, its starting points and at most its 30000 steps."""

LENGTHS = {"Rosenbrock": 30_000}

CONVERGING: dict[str, Callable[[], Any]] = {
  "psgd whitening": lambda: dpo.psgd(1e-2),
  "psgd newton": lambda: dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=1),
  "levenberg_marquardt": lambda: dpo.levenberg_marquardt(optax.sgd(1e-3)),
  "chain": lambda: optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=optax.ema(0.9)),
    optax.clip_by_global_norm(1.0),
    optax.sgd(0.1),
  ),
  "gradient penalty": lambda: optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=dpo.add_gradient_norm_penalty(1e-5)),
    optax.clip_by_global_norm(1.0),
    optax.sgd(0.1),
  ),
  "bnp": lambda: dpo.bnp(1e-3),
  "gls": lambda: dpo.gls(0.1, fallback=optax.sgd(1e-3)),
  "sgd_ph": lambda: dpo.sgd_ph(0.05, first_leaf, tau=1.0, damping=0.1),
}
"""Learning rates, one for all four problems; the other rows converge as they stand in the table."""


def converges(problem: str) -> Callable[[str], None]:
  def promise(name: str) -> None:
    start, end, loss = PROBLEMS[problem]
    tx = CONVERGING.get(name, ROWS[name].make)()
    body = lambda carry, _: (one_step(tx, ROWS[name].extras, loss)(*carry)[:2], None)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=LENGTHS.get(problem, 3000))[0][0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-2, atol=3e-2), run((start, tx.init(start))), end)

  return promise


PROMISES: dict[str, Callable[[str], None]] = {
  "unknown extra arguments are ignored": unknown_extra_arguments,
  "structure, shape, dtype and weak type stay": strong_types,
  "the second call does not compile": no_recompilation,
  "same key, same run, bit for bit": same_key_same_run,
  "the loss falls": loss_falls,
  "lax.scan": scan,
  "inject_hyperparams": inject_hyperparams,
  "MultiSteps": wrapped(lambda tx: optax.MultiSteps(tx, every_k_schedule=2)),
  "chain": wrapped(lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5))),
  "named_chain": wrapped(lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx))),
  "masked": masked,
  "partition": partition,
  "apply_if_finite": wrapped(lambda tx: optax.apply_if_finite(tx, 5)),
  "conditionally_transform": wrapped(
    lambda tx: optax.conditionally_transform(tx, lambda step, **_: step % 2 == 0, forward_extra_args=True)
  ),
  "flatten": lambda name: keeps(optax.flatten(transform(name)), ROWS[name].extras, loss=loss),
  "schedule_free": wrapped(lambda tx: optax.contrib.schedule_free(tx, 0.1)),
  "reduce_on_plateau": wrapped(lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()), "value"),
  "mechanize": wrapped(optax.contrib.mechanize),
  "lookahead": lookahead,
  "lookahead(reset_state=True)": functools.partial(lookahead, reset_state=True),
  "tree.map_params": map_params,
  **{f"{jnp.dtype(d).name} params": dtype_kept(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)},
  "x64": x64,
  "numpy arrays": numpy_inputs,
  **{kind: container(kind) for kind in CONTAINERS},
  "init from shapes": init_from_shapes,
  "donation of a fresh state": donation,
  "flax serialization": flax_serialization,
  "serialization of each leaf by numpy": numpy_serialization,
  "jax_debug_nans": debug_nans,
  "rank promotion raise": strictly(jax.numpy_rank_promotion, "raise"),
  "strict dtype promotion": strictly(jax.numpy_dtype_promotion, "strict"),
  "a loop that is not jitted compiles once": unjitted_loop,
  "inject_hyperparams, plain form": inject_plainly,
  "explicit mesh axes": explicit_axes,
  "bfloat16 updates from float32 numbers": wide_numbers,
  "weakly typed scalars": weak_scalars,
  **{kind: odd_tree(kind) for kind in ODD_TREES},
  **{f"converges: {problem}": converges(problem) for problem in PROBLEMS},
}
RUNS = ("the second call does not compile", "same key, same run, bit for bit", "the loss falls")
"""Promises of optimizers, not of single transforms."""
SLOW = tuple(f"converges: {problem}" for problem in PROBLEMS if problem != "mixed tensors")


def optimizes(promise: str) -> bool:
  return promise in RUNS or promise.startswith("converges")


class Excuse(NamedTuple):
  """Attributes:
  promise: which promises, as a regular expression.
  about: (name, row) -> whether it is about this row.
  error: what comes in place of a result.
  says: what its message says, as a regular expression.
  reason: why, in the table.
  """

  promise: str
  about: Callable[[str, Row], bool]
  error: type[Exception] | tuple[type[Exception], ...]
  says: str
  reason: str

  def covers(self, promise: str, name: str) -> bool:
    return bool(re.fullmatch(self.promise, promise)) and self.about(name, ROWS[name])


EXCUSES = [
  Excuse(
    r"lookahead.*",
    lambda name, row: bool(row.extras),
    ValueError,
    r"`update` received n(o|either) `",
    "`optax.lookahead` hands no extra argument on, and without it there is no step",
  ),
  Excuse(
    "flatten",
    lambda name, row: bool({"hvp", "value_fn"} & row.extras),
    (ValueError, IndexError, TypeError),
    r"structure of the parameters|index",
    "the loss and its Hessian take the tree, not one vector",
  ),
  Excuse(
    "flatten",
    lambda name, row: "layer_inputs" in row.extras and name != "gls",
    ValueError,
    "no such layer, only a single array",
    "one vector has no layers",
  ),
  Excuse(
    "strict dtype promotion",
    lambda name, row: name == "chain",
    ValueError,
    "float'>\", 'int32'",
    "`optax.ema` raises a float to an integer power, and `optax.adam` with it",
  ),
  Excuse(
    "masked|partition",
    lambda name, row: "value_fn" in row.extras and "value" not in row.extras,
    ValueError,
    "evaluates the loss at all params.*Put it outside",
    "it evaluates the loss, which needs all params",
  ),
]


def excuse(promise: str, name: str) -> Excuse | None:
  return next((x for x in EXCUSES if x.covers(promise, name)), None)


def cells() -> list[tuple[str, str]]:
  """(promise, row) of the whole table."""
  return [(p, name) for p, name in itertools.product(PROMISES, ROWS) if name in OPTIMIZERS or not optimizes(p)]


class Broken(AssertionError):
  """A cell that is not what the table says."""


def ask(promise: str, name: str) -> str:
  """ "holds", or the reason why it cannot; raises if the table is wrong."""
  excused = excuse(promise, name)
  if excused is None:
    PROMISES[promise](name)
    return "holds"
  try:
    PROMISES[promise](name)
  except excused.error as error:
    if re.search(excused.says, str(error)):
      return excused.reason
    raise Broken(f"{name} breaks {promise!r} with another message than {excused.says!r}: {error}") from error
  raise Broken(f"{name} keeps {promise!r}: take its excuse out of the table")
