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
# Two criteria, two fixed points: fitted on Hessian-vector products, P → |H|⁻¹; fitted on gradients, P → (E g gᵀ)^(−½).
# Which is better, and when are they the same?

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
figure, axis = plt.subplots(figsize=(8, 4.5))
for (name, p), marker in zip(found.items(), "os^v"):
  seen = np.diag(rotation.T @ p @ rotation)  # P in the eigenbasis of H
  axis.loglog(curvature, seen / seen[-1], marker, label=name)
for power, style, name in ((1, "-", "h⁻¹"), (0.5, "--", "h^(−½)"), (0, ":", "1")):
  axis.loglog(curvature, curvature**-power, style, color="grey", linewidth=0.8, label=f"line: {name}")
axis.set(xlabel="eigenvalue h of H (loss / parameter²)", ylabel="P along its eigenvector\n(1 at the largest h)")
axis.set_title("What each criterion finds")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# Whitening finds h⁻¹, h^(−½) or nothing, as the noise is. In classification at the start of training the gradients'
# second moment follows the (Gauss–Newton) Hessian, which is why whitening works there without second derivatives.
#
# ## What it costs, and what it brings
#
# The same small network at equal *gradient evaluations*: a Hessian-vector product counts as one. Five learning rates for
# each on seed 0; the best of each on seeds 1, 2 and 3.

# %%
from flax import linen as nn

model = nn.Sequential([nn.Dense(24), nn.tanh, nn.Dense(24), nn.tanh, nn.Dense(1)])
inputs = jnp.asarray(rng.standard_normal((512, 6)) * np.geomspace(0.1, 3, 6), jnp.float32)
target = jnp.sin(inputs.sum(-1, keepdims=True)) + jnp.cos(2 * inputs[:, :1])


def loss_of(params, rows):
  return jnp.mean((model.apply(params, inputs[rows]) - target[rows]) ** 2)


def trainer(make, steps):
  def train(rate, seed):
    tx = optax.with_extra_args_support(make(rate))
    start, key = jax.random.split(jax.random.key(seed))
    params = model.init(start, inputs)

    def step(carry, key):
      params, state = carry
      rows = jax.random.choice(key, len(inputs), (64,))
      loss = lambda p: loss_of(p, rows)
      grads = jax.grad(loss)(params)
      updates, state = tx.update(grads, state, params, value_fn=loss, hvp=dpo.hvp(loss, params))
      params = optax.apply_updates(params, updates)
      return (params, state), loss_of(params, jnp.arange(len(inputs)))

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
    return params, losses

  return jax.jit(train)


budget = 1500
adaptive, of_newton = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.02, 0.05, 0.1, 0.2, 0.5)
kron = lambda: dpo.kron(max_skew=jnp.inf)
contestants = {  # gradient evaluations of a step, optimizer, rates
  "Adam": (1.0, optax.adam, adaptive),
  "Kron on gradients": (1.0, lambda rate: dpo.psgd(rate, kron(), b1=0.9), adaptive),
  "SOAP": (1.0, lambda rate: dpo.psgd(rate, dpo.soap(), b1=0.95, every=1), adaptive),
  "Kron on Hv, every step": (2.0, lambda rate: dpo.psgd(rate, kron(), dpo.newton(), every=1), of_newton),
  "Kron on Hv, every tenth": (1.1, lambda rate: dpo.psgd(rate, kron(), dpo.newton(), every=10), of_newton),
}
runs = {}
for name, (cost, make, rates) in contestants.items():
  train = trainer(make, int(budget / cost))
  trials = {rate: float(train(rate, 0)[1][-50:].mean()) for rate in rates}
  trials = {rate: loss for rate, loss in trials.items() if np.isfinite(loss)}
  best = min(trials, key=trials.get)
  results = [train(best, seed) for seed in (1, 2, 3)]
  runs[name] = best, cost, np.stack([losses for _, losses in results])
  print(f"{name:24s} rate {best:<6g} loss of each trial: " + "  ".join(f"{rate:g}: {loss:.2g}" for rate, loss in trials.items()))

# %%
figure, axis = plt.subplots(figsize=(9, 4.5))
for name, (rate, cost, losses) in runs.items():
  smooth = np.stack([np.convolve(line, np.ones(25) / 25, "valid") for line in losses])
  evaluations = cost * np.arange(25, 25 + smooth.shape[1])
  axis.semilogy(evaluations, np.median(smooth, 0), label=f"{name}, rate {rate:g}")
  axis.fill_between(evaluations, smooth.min(0), smooth.max(0), alpha=0.2)
