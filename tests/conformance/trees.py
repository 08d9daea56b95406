# SPDX-License-Identifier: Apache-2.0
"""Dtypes, containers, odd trees, buffers and serialization."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.conformance.rows import CALM, ROWS, avals, keeps, one_step, same, transform
from tests.table import OPTIMIZERS, PARAMS, compiled, layer_inputs


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
