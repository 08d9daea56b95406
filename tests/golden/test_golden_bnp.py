# SPDX-License-Identifier: Apache-2.0
"""Parity of BNP with the golden record, a numpy reference derived from P = (1/q) U D: a network and a convolution."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.layers.record import Window
from dpsgd_optax.preconditioners.batch_norm import expected_scale

PAPER = dict(debias=False, within_batch=True)


@functools.cache
def golden():
  with np.load(Path(__file__).parent / "bnp" / "bnp_numpy_f64.npz", allow_pickle=False) as z:
    return {k: z[k] for k in z.files}


def close(came, expected):
  np.testing.assert_allclose(came, expected, rtol=1e-10, atol=1e-12)


def test_twelve_steps_of_the_golden_network(x64):
  """Loss, gradients, preconditioned gradients, running statistics and parameters of every step."""
  record = golden()
  meta = json.loads(str(record["mlp/meta"]))
  at = lambda name, t: record[f"mlp/{name}"][t]
  start = {i: {"kernel": record[f"mlp/init/W{i}"], "bias": record[f"mlp/init/b{i}"]} for i in ("1", "2")}
  params = jax.tree.map(jnp.asarray, start)
  tx = dpo.bnp(meta["lr"], decay=meta["rho"], relative_damping=meta["eps1"], damping=meta["eps2"], **PAPER)

  def loss(p, x, y):
    h = jnp.tanh(x @ p["1"]["kernel"] + p["1"]["bias"])
    logits = h @ p["2"]["kernel"] + p["2"]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), {"1": x, "2": h}

  @jax.jit
  def step(params, state, x, y):
    (value, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params, x, y)
    updates, state = tx.update(grads, state, params, layer_inputs=inputs)
    return optax.apply_updates(params, updates), state, value, grads, updates

  state = tx.init(params)
  for t in range(meta["T"]):
    params, state, value, grads, updates = step(params, state, at("x", t), at("y", t))
    close(value, at("loss", t))
    for i in ("1", "2"):
      name = next(k for k in optax.tree.get(state, "buckets") if k.startswith(f"{len(start[i]['kernel']) + 1}x"))
      seen = optax.tree.get(state, "buckets")[name]
      close(seen.mean[0], at(f"mu{i}", t))
      close(seen.variance[0], at(f"var{i}", t))
      close(seen.scale[0], at(f"q2_{i}", t))
      close(grads[i]["kernel"], at(f"g_W{i}", t))
      close(-updates[i]["kernel"] / meta["lr"], at(f"pg_W{i}", t))
      close(-updates[i]["bias"] / meta["lr"], at(f"pg_b{i}", t))
      close(params[i]["kernel"], at(f"W{i}", t))
      close(params[i]["bias"], at(f"b{i}", t))


@pytest.mark.parametrize("name", ["patch", "unit"])
def test_the_golden_convolution(x64, name):
  """The statistics are those of the channels, the same for each offset of the window; q² = max(k²c/N, rs), or 1."""
  record = golden()
  grads = {"kernel": jnp.asarray(record["conv/g_w"]), "bias": jnp.asarray(record["conv/g_b"])}
  window = Window((1, 1), "SAME", (1, 1), (1, 1))
  inputs = dpo.LayerRecord(
    (jnp.asarray(record["conv/H"]),), kind="conv", kernel_shape=(3, 3, 3, 4), input_axes=3, window=window
  )
  q2 = expected_scale if name == "patch" else 1.0
  p = dpo.batch_norm(decay=0.0, relative_damping=1e-2, q2=q2, **PAPER)
  tx = dpo.scale_by_preconditioner(p, dpo.layer_inputs(), damping=1e-4)
  updates, state = tx.update(grads, tx.init(grads), layer_inputs={"kernel": inputs})
  (seen,) = state.preconditioner.buckets.values()
  close(seen.mean[0], np.tile(record["conv/mu"], 9))
  close(seen.variance[0], np.tile(record["conv/var"], 9))
  close(seen.scale[0], record[f"conv/{name}/q2"])
  close(updates["kernel"], record[f"conv/{name}/pg_w"])
  close(updates["bias"], record[f"conv/{name}/pg_b"])