axis.set(xlabel="gradient evaluations", ylabel="mean squared error (mean of 25 steps)")
axis.set_title("Each at its own rate; median and range of three seeds")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## SOAP: Adam in another basis, and what that basis sees
#
# `psgd(lr, soap(), b1=0.95, every=1)` is SOAP: P = (Q_L ⊗ Q_R) diag(1/√V) (Q_L ⊗ Q_R)ᵀ, with Q_L and Q_R the eigenvectors
# of the moments GGᵀ and GᵀG. That is Adam in a rotated basis, and as good as the second moment of the gradients is
# diagonal there. `soap` takes either criterion: on gradients V is their second moment, on Hessian-vector products that
# of H v, which is H², so that P → |H|⁻¹.
#
# Here are both, for the 6 × 24 matrix of the first layer after three hundred steps of Adam: the second moment of what is
# observed, as correlations, in the basis of the parameters and in the basis that `soap` found.

# %%
params, _ = trainer(optax.adam, 300)(3e-2, 1)
weight = params["params"]["layers_0"]["kernel"]


def with_weight(w):
  return {"params": {**params["params"], "layers_0": {**params["params"]["layers_0"], "kernel": w}}}


def observation(key, newton):
  """A probe of the first layer: g of a batch, or v and H v of the whole set."""
  if not newton:
    rows = jax.random.choice(key, len(inputs), (64,))
    return dpo.Probe(None, jax.grad(lambda w: loss_of(with_weight(w), rows))(weight))
  v = jax.random.normal(key, weight.shape)
  return dpo.Probe(v, dpo.hvp(lambda w: loss_of(with_weight(w), jnp.arange(len(inputs))), weight)(v))


def second_moments(newton, count=3000):
  """In the parameters' basis, and in SOAP's."""
  p = dpo.soap(b2=0.999, max_skew=jnp.inf)
  keys = jax.random.split(jax.random.key(0), count)
  fit = lambda state, key: (p.fit(state, observation(key, newton), key=key, damping=0.0), None)
  state, _ = jax.jit(lambda s: jax.lax.scan(fit, s, keys))(p.init(weight))
  left, right = (basis[0] for basis in optax.tree.get(state, "bases"))
  seen = jax.jit(jax.vmap(lambda key: observation(key, newton).product))(jax.random.split(jax.random.key(1), count))
  moment = lambda x: np.einsum("ki,kj->ij", x.reshape(count, -1), x.reshape(count, -1)) / count
  return moment(np.asarray(seen)), moment(np.asarray(left.T @ seen @ right))


def correlations(c):
  scale = np.sqrt(np.diag(c))
  return c / np.outer(scale, scale)


figure, axes = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained")
for pair, what, newton in ((axes[:2], "gradients", False), (axes[2:], "H v", True)):
  for axis, c, basis in zip(pair, second_moments(newton), ("parameters'", "SOAP's")):
    r = correlations(c)
    picture = axis.imshow(abs(r), cmap=plt.get_cmap("Blues", 5), vmin=0, vmax=1)
    axis.set(title=f"{what}, {basis} basis\nlargest eigenvalue {np.linalg.eigvalsh(r)[-1]:.1f}", xticks=[], yticks=[])
    axis.set_xlabel("entry, 1 to 144")
figure.colorbar(picture, ax=axes, label="|correlation|", shrink=0.75)

# %% [markdown]
# A white picture with a dark diagonal would be a basis in which Adam's division by √V is all there is to do; all
# eigenvalues of the correlations would then be 1. The largest says how uneven the division leaves the directions. SOAP's
# rotation brings it down; what is left is what no Kronecker basis can take, and with H v that is more than with gradients.
#
# Rules of thumb: *whitening* if gradients are all you have, if batches are small, or in place of Adam; *Newton* if the
# loss is deterministic or its noise says little about its curvature, if the Hessian is indefinite (|H|⁻¹ leaves saddles),
# and a product now and then is cheap.
#
# ## What to remember
#
# 1. On Hv, P → |H|⁻¹, whatever the noise; on gradients P → (E g gᵀ)^(−½), which is |H|⁻¹ where the noise is like H².
# 2. A fit on Hv costs one gradient more: fit every tenth step, and compare at equal gradient evaluations.
# 3. SOAP is Adam in a basis where the second moment is nearly diagonal, and it takes either criterion.
