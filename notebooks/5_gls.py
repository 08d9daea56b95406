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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/5_gls.ipynb)
#
# A first-order method that moves like Newton's: ask each layer's outputs to go down their gradient, and solve a small
# least-squares problem for the weights that do it. It needs what enters each layer, which `dpsgd_optax` takes from an
# unchanged model. (The note that named the method does not publish its rule; specs and docstrings say what we do.)

# %%
try:
  import dpsgd_optax as dpo
except ImportError:  # on Colab
  # %pip install -q "dpsgd_optax[bench] @ git+https://github.com/dpsgd-optax/dpsgd_optax"
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
# "Lowers the loss much faster than SGD even when forced to SGD's step length": `match_total` rescales each GLS step to
# the length of SGD's.

# %%
from dpsgd_optax import training
from flax import linen as nn
from sklearn.datasets import load_digits

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
start = model.init(jax.random.key(0), images[:1])["params"]
forward = training.with_layer_inputs(model.apply)


def train(tx, layered, steps=250, batch=128):
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def step(params, state, key):
    rows = jax.random.choice(key, len(images), (batch,))

    def loss(p):
      out, inputs = forward({"params": p}, images[rows])
      return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean(), inputs

    (_, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
    more = {"layer_inputs": inputs} if layered else {}
    updates, state = tx.update(grads, state, params, **more)
    params = optax.apply_updates(params, updates)
    out = model.apply({"params": params}, images)
    value = optax.losses.softmax_cross_entropy_with_integer_labels(out, labels).mean()
    return params, state, value, optax.tree.norm(updates)

  params, state, log = start, tx.init(start), []
  for key in jax.random.split(jax.random.key(1), steps):
    params, state, value, length = step(params, state, key)
    log.append((float(value), float(length)))
  return np.asarray(log)


runs = {
  "SGD": train(optax.sgd(0.3), False),
  "Adam": train(optax.adam(3e-3), False),
  "GLS": train(dpo.gls(0.3), True),
  "GLS at SGD's step length": train(dpo.gls(0.3, match=dpo.layers.match_total), True),
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for name, log in runs.items():
  left.semilogy(log[:, 0], label=name)
  right.semilogy(np.cumsum(log[:, 1]), log[:, 0], label=name)
left.set(xlabel="step", ylabel="training loss")
right.set(xlabel="length of the path so far", title="The same losses by distance travelled")
left.legend()
figure.tight_layout()

# %% [markdown]
# ## Its weakness: a layer wider than what enters it
#
# The neurons of such a layer are asked for more directions than its inputs have: their changes are correlated, and what
# follows adds them up. `max_output_change` bounds how far the outputs of a layer may move in one step.

# %%
wide = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(6), nn.Dense(32), nn.relu, nn.Dense(64)])
first = wide.init(jax.random.key(0), images[:1])["params"]
record = training.with_layer_inputs(wide.apply)


def autoencode(tx, layered, steps=250, batch=128):
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def step(params, state, key):
    rows = jax.random.choice(key, len(images), (batch,))

    def loss(p):
      out, inputs = record({"params": p}, images[rows])
      return jnp.mean(jnp.sum((out - images[rows]) ** 2, -1)), inputs

    (value, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, **({"layer_inputs": inputs} if layered else {}))
    return optax.apply_updates(params, updates), state, value

  params, state, log = first, tx.init(first), []
  for key in jax.random.split(jax.random.key(1), steps):
    params, state, value = step(params, state, key)
    log.append(float(value))
  return log


figure, axis = plt.subplots(figsize=(7, 4))
for name, log in {
  "Adam": autoencode(optax.adam(1e-2), False),
  "GLS": autoencode(dpo.gls(0.1), True),
  "GLS, max_output_change=0.1": autoencode(dpo.gls(0.1, max_output_change=0.1), True),
}.items():
  axis.semilogy(np.convolve(log, np.ones(10) / 10, "valid"), label=name)
axis.set(xlabel="step", ylabel="reconstruction loss (mean of 10 steps)", title="Autoencoder 64-32-6-32-64")
axis.legend()
