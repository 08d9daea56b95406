# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # GLS: layerwise least squares
#
# A first-order method that moves like Newton's: ask each layer's outputs to go down their gradient, and solve a small
# least-squares problem for the weights that do it. It needs what enters each layer, which `dpsgd_optax` takes from an
# unchanged model. (The note that named the method does not publish its rule; specs and docstrings say what we do.)

# %%
# Where the package is missing, as on Colab: clone the repository and open this notebook in its folder; this cell then
# installs it from there. Everywhere else the cell does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dpsgd_optax") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "..[bench]"], check=True)

# %%
import dpsgd_optax as dpo
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

# %% [markdown]
# ## One linear layer: one step
#
# With squared loss and a linear layer, a GLS step of length one *is* the least-squares solution.

# %%
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((256, 20)) * np.geomspace(0.01, 10, 20), jnp.float32)
y = x @ jnp.asarray(rng.standard_normal((20, 3)), jnp.float32) + 0.1


def linear(p):
  return 0.5 * jnp.sum((x @ p["w"] + p["b"] - y) ** 2) / len(x)


params = {"w": jnp.zeros((20, 3)), "b": jnp.zeros(3)}
value, grads, inputs = dpo.capture(linear)(params)  # what enters each layer, read off the loss itself
tx = dpo.gls(1.0, damping=1e-6, decay=None, layers=inputs)
state = tx.init(params)
updates, state = tx.update(grads, state, params, layer_inputs=inputs)
print("before", float(value), " after one step", float(linear(optax.apply_updates(params, updates))))

# %% [markdown]
# ## A deep network, at equal steps and at equal step length
#
# The note claims that it ends below SGD even at SGD's step length: `match_total` rescales each GLS step to the length of
# SGD's. Five learning rates for each optimizer on seed 0; the best of each on seeds 1, 2 and 3. A rate of 1 is
# the whole least-squares step, so that those of GLS end there.

# %%
from dpsgd_optax import training
from flax import linen as nn
from sklearn.datasets import load_digits

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)


def cross_entropy(out, rows):
  return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean()


def square_error(out, rows):
  return jnp.mean(jnp.sum((out - images[rows]) ** 2, -1))


def trainer(model, loss_of, make, steps=250, batch=128):
  """(rate, seed) → losses on the whole set and step lengths."""
  forward = training.with_layer_inputs(model.apply)

  def train(rate, seed):
    tx = optax.with_extra_args_support(make(rate))
    start, key = jax.random.split(jax.random.key(seed))
    params = model.init(start, images[:1])["params"]

    def step(carry, key):
      params, state = carry
      rows = jax.random.choice(key, len(images), (batch,))

      def loss(p):
        out, inputs = forward({"params": p}, images[rows])
        return loss_of(out, rows), inputs

      (_, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, state = tx.update(grads, state, params, layer_inputs=inputs)
      params = optax.apply_updates(params, updates)
      value = loss_of(model.apply({"params": params}, images), jnp.arange(len(images)))
      return (params, state), (value, optax.tree.norm(updates))

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[1]

  return jax.jit(train)


def raced(model, loss_of, contestants):
  """name, with the best of its rates → losses and step lengths, each (3, steps)."""
  runs = {}
  for name, (make, rates) in contestants.items():
    train = trainer(model, loss_of, make)
    trials = {rate: float(train(rate, 0)[0][-10:].mean()) for rate in rates}
    trials = {rate: loss for rate, loss in trials.items() if np.isfinite(loss)}
    best = min(trials, key=trials.get)
    runs[f"{name}, rate {best:g}"] = [np.stack(a) for a in zip(*(train(best, seed) for seed in (1, 2, 3)))]
    print(f"{name:26s} " + "  ".join(f"{rate:g}: {loss:.2g}" for rate, loss in trials.items()))
  return runs


model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
adaptive = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
runs = raced(
  model,
  cross_entropy,
  {
    "SGD": (optax.sgd, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "Adam": (optax.adam, adaptive),
    "GLS": (dpo.gls, (0.1, 0.2, 0.4, 0.7, 1.0)),
    "GLS, SGD's step length": (lambda rate: dpo.gls(rate, match=dpo.layers.match_total), (0.1, 0.3, 1.0, 3.0, 10.0)),
  },
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), sharey=True, layout="constrained")
for name, (losses, lengths) in runs.items():
  steps, middle = np.arange(1, 1 + losses.shape[1]), np.median(losses, 0)
  left.semilogy(steps, middle, label=name)
  left.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2)
  right.semilogy(np.median(np.cumsum(lengths, 1), 0), middle)
left.set(xlabel="steps", ylabel="loss on the training set (nats)", title="Median and range of three seeds")
right.set(xlabel="length of the path so far, ‖θ‖ units", title="The same medians by distance travelled", xscale="log")
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)

# %% [markdown]
# ## Its weakness: a layer wider than what enters it
#
# The neurons of such a layer are asked for more directions than its inputs have: their changes are correlated, and what
# follows adds them up. `max_output_change` bounds how far the outputs of a layer may move in one step.

# %%
wide = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(6), nn.Dense(32), nn.relu, nn.Dense(64)])
of_gls = (0.02, 0.05, 0.1, 0.2, 0.4)
runs = raced(
  wide,
  square_error,
  {
    "Adam": (optax.adam, adaptive),
    "GLS": (dpo.gls, of_gls),
    "GLS, max_output_change=0.1": (lambda rate: dpo.gls(rate, max_output_change=0.1), of_gls),
  },
)

# %%
figure, axis = plt.subplots(figsize=(9, 4))
for name, (losses, _) in runs.items():
  smooth = np.stack([np.convolve(line, np.ones(10) / 10, "valid") for line in losses])
  steps = np.arange(10, 10 + smooth.shape[1])
  axis.semilogy(steps, np.median(smooth, 0), label=name)
  axis.fill_between(steps, smooth.min(0), smooth.max(0), alpha=0.2)
axis.set(xlabel="steps", ylabel="square error of an image (mean of 10 steps)", title="Autoencoder 64-32-6-32-64")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# The table above the picture is the other half: plain GLS has no loss to show at the larger rates, with the bound it has.
# At the best rate of each the bound gains nothing here; it saves the search.
#
# ## What to remember
#
# 1. GLS solves for the weights of each layer that move its outputs down their gradient; it needs `layer_inputs`.
# 2. On one linear layer with squared loss a step of length one is the solution.
# 3. Layers wider than their inputs are its weak place: a large rate diverges there; `max_output_change` bounds it.
