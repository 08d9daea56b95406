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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/6_your_own_preconditioner.ipynb)
#
# A method is one file: `init`, `fit` and `apply` of a single array. The lift adds trees, batching by shape, keys and
# damping; `scale_by_preconditioner` adds cadence, momentum, robustness and the state. Here: row scaling, one number for
# each row of a matrix.

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


def train(tx, steps=400):
  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, hvp=dpo.hvp(loss, params))
    return (optax.apply_updates(params, updates), state), jnp.linalg.norm(params["w"] - target)

  params = {"w": jnp.zeros((30, 4))}
  (_, state), errors = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((params, tx.init(params)))
  return state, np.asarray(errors)


def newton(preconditioner, rate):
  return optax.chain(
    dpo.scale_by_preconditioner(preconditioner, dpo.newton(), every=2), optax.scale_by_learning_rate(rate)
  )


runs = {
  "gradient descent": train(optax.with_extra_args_support(optax.sgd(6.0))),
  "rows(0.3)": train(newton(rows(0.3), 0.3)),
  "diagonal(0.3)": train(newton(dpo.diagonal(step_size=0.3), 0.3)),
}

# %%
figure, axis = plt.subplots(figsize=(7, 4))
for name, (_, errors) in runs.items():
  axis.semilogy(errors, label=name)
axis.set(xlabel="step", ylabel="distance from the minimum")
axis.legend()

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
