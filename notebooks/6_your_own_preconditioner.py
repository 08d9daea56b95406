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
# # Your own preconditioner
#
# A method is one file: `init`, `fit` and `apply` of a single array. The lift adds trees, batching by shape, keys and
# damping; `scale_by_preconditioner` adds cadence, momentum, robustness and the state. Here: row scaling, one number for
# each row of a matrix.

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
# ## Three functions
#
# Q = diag(q) over the rows, P = Q². The criterion hᵀPh + vᵀP⁻¹v falls along q ← q (1 − μ (a² − b²)) with a = Qh and
# b = Q⁻¹v, each averaged over a row.

# %%
from typing import NamedTuple


class RowState(NamedTuple):
  q: jax.Array  # (rows, 1, …)


def rows(step_size=0.1):
  def init(x):
    return RowState(jnp.ones(x.shape[:1] + (1,) * (x.ndim - 1), x.dtype))

  def fit(state, probe, *, key):
    v = jnp.ones_like(probe.product) if probe.vector is None else probe.vector
    mean = lambda t: jnp.mean(t, tuple(range(1, t.ndim)), keepdims=True) if t.ndim > 1 else t
    a2, b2 = mean((state.q * probe.product) ** 2), mean((v / state.q) ** 2)
    return RowState(state.q * (1 - step_size * (a2 - b2) / jnp.maximum(jnp.max(a2 + b2), 1e-30)))

  return dpo.per_leaf(dpo.Preconditioner(init, fit, lambda state, x: state.q**2 * x))


# %% [markdown]
# ## It is an optimizer already

# %%
rng = np.random.default_rng(0)
scales = jnp.asarray(np.geomspace(0.03, 3, 30), jnp.float32)[:, None]
target = jnp.asarray(rng.standard_normal((30, 4)), jnp.float32)
loss = lambda p: jnp.mean((scales * (p["w"] - target)) ** 2)


def distances(tx, start, steps=400):
  def step(carry, _):
    params, state = carry
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params, hvp=dpo.hvp(loss, params))
    return (optax.apply_updates(params, updates), state), jnp.linalg.norm(params["w"] - target)

  params = {"w": start}
  return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]


def newton(preconditioner, rate):
  return optax.chain(
    dpo.scale_by_preconditioner(preconditioner, dpo.newton(), every=2), optax.scale_by_learning_rate(rate)
  )


# %% [markdown]
# Five learning rates for each from one starting point; the best of them from another. Newton's steps end at a rate of 2,
# gradient descent at 2 over the largest curvature, which is a little above 13.

# %%
of_newton = (0.2, 0.5, 1.0, 1.5, 1.9)
contestants = {
  "gradient descent": (lambda rate: optax.with_extra_args_support(optax.sgd(rate)), (4.0, 8.0, 12.0, 13.0, 16.0)),
  "rows": (lambda rate: newton(rows(0.3), rate), of_newton),
  "diagonal": (lambda rate: newton(dpo.diagonal(step_size=0.3), rate), of_newton),
}
figure, axis = plt.subplots(figsize=(9, 4))
for name, (make, rates) in contestants.items():
  train = jax.jit(lambda rate, start, make=make: distances(make(rate), start))
  ends = {rate: float(train(rate, jnp.ones((30, 4)))[-1]) for rate in rates}
  ends = {rate: end for rate, end in ends.items() if np.isfinite(end)}
  best = min(ends, key=ends.get)
  axis.semilogy(np.maximum(train(best, jnp.zeros((30, 4))), 1e-7), label=f"{name}, rate {best:g}")
  print(f"{name:17s} " + "  ".join(f"{rate:g}: {end:.2g}" for rate, end in ends.items()))
axis.set(xlabel="steps", ylabel="distance from the minimum, ‖w − w*‖")
axis.set_title("A quadratic whose rows have scales from 0.03 to 3")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## What came for free
#
# Cadence, counters, and the skipping of steps that are not finite:

# %%
tx = newton(rows(), 0.1)
params = {"w": jnp.zeros((30, 4))}
state = tx.init(params)
broken = {"w": jnp.full((30, 4), jnp.nan)}
updates, state = tx.update(broken, state, params, hvp=dpo.hvp(loss, params))
print("updates all zero:", bool(jnp.all(updates["w"] == 0)))
print({name: int(optax.tree.get(state, name)) for name in ("count", "fits", "skipped")})

# %% [markdown]
# Levenberg–Marquardt around it, other criteria, other parts of the network: composition, not subclasses.

# %%
tx = optax.chain(dpo.levenberg_marquardt(newton(rows(), 0.5), damping=1.0))
print(jax.tree.map(jnp.shape, optax.tree.get(tx.init(params), "damping")))

tx = optax.partition(
  {"rows": newton(rows(), 0.1), "adam": optax.adam(1e-2)},
  {"w": "rows", "b": "adam"},
)
state = tx.init({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)})

# %% [markdown]
# To put it into the project: one file in `dpsgd_optax/preconditioners/`, one export, one row in `tests/table.py`. The
# laws (fixed points, symmetry, stacked ≡ separate, the criterion falls) and the contracts of optax then run on it.
#
# ## What to remember
#
# 1. `init`, `fit` and `apply` of one array are a method; `per_leaf` makes it work on trees, batched by shape.
# 2. `scale_by_preconditioner` adds cadence, keys, momentum, counters, and the skipping of steps that are not finite.
# 3. Check a new method against the closed form it should reach; the laws in the tests do that for every row.
