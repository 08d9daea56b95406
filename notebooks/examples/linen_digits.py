# SPDX-License-Identifier: Apache-2.0
"""A whole Flax linen training script: batch norm, dropout, an optimizer for each kind of parameter, Orbax.

python notebooks/examples/linen_digits.py [FOLDER]     trains; killed and started again it goes on from FOLDER

  first kernel and bias   `gls`, which is shown what enters the layer
  second kernel           Newton `kron` on Hessian-vector products: the key of the dropout is that of the gradient, so
                          that both see the same network
  the rest                Adam
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from sklearn.datasets import load_digits

import dpsgd_optax as dpo
from dpsgd_optax import training

BATCH = 128


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Dense(64, name="first")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(10, name="second")(x)


class State(training.TrainState):
  """The train state that forwards extra arguments, with the running statistics of batch norm."""

  batch_stats: Any = None


def kinds(params):
  """Which optimizer trains which parameter."""

  def kind(path, x):
    names = [part.key for part in path]
    if "first" in names:
      return "gls"
    return "newton" if names == ["second", "kernel"] else "adam"

  return jax.tree_util.tree_map_with_path(kind, params)


def optimizer():
  newton = dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=2)
  return optax.partition({"gls": dpo.gls(0.1), "newton": newton, "adam": optax.adam(1e-2)}, kinds)


@jax.jit
def train_step(state, x, y, key):
  forward = training.with_layer_inputs(state.apply_fn)
  dropout = jax.random.fold_in(key, state.step)

  def loss(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    (logits, new), inputs = forward(variables, x, True, rngs={"dropout": dropout}, mutable=["batch_stats"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (new["batch_stats"], inputs)

  (value, (stats, inputs)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  extra = {"hvp": dpo.hvp(loss, state.params, has_aux=True), "layer_inputs": inputs}
  return state.apply_gradients(grads=grads, extra_args=extra, batch_stats=stats), value


def data():
  x, y = load_digits(return_X_y=True)
  x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
  held_out = jnp.arange(len(x)) % 5 == 0
  return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def start(seed: int = 0):
  model, (x, _) = Net(), data()[0]
  variables = model.init(jax.random.key(seed), x[:1], False)
  return State.create(
    apply_fn=model.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=optimizer()
  )


def epoch(state, number: int):
  """One pass in an order that depends on the number of the epoch only."""
  x, y = data()[0]
  order = jax.random.permutation(jax.random.key(number), len(x))
  for begin in range(0, len(x) - BATCH + 1, BATCH):
    rows = order[begin : begin + BATCH]
    state, value = train_step(state, x[rows], y[rows], jax.random.key(17))
  return state, float(value)


def accuracy(state) -> float:
  x, y = data()[1]
  logits = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, False)
  return float(jnp.mean(logits.argmax(-1) == y))


def train(folder: Path, epochs: int, fresh=start):
  """Up to `epochs` epochs, from the newest checkpoint in the folder if there is one."""
  state = fresh()
  with ocp.CheckpointManager(folder.absolute()) as manager:
    first = 0
    if (last := manager.latest_step()) is not None:
      dpo.diagnostics.check_state_layout(json.loads((folder / "layout.json").read_text()), state.opt_state)
      state = manager.restore(last, args=ocp.args.StandardRestore(jax.eval_shape(lambda x: x, state)))
      first = last + 1
    (folder / "layout.json").write_text(json.dumps(dpo.diagnostics.state_layout(state.opt_state)))
    for number in range(first, epochs):
      state, value = epoch(state, number)
      manager.save(number, args=ocp.args.StandardSave(state))
      print(f"epoch {number}: loss {value:.4f}, test accuracy {accuracy(state):.3f}")
  return state


if __name__ == "__main__":
  train(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/linen_digits"), 5)
