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
# A Flax network on scikit-learn's real handwritten digits, first with Adam, then with damped preconditioned SGD.
# The loop changes in one line. (DPSGD is *damped preconditioned* SGD here, not differentially private SGD.)

# %%
# Where the package is missing, as on Colab: clone the repository and open this notebook in its folder; this cell then
# installs it from there. Everywhere else the cell does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dpsgd_optax") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "..[bench]"], check=True)

# %%
import time

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


def loss_of(params, x, y):
  return optax.losses.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


# %% [markdown]
# ## The step
#
# What an optimizer needs beside the gradient goes into `update` by name, and every optimizer ignores what it does not
# know. So one step serves all: `value` and `value_fn` are the loss and its value on this batch. DPSGD makes its
# Hessian-vector products from `value_fn`, and looks with it at the loss after every fifth step, to judge its damping.

# %%
def step(tx, params, state, rows):
  loss = lambda p: loss_of(p, x[rows], y[rows])
  value, grads = jax.value_and_grad(loss)(params)
  updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
  return optax.apply_updates(params, updates), state


# %% [markdown]
# Two hundred and fifty such steps as one compiled function of learning rate and seed, with a look at the whole training
# set after every fifth.

# %%
def trainer(make, steps=250, batch=128, look=5):
  def train(rate, seed):
    tx = optax.with_extra_args_support(make(rate))
    start, key = jax.random.split(jax.random.key(seed))
    params = model.init(start, x[:1])

    def one(carry, key):
      return step(tx, *carry, jax.random.choice(key, len(x), (batch,), replace=False)), None

    def some(carry, keys):
      (params, state), _ = jax.lax.scan(one, carry, keys)
      seen = {"loss": loss_of(params, x, y), **{name: optax.tree.get(state, name) for name in ("damping", "ratio")}}
      return (params, state), seen

    (_, state), log = jax.lax.scan(some, (params, tx.init(params)), jax.random.split(key, (steps // look, look)))
    return state, log

  return jax.jit(train)


# %% [markdown]
# ## A fair race
#
# A learning rate that nobody chose proves nothing. Each optimizer gets five, on seed 0; the best of each then runs on
# seeds 1, 2 and 3.

# %%
adaptive, newton = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.02, 0.05, 0.1, 0.2, 0.5)
contestants = {
  "Adam": (optax.adam, adaptive),
  "PSGD, in place of Adam": (lambda rate: dpo.psgd(rate, b1=0.9), adaptive),
  "DPSGD": (dpo.dpsgd, newton),
}
runs = {}
for name, (make, rates) in contestants.items():
  train = trainer(make)
  trials = {rate: float(train(rate, 0)[1]["loss"][-1]) for rate in rates}
  best = min(trials, key=trials.get)
  begin = time.perf_counter()
  results = [jax.block_until_ready(train(best, seed)) for seed in (1, 2, 3)]
  runs[name] = best, results, (time.perf_counter() - begin) / 3
  print(f"{name:24s} rate {best:<6g} loss of each trial: " + "  ".join(f"{rate:g}: {trials[rate]:.2g}" for rate in rates))

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), sharey=True, layout="constrained")
for name, (rate, results, seconds) in runs.items():
  losses = np.stack([log["loss"] for _, log in results])
  share = np.arange(1, 1 + losses.shape[1]) / losses.shape[1]
  for axis, length in zip(axes, (250, seconds)):
    axis.semilogy(share * length, np.median(losses, 0), label=f"{name}, rate {rate:g}")
    axis.fill_between(share * length, losses.min(0), losses.max(0), alpha=0.2)
axes[0].set(xlabel="steps", ylabel="loss on the whole training set (nats)", title="By steps")
axes[1].set(xlabel="seconds of training, without compilation", title="By seconds, on two CPU cores")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# Lines are medians of three seeds, bands their range. Left: per *step* DPSGD is far ahead, and whitening PSGD, at its own
# rate, ends below Adam. Right: the gradient of a network this small costs almost nothing, so that by the *clock* the
# extra work has to be paid from the steps it saves. On larger networks the balance is another: the README's table and
# `python -m benchmarks demo` say where it pays.
#
# ## Levenberg–Marquardt at work
#
# DPSGD compares what a step gained with what its model had promised. A good ratio raises the damping τ, which lengthens
# the step; a poor one lowers it. Both numbers stand in the state.

# %%
_, ((_, log), *_), _ = runs["DPSGD"]
steps = np.arange(1, 1 + len(log["ratio"])) * 5
figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True)
above.semilogy(steps, log["damping"], ".-", color="C2")
above.set(ylabel="damping τ\n(parameter² / loss)", title="DPSGD, seed 1: judged after every fifth step")
below.plot(steps, log["ratio"], ".-", color="C3")
for threshold, what in ((0.75, "above: τ rises"), (0.25, "below: τ falls")):
  below.axhline(threshold, color="grey", linestyle=":")
  below.text(1.01, threshold, what, fontsize=8, va="center", transform=below.get_yaxis_transform())
below.set(xlabel="steps", ylabel="gain of a step:\nactual / predicted", ylim=(-0.25, 1.25))
figure.tight_layout()

# %% [markdown]
# ## What a logger is given
#
# `report` flattens any optimizer state into scalars; it may be called inside `jit`.

# %%
{name: round(float(number), 5) for name, number in dpo.report(runs["DPSGD"][1][0][0]).items()}

# %% [markdown]
# ## What to remember
#
# 1. One loop serves every optimizer: give `update` the loss (`value`, `value_fn`), and change the line that makes `tx`.
# 2. A rate belongs to its optimizer: for `psgd` try Adam's and a third of it, for `dpsgd` 0.05 to 0.2; then compare.
# 3. DPSGD gains per step; whether it gains by the clock depends on what a gradient costs beside the fit. Measure both.
