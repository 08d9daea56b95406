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
# # Ten lines to DPSGD
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/1_ten_lines_to_dpsgd.ipynb)
#
# A Flax network on scikit-learn's real handwritten digits, first with Adam, then with damped preconditioned SGD.
# The loop changes in one line. (DPSGD is *damped preconditioned* SGD here, not differentially private SGD.)

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

# %%
from flax import linen as nn
from sklearn.datasets import load_digits

digits = load_digits()
x, y = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)
model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)])
start = model.init(jax.random.key(0), x[:1])


def loss_of(params, x, y):
  return optax.losses.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


# %% [markdown]
# ## The loop
#
# What an optimizer needs beside the gradient goes into `update` by name, and every optimizer ignores what it does not
# know. So one loop serves all: `value` and `value_fn` are the loss and its value on this batch. DPSGD makes its
# Hessian-vector products from `value_fn`, and looks with it at the loss after every fifth step, to judge its damping.

# %%
def train(tx, steps=250, batch=128):
  params, state = start, tx.init(start)
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def step(params, state, rows):
    loss = lambda p: loss_of(p, x[rows], y[rows])
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
    return optax.apply_updates(params, updates), state

  evaluate = jax.jit(lambda p: loss_of(p, x, y))
  log = []
  for count, key in enumerate(jax.random.split(jax.random.key(1), steps)):
    rows = jax.random.choice(key, len(x), (batch,), replace=False)
    params, state = step(params, state, rows)
    if count % 5 == 0:
      log.append((count, float(evaluate(params)), optax.tree.get(state, "damping"), optax.tree.get(state, "ratio")))
  return params, state, log


runs = {
  "Adam": train(optax.adam(1e-2)),
  "PSGD (whitening), in place of Adam": train(dpo.psgd(3e-3, b1=0.9)),
  "DPSGD": train(dpo.dpsgd(0.2)),
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for label, (_, _, log) in runs.items():
  left.semilogy([row[0] for row in log], [row[1] for row in log], label=label)
left.set(xlabel="step", ylabel="training loss", title="The whole training set")
left.legend()
log = runs["DPSGD"][2]
right.plot([row[0] for row in log], [row[2] for row in log], color="C2", label="damping")
right.plot([row[0] for row in log], [row[3] for row in log], color="C3", alpha=0.6, label="ratio: actual / predicted")
right.set(xlabel="step", title="Levenberg–Marquardt at work, read from the state", ylim=(-0.5, 2))
right.legend()
figure.tight_layout()

# %% [markdown]
# ## What a logger is given
#
# `report` flattens any optimizer state into scalars; it may be called inside `jit`.

# %%
{name: round(float(number), 5) for name, number in dpo.report(runs["DPSGD"][1]).items()}

# %% [markdown]
# At equal *steps* the second-order method is far ahead. At equal *seconds* a network this small is another matter: its
# gradient costs almost nothing, so that Adam has finished before DPSGD has compiled. `python -m benchmarks demo` prints
# both rankings; the README shows where the extra work pays.
