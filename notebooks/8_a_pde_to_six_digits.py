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
# # A PDE to six digits
#
# A small network is trained to solve Poisson's equation. Adam stops after two digits, and not because the network cannot
# do better: with a step that is *solved*, the same network from the same start goes on to six digits and more.

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

jax.config.update("jax_enable_x64", True)  # six digits of a solution need more than six digits of the loss

# %% [markdown]
# ## The equation, point by point
#
# Δu = f on the unit square, u = 0 on its edge. We choose the solution, u = sin(πx) sin(πy), and with it f, so that the
# error can be measured. A network u(x; θ) with three layers of 20 tanh units is to satisfy the equation at 320 points
# inside, and the edge condition at 80 points.
#
# The loss is ½ Σ r². Each residual is a function of the parameters and of *one* point, with its weight inside. Written
# this way, their Jacobian costs about one gradient of the whole batch.

# %%
solution = lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
rng = np.random.default_rng(0)
inside, edge = rng.uniform(size=(320, 2)), rng.uniform(size=(80, 2))
edge[np.arange(80), np.arange(80) // 2 % 2] = np.arange(80) % 2  # to one of the four sides


def start(key, sizes=(2, 20, 20, 20, 1)):
  draw = lambda key, m, n: {"w": jax.random.normal(key, (m, n)) * (2 / (m + n)) ** 0.5, "b": jnp.zeros(n)}
  return [draw(*each) for each in zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:])]


def u(params, x):
  for layer in params[:-1]:
    x = jnp.tanh(x @ layer["w"] + layer["b"])
  return (x @ params[-1]["w"] + params[-1]["b"])[0]


def laplacian(function, x):
  along = lambda e: jax.jvp(lambda x: jax.jvp(function, (x,), (e,))[1], (x,), (e,))[1]
  return along(jnp.array([1.0, 0.0], x.dtype)) + along(jnp.array([0.0, 1.0], x.dtype))


def system(dtype=jnp.float64):
  x, b = jnp.asarray(inside, dtype), jnp.asarray(edge, dtype)
  equation = lambda p, x: (laplacian(lambda x: u(p, x), x) - laplacian(solution, x)) / len(inside) ** 0.5
  condition = lambda p, x: u(p, x) / len(edge) ** 0.5
  return dpo.residuals((equation, x), (condition, b))


params = start(jax.random.key(1))
print(f"{sum(x.size for x in jax.tree.leaves(params))} parameters, {system()(params).size} residuals")

# %% [markdown]
# ## One loop for all
#
# `gauss_newton` takes the residuals as `residual_fn`; L-BFGS takes the loss and its value, for its line search; the
# others need the gradient only.

# %%
axis = np.linspace(0, 1, 60)
grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2))
exact = jax.vmap(solution)(grid)


def error(params):
  found = jax.vmap(u, (None, 0))(params, grid)
  return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)


def one_step(tx, fit, params, state, solved=False):
  value, grads = jax.value_and_grad(fit.loss)(params)
  extra = {"residual_fn": fit} if solved else {"value": value, "grad": grads, "value_fn": fit.loss}
  updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def trained(tx, steps, solved=False, points=60, dtype=jnp.float64, seed=1):
  """Params, and at so many points of the run: seconds, loss, error and, where there is one, λ."""
  fit = system(dtype)
  step = lambda carry, _: (one_step(tx, fit, *carry, solved), None)
  params = jax.tree.map(lambda x: x.astype(dtype), start(jax.random.key(seed)))
  carry, log, seconds = (params, tx.init(params)), [], 0.0
  some = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps // points)[0]).lower(carry).compile()
  look = jax.jit(lambda p: (fit.loss(p), error(p)))
  for _ in range(points):
    begin = time.perf_counter()
    carry = jax.block_until_ready(some(carry))
    seconds += time.perf_counter() - begin
    damping = getattr(carry[1], "damping", jnp.nan)
    log.append((seconds, *map(float, look(carry[0])), float(damping)))
  return carry[0], np.array(log).T


# %%
falling = lambda rate, steps: optax.cosine_decay_schedule(rate, steps)
adam = lambda rate, steps: optax.adam(falling(rate, steps))
soap = lambda rate, steps: dpo.psgd(falling(rate, steps), dpo.soap(), b1=0.95, every=1)


