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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpsgd-optax/dpsgd_optax/blob/main/notebooks/4_norm_layers_and_regularisation.ipynb)
#
# Three papers about preconditioning and normalisation: SGD with partial Hessian (arXiv:2403.02681), batch-norm
# preconditioning (arXiv:2108.01110), and regularisation under a preconditioner (arXiv:2410.00232).

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

# %%
def train(tx, loss, params, steps=150, **more):
  tx = optax.with_extra_args_support(tx)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, hvp=dpo.hvp(loss, params))
    return (optax.apply_updates(params, updates), state), value

  (params, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((params, tx.init(params)))
  return params, np.asarray(losses)


params, loss = made("batch")
figure, axis = plt.subplots(figsize=(7, 4))
for name, tx in {
  "SGD with momentum": optax.sgd(0.05, 0.9),
  "SGD-PH": dpo.sgd_ph(0.05, where=training.is_norm_param),
}.items():
  axis.semilogy(train(tx, loss, params)[1], label=name)
axis.set(xlabel="step", ylabel="training loss", title="Same learning rate")
axis.legend()

# %% [markdown]
# No gain is claimed: on this network, and in the benchmarks of this project, SGD-PH was not seen to beat tuned SGD with
# momentum by more than the spread of the seeds.
#
# ## Batch norm without batch norm
#
# BNP puts the statistics of a layer's inputs into a preconditioner: a plain network whose *gradients* are normalised.
# It works at batch sizes where batch norm does not, and the network stays as it is.

# %%
plain = Net("none")
params = plain.init(jax.random.key(0), x)["params"]
forward = training.with_layer_inputs(plain.apply)


def run(tx, with_inputs, steps=300, batch=8):
  def step(carry, key):
    params, state = carry
    rows = jax.random.choice(key, len(x), (batch,))

    def loss(p):
      out, inputs = forward({"params": p}, x[rows])
      return optax.losses.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean(), inputs

    (_, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
    more = {"layer_inputs": inputs} if with_inputs else {}
    updates, state = tx.update(grads, state, params, **more)
    params = optax.apply_updates(params, updates)
    out = plain.apply({"params": params}, x)
    return (params, state), optax.losses.softmax_cross_entropy_with_integer_labels(out, labels).mean()

  keys = jax.random.split(jax.random.key(1), steps)
  return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, keys)[1])((params, tx.init(params))))


figure, axis = plt.subplots(figsize=(7, 4))
axis.semilogy(run(optax.sgd(0.05), False), label="SGD")
axis.semilogy(run(optax.sgd(0.2), False), label="SGD, four times the learning rate")
axis.semilogy(run(dpo.bnp(0.2), True), label="BNP, four times the learning rate")
axis.set(xlabel="step", ylabel="training loss", title="Badly scaled inputs, batches of 8")
axis.legend()

# %% [markdown]
# ## What weight decay means under a preconditioner
#
# Under Adam, "L2" is not "weight decay". With z = P^(−½) θ the preconditioned variable, decay of z is AdamW's decoupled
# decay, and decay of θ is L2 in the gradient, which P then bends. On a quadratic with known curvature the shrinkage of
# each eigen-direction shows it.

# %%
curvature = jnp.geomspace(0.01, 10, 40)
quadratic = lambda p: 0.5 * jnp.sum(curvature * (p - 1.0) ** 2)


def minimum(tx, steps=4000):
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
  tx = dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), after=after)
  parts = [tx] if before is None else [before, tx]
  return optax.chain(*parts, optax.scale_by_learning_rate(0.02))


strength = 0.3
figure, axis = plt.subplots(figsize=(7, 4))
axis.semilogx(curvature, minimum(newton(before=optax.add_decayed_weights(strength))), label="L2 of θ: h / (h + λ)")
axis.semilogx(curvature, minimum(newton(after=optax.add_decayed_weights(strength))), label="L2 of z (decoupled): 1 / (1 + λ)")
axis.set(xlabel="curvature h", ylabel="where the weight ends (1 without penalty)", ylim=(0, 1.05))
axis.legend()
