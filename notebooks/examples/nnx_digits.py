# SPDX-License-Identifier: Apache-2.0
"""The same in Flax NNX: batch norm, dropout, an optimizer for each kind of parameter, Orbax.

python notebooks/examples/nnx_digits.py [FOLDER]     trains; killed and started again it goes on from FOLDER

The loss is a function of the pure tree of parameters. Dropout draws from a stream that lives in the model: merged anew
from the same state, the gradient and the Hessian-vector product see the same network.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import dpsgd_optax as dpo
from dpsgd_optax import training

BATCH = 128


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(64, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.second = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def kinds(params):
  """Which optimizer trains which parameter."""

  def kind(path, x):
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
    if "first" in names:
      return "gls"
    return "newton" if names[:2] == ["second", "kernel"] else "adam"

  return jax.tree_util.tree_map_with_path(kind, params)


def optimizer():
  newton = dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=2)
  return optax.partition({"gls": dpo.gls(0.1), "newton": newton, "adam": optax.adam(1e-2)}, kinds)


@nnx.jit
def train_step(model, optimizer, x, y):
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    net = nnx.merge(graph, params, rest, copy=True)  # its statistics change here, under the derivative
    logits, inputs = training.call_with_layer_inputs(net, x)
    value = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, (nnx.state(net, nnx.Not(nnx.Param)), inputs)

  (value, (new, inputs)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  hvp = dpo.hvp(loss, nnx.as_pure(params), has_aux=True)  # as the optimizer sees them: arrays, not variables
  optimizer.update(model, grads, hvp=hvp, layer_inputs=inputs)
  nnx.update(model, new)  # the running statistics and the stream of the dropout, advanced once
  return value


def data():
  x, y = load_digits(return_X_y=True)
  x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
  held_out = jnp.arange(len(x)) % 5 == 0
  return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def start(seed: int = 0):
  model = Net(nnx.Rngs(seed))
  return model, nnx.Optimizer(model, optimizer(), wrt=nnx.Param)


def epoch(run, number: int) -> float:
  """One pass in an order that depends on the number of the epoch only."""
  x, y = data()[0]
  order = jax.random.permutation(jax.random.key(number), len(x))
  run[0].train()
  for begin in range(0, len(x) - BATCH + 1, BATCH):
    rows = order[begin : begin + BATCH]
    value = train_step(*run, x[rows], y[rows])
  return float(value)


def accuracy(run) -> float:
  x, y = data()[1]
  run[0].eval()
  return float(jnp.mean(run[0](x).argmax(-1) == y))


def as_arrays(run):
  """The state of model and optimizer as a tree of arrays, keys as their numbers: what Orbax keeps."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, nnx.to_pure_dict(nnx.state(run)))


def restored(run, arrays):
  """Model and optimizer brought to the state that was kept."""
  state = nnx.state(run)
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  like = nnx.to_pure_dict(state)
  wrap = lambda old, new: jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if is_key(old) else new
  nnx.replace_by_pure_dict(state, jax.tree.map(wrap, like, arrays))
  nnx.update(run, state)


def train(folder: Path, epochs: int, fresh=start):
  """Up to `epochs` epochs, from the newest checkpoint in the folder if there is one."""
  run = fresh()
  with ocp.CheckpointManager(folder.absolute()) as manager:
    first = 0
    if (last := manager.latest_step()) is not None:
      kept = manager.restore(last, args=ocp.args.StandardRestore(jax.eval_shape(lambda: as_arrays(run))))
      restored(run, kept)
      first = last + 1
    for number in range(first, epochs):
      value = epoch(run, number)
      manager.save(number, args=ocp.args.StandardSave(as_arrays(run)))
      print(f"epoch {number}: loss {value:.4f}, test accuracy {accuracy(run):.3f}")
  return run


if __name__ == "__main__":
  train(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/nnx_digits"), 5)
