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
# # Anatomy of a preconditioner
#
# What P looks like when it has been fitted, how it gets there, and what it does to a trajectory.
#
# A preconditioner is three functions on a pytree: `init`, `fit` (one probe in, a better P out) and `apply` (P times a
# gradient). Fitted on pairs (v, Hv), its fixed point is |H|⁻¹: here we can hold it against the exact one.

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
# ## P against |H|⁻¹
#
# A quadratic loss of a 4 × 5 matrix, ½ tr(A W B Wᵀ), whose Hessian is A ⊗ B: what `kron` can represent exactly.

# %%
from matplotlib.colors import SymLogNorm

rng = np.random.default_rng(0)


def spd(d, condition):
  q, _ = np.linalg.qr(rng.standard_normal((d, d)))
  return (q * np.geomspace(1, condition, d)) @ q.T


a, b = (jnp.asarray(spd(d, 30.0), jnp.float32) for d in (4, 5))
loss = lambda w: 0.5 * jnp.trace(a @ w @ b @ w.T)
hessian = jnp.kron(a, b)
exact = jnp.linalg.inv(hessian)


def fitted(preconditioner, probes=1500):
  """P as a matrix after every hundred probes."""
  w = jnp.zeros((4, 5))
  state = preconditioner.init(w)
  hv = dpo.hvp(loss, w)
  matrix = lambda s: jax.vmap(lambda e: preconditioner.apply(s, e.reshape(4, 5)).ravel())(jnp.eye(20))

  def one(state, key):
    v = jax.random.normal(key, (4, 5))
    return preconditioner.fit(state, dpo.Probe(v, hv(v)), key=key, damping=0.0), None

  def hundred(state, keys):
    state, _ = jax.lax.scan(one, state, keys)
    return state, matrix(state)

  keys = jax.random.split(jax.random.key(0), (probes // 100, 100))
  return jax.jit(lambda s: jax.lax.scan(hundred, s, keys)[1])(state)


groups = {
  "diagonal": dpo.diagonal(),
  "kron": dpo.kron(max_skew=jnp.inf),
  "lra(rank=4)": dpo.lra(rank=4),
  "dense": dpo.dense(),
}
histories = {name: fitted(group) for name, group in groups.items()}

# %%
figure, axes = plt.subplots(1, 5, figsize=(13, 3.4), layout="constrained")
limit = float(jnp.abs(exact).max())
shades = SymLogNorm(linthresh=0.02 * limit, vmin=-limit, vmax=limit)
for axis, (name, p) in zip(axes, {"|H|⁻¹": exact, **{k: h[-1] for k, h in histories.items()}}.items()):
  picture = axis.imshow(p, cmap="RdBu", norm=shades)
  error = jnp.linalg.norm(p - exact) / jnp.linalg.norm(exact)
  axis.set(title=name if name == "|H|⁻¹" else f"{name}\nrelative error {error:.2g}", xticks=[], yticks=[])
  axis.set_xlabel("parameter, 1 to 20")
axes[0].set_ylabel("parameter, 1 to 20")
figure.colorbar(picture, ax=axes, label="entry of P (parameter² / loss)", shrink=0.75)

# %% [markdown]
# What matters for a step is P H: the closer its eigenvalues are to one another, the rounder the bowl looks to the
# optimizer. A diagonal P cannot turn axes; `kron` gets all the way because H is a Kronecker product.

# %%
def condition(p):
  """κ of P^½ H P^½."""
  values, vectors = np.linalg.eigh(np.asarray((p + p.T) / 2, np.float64))
  root = vectors * np.sqrt(np.maximum(values, 1e-12))
  found = np.linalg.eigvalsh(root.T @ np.asarray(hessian, np.float64) @ root)
  return found.max() / found.min()


figure, axis = plt.subplots(figsize=(7, 4))
for name, history in histories.items():
  axis.semilogy(np.arange(1, 1 + len(history)) * 100, [condition(p) for p in history], label=name)
axis.axhline(float(np.linalg.cond(hessian)), color="grey", linestyle=":", label="H itself, without P")
axis.set(xlabel="probes seen", ylabel="condition number of P H (1 is round)", title="How round the bowl has become")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## Trajectories
#
# Rosenbrock's valley, (1 − u)² + 100 (v − u²)². Every method gets five learning rates from one starting point, and
# the best of them takes 300 steps from another.

# %%
valley = lambda p: 100.0 * (p[1] - p[0] ** 2) ** 2 + (1.0 - p[0]) ** 2


def walker(make, steps=300):
  """(learning rate, start) → the path."""

  def walk(rate, first):
    tx = optax.with_extra_args_support(make(rate))

    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(valley)(params)
      updates, state = tx.update(grads, state, params, value=value, value_fn=valley, hvp=dpo.hvp(valley, params))
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jnp.vstack([first, jax.lax.scan(step, (first, tx.init(first)), length=steps)[1]])

  return jax.jit(walk)


def newton(group):
  return lambda rate: dpo.psgd(rate, group(step_size=0.3), dpo.newton(), every=1)


of_newton = (0.2, 0.5, 1.0, 1.3, 1.6)
contestants = {
  "SGD": (optax.sgd, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
  "Adam": (optax.adam, (0.1, 0.3, 1.0, 3.0, 10.0)),
  "PSGD, diagonal": (newton(dpo.diagonal), of_newton),
  "PSGD, dense": (newton(dpo.dense), of_newton),
}
paths = {}
for name, (make, rates) in contestants.items():
  walk = walker(make)
  ends = {rate: float(valley(walk(rate, jnp.array([-0.5, 1.5]))[-1])) for rate in rates}
  ends = {rate: end for rate, end in ends.items() if np.isfinite(end)}
  best = min(ends, key=ends.get)
  paths[f"{name}, rate {best:g}"] = np.asarray(walk(best, jnp.array([-1.2, 1.0])))
  print(f"{name:15s}", {rate: float(f"{end:.1e}") for rate, end in ends.items()})

# %%
u, v = np.meshgrid(np.linspace(-2, 2, 200), np.linspace(-1, 2.5, 200))
figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True)
for axis, (name, path) in zip(axes, paths.items()):
  axis.contour(u, v, np.log10(valley((u, v)) + 1e-3), 18, cmap="Greys", linewidths=0.7)
  axis.plot(*path.T, ".-", color="C3", markersize=3, linewidth=0.8)
  axis.plot(*path[0], "ko", markersize=6)
  axis.plot(1, 1, "k*", markersize=12)
  axis.set(title=f"{name}\nloss in the end {float(valley(path[-1])):.1e}", xlim=(-2, 2), ylim=(-1, 2.5))
  axis.set_xlabel("u")
axes[0].set_ylabel("v")
figure.tight_layout()

# %% [markdown]
# The dot is the start, the star the minimum. A diagonal P scales the two axes; the valley runs across them and bends, so
# that only the dense P points along it.
#
# ## What to remember
#
# 1. A preconditioner is `init`, `fit` and `apply`; fitted on pairs (v, Hv) it goes to |H|⁻¹, as near as its group can.
# 2. The group is what you pay for: `diagonal` scales axes, `kron` turns them layer by layer, `lra` and `dense` all of them.
# 3. What counts is the condition number of P H, not how close P is to |H|⁻¹ entry by entry.
