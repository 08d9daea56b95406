# SPDX-License-Identifier: Apache-2.0
"""Parameters as the frameworks hold them: nnx states and their variables, frozen dicts, models that are pytrees."""

import dataclasses
import functools
import itertools
from typing import Any

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpsgd_optax as dpo
from dpsgd_optax import training
from dpsgd_optax._trees.paths import names
from dpsgd_optax._trees.selection import spread

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
X = jax.random.normal(jax.random.key(0), (32, 4))
Y = jnp.sin(X.sum(-1, keepdims=True))


class Net(nnx.Module):
  """What changes when it is called: statistics, and the counts of the keys."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.second = nnx.Linear(8, 1, rngs=rngs)

  def __call__(self, x):
    return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def split(net):
  """The variables of the parameters, and the loss of them: it also returns what else has changed."""
  graph, params, rest = nnx.split(net, nnx.Param, ...)

  def loss(p):
    model = nnx.merge(graph, p, rest, copy=True)
    return jnp.mean((model(X) - Y) ** 2), nnx.state(model, nnx.Not(nnx.Param))

  return params, loss


def train(tx, extras, steps=12, donate=True):
  """The README's loop; extras: (loss, value, variables of the parameters) -> arguments of `update`."""
  net = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

  @functools.partial(nnx.jit, donate_argnums=(0, 1) if donate else ())
  def step(net, optimizer):
    params, loss = split(net)
    (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
    optimizer.update(net, grads, **extras(lambda p: loss(p)[0], value, params))
    nnx.update(net, after)
    return value

  values = [float(step(net, optimizer)) for _ in range(steps)]
  return values, net


KINDS = jax.tree_util.Partial(lambda tree: jax.tree.map(lambda p: "kernel" if p.ndim > 1 else "bias", tree))
NNX = {
  "dpsgd, value_fn": (lambda: dpo.dpsgd(0.1), lambda f, v, p: dict(value=v, value_fn=f)),
  "dpsgd, hvp": (lambda: dpo.dpsgd(0.1), lambda f, v, p: dict(value=v, value_fn=f, hvp=dpo.hvp(f, p))),
  "newton": (lambda: dpo.psgd(0.05, dpo.kron(), dpo.newton()), lambda f, v, p: dict(hvp=dpo.hvp(f, p))),
  "in a partition": (
    lambda: optax.partition({"kernel": dpo.dpsgd(0.1), "bias": optax.adam(1e-2)}, KINDS),
    lambda f, v, p: dict(value=v, value_fn=f, hvp=dpo.hvp(f, p)),
  ),
  "sgd_ph": (
    lambda: dpo.sgd_ph(0.05, {"first": False, "norm": True, "second": {"kernel": False, "bias": False}}),
    lambda f, v, p: dict(hvp=dpo.hvp(f, p)),
  ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", NNX)
def test_an_nnx_model_with_batch_norm_and_dropout_is_trained_with_donated_buffers(name):
  """By `nnx.jit`; products of the state of `nnx.split` as it is, a mask as a plain dict."""
  make, extras = NNX[name]
  values, net = train(make(), extras)
  assert values[-1] < 0.8 * values[0] and np.all(np.isfinite(values))
  assert np.any(net.norm.mean[...] != 0)


def test_the_product_of_variables_is_that_of_their_arrays():
  """The same run, bit for bit, with `hvp` at the state of `nnx.split` and at `nnx.as_pure` of it."""
  make = lambda: dpo.dpsgd(0.1)
  values = [
    train(make(), lambda f, v, p: dict(value=v, value_fn=f, hvp=dpo.hvp(f, of(p))), steps=6)[0]
    for of in (lambda p: p, nnx.as_pure)
  ]
  assert values[0] == values[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  kernel: Any
  bias: Any


def containers():
  """One and the same two leaves."""
  kernel, bias = jax.random.normal(jax.random.key(1), (4, 1)), jnp.array([0.3])
  plain = {"layer": {"kernel": kernel, "bias": bias}}
  variables = nnx.State({"layer": {"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}})
  return {
    "dict": plain,
    "frozen dict": flax.core.freeze(plain),
    "nnx arrays": nnx.as_pure(variables),
    "nnx variables": variables,
    "dataclass": {"layer": Layer(kernel, bias)},
  }


CONTAINERS = list(containers())


def leaf_of(tree, name):
  (found,) = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if names(path)[-1] == name]
  return found


def loss_of(tree):
  return jnp.mean((jnp.tanh(X @ leaf_of(tree, "kernel") + leaf_of(tree, "bias")) - Y) ** 2)


PRODUCTS = {
  "hvp": lambda f, p: dpo.hvp(f, p),
  "hvp_finite_difference": lambda f, p: dpo.hvp_finite_difference(f, p),
  "ggnvp": lambda f, p: dpo.ggnvp(lambda z: z, p, outputs=f),
  "value_and_grad_and_hvp": lambda f, p: lambda v: dpo.value_and_grad_and_hvp(f)(p, v)[2],
  "value_and_grad_then_hvp": lambda f, p: dpo.value_and_grad_then_hvp(f)(p)[2],
}


PAIRS = [("hvp", *pair) for pair in itertools.permutations(CONTAINERS, 2)]
PAIRS += [(name, *pair) for name in PRODUCTS if name != "hvp" for pair in itertools.permutations(CONTAINERS[2:4])]


@pytest.mark.parametrize(("name", "params", "vector"), PAIRS)
def test_a_vector_may_come_in_another_container_than_the_parameters(name, params, vector):
  """The product has the structure of the vector, and the numbers of the product of dicts."""
  trees = containers()
  product = PRODUCTS[name](loss_of, trees[params])(trees[vector])
  assert jax.tree.structure(product) == jax.tree.structure(trees[vector])
  expected = PRODUCTS[name](loss_of, trees["dict"])(trees["dict"])
  for leaf in ("kernel", "bias"):
    close(leaf_of(product, leaf), leaf_of(expected, leaf), rtol=1e-3)


@pytest.mark.parametrize("params", CONTAINERS[1:])
def test_a_hole_of_one_container_is_the_hole_of_another(params):
  """H_bb v_b, and the hole where it was, above the leaves too."""
  trees, hole = containers(), optax.MaskedNode()
  vector = {"layer": {"kernel": hole, "bias": jnp.ones(1)}}
  product = dpo.hvp(loss_of, trees[params])(vector)
  assert product["layer"]["kernel"] == hole
  alone = {"layer": {"kernel": jnp.zeros((4, 1)), "bias": jnp.ones(1)}}
  close(product["layer"]["bias"], dpo.hvp(loss_of, trees["dict"])(alone)["layer"]["bias"])
  assert dpo.hvp(loss_of, trees[params])({"layer": hole}) == {"layer": hole}


@pytest.mark.parametrize("params", CONTAINERS[3:])
def test_other_names_are_still_refused(params):
  vector = {"layer": {"kernel": jnp.ones((4, 1)), "shift": jnp.ones(1)}}
  with pytest.raises(ValueError, match=r"`hvp` needs a vector with the structure of the parameters.*shift"):
    dpo.hvp(loss_of, containers()[params])(vector)


# -- prefix trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", CONTAINERS[1:])
def test_stacked_is_a_plain_dict_whatever_the_container(params):
  """`kron(stacked={…})`: the same state as for dicts."""
  widen = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), tree)
  tree, depths = widen(containers()[params]), {"layer": {"kernel": 1, "bias": 1}}
  state, expected = (dpo.kron(stacked=depths).init(x) for x in (tree, widen(containers()["dict"])))
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("params", CONTAINERS)
def test_a_prefix_is_spread_by_names_where_the_containers_differ(params):
  tree = containers()[params]
  for prefix in ({"layer": 7}, flax.core.freeze({"layer": 7}), {"layer": {"kernel": 7, "bias": 7}}):
    found = spread(prefix, tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree) and set(jax.tree.leaves(found)) == {7}


@pytest.mark.parametrize(
  ("prefix", "clue"),
  [
    ({"layer": {"kernel": 1}}, "it has nothing for layer/bias"),
    (
      {"layer": {"kernel": 1, "bias": 0, "shift": 0}},
      "it names layer/shift, but there are only layer/kernel, layer/bias",
    ),
  ],
)
def test_a_prefix_that_does_not_fit_is_refused_with_a_name(prefix, clue):
  for tree in (containers()["nnx variables"], containers()["dict"]):
    with pytest.raises(ValueError) as error:
      dpo.kron(stacked=prefix).init(tree)
    message = str(error.value)
    assert "`stacked` must be a tree of ints that fits the params" in message and "stacked=lambda path, leaf" in message
    if isinstance(tree, nnx.State):
      assert clue.split(" but")[0] in message


def test_a_prefix_of_the_whole_serves_a_part():
  """Under `optax.partition` the other leaves are holes: what the prefix says of them is passed over."""
  part = nnx.State({"layer": {"kernel": nnx.Param(jnp.ones((3, 4))), "bias": optax.MaskedNode()}})
  found = spread({"layer": {"kernel": 1, "bias": 2}}, part)
  assert jax.tree.leaves(found) == [1] and jax.tree.structure(found) == jax.tree.structure(part)


def test_records_in_a_plain_dict_serve_an_nnx_model():
  """`layers=` and `layer_inputs=` by names, and what `capture` makes of the variables."""
  net = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
  graph, params, rest = nnx.split(net, nnx.Param, ...)
  loss = lambda p: jnp.mean((nnx.merge(graph, p, rest, copy=True)(X) - Y) ** 2)
  _, _, layers = dpo.capture(loss)(params)
  by_hand = {"layers": {i: {"kernel": layers["layers"][i]["kernel"].get_value()} for i in (0, 2)}}
  grads = nnx.as_pure(jax.grad(loss)(params))
  updates = []
  for spec, inputs in ((layers, layers), (by_hand, by_hand), (by_hand, layers)):
    tx = dpo.gls(0.1, layers=spec)
    updates.append(tx.update(grads, tx.init(nnx.as_pure(params)), nnx.as_pure(params), layer_inputs=inputs)[0])
  for other in updates[1:]:
    chex.assert_trees_all_equal(updates[0], other)


def test_an_embedding_among_the_records_is_no_layer_of_bnp():
  """It keeps its update, or goes to the fallback, as where the layers are told by their names."""
  loss = lambda p: jnp.mean((p["table"][jnp.arange(6) % 3] @ p["w"]) ** 2)
  params = {"table": jnp.arange(12.0).reshape(3, 4), "w": jnp.ones((4, 1))}
  _, grads, layers = dpo.capture(loss)(params)
  for fallback, factor in ((None, 0.1), (optax.sgd(0.7), 0.7)):
    tx = dpo.bnp(0.1, layers=layers, fallback=fallback if fallback else optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params, layer_inputs=layers)
    close(updates["table"], -factor * grads["table"])
  p = dpo.batch_norm(layers=layers)
  observed = dpo.layer_inputs()(None, grads, params, layer_inputs=layers)
  state = p.fit(p.init(params), observed, key=jax.random.key(0), damping=0.0)
  np.testing.assert_array_equal(p.apply(state, grads)["table"], grads["table"])


# -- norm layers -------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
  """As `eqx.nn.LayerNorm` and `eqx.nn.Linear` hold their arrays."""

  weight: Any
  bias: Any


def test_norm_layers_of_haiku_and_equinox_are_found():
  ones = jnp.ones
  haiku = {
    "net/~/batch_norm": {"scale": ones((1, 4)), "offset": ones((1, 4))},
    "net/linear": {"w": ones((4, 2)), "b": ones(2)},
  }
  assert training.is_norm_param(haiku) == {
    "net/~/batch_norm": {"scale": True, "offset": True},
    "net/linear": {"w": False, "b": False},
  }
  model = [
    Affine(ones(4), ones(4)),
    Affine(ones(4), None),
    Affine(ones((2, 4)), ones(2)),
    Affine(ones(4), ones(())),
    jnp.tanh,
  ]
  found = training.is_norm_param(model)
  assert jax.tree.leaves(found) == [True, True, True, False, False, False, False, False]
  assert jax.tree.structure(found) == jax.tree.structure(model)


@pytest.mark.parametrize("where", [training.is_norm_param, dpo.is_vector])
def test_the_message_does_not_advise_what_was_typed(where):
  with pytest.raises(ValueError, match=r"`where` selects none of the 1 parameters: w") as error:
    dpo.sgd_ph(0.1, where).init({"w": jnp.ones((2, 2))})
  other = {training.is_norm_param: "is_vector", dpo.is_vector: "is_norm_param"}[where]
  assert f"{other}`" in str(error.value) and f"{where.__name__}`" not in str(error.value)
  assert "a tree of bools like the params" in str(error.value)
