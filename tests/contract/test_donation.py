# SPDX-License-Identifier: Apache-2.0
"""Every training loop that gives its state away (`donate_argnums`) works, from the first step on.

XLA refuses a buffer that is donated twice, so no two leaves of a state may share one. `tests.conformance` asks each row
of the table for it; here is what lies around a transform: a preconditioner alone, a wrapper, a training loop, a
checkpoint.
"""

import io

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import dpsgd_optax as dpo
from dpsgd_optax import training
from tests.conformance.rows import ROWS, one_step, transform
from tests.conformance.trees import copied, shared_buffers
from tests.table import OPTIMIZERS, PARAMS, PRECONDITIONERS


def eaten(tree):
  """The tree through a program that donates all of it."""
  return jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree), donate_argnums=0)(tree)


TREES = {
  "matrix and vector": PARAMS,
  "equal shapes, a scalar, a stack": {
    "s": jnp.float32(1.0),
    "u": jnp.ones(2),
    "v": jnp.ones(2),
    "k": jnp.ones((2, 2, 3)),
  },
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_no_two_leaves_of_a_fresh_preconditioner_share_a_buffer(name, tree):
  params = TREES[tree]
  state = PRECONDITIONERS[name]().init(params)
  assert not shared_buffers(state, params)
  eaten(state)


WRAPPED = {
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
  "levenberg_marquardt of MultiSteps": lambda tx: dpo.levenberg_marquardt(optax.MultiSteps(tx, 2)),
  "partition": lambda tx: optax.partition({"a": tx, "b": optax.adam(0.1)}, {"w": "a", "b": "b"}),
  "two in a chain": lambda tx: optax.chain(tx, dpo.clipped_learning_rate(0.1), dpo.penalties.proximal_l2(0.1, 0.1)),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", ["psgd whitening", "dpsgd", "sgd_ph"])
def test_no_two_leaves_share_a_buffer_inside_a_wrapper(name, wrapper):
  params = copied(PARAMS)
  state = WRAPPED[wrapper](transform(name)).init(params)
  assert not shared_buffers(state, params)


@pytest.mark.parametrize("name", ROWS)
def test_no_two_leaves_share_a_buffer_after_a_jitted_init(name):
  params = copied(PARAMS)
  state = jax.jit(transform(name).init)(params)
  assert not shared_buffers(state, params)
  eaten((params, state))


def by_flax(tx, params, state):
  return flax.serialization.from_bytes((params, tx.init(params)), flax.serialization.to_bytes((params, state)))


def by_numpy(tx, params, state):
  """Arrays of a file in memory, as Orbax and `np.load` hand them out."""
  leaves, treedef = jax.tree.flatten((params, state))
  file = io.BytesIO()
  np.savez(file, *map(np.asarray, leaves))
  file.seek(0)
  return treedef.unflatten([jnp.asarray(x) for x in np.load(file).values()])


@pytest.mark.parametrize("restore", [by_flax, by_numpy])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_can_be_donated(name, restore):
  tx, params = transform(name), copied(PARAMS)
  params, state = restore(tx, params, tx.init(params))
  assert not shared_buffers(params, state)
  eaten((params, state))


@pytest.mark.parametrize("name", ["psgd whitening", "psgd newton", "dpsgd"])
def test_the_sharded_optimizer_can_be_donated(name):
  """On a mesh of one device, where `with_sharding_constraint` copies nothing."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  row = ROWS[name]
  tx = dpo.sharded(row.make(), mesh)
  params = jax.device_put(copied(PARAMS), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  state = tx.init(params)
  assert not shared_buffers(params, state)
  step = one_step(tx, row.extras)
  run = jax.jit(lambda *carry: step(*carry)[:2], donate_argnums=(0, 1))
  for _ in range(2):
    params, state = run(params, state)


@pytest.mark.parametrize("make", [lambda lam, key: dpo.dpsgd(0.1, damping=lam, bounds=(1e-5, 2.0), key=key)])
def test_arrays_that_were_given_to_the_constructor_are_not_donated(make):
  """λ and key of the caller stay alive: a second `init` finds them."""
  lam, key = jnp.float32(1.0), jax.random.key(3)
  tx = make(lam, key)
  for _ in range(2):
    eaten(tx.init(PARAMS))
  assert float(lam) == 1 and jax.random.key_data(key).shape == (2,)


def loss_of(apply, params):
  return jnp.mean((apply(params, jnp.ones((4, 3))) - 1.0) ** 2)


def test_our_train_state_can_be_donated_from_the_first_step():
  model = nn.Dense(2)
  params = model.init(jax.random.key(0), jnp.ones((4, 3)))["params"]
  apply = lambda params, x: model.apply({"params": params}, x)
  state = training.TrainState.create(apply_fn=apply, params=params, tx=dpo.dpsgd(0.1))

  def step(state):
    loss = lambda p: loss_of(state.apply_fn, p)
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads, extra_args={"value": value, "value_fn": loss}), value

  run, values = jax.jit(step, donate_argnums=0), []
  for _ in range(3):
    state, value = run(state)
    values.append(float(value))
  assert values[-1] < values[0]


@pytest.mark.parametrize("donated", [(0, 1), (1,)])
def test_an_nnx_optimizer_can_be_donated_from_the_first_step(donated):
  net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, dpo.psgd(0.01, b1=0.9), wrt=nnx.Param)

  def step(net, optimizer):
    value, grads = nnx.value_and_grad(lambda net: jnp.mean((net(jnp.ones((4, 3))) - 1.0) ** 2))(net)
    optimizer.update(net, grads)
    return value

  run = nnx.jit(step, donate_argnums=donated)
  values = [float(run(net, optimizer)) for _ in range(3)]
  assert values[-1] < values[0]
