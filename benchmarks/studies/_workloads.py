# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks cost` times: networks with made-up data, and a table of calls on each of them.

mlp        784-512-512-10, batch 256            charlm    4 decoder blocks of width 128, 16 x 128 characters
lenet5     5 layers on 28 x 28, batch 64        resnet8   8 layers with batch norm on 32 x 32 x 3, batch 64
deep       kernels of 100 layers 64 x 64        gpt2      12 decoder blocks of width 768, 8 x 1024 tokens: for a GPU
layers     lenet5 as `nn.Conv` and `nn.Dense`: `capture` and `bnp` on an unchanged model, convolutions in a `lax.cond`

Each call is a whole step, or `update` alone, that goes on from its own result; its state is donated, as in training.
`dense` is not among them: the square of the number of parameters of the smallest of these networks is 15 GB.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpsgd_optax as dpo
from benchmarks.engine.problem import STATISTICS, cross_entropy
from benchmarks.problems.models import MLP, LeNet5, Transformer
from benchmarks.problems.resnet import SIZES, ResNet
from benchmarks.studies import _peers as peers
from dpsgd_optax import training

RATE = 1e-5  # nothing may run away: a step is repeated some hundred times
# both factors of every matrix dense, vectors diagonal: the structure of psgd-jax; the geometry of the fewest products
DENSE = dpo.kron(max_skew=100.0, geometry=dpo.qeq)
QUICK = dpo.kron(geometry=dpo.quad)  # what `psgd` fits here
DEPTH, WIDTH = 100, 64
BLOCK = 256


def compiled(call: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
  """The call traced and compiled, and the CPU seconds of it; nothing is remembered from an earlier time."""
  start = time.process_time()
  anew = jax.jit(lambda *arguments: call(*arguments), donate_argnums=0)
  return anew.lower(*arguments).compile(), time.process_time() - start


class Step:
  """A compiled call `carry, *arguments -> carry, result` that goes on from its own carry, which is donated."""

  def __init__(self, call: Callable[..., tuple[Any, Any]], carry: Any, *arguments: Any):
    self.carry = jax.tree.map(jnp.copy, carry)  # no two donated arrays may be one buffer
    self.arguments = arguments
    before = process_types(self.carry)
    self.compiled, self.compile_seconds = compiled(call, self.carry, *arguments)
    self()
    self.recompiled = int(process_types(self.carry) != before)

  def __call__(self) -> Any:
    self.carry, result = self.compiled(self.carry, *self.arguments)
    return result, jax.tree.leaves(self.carry)[-1:]

  def counts(self) -> dict[str, float | None]:
    """What the compiler says of it; CPU seconds that tracing and compiling took."""
    costs, memory = self.compiled.cost_analysis() or {}, self.compiled.memory_analysis()
    return {
      "compile_cpu_seconds": self.compile_seconds,
      "instructions": self.compiled.as_text().count(" = "),
      "flops": costs.get("flops"),
      "bytes": costs.get("bytes accessed"),
      "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def process_types(tree: Any) -> list[Any]:
  """Shapes, dtypes and weak types: what a second call has to find unchanged if it is not to compile again."""
  return [(x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(tree))]


@dataclass(frozen=True)
class Workload:
  """Params, and the loss with the running statistics after the batch; without `loss` the updates alone are timed."""

  params: Any
  statistics: Any = ()
  batch: Any = ()
  loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]] | None = None

  @property
  def gradients(self) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.01 * rng.standard_normal(x.shape), x.dtype), self.params)


def _classifier(model: nn.Module, shape: tuple[int, ...], classes: int = 10, **train: Any) -> Workload:
  """Cross-entropy of random images or tokens; `train`: arguments of a model that has running statistics."""
  rng = np.random.default_rng(0)
  images = len(shape) != 2 or not isinstance(model, Transformer)
  x = jnp.asarray(rng.standard_normal(shape), jnp.float32) if images else jnp.asarray(rng.integers(0, classes, shape))
  y = jnp.asarray(rng.integers(0, classes, shape[:1] if images else shape))
  variables = jax.jit(model.init)(jax.random.key(0), x[:1])

  def loss(params: Any, statistics: Any, batch: Any) -> tuple[jax.Array, Any]:
    if not train:
      return cross_entropy(model.apply(params, batch[0]), batch[1])["loss"], statistics
    logits, new = model.apply(params | {STATISTICS: statistics}, batch[0], mutable=[STATISTICS], **train)
    return cross_entropy(logits, batch[1])["loss"], new[STATISTICS]

  statistics = variables.get(STATISTICS, ())
  params = {name: part for name, part in variables.items() if name != STATISTICS}
  return Workload(params, statistics, (x, y), loss)


