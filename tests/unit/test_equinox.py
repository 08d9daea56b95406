# SPDX-License-Identifier: Apache-2.0
"""Equinox: the model itself is the tree of parameters, with functions, flags and rates among its leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax import training
from dpsgd_optax._trees.paths import names
from dpsgd_optax.layers.find import find_layers
from dpsgd_optax.layers.find import records_of as matched
from dpsgd_optax.layers.matrix import as_matrix
from dpsgd_optax.layers.moments import gradients_of, rows_of
from dpsgd_optax.layers.record import is_record

eqx = pytest.importorskip("equinox")

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)
X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jnp.sin(X.sum(1, keepdims=True))


class Net(eqx.Module):
  """A function before the arrays, a rate and a flag between them."""

  act: callable
  first: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  dropout: eqx.nn.Dropout
  second: eqx.nn.Linear

  def __init__(self, key):
    keys = jax.random.split(key)
    self.act = jnp.tanh
    self.first, self.second = eqx.nn.Linear(4, 8, key=keys[0]), eqx.nn.Linear(8, 1, key=keys[1])
    self.norm, self.dropout = eqx.nn.LayerNorm(8), eqx.nn.Dropout(0.0)

  def __call__(self, x):
    return self.second(self.dropout(self.act(self.norm(self.first(x)))))


MODEL = Net(jax.random.key(1))


def loss(model):
  return jnp.mean((jax.vmap(model)(X) - Y) ** 2)


def arrays(model):
  return eqx.filter(model, eqx.is_inexact_array)


def train(tx, extras, shown, steps=12):
  """extras: (value, model) -> arguments of `update`; shown: what of the model is handed over as params."""
  model, state = MODEL, tx.init(arrays(MODEL))

  @eqx.filter_jit(donate="all")
  def step(model, state):
    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = tx.update(grads, state, shown(model), **extras(value, model))
    return eqx.apply_updates(model, updates), state, value

  model, values = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, model), []
  for _ in range(steps):
    model, state, value = step(model, state)
    values.append(float(value))
  return values


OPTIMIZERS = {
  "psgd": (lambda: dpo.psgd(0.01), lambda v, m: {}),
  "newton": (lambda: dpo.psgd(0.05, dpo.kron(), dpo.newton()), lambda v, m: dict(hvp=dpo.hvp(loss, m))),
  "dpsgd": (lambda: dpo.dpsgd(0.1), lambda v, m: dict(value=v, value_fn=loss, hvp=dpo.hvp(loss, m))),
  "lra": (lambda: dpo.psgd(0.05, dpo.lra(rank=2), dpo.newton()), lambda v, m: dict(hvp=dpo.hvp(loss, m))),
  "sgd_ph": (lambda: dpo.sgd_ph(0.1, training.is_norm_param), lambda v, m: dict(hvp=dpo.hvp(loss, m))),
}


@pytest.mark.parametrize("shown", [lambda m: m, arrays], ids=["model", "arrays"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_is_trained_whether_it_or_its_arrays_are_the_params(name, shown):
  make, extras = OPTIMIZERS[name]
  values = train(make(), extras, shown)
  assert values[-1] < 0.8 * values[0] and np.all(np.isfinite(values))


def test_the_model_alone_serves_the_judge_and_the_product():
  """`value_fn` without `hvp`: of the whole model, and of its arrays combined with the rest, the same run."""
  values = train(dpo.dpsgd(0.1), lambda v, m: dict(value=v, value_fn=loss), lambda m: m, steps=8)

  def of_arrays(value, model):
    static = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    return dict(value=value, value_fn=lambda p: loss(eqx.combine(p, static)))

  assert values == train(dpo.dpsgd(0.1), of_arrays, arrays, steps=8)


# -- layers ------------------------------------------------------------------------------------------------------------


class Everything(eqx.Module):
  act: callable
  embed: eqx.nn.Embedding
  attention: eqx.nn.MultiheadAttention
  conv: eqx.nn.Conv1d
  grouped: eqx.nn.Conv1d
  norm: eqx.nn.LayerNorm
  cell: eqx.nn.GRUCell
  dense: eqx.nn.Linear
  bare: eqx.nn.Linear

  def __init__(self, key):
    keys = jax.random.split(key, 7)
    self.act, self.norm = jnp.tanh, eqx.nn.LayerNorm(8)
    self.embed = eqx.nn.Embedding(7, 4, key=keys[0])
    self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=keys[1])
    self.conv = eqx.nn.Conv1d(4, 8, 3, padding=1, key=keys[2])
    self.grouped = eqx.nn.Conv1d(8, 8, 3, padding=1, groups=2, key=keys[3])
    self.cell = eqx.nn.GRUCell(8, 6, key=keys[4])
    self.dense, self.bare = eqx.nn.Linear(14, 5, key=keys[5]), eqx.nn.Linear(5, 1, use_bias=False, key=keys[6])

  def __call__(self, ids):
    x = jax.vmap(self.embed)(ids)
    x = self.attention(x, x, x)
    x = jax.vmap(self.norm)(self.grouped(self.act(self.conv(x.T))).T)
    h = self.cell(x[0], jnp.zeros(6))
    return self.bare(self.act(self.dense(jnp.concatenate([h, x.mean(0)]))))


IDS = jax.random.randint(jax.random.key(2), (16, 5), 0, 7)


def loss_of_ids(model):
  return jnp.mean((jax.vmap(model)(IDS) - jnp.sin(IDS.sum(1, keepdims=True) * 1.0)) ** 2)


def test_capture_takes_the_model_as_it_is():
  """Value and gradient are those of `eqx.filter_value_and_grad`: None where there is no array."""
  model = Everything(jax.random.key(3))
  value, grads, _ = dpo.capture(loss_of_ids)(model)
  expected, gradient = eqx.filter_value_and_grad(loss_of_ids)(model)
  close(value, expected)
  assert jax.tree.structure(grads) == jax.tree.structure(gradient)
  jax.tree.map(close, grads, gradient)


def test_capture_finds_the_layers_of_equinox():
  """weight (out, in), the bias of a convolution (out, 1, 1), embeddings under `vmap`: x̃ᵀE is the gradient."""
  model = Everything(jax.random.key(3))
  _, grads, layers = dpo.capture(loss_of_ids, gradients=True)(model)
  found = {names(path): x for path, x in jax.tree_util.tree_flatten_with_path(layers, is_leaf=is_record)[0]}
  kinds = {"/".join(path): (x.kind, x.bias is not None) for path, x in found.items()}
  assert kinds == {
    "embed/weight": ("embed", False),
    "attention/query_proj/weight": ("dense", True),
    "attention/key_proj/weight": ("dense", False),
    "attention/value_proj/weight": ("dense", False),
    "attention/output_proj/weight": ("dense", False),
    "conv/weight": ("conv", True),
    "grouped/weight": ("conv", True),
    "cell/weight_ih": ("dense", True),
    "cell/weight_hh": ("dense", False),
    "dense/weight": ("dense", True),
    "bare/weight": ("dense", False),
  }
  leaves, places = jax.tree.leaves(grads), find_layers(grads, layers)
  for layer, record in zip(places, matched(places, layers, grads), strict=True):
    if record.kind != "embed":
      (x,), (e,) = record.inputs, record.gradients
      rows = rows_of(record, x, layer.stack)
      rows = rows if layer.bias is None else jnp.concatenate([rows, jnp.ones((*rows.shape[:2], 1))], -1)
      product = jnp.einsum("mri,mro->mio", rows, gradients_of(record, e, layer.stack))
      close(product, as_matrix(layer, leaves), atol=1e-5)


@pytest.mark.parametrize("make", [dpo.gls, functools.partial(dpo.gls, max_output_change=0.1), dpo.bnp])
def test_layerwise_methods_train_a_model(make):
  """What is no layer goes to the fallback; params are the arrays, for `optax.partition` takes nothing else."""
  model = Everything(jax.random.key(3))
  spec = jax.eval_shape(lambda: dpo.capture(loss_of_ids)(model))[2]
  tx = make(0.1, layers=spec, fallback=optax.adam(1e-2))
  state = tx.init(arrays(model))

  @eqx.filter_jit
  def step(model, state):
    value, grads, layers = dpo.capture(loss_of_ids)(model)
    updates, state = tx.update(grads, state, arrays(model), layer_inputs=layers)
    return eqx.apply_updates(model, updates), state, value

  values = []
  for _ in range(12):
    model, state, value = step(model, state)
    values.append(float(value))
  assert values[-1] < 0.9 * values[0]


def test_without_a_fallback_the_model_itself_may_be_the_params():
  """`clip_output_change` reads the weights: those opposite the updates, whatever else is a leaf of the model."""
  model = eqx.nn.Sequential(
    [eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(4, 8, key=jax.random.key(1)), eqx.nn.Linear(8, 1, key=jax.random.key(2))]
  )
  run = dpo.capture(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))
  _, grads, layers = run(model)
  tx = dpo.gls(0.1, layers=layers, max_output_change=0.01)
  updates = [tx.update(grads, tx.init(arrays(model)), p, layer_inputs=layers)[0] for p in (model, arrays(model))]
  chex.assert_trees_all_equal(*updates)


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dpo.gls, dpo.bnp])
def test_the_advice_names_capture_and_layers(make):
  with pytest.raises(
    ValueError,
    match=r"first/weight.*`layers=jax.eval_shape\(lambda: capture\(loss\)\(params, batch\)\)\[2\]` .*Equinox",
  ):
    make(0.1).init(arrays(MODEL))


def test_the_norm_layers_of_a_model_are_found():
  chosen = training.is_norm_param(arrays(MODEL))
  assert (
    chosen.norm.weight and chosen.norm.bias and not (chosen.first.weight or chosen.first.bias or chosen.second.bias)
  )
  with_state, _ = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
  assert jax.tree.leaves(training.is_norm_param([with_state, MODEL.first]))[:2] == [True, True]


@pytest.mark.parametrize("preconditioner", [dpo.kron, dpo.lra, dpo.diagonal, dpo.damped_kron])
def test_a_model_in_the_place_of_its_arrays_is_refused_by_init_with_what_to_type(preconditioner):
  with pytest.raises(ValueError, match=r"\.act is a .*`tx.init\(eqx.filter\(model, eqx.is_inexact_array\)\)`"):
    dpo.psgd(0.1, preconditioner()).init(MODEL)
