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
# # Norm layers, partial Hessians, and what a penalty means
#
# Three papers about preconditioning and normalisation: SGD with partial Hessian (arXiv:2403.02681), batch-norm
# preconditioning (arXiv:2108.01110), and regularisation under a preconditioner (arXiv:2410.00232).

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
# ## How diagonal is the Hessian of a norm layer?
#
# SGD-PH divides the gradients of norm layers by the diagonal of their Hessian block. That block is exactly diagonal
# only if what follows is channel-separable. `diagonality` measures it, on any loss.

# %%
from dpsgd_optax import training
from flax import linen as nn

rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((128, 8)) * np.geomspace(0.2, 5, 8), jnp.float32)
labels = jnp.asarray((np.asarray(x) @ rng.standard_normal((8, 4))).argmax(-1))


class Net(nn.Module):
  norm: str = "batch"

  @nn.compact
  def __call__(self, x):
    for width in (16, 16):
      x = nn.Dense(width)(x)
      if self.norm == "batch":
        x = nn.BatchNorm(use_running_average=False)(x)
      if self.norm == "layer":
        x = nn.LayerNorm()(x)
      x = nn.relu(x)
    return nn.Dense(4)(x)


def made(norm):
  model = Net(norm)
  variables = model.init(jax.random.key(0), x)

  def loss(params):
    out, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels).mean()

  return variables["params"], loss


for norm in ("batch", "layer"):
  params, loss = made(norm)
  found = dpo.diagonality(loss, params, where=training.is_norm_param)
  for path, of in found.items():
    print(f"{path:22s} off-diagonal share {float(of.share):.2f}   row sums wrong by {float(of.error):.2f}")

# %% [markdown]
# Far from zero: which is why the default probe of `sgd_ph` is random signs, an unbiased estimate of the diagonal, and
# not the row sums H·1 of the released code.
#
# ## SGD-PH beside SGD with momentum
#
# Five learning rates for each from one set of initial parameters, and the best of each from three others.

# %%
SMALL = (0.03, 0.1, 0.3, 1.0, 3.0)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)


def raced(train, rates=RATES):
  """The best rate of five on seed 0, and the losses with it on seeds 1 to 3: (3, steps)."""
  trials = {rate: float(train(rate, 0)[-20:].mean()) for rate in rates}
  trials = {rate: loss for rate, loss in trials.items() if np.isfinite(loss)}
  best = min(trials, key=trials.get)
  return best, np.stack([train(best, seed) for seed in (1, 2, 3)])


def drawn(axis, runs):
  """Median and range over the seeds."""
  for name, (rate, losses) in runs.items():
    axis.semilogy(np.median(losses, 0), label=f"{name}, rate {rate:g}")
    axis.fill_between(np.arange(losses.shape[1]), losses.min(0), losses.max(0), alpha=0.2)
  axis.set(xlabel="steps", ylabel="loss on the training set (nats)")
  axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  axis.figure.tight_layout()


def on_batch_norm(make, steps=150):
  model = Net("batch")

  def train(rate, seed):
    tx = optax.with_extra_args_support(make(rate))
    variables = model.init(jax.random.key(seed), x)

    def loss(params):
      out, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
      return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state, params, hvp=dpo.hvp(loss, params))
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (variables["params"], tx.init(variables["params"])), length=steps)[1]

  return jax.jit(train)


figure, axis = plt.subplots(figsize=(9, 4))
axis.set_title("Batch norm, the whole training set in each step")
drawn(axis, {
  "SGD with momentum": raced(on_batch_norm(lambda rate: optax.sgd(rate, 0.9))),
  "SGD-PH": raced(on_batch_norm(lambda rate: dpo.sgd_ph(rate, where=training.is_norm_param))),
})

# %% [markdown]
# Three seeds of a toy decide nothing, and no gain is claimed: on real digits, with five seeds, SGD-PH did not end below
# tuned SGD with momentum (the page on claims has the figures).
#
# ## Batch norm without batch norm
#
# BNP puts the statistics of a layer's inputs into a preconditioner: a plain network whose *gradients* are normalised.
# It works at batch sizes where batch norm does not, and the network stays as it is.

# %%
plain = Net("none")
forward = training.with_layer_inputs(plain.apply)


def in_small_batches(make, steps=300, batch=8):
  def train(rate, seed):
    tx = optax.with_extra_args_support(make(rate))
    start, key = jax.random.split(jax.random.key(seed))
    params = plain.init(start, x)["params"]

    def step(carry, key):
      params, state = carry
      rows = jax.random.choice(key, len(x), (batch,))

      def loss(p):
        out, inputs = forward({"params": p}, x[rows])
        return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean(), inputs

      (_, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, state = tx.update(grads, state, params, layer_inputs=inputs)
      params = optax.apply_updates(params, updates)
      out = plain.apply({"params": params}, x)
      return (params, state), optax.losses.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[1]

  return jax.jit(train)


figure, axis = plt.subplots(figsize=(9, 4))
axis.set_title("Inputs of uneven scale, batches of 8, no norm layer")
drawn(axis, {"SGD": raced(in_small_batches(optax.sgd), SMALL), "BNP": raced(in_small_batches(dpo.bnp), SMALL)})

# %% [markdown]
# ## What weight decay means under a preconditioner
#
# Under Adam, "L2" is not "weight decay". With z = P^(−½) θ the preconditioned variable, decay of z is AdamW's decoupled
# decay, and decay of θ is L2 in the gradient, which P then bends. On a quadratic with known curvature the shrinkage of
# each eigen-direction shows it.

# %%
curvature = jnp.geomspace(0.01, 10, 40)
quadratic = lambda p: 0.5 * jnp.sum(curvature * (p - 1.0) ** 2)


def minimum(tx, steps=8000):
  tx = optax.with_extra_args_support(tx)

  def step(carry, _):
    params, state = carry
    grads = jax.grad(quadratic)(params)
    updates, state = tx.update(grads, state, params, hvp=dpo.hvp(quadratic, params))
    return (optax.apply_updates(params, updates), state), None

  first = jnp.zeros(40)
  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((first, tx.init(first)))
  return np.asarray(params)


def newton(before=None, after=None):
  tx = dpo.scale_by_preconditioner(dpo.diagonal(step_size=0.5), dpo.newton(), after=after)
  parts = [tx] if before is None else [before, tx]
  return optax.chain(*parts, optax.scale_by_learning_rate(0.02))


strength = 0.3
of_theta = minimum(newton(before=optax.add_decayed_weights(strength)))
of_z = minimum(newton(after=optax.add_decayed_weights(strength)))
figure, axis = plt.subplots(figsize=(8, 4))
axis.semilogx(curvature, of_theta, "o", color="C0", label="L2 of θ, found")
axis.semilogx(curvature, curvature / (curvature + strength), color="C0", label="h / (h + λ)")
axis.semilogx(curvature, of_z, "s", color="C1", label="L2 of z (decoupled), found")
axis.semilogx(curvature, 0 * curvature + 1 / (1 + strength), color="C1", label="1 / (1 + λ)")
axis.set(xlabel="curvature h (loss / parameter²)", ylabel="where the weight ends\n(1 without penalty)", ylim=(0, 1.05))
axis.set_title(f"A penalty of strength λ = {strength}")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## What to remember
#
# 1. The Hessian of a norm layer is not diagonal unless what follows is separable: `diagonality` measures it on your loss.
# 2. `bnp` normalises gradients in place of activations, and needs no batch to speak of.
# 3. Under a preconditioner L2 has two meanings: of θ it bends with the curvature, of z it is AdamW's decoupled decay.
