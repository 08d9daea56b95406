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
# # Newton or whitening?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/3_newton_or_whitening.ipynb)
#
# Two criteria, two fixed points: fitted on Hessian-vector products, P → |H|⁻¹; fitted on gradients, P → (E g gᵀ)^(−½).
# Which is better, and when are they the same?

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
# ## Two fixed points
#
# A quadratic with Hessian H and gradient noise of covariance C. Newton probes see H; gradients at the minimum see C
# alone. If C ∝ H² (the noise of a well-specified least-squares model at a distance from its minimum, say) the two
# agree; if C = I, whitening knows nothing of the curvature.

# %%
rng = np.random.default_rng(1)
d = 12
rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
curvature = np.geomspace(1e-2, 1.0, d)
hessian = jnp.asarray((rotation * curvature) @ rotation.T, jnp.float32)


def fit(probe_of, steps=4000):
  p = dpo.dense(step_size=0.1)

  def one(state, key):
    return p.fit(state, probe_of(key), key=key, damping=0.0), None

  run = lambda s: jax.lax.scan(one, s, jax.random.split(jax.random.key(0), steps))[0]
  state = jax.jit(run)(p.init(jnp.zeros(d)))
  return np.asarray(jax.vmap(lambda e: p.apply(state, e))(jnp.eye(d)))


def newton_probe(key):
  v = jax.random.normal(key, (d,))
  return dpo.Probe(v, hessian @ v)


def gradients(power):
  """g ~ N(0, H^power)."""
  root = jnp.asarray((rotation * curvature ** (power / 2)) @ rotation.T, jnp.float32)
  return lambda key: dpo.Probe(None, root @ jax.random.normal(key, (d,)))


found = {
  "Newton: |H|⁻¹": fit(newton_probe),
  "whitening, noise H²": fit(gradients(2)),
  "whitening, noise H": fit(gradients(1)),
  "whitening, noise I": fit(gradients(0)),
}

# %%
figure, axis = plt.subplots(figsize=(7, 4.5))
for (name, p), marker in zip(found.items(), "os^v"):
  seen = np.diag(rotation.T @ p @ rotation)  # P in the eigenbasis of H
  axis.loglog(curvature, seen / seen[-1], marker, label=name)
for power, style in ((1, "-"), (0.5, "--"), (0, ":")):
  axis.loglog(curvature, curvature**-power, style, color="grey", linewidth=0.8)
axis.set(xlabel="eigenvalue h of H", ylabel="P along its eigenvector", title="Lines: h⁻¹, h^(−½), 1")
axis.legend()

# %% [markdown]
# The picture says it all: whitening finds h⁻¹, h^(−½) or nothing, as the noise is. In classification at the start of
# training the gradients' second moment follows the (Gauss–Newton) Hessian, which is why whitening works so well there,
# and needs no second derivatives.
#
# ## What it costs, and what it brings
#
# The same small network, both criteria, at equal *gradient evaluations*: a Hessian-vector product counts as one.

# %%
from flax import linen as nn

model = nn.Sequential([nn.Dense(24), nn.tanh, nn.Dense(24), nn.tanh, nn.Dense(1)])
inputs = jnp.asarray(rng.standard_normal((512, 6)) * np.geomspace(0.1, 3, 6), jnp.float32)
target = jnp.sin(inputs.sum(-1, keepdims=True)) + jnp.cos(2 * inputs[:, :1])
start = model.init(jax.random.key(0), inputs)


def train(tx, steps, every=None):
  tx = optax.with_extra_args_support(tx)

  def step(carry, key):
    params, state = carry
    rows = jax.random.choice(key, len(inputs), (64,))
    loss = lambda p: jnp.mean((model.apply(p, inputs[rows]) - target[rows]) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss, hvp=dpo.hvp(loss, params))
    params = optax.apply_updates(params, updates)
    return (params, state), jnp.mean((model.apply(params, inputs) - target) ** 2)

  keys = jax.random.split(jax.random.key(1), steps)
  return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, keys)[1])((start, tx.init(start))))


budget = 2000
kron = lambda: dpo.kron(max_skew=jnp.inf)
runs = {
  "Adam": (1.0, train(optax.adam(1e-2), budget)),
  "whitening": (1.0, train(dpo.psgd(3e-3, kron(), b1=0.9), budget)),
  "Newton, every step": (2.0, train(dpo.psgd(0.05, kron(), dpo.newton(), every=1), budget // 2)),
  "Newton, every tenth step": (1.1, train(dpo.psgd(0.05, kron(), dpo.newton(), every=10), int(budget / 1.1))),
}

# %%
figure, axis = plt.subplots(figsize=(7, 4.5))
for name, (cost, losses) in runs.items():
  smooth = np.convolve(losses, np.ones(25) / 25, "valid")
  axis.semilogy(cost * np.arange(len(smooth)), smooth, label=name)
axis.set(xlabel="gradient evaluations", ylabel="training loss (mean of 25 steps)")
axis.legend()

# %% [markdown]
# Rules of thumb: *whitening* if gradients are all you have, if batches are small, or in place of Adam; *Newton* if the
# loss is deterministic or its noise says little about its curvature, if the Hessian is indefinite (|H|⁻¹ leaves saddles),
# and a product now and then is cheap. P changes slowly: `every=10` loses little and costs a tenth of a gradient.
