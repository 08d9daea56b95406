# SPDX-License-Identifier: Apache-2.0
"""Parity of `sgd_ph` with the released torch optimizer: three runs of 20 steps, gradients and products made here."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.preconditioners.diagonal_newton import cycle_count


@functools.cache
def golden():
  with np.load(Path(__file__).parent / "sgd_ph" / "sgdph_torch_f64.npz", allow_pickle=False) as z:
    return {k: z[k] for k in z.files}


def normalised(x, p, axes):
  mean, variance = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
  shape = [1] * x.ndim
  shape[1] = x.shape[1]
  return (x - mean) / jnp.sqrt(variance + 1e-5) * p["weight"].reshape(shape) + p["bias"].reshape(shape)


def conv(p, x):
  """3x3 – BN – tanh – 3x3 – BN – softplus – mean over space – linear. Channels second, as in torch."""
  options = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
  convolve = functools.partial(jax.lax.conv_general_dilated, **options)
  x = convolve(x, p["conv1"]["weight"])
  x = jnp.tanh(normalised(x, p["bn1"], (0, 2, 3)))
  x = convolve(x, p["conv2"]["weight"])
  x = jax.nn.softplus(normalised(x, p["bn2"], (0, 2, 3)))
  return jnp.mean(x, (2, 3)) @ p["fc"]["weight"].T + p["fc"]["bias"]


def mlp(p, x):
  """linear – BN – tanh – linear – LN – tanh – linear."""
  x = jnp.tanh(normalised(x @ p["fc1"]["weight"].T + p["fc1"]["bias"], p["bn"], (0,)))
  x = jnp.tanh(normalised(x @ p["fc2"]["weight"].T, p["ln"], (1,)))
  return x @ p["out"]["weight"].T + p["out"]["bias"]


def tree(run, kind, names):
  """{"bn1": {"weight": …}} from the record's "kind/bn1.weight"."""
  found = {}
  for name in names:
    layer, leaf = name.split(".")
    found.setdefault(layer, {})[leaf] = golden()[f"{run}/{kind}/{name}"]
  return found


def curvatures(state, chosen):
  """The state's h, leaf by leaf: it is stacked by shape, in the order of the tree."""
  buckets, taken, found = optax.tree.get(state, "buckets"), {}, []
  for x in jax.tree.leaves(chosen):
    name = f"{x.shape[0]}_float64"
    found.append(buckets[name].curvature[taken.setdefault(name, 0)])
    taken[name] += 1
  return jax.tree.unflatten(jax.tree.structure(chosen), found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def trained(net, cycle, params, x, y, numbers):
  """Every step's loss, gradient, parameters, momentum and h. The hyper-parameters are traced: one program for a net."""
  where = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(k.key for k in path) in cycle, params)
  options = dict(probe=dpo.probes.ones, cycle=cycle, signed=False, bias_correction=cycle_count(len(cycle)))
  tx = dpo.sgd_ph(where=where, **numbers, **options)

  def step(carry, batch):
    params, state = carry
    x, y = batch
    loss = lambda p: jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(net(p, x), y))
    value, grads, hvp = dpo.value_and_grad_then_hvp(loss, where=where)(params)
    updates, state = tx.update(grads, state, params, hvp=hvp)
    params = optax.apply_updates(params, updates)
    h = curvatures(state, jax.tree.map(lambda x, w: x if w else None, params, where))
    return (params, state), (value, grads, params, optax.tree.get(state, "trace"), h)

  return jax.lax.scan(step, (params, tx.init(params)), (x, y))[1]


@pytest.mark.parametrize("run", ["conv_default", "conv_aggr", "mlp_default"])
def test_twenty_steps_of_the_released_code(x64, run):
  """Loss, gradient, momentum, curvature and parameters of each step to 1e-9, by Hessian products through the norms."""
  meta = json.loads(str(golden()[f"{run}/meta"]))
  *oned, last = meta["oned"]
  assert last in ("fc.bias", "out.bias")
  cycle = (*(name.replace(".", "/") for name in oned), None)  # its probe of the last tensor is not used
  hyper = meta["hyper"]
  numbers = dict(
    learning_rate=hyper["lr"],
    b1=hyper["momentum"],
    weight_decay=hyper["weight_decay"],
    damping=meta["eps_sgdph"],
    tau=meta["tau"],
  )
  x, y = golden()[f"{run}/x"], golden()[f"{run}/y"]
  net = conv if run.startswith("conv") else mlp
  numbers = {name: jnp.float64(number) for name, number in numbers.items()}
  loss, grads, params, momentum, h = trained(net, cycle, tree(run, "init", meta["names"]), x, y, numbers)
  np.testing.assert_allclose(loss, golden()[f"{run}/loss"], rtol=1e-9)
  for came, kind in ((grads, "grad"), (params, "param"), (momentum, "mom")):
    expected = tree(run, kind, meta["names"])
    chex.assert_trees_all_close(came, expected, rtol=1e-9, atol=1e-12)
  for name in oned:
    layer, leaf = name.split(".")
    expected = golden()[f"{run}/diag/{name}"]
    np.testing.assert_allclose(h[layer][leaf], expected, rtol=1e-9, atol=1e-12)
    assert np.all(expected[-1] >= 0)


def test_the_exact_probe_finds_the_true_diagonal_of_the_record_and_the_row_sums_are_another(x64):
  """Against torch's double backward, at the first step."""
  meta = json.loads(str(golden()["conv_default/meta"]))
  assert meta["oned"][0] == "bn1.weight"
  params = jax.tree.map(jnp.asarray, tree("conv_default", "init", meta["names"]))
  x, y = golden()["conv_default/x"][0], golden()["conv_default/y"][0]
  loss = lambda p: jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(conv(p, x), y))
  where = jax.tree.map(lambda _: False, params) | {"bn1": {"weight": True, "bias": False}}
  observe = dpo.hessian_diagonal(dpo.probes.exact, where=where)
  seen = jax.jit(lambda p: observe(jax.random.key(0), p, p, hvp=dpo.hvp(loss, p)).product["bn1"]["weight"])(params)
  sums, diagonal = (golden()[f"conv_default/probe_{kind}"][0, : len(seen)] for kind in ("rowsum", "true_diag"))
  np.testing.assert_allclose(seen, diagonal, rtol=1e-9, atol=1e-13)
  assert not np.allclose(sums, diagonal, rtol=0.1)
