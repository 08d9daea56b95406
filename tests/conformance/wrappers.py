# SPDX-License-Identifier: Apache-2.0
"""What the wrappers of Optax, and a loop under jit, ask of a transform."""

import contextlib
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.conformance.injected import INJECTED, plain_form
from tests.conformance.rows import CALM, ROWS, avals, keeps, one_step, same, transform
from tests.table import PARAMS, compiled, loss


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
