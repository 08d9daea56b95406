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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/2_anatomy_of_a_preconditioner.ipynb)
#
# What P looks like when it has been fitted, how it gets there, and what it does to a trajectory.
#
# A preconditioner is three functions on a pytree: `init`, `fit` (one probe in, a better P out) and `apply` (P times a
# gradient). Fitted on pairs (v, Hv), its fixed point is |H|⁻¹: here we can hold it against the exact one.

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
figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
limit = float(jnp.abs(exact).max())
shades = SymLogNorm(linthresh=0.02 * limit, vmin=-limit, vmax=limit)
for axis, (name, p) in zip(axes, {"|H|⁻¹": exact, **{k: h[-1] for k, h in histories.items()}}.items()):
  axis.imshow(p, cmap="RdBu", norm=shades)
  error = jnp.linalg.norm(p - exact) / jnp.linalg.norm(exact)
  axis.set(title=name if name == "|H|⁻¹" else f"{name}\nerror {error:.2f}", xticks=[], yticks=[])
figure.tight_layout()

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
axis.axhline(float(np.linalg.cond(hessian)), color="grey", linestyle=":", label="H itself")
axis.set(xlabel="probes", ylabel="condition number of P H", title="How round the bowl has become")
axis.legend()

# %% [markdown]
# ## Trajectories
#
# Rosenbrock's valley. Every method starts at the same point and takes 300 steps.

# %%
valley = lambda p: 100.0 * (p[1] - p[0] ** 2) ** 2 + (1.0 - p[0]) ** 2


def walk(tx, steps=300):
  tx = optax.with_extra_args_support(tx)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(valley)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=valley, hvp=dpo.hvp(valley, params))
    params = optax.apply_updates(params, updates)
    return (params, state), params

  first = jnp.array([-1.2, 1.0])
  _, path = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((first, tx.init(first)))
  return np.vstack([first, path])


paths = {
  "SGD": walk(optax.sgd(1e-3)),
  "Adam": walk(optax.adam(0.05)),
  "PSGD, diagonal": walk(dpo.psgd(0.1, dpo.diagonal(step_size=0.3), dpo.newton(), every=1)),
  "PSGD, dense": walk(dpo.psgd(0.3, dpo.dense(step_size=0.3), dpo.newton(), every=1)),
}
u, v = np.meshgrid(np.linspace(-1.6, 1.4, 200), np.linspace(-0.5, 1.8, 200))
figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), sharey=True)
for axis, (name, path) in zip(axes, paths.items()):
  axis.contour(u, v, np.log10(valley((u, v)) + 1e-3), 18, cmap="Greys")
  axis.plot(*path.T, ".-", color="C3", markersize=3, linewidth=0.8)
  axis.plot(1, 1, "k*", markersize=12)
  axis.set(title=f"{name}: {float(valley(path[-1])):.1e}", xlim=(-1.6, 1.4), ylim=(-0.5, 1.8))
figure.tight_layout()