class Layers(nn.Module):
  """LeNet-5 as anybody would write it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for features in (6, 16):
      x = nn.max_pool(nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
    x = x.reshape(len(x), -1)
    for features in (120, 84):
      x = nn.relu(nn.Dense(features)(x))
    return nn.Dense(10)(x)


def deep(depth: int = DEPTH, width: int = WIDTH) -> Workload:
  rng = np.random.default_rng(0)
  return Workload({f"w{i}": jnp.asarray(rng.standard_normal((width, width)), jnp.float32) for i in range(depth)})


WORKLOADS: dict[str, Callable[[], Workload]] = {
  "mlp": lambda: _classifier(MLP((512, 512, 10)), (256, 784)),
  "lenet5": lambda: _classifier(LeNet5(), (64, 28, 28, 1)),
  "charlm": lambda: _classifier(Transformer(65, 4, 128, 4), (16, 128), 65),
  "resnet8": lambda: _classifier(ResNet(*SIZES["resnet8"], "batch", True), (64, 32, 32, 3), train=True),
  "deep": deep,
  "layers": lambda: _classifier(Layers(), (64, 28, 28, 1)),
  "gpt2": lambda: _classifier(Transformer(50257, 12, 768, 12), (8, 1024), 50257),
}
USUAL = ("mlp", "lenet5", "charlm", "resnet8", "deep", "layers")
LAYERED = ("mlp", "layers")  # where each layer is shown what enters it


def per_leaf(make: Callable[[], optax.GradientTransformation], params: Any) -> optax.GradientTransformation:
  """The same rule for every leaf by itself, one after the other: what batching by shape saves."""
  counter = itertools.count()
  labels = jax.tree.map(lambda _: str(next(counter)), params)
  return optax.partition({label: make() for label in jax.tree.leaves(labels)}, labels)


def updates(work: Workload, name: str) -> dict[str, tuple[Any, ...]]:
  """`update` alone: name -> call, carry, arguments."""
  params, grads = work.params, work.gradients

  def alone(tx: optax.GradientTransformation, **extra: Any) -> tuple[Any, ...]:
    tx = optax.with_extra_args_support(tx)

    def call(state: Any, grads: Any, params: Any) -> tuple[Any, Any]:
      new, state = tx.update(grads, state, params, **extra)
      return state, new

    return call, tx.init(params), grads, params

  whitening = partial(dpo.psgd, RATE, b1=0.9)
  product = lambda v: v
  found = {
    "sgd": alone(optax.sgd(RATE)),
    "adam": alone(optax.adam(RATE)),
    "adamw": alone(optax.adamw(RATE)),
    "muon": alone(optax.contrib.muon(RATE)),
    "psgd, no fit": alone(whitening(QUICK), refresh=False),
    "psgd, fit": alone(whitening(QUICK), refresh=True),
    "psgd dense, no fit": alone(whitening(DENSE), refresh=False),
    "psgd dense, fit": alone(whitening(DENSE), refresh=True),
    "psgd dense, scheduled": alone(whitening(DENSE)),
    "dpsgd, no fit": alone(dpo.dpsgd(RATE), refresh=False, judge=False, value=jnp.ones(())),
    "dpsgd, fit": alone(dpo.dpsgd(RATE), refresh=True, judge=False, value=jnp.ones(()), hvp=product),
  }
  if name == "deep":
    found["psgd dense per leaf, fit"] = alone(per_leaf(lambda: whitening(DENSE), params), refresh=True)
  if name == "mlp":
    found |= {
      "psgd lra of rank 10, fit": alone(whitening(dpo.lra(rank=10)), refresh=True),
      "psgd xmat, fit": alone(whitening(dpo.xmat()), refresh=True),
      "psgd affine, fit": alone(whitening(dpo.affine(max_skew=100.0)), refresh=True),
      "psgd scan, fit": alone(whitening(dpo.scan()), refresh=True),
      "psgd diagonal, fit": alone(whitening(dpo.diagonal()), refresh=True),
      f"psgd dense in blocks of {BLOCK}, fit": alone(whitening(dpo.blocked(DENSE, BLOCK)), refresh=True),
      "a fit taken": _fit(params, grads, True),
      "a fit not taken": _fit(params, grads, False),
    }
  if peers.installed():
    kron = peers.psgd_jax("kron").kron
    theirs = lambda p: alone(kron(RATE, b1=0.9, preconditioner_update_probability=p))
    found["psgd-jax kron, fit"] = theirs(1.0)
    if name != "deep":  # it takes minutes to compile there
      found["psgd-jax kron, no fit"] = theirs(1e-9)
    if name == "mlp":
      every = {"b1": 0.9, "preconditioner_update_probability": 1.0}
      lra = peers.psgd_jax("low_rank_approximation").low_rank_approximation
      found["psgd-jax lra of rank 10, fit"] = alone(lra(RATE, **every))
      found["psgd-jax xmat, fit"] = alone(peers.psgd_jax("xmat").xmat(RATE, **every))
  return {f"update: {label}": call for label, call in found.items()}


def _fit(params: Any, grads: Any, taken: bool) -> tuple[Any, ...]:
  """The fit of all factors inside a `lax.cond`."""
  p = DENSE

  def call(state: Any, taken: jax.Array, grads: Any) -> tuple[Any, Any]:
    fit = lambda state: p.fit(state, dpo.Probe(None, grads), key=jax.random.key(0), damping=0.0)
    return jax.lax.cond(taken, fit, lambda state: state, state), ()

  return call, p.init(params), jnp.asarray(taken), grads


def steps(work: Workload, name: str) -> dict[str, tuple[Any, ...]]:
  """Whole steps, gradient and all: name -> call, carry, arguments."""
  assert work.loss is not None
  params, statistics, batch = work.params, work.statistics, work.batch
  loss_of = lambda statistics, batch: lambda p: work.loss(p, statistics, batch)
  vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

  def of_gradient(call: Callable[..., Any]) -> tuple[Any, ...]:
    """`call(loss, params, batch)` that returns gradients, or gradients and more."""

    def run(carry: Any, params: Any, statistics: Any, batch: Any, vector: Any) -> tuple[Any, Any]:
      return carry, call(loss_of(statistics, batch), params, vector)

    return run, jnp.zeros(()), params, statistics, batch, vector

  def step(tx: optax.GradientTransformation, fit: str | None = None, **extra: Any) -> tuple[Any, ...]:
    """`fit`: whence the Hessian-vector product comes: of the "batch", of its first "quarter", of the 1-D "leaves"."""
    tx = optax.with_extra_args_support(tx)

    def run(carry: Any, batch: Any) -> tuple[Any, Any]:
      params, statistics, state = carry
      loss = loss_of(statistics, batch)
      if fit in ("batch", "leaves"):
        where = {"where": training.is_norm_param} if fit == "leaves" else {}
        (value, statistics), grads, hvp = dpo.value_and_grad_then_hvp(loss, has_aux=True, **where)(params)
        given = {"hvp": hvp}
      else:
        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        quarter = jax.tree.map(lambda x: x[: len(x) // 4], batch)
        given = {"hvp": dpo.hvp(loss_of(statistics, quarter), params, has_aux=True)} if fit == "quarter" else {}
      ahead = lambda p: loss(p)[0]
      given |= {"value": value, "value_fn": ahead, "obj_fn": ahead}
      new, state = tx.update(grads, state, params, **given, **extra)
      return (optax.apply_updates(params, new), statistics, state), value

    return run, (params, statistics, tx.init(params)), batch

  def gradient_and_apply() -> tuple[Any, ...]:
    p = dpo.damped_kron()

    def run(carry: Any, batch: Any) -> tuple[Any, Any]:
      params, statistics, state = carry
      (value, statistics), grads = jax.value_and_grad(loss_of(statistics, batch), has_aux=True)(params)
      new = jax.tree.map(lambda w, u: w - RATE * u, params, p.apply(state, grads))
      return (new, statistics, state), value

    return run, (params, statistics, p.init(params)), batch

  aux = {"has_aux": True}
  whitening, newton, dpsgd = dpo.psgd(RATE, QUICK, b1=0.9), dpo.psgd(RATE, QUICK, dpo.newton()), dpo.dpsgd(RATE)
  found = {
    "gradient": of_gradient(lambda f, p, v: jax.value_and_grad(f, **aux)(p)),
    "gradient + Hvp": of_gradient(lambda f, p, v: dpo.value_and_grad_and_hvp(f, **aux)(p, v)),
    "gradient + Hvp by differences": of_gradient(lambda f, p, v: _differences(f, p, v)),
    "gradient and apply": gradient_and_apply(),
    "sgd": step(optax.sgd(RATE)),
    "adam": step(optax.adam(RATE)),
    "adamw": step(optax.adamw(RATE)),
    "muon": step(optax.contrib.muon(RATE)),
    "psgd, no fit": step(whitening, refresh=False),
    "psgd, fit": step(whitening, refresh=True),
    "psgd newton, no fit": step(newton, refresh=False),
    "psgd newton, fit": step(newton, "batch", refresh=True),
    "psgd newton, fit on a quarter of the batch": step(newton, "quarter", refresh=True),
    "dpsgd, no fit": step(dpsgd, refresh=False, judge=False),
    "dpsgd, fit": step(dpsgd, "batch", refresh=True, judge=False),
    "levenberg_marquardt": step(dpo.levenberg_marquardt(optax.sgd(RATE))),
    "sophia": step(optax.contrib.sophia(RATE)),
  }
  if name == "resnet8":
    found["sgd_ph"] = step(dpo.sgd_ph(RATE, training.is_norm_param), "leaves", refresh=True)
  if name in ("mlp", "lenet5", "layers") and peers.installed():
    found["psgd-jax affine, fit"] = _affine(work, loss_of, True)
    found["psgd-jax affine on our Hvp, fit"] = _affine(work, loss_of, False)
  if name in LAYERED:
    found |= layered(work)
  return found


def layered(work: Workload) -> dict[str, tuple[Any, ...]]:
  """Gradients with what enters each layer, and the methods that live on it."""
  assert work.loss is not None
  params, statistics, batch = work.params, work.statistics, work.batch
  loss = lambda p, batch: work.loss(p, statistics, batch)
  captured = lambda reduce=None: dpo.capture(loss, has_aux=True, reduce=reduce)
  inputs = jax.jit(captured())(params, batch)[2]
  is_record = lambda x: isinstance(x, dpo.LayerRecord)

  def of_gradient(reduce: Callable | None) -> tuple[Any, ...]:
    return lambda carry, params, batch: (carry, captured(reduce)(params, batch)), jnp.zeros(()), params, batch

  def products(carry: Any, inputs: Any) -> tuple[Any, Any]:
    moments = lambda record: None if record is None else dpo.second_moments(record, ())
    return carry, jax.tree.map(moments, inputs, is_leaf=is_record)

  def step(tx: optax.GradientTransformationExtraArgs) -> tuple[Any, ...]:
    def run(carry: Any, batch: Any) -> tuple[Any, Any]:
      params, state = carry
      (value, _), grads, records = captured()(params, batch)
      new, state = tx.update(grads, state, params, layer_inputs=records)
      return (optax.apply_updates(params, new), state), value

    return run, (params, tx.init(params)), batch

  return {
    "gradient and inputs": of_gradient(None),
    "gradient and second moments": of_gradient(dpo.second_moments),
    "second moments of the inputs": (products, jnp.zeros(()), inputs),
    "bnp": step(dpo.bnp(RATE, layers=inputs)),
    "gls": step(dpo.gls(RATE, layers=inputs, fallback=optax.sgd(RATE))),
  }


def _differences(loss: Callable, params: Any, vector: Any) -> Any:
  """Gradient and product from two gradients: the compiler sees that one of the three is asked for twice."""
  value, grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, grads, dpo.hvp_finite_difference(loss, params, has_aux=True)(vector)


def _affine(work: Workload, loss_of: Callable, as_documented: bool) -> tuple[Any, ...]:
  """A whole step of psgd-jax's affine preconditioner on Hessian-vector products, every step a fit.

  ``as_documented``: with the products of its `hessian_helper`, as its README tells, which computes them in a
  `lax.cond`; otherwise it is handed products made as ours are, and told at trace time that there is one.
  """
  tx = peers.psgd_jax("affine").affine(RATE, b1=0.0)
  helper = peers.psgd_jax("utils").hessian_helper

  def run(carry: Any, batch: Any, vector: Any) -> tuple[Any, Any]:
    params, statistics, state, (key, count) = carry
    loss, due = loss_of(statistics, batch), True
    if as_documented:
      key, probe_key = jax.random.split(key)
      (value, statistics), grads, product, vector, due = helper(probe_key, count, loss, params, has_aux=True)
    else:
      (value, statistics), grads, product = dpo.value_and_grad_and_hvp(loss, has_aux=True)(params, vector)
    new, state = tx.update(grads, state, params, Hvp=product, vector=vector, update_preconditioner=due)
    return (optax.apply_updates(params, new), statistics, state, (key, count + 1)), value

  vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), work.params)
  ahead = jax.random.key(0), jnp.zeros((), jnp.int32)
  return run, (work.params, work.statistics, tx.init(work.params), ahead), work.batch, vector