def best_rate(make, steps, rates=(1e-2, 3e-2, 1e-1)):
  """Of three rates, side by side, that of the lowest loss on another start, in a third of the steps."""
  fit, first = system(), start(jax.random.key(0))

  def last_loss(rate):
    tx = make(rate, steps)
    step = lambda carry, _: (one_step(tx, fit, *carry), None)
    return fit.loss(jax.lax.scan(step, (first, tx.init(first)), length=steps)[0][0])

  losses = jax.jit(jax.vmap(last_loss))(jnp.array(rates))
  print({rate: f"{loss:.1e}" for rate, loss in zip(rates, losses)})
  return rates[int(jnp.argmin(losses))]


contestants = {
  "Adam": (adam(best_rate(adam, 800), 2400), 2400),
  "SOAP": (soap(best_rate(soap, 400), 1200), 1200),
  "L-BFGS": (optax.lbfgs(), 600),
  "gauss_newton": (dpo.gauss_newton(), 120),
}
runs = {}
for name, (tx, steps) in contestants.items():
  runs[name] = trained(tx, steps, solved=name == "gauss_newton")
  seconds, loss, errors, _ = runs[name][1][:, -1]
  print(f"{name:13s} {steps:5d} steps {seconds:5.1f} s   loss {loss:.1e}   relative error {errors:.1e}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for name, (tx, steps) in contestants.items():
  seconds, loss, errors, damping = runs[name][1]
  axes[0].semilogy(np.linspace(steps / 60, steps, 60), loss, label=name)
  axes[1].semilogy(seconds, errors, label=name)
axes[0].set(xlabel="steps", ylabel="loss ½ Σ r²", title="Loss by steps", xscale="log")
axes[1].set(xlabel="seconds of training, without compilation", ylabel="relative L2 error", title="Error by seconds")
axes[1].axhline(1e-6, color="gray", linestyle=":", linewidth=1)
axes[2].semilogy(np.linspace(2, 120, 60), runs["gauss_newton"][1][3], color="C3")
axes[2].set(xlabel="steps", ylabel="λ", title="The damping of gauss_newton")
axes[1].legend();

# %% [markdown]
# One step of `gauss_newton` costs as much as dozens of Adam's: it forms the Jacobian of all residuals (400 × 921) and
# solves with it. But each of its steps is worth hundreds of theirs. Here is one start; the race on five seeds, in equal
# CPU seconds, is `python -m benchmarks science poisson`.
#
# The damping λ (right) begins where steps are short and safe. After each step that does what the linear model promised
# it shrinks; after one on which the loss would rise, the step is tried again with more of it. Near the end the step is
# almost the full one of Gauss and Newton, and the loss falls by a factor per step.
#
# ## The solution, and where it is wrong

# %%
image = lambda values: np.asarray(values).reshape(60, 60).T
figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
found = {name: jax.vmap(u, (None, 0))(run[0], grid) for name, run in runs.items()}
shown = axes[0].imshow(image(found["gauss_newton"]), origin="lower", extent=(0, 1, 0, 1))
figure.colorbar(shown, ax=axes[0])
axes[0].set(title="the network, gauss_newton", xlabel="x", ylabel="y")
for axis, name in zip(axes[1:], ("Adam", "L-BFGS", "gauss_newton")):
  wrong = image(found[name] - exact)
  most = abs(wrong).max()
  shown = axis.imshow(wrong, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu", vmin=-most, vmax=most)
  figure.colorbar(shown, ax=axis, format="%.0e")
  axis.set(title=f"its error, {name}", xlabel="x")

# %% [markdown]
# The scales of the three maps differ by orders of magnitude. What is left of Adam's error is smooth: directions in which
# the loss is almost flat, along which a gradient step moves next to nothing. The solved step divides by the curvature,
# and moves in them as far as in all others.
#
# ## How many digits float32 has
#
# The same in single precision. `gauss_newton` solves from the residuals themselves and never from their squares where
# that would cost digits, so it still trains; but second derivatives of a network in float32 carry an error of their own.

# %%
_, single = trained(dpo.gauss_newton(), 60, solved=True, dtype=jnp.float32)
figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
axis.semilogy(np.linspace(2, 120, 60), runs["gauss_newton"][1][2], color="C3", label="float64")
axis.semilogy(np.linspace(1, 60, 60), single[2], color="C4", label="float32")
axis.set(xlabel="steps", ylabel="relative L2 error", title="gauss_newton in two precisions")
axis.legend()
print(f"relative error in float32: {single[2, -1]:.1e}, in float64: {runs['gauss_newton'][1][2, -1]:.1e}")

# %% [markdown]
# ## What to remember
#
# 1. Small network, whole data, no noise, last digits: write residuals of one sample, and let `gauss_newton` solve.
# 2. A step costs a Jacobian and a factorization: up to some thousands of parameters, or of residuals, that pays.
# 3. Use float64 for it: float32 ends where the derivatives of the network are no longer exact.
