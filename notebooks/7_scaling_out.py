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
# # Scaling out: many layers, many runs, many devices
#
# How compile time grows with depth, how a whole sweep becomes one compiled call, and how a preconditioner is divided over
# devices. The devices here are eight virtual ones on the CPU; on real ones nothing changes but the mesh.

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
# The number of virtual devices must be set before JAX starts. On a machine with accelerators leave this cell out.

# %%
import os

jax.config.update("jax_num_cpu_devices", 8)

# %% [markdown]
# ## Compile time grows with shapes more than with layers
#
# Leaves of equal shape are stacked and fitted in one batched computation. What remains for each layer is to stack and
# to unstack it.

# %%
import time


def compile_seconds(depth, equal=True):
  params = {f"w{i}": jnp.zeros((32, 32 if equal else 16 + 16 * i)) for i in range(depth)}
  tx = dpo.psgd(1e-3)
  state = tx.init(params)
  begin = time.perf_counter()
  jax.jit(tx.update).lower(params, state, params).compile()
  return time.perf_counter() - begin


compile_seconds(1)  # the first one pays for what JAX does once
depths = [1, 2, 4, 8]
figure, axis = plt.subplots(figsize=(6, 3.5))
axis.plot(depths, [compile_seconds(depth, False) for depth in depths], "o-", label="all shapes different")
axis.plot([*depths, 32], [compile_seconds(depth) for depth in [*depths, 32]], "o-", label="all shapes equal")
axis.set(xlabel="layers", ylabel="seconds to compile `update`", ylim=(0, None), title="One step of psgd")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## A sweep as one call
#
# `refresh=` given as a Python bool chooses at trace time whether a step fits, so that under `vmap` over seeds and
# learning rates the steps without a fit stay cheap (a batched `lax.cond` would run both branches).

# %%
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((256, 16)) * np.geomspace(0.1, 3, 16), jnp.float32)
y = jnp.tanh(x @ jnp.asarray(rng.standard_normal((16, 4)), jnp.float32))


def run(rate, seed, cycles=12, every=10):
  tx = dpo.psgd(rate, dpo.kron(), key=jax.random.wrap_key_data(seed))
  params = {"a": 0.3 * jax.random.normal(jax.random.wrap_key_data(seed), (16, 24)), "b": jnp.zeros((24, 4))}
  loss = lambda p: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)

  def step(carry, refresh):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params, refresh=refresh)
    return optax.apply_updates(params, updates), state

  def cycle(carry, _):
    carry = step(carry, True)
    carry = jax.lax.fori_loop(0, every - 1, lambda _, c: step(c, False), carry)
    return carry, loss(carry[0])

  return jax.lax.scan(cycle, (params, tx.init(params)), length=cycles)[1]


rates = jnp.geomspace(3e-4, 0.1, 8)
seeds = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), 4))
sweep = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
final = np.asarray(sweep(rates, seeds))[:, :, -1]

figure, axis = plt.subplots(figsize=(6, 3.5))
axis.loglog(rates, np.median(final, 1), "o-", label="median of the seeds")
axis.fill_between(rates, final.min(1), final.max(1), alpha=0.2, label="their range")
axis.legend()
axis.set(xlabel="learning rate", ylabel="mean squared error in the end", title="8 rates × 4 seeds, one compiled call")
figure.tight_layout()

# %% [markdown]
# ## Many devices
#
# `sharded` divides each bucket of equal matrices over the mesh; the state is laid out by `partition_specs`. The batch is
# divided too, and JAX makes gradients and Hessian-vector products global by itself.

# %%
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
replicated, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
params = {f"w{i}": 0.2 * jax.random.normal(jax.random.key(i), (16, 16)) for i in range(8)}
plain = dpo.psgd(1e-2)
tx = dpo.sharded(plain, mesh)


def loss(p, batch):
  for name in sorted(p):
    batch = jnp.tanh(batch @ p[name])
  return jnp.mean(batch**2)


def step_of(tx):
  @jax.jit
  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


placed, batch = jax.device_put(params, replicated), jax.device_put(x, divided)
state = jax.jit(tx.init)(placed)
step, single = step_of(tx), step_of(plain)
reference, reference_state = params, plain.init(params)
for _ in range(10):
  placed, state, value = step(placed, state, batch)
  reference, reference_state, _ = single(reference, reference_state, x)
apart = max(float(jnp.max(jnp.abs(placed[name] - reference[name]))) for name in params)
print(f"loss {float(value):.5f}; largest difference from one device: {apart:.1e}")

# %%
bucket = optax.tree.get(state, "buckets")["16x16_float32"]
print("factors of Q:", bucket.q[0].shape, "of which each device holds", bucket.q[0].addressable_shards[0].data.shape)
jax.debug.visualize_array_sharding(bucket.q[0].reshape(8, -1))

# %% [markdown]
# ## Replicas by hand: `pmap` and `shard_map`
#
# There each replica sees its share of the batch, and JAX averages nothing by itself. Averaging the gradient is not enough:
# Hessian-vector product and loss are local, each replica fits a P of its own, and the parameters drift apart without a
# word. `data_parallel` averages all that comes in, so that the replicas stay equal bit for bit.
#
# It is the same under `jax.shard_map(…, check_vma=False)`. With its default, `check_vma=True`, JAX sums the derivatives of
# replicated parameters by itself; there the loss has to be `jax.lax.pmean(loss, "data")`.

# %%
two = {name: params[name] for name in ("w0", "w1")}
shares = x.reshape(jax.device_count(), -1, x.shape[1])


def drift(tx, steps=6):
  def step(params, state, share):
    local = lambda p: loss(p, share)
    value, grads = jax.value_and_grad(local)(params)
    updates, state = tx.update(jax.lax.pmean(grads, "data"), state, params, value=value, value_fn=local)
    return optax.apply_updates(params, updates), state

  replicate = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * jax.device_count()), tree)
  run, params, state = jax.pmap(step, axis_name="data"), replicate(two), replicate(tx.init(two))
  for _ in range(steps):
    params, state = run(params, state, shares)
  return max(float(jnp.max(jnp.abs(a - a[0]))) for a in params.values())


print(f"only the gradient averaged: the replicas are {drift(dpo.dpsgd(0.1)):.1e} apart")
print(f"data_parallel: {drift(dpo.data_parallel(dpo.dpsgd(0.1), 'data')):.1e}")

# %% [markdown]
# ## What to remember
#
# 1. Leaves of equal shape are one batched computation: another layer of a known shape costs less than a new shape.
# 2. `sharded(tx, mesh)` divides fits and state over devices and changes no number beyond rounding.
# 3. Under `pmap` and `shard_map` wrap the optimizer in `data_parallel`: averaging the gradient alone is not enough.
