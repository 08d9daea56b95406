# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks cost` times: networks with made-up data, and calls on each of them.

small      64-64-32-10, batch 64: what a step costs when flops cost nothing
mlp        784-512-512-10, batch 256            charlm    4 decoder blocks of width 128, 16 x 128 characters
lenet5     5 layers on 28 x 28, batch 64        resnet8   8 layers with batch norm on 32 x 32 x 3, batch 64
deep       kernels of 100 layers 64 x 64        gpt2      12 decoder blocks of width 768, 8 x 1024 tokens: for a GPU
resnet18   18 layers, 11.2 million parameters, batch 128: for a GPU
layers     lenet5 as `nn.Conv` and `nn.Dense`: `capture` and `bnp` on an unchanged model, convolutions in a `lax.cond`

Each call is a whole step, or `update` alone, that goes on from its own result; its state is donated, as in training.
`dense` is not among them: the square of the number of parameters of the smallest of these networks is 15 GB.

Other people's Kron is in rivals.py: the same momentum, the same dense factors, donated too, and the fit on every step
or on none as a probability of 1 or 1e-9, by which they decide inside the step. They hold the factors, not P.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpsgd_optax as dpo
from benchmarks import rivals
from benchmarks.engine.problem import STATISTICS, cross_entropy
from benchmarks.engine.timing import Timed, Workload, of_gradient, probe, whole_step
from benchmarks.problems.models import MLP, LeNet5, Transformer
from benchmarks.problems.resnet import SIZES, ResNet
from dpsgd_optax import training

RATE = 1e-5  # nothing may run away: a step is repeated some hundred times
NEVER = 1e-9  # the probability of a fit where there shall be none
# both factors of every matrix dense, vectors diagonal: the structure of psgd-jax; the geometry of the fewest products
DENSE = dpo.kron(max_skew=100.0, geometry=dpo.qeq)
BLOCK = 256
BLOCKS = dpo.blocked(dpo.kron(max_skew=100.0, geometry=dpo.pro), BLOCK)  # what distributed-kron has
NO_P = {  # what every workload is trained with besides
  "sgd": optax.sgd(RATE),
  "adam": optax.adam(RATE),
  "adamw": optax.adamw(RATE),
  "muon": optax.contrib.muon(RATE),
}
LAYERED = ("mlp", "layers")  # where each layer is shown what enters it
RACED = ("small", "mlp", "lenet5", "charlm", "deep")  # beside psgdax and rollfast
BLOCKED = ("mlp", "charlm")  # beside distributed-kron
HISTORY = ("mlp", "lenet5", "layers")  # beside psgd-jax


def classification(model: nn.Module, shape: tuple[int, ...], classes: int = 10, **train: Any) -> Workload:
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


def deep(depth: int = 100, width: int = 64) -> Workload:
  rng = np.random.default_rng(0)
  return Workload({f"w{i}": jnp.asarray(rng.standard_normal((width, width)), jnp.float32) for i in range(depth)})


WORKLOADS: dict[str, Callable[[], Workload]] = {
  "small": lambda: classification(MLP((64, 32, 10)), (64, 64)),
  "mlp": lambda: classification(MLP((512, 512, 10)), (256, 784)),
  "lenet5": lambda: classification(LeNet5(), (64, 28, 28, 1)),
  "charlm": lambda: classification(Transformer(65, 4, 128, 4), (16, 128), 65),
  "resnet8": lambda: classification(ResNet(*SIZES["resnet8"], "batch", True), (64, 32, 32, 3), train=True),
  "resnet18": lambda: classification(ResNet(*SIZES["resnet18"], "batch", True), (128, 32, 32, 3), train=True),
  "deep": deep,
  "layers": lambda: classification(Layers(), (64, 28, 28, 1)),
  "gpt2": lambda: classification(Transformer(50257, 12, 768, 12), (8, 1024), 50257),
}
USUAL = ("small", "mlp", "lenet5", "charlm", "resnet8", "deep", "layers")


def per_leaf(make: Callable[[], optax.GradientTransformation], params: Any) -> optax.GradientTransformation:
  """The same rule for every leaf by itself, one after the other: what batching by shape saves."""
  counter = itertools.count()
  labels = jax.tree.map(lambda _: str(next(counter)), params)
  return optax.partition({label: make() for label in jax.tree.leaves(labels)}, labels)


def alone(tx: optax.GradientTransformation, work: Workload, **extra: Any) -> Timed:
  """`update` by itself, on made-up gradients."""
  tx = optax.with_extra_args_support(tx)

  def call(state: Any, grads: Any, params: Any) -> tuple[Any, Any]:
    new, state = tx.update(grads, state, params, **extra)
    return state, new

  return call, tx.init(work.params), work.gradients, work.params


def updates(work: Workload, name: str) -> dict[str, Timed]:
  """`update` alone: name -> call, carry, arguments."""
  update = lambda tx, **extra: alone(tx, work, **extra)
  whitening = partial(dpo.psgd, RATE, b1=rivals.MOMENTUM)
  product, given = (lambda v: v), {"judge": False, "value": jnp.ones(())}
  fitted = lambda p=None: update(whitening(p), refresh=True)
  soap = lambda period: dpo.psgd(RATE, dpo.soap(basis_every=period), b1=0.95, every=1)
  found = {name: update(tx) for name, tx in NO_P.items()} | {
    "psgd, no fit": update(whitening(), refresh=False),
    "psgd, fit": fitted(),
    "psgd, scheduled": update(whitening()),
    "soap, bases kept": update(soap(1000)),
    "soap, bases refreshed": update(soap(1)),
    "dpsgd, no fit": update(dpo.dpsgd(RATE), refresh=False, **given),
    "dpsgd, fit": update(dpo.dpsgd(RATE), refresh=True, hvp=product, **given),
  }
  if name in BLOCKED:
    found["psgd of bfloat16 factors, fit"] = fitted(dpo.kron(state_dtype=jnp.bfloat16))
    found[f"psgd dense pro in blocks of {BLOCK}, fit"] = fitted(BLOCKS)
  if name in ("mlp", "deep"):
    found["psgd dense, fit"] = fitted(DENSE)
  if name == "deep":
    found["psgd dense per leaf, fit"] = update(per_leaf(lambda: whitening(DENSE), work.params), refresh=True)
  if name == "mlp":
    found |= {
      "psgd dense, no fit": update(whitening(DENSE), refresh=False),
      "psgd lra of rank 10, fit": fitted(dpo.lra(rank=10)),
      "psgd xmat, fit": fitted(dpo.xmat()),
      "psgd affine, fit": fitted(dpo.affine(max_skew=100.0)),
      "psgd scan, fit": fitted(dpo.scan()),
      "psgd diagonal, fit": fitted(dpo.diagonal()),
      f"psgd dense in blocks of {BLOCK}, fit": fitted(dpo.blocked(DENSE, BLOCK)),
      "a fit taken": _fit(work, True),
      "a fit not taken": _fit(work, False),
    }
  return {f"update: {label}": call for label, call in (found | of_rivals(work, name)).items()}


def of_rivals(work: Workload, name: str) -> dict[str, Timed]:
  """The same by the packages that can be imported here."""
  found = {}
  for rival, make in rivals.installed().items() if name in RACED else ():
    found |= {f"{rival}, {fit}": timed for fit, timed in _of_rival(make, work).items()}
  if name in BLOCKED and rivals.module("distributed_kron.pro"):
    found["distributed-kron pro, fit"] = alone(rivals.distributed_kron(RATE, BLOCK), work)
  if name in RACED and rivals.module("soap_jax"):
    found |= {f"SOAP_JAX, bases {kind}": _soap_jax(work, every) for kind, every in (("kept", 10**6), ("refreshed", 1))}
  if name == "mlp" and rivals.module("psgd_jax.kron"):
    found |= _psgd_jax(work)
  return found


def _of_rival(make: Callable[..., optax.GradientTransformation], work: Workload) -> dict[str, Timed]:
  """With a fit and without: one program, whose compilation may take minutes, with the probability as an argument."""

  def call(state: Any, grads: Any, params: Any, probability: jax.Array) -> tuple[Any, Any]:
    new, state = make(RATE, probability=lambda count: probability).update(grads, state, params)
    return state, new

  given = make(RATE).init(work.params), work.gradients, work.params
  return {fit: (call, *given, jnp.asarray(p)) for fit, p in (("fit", 1.0), ("no fit", NEVER))}


def _soap_jax(work: Workload, every: int) -> Timed:
  """SOAP_JAX after its first step, which is another one."""
  tx = rivals.soap(RATE, every)
  call, state, *given = alone(tx, work)
  for _ in range(2):  # the bases are refreshed on the second step whatever `every` is
    state, _ = jax.jit(call)(state, *given)
  return call, state, *given


def _psgd_jax(work: Workload) -> dict[str, Timed]:
  """The same by psgd-jax."""
  entered = {"kron": "kron", "lra of rank 10": "low_rank_approximation", "xmat": "xmat"}

  def update(module: str, probability: float) -> Timed:
    make = getattr(rivals.needed(f"psgd_jax.{module}"), module)
    return alone(make(RATE, b1=rivals.MOMENTUM, preconditioner_update_probability=probability), work)

  found = {f"psgd-jax {label}, fit": update(module, 1.0) for label, module in entered.items()}
  return found | {"psgd-jax kron, no fit": update("kron", NEVER)}


def _fit(work: Workload, taken: bool) -> Timed:
  """The fit of all factors inside a `lax.cond`."""
  p = DENSE

  def call(state: Any, taken: jax.Array, grads: Any) -> tuple[Any, Any]:
    fit = lambda state: p.fit(state, dpo.Probe(None, grads), key=jax.random.key(0), damping=0.0)
    return jax.lax.cond(taken, fit, lambda state: state, state), ()

  return call, p.init(work.params), jnp.asarray(taken), work.gradients


def steps(work: Workload, name: str) -> dict[str, Timed]:
  """Whole steps, gradient and all: name -> call, carry, arguments."""
  aux = {"has_aux": True}
  gradient, step = partial(of_gradient, work), partial(whole_step, work)
  whitening, newton = dpo.psgd(RATE, b1=rivals.MOMENTUM), dpo.psgd(RATE, curvature=dpo.newton())
  dpsgd = dpo.dpsgd(RATE)
  found = {
    "gradient": gradient(lambda f, p, v: jax.value_and_grad(f, **aux)(p)),
    "gradient + Hvp": gradient(lambda f, p, v: dpo.value_and_grad_and_hvp(f, **aux)(p, v)),
    "gradient + Hvp by differences": gradient(_differences),
    "gradient and apply": gradient_and_apply(work),
    **{name: step(tx) for name, tx in NO_P.items()},
    "psgd, no fit": step(whitening, refresh=False),
    "psgd, fit": step(whitening, refresh=True),
    "psgd newton, no fit": step(newton, refresh=False),
    "psgd newton, fit": step(newton, "fused", refresh=True),
    "psgd newton, fit on a quarter of the batch": step(newton, "quarter", refresh=True),
    "dpsgd, no fit": step(dpsgd, refresh=False, judge=False),
    "dpsgd, fit": step(dpsgd, "fused", refresh=True, judge=False),
    "levenberg_marquardt": step(dpo.levenberg_marquardt(optax.sgd(RATE))),
    "sophia": step(optax.contrib.sophia(RATE)),
  }
  if name == "resnet8":
    found["sgd_ph"] = step(dpo.sgd_ph(RATE, training.is_norm_param), "leaves", refresh=True)
  if name in HISTORY and rivals.module("psgd_jax.affine"):
    found["psgd-jax affine, fit"] = _affine(work, True)
    found["psgd-jax affine on our Hvp, fit"] = _affine(work, False)
  return found | (layered(work) if name in LAYERED else {})


def gradient_and_apply(work: Workload) -> Timed:
  """The least that a preconditioned step can do: no fit, no momentum, no clipping."""
  p = dpo.damped_kron()
  update = lambda grads, state, params=None: (optax.tree.scale(-RATE, p.apply(state, grads)), state)
  return whole_step(work, optax.GradientTransformation(p.init, update))


def layered(work: Workload) -> dict[str, Timed]:
  """Gradients with what enters each layer, and the methods that live on it."""
  captured = partial(dpo.capture, has_aux=True)
  inputs = jax.jit(captured(work.of_params(work.statistics, work.batch)))(work.params)[2]
  is_record = lambda x: isinstance(x, dpo.LayerRecord)

  def products(carry: Any, inputs: Any) -> tuple[Any, Any]:
    moments = lambda record: None if record is None else dpo.layers.second_moments(record, ())
    return carry, jax.tree.map(moments, inputs, is_leaf=is_record)

  return {
    "gradient and inputs": of_gradient(work, lambda f, p, v: captured(f)(p)),
    "gradient and second moments": of_gradient(work, lambda f, p, v: captured(f, reduce=dpo.layers.second_moments)(p)),
    "second moments of the inputs": (products, jnp.zeros(()), inputs),
    "bnp": whole_step(work, dpo.bnp(RATE, layers=inputs), "inputs"),
    "gls": whole_step(work, dpo.gls(RATE, layers=inputs, fallback=optax.sgd(RATE)), "inputs"),
  }


def _differences(loss: Callable, params: Any, vector: Any) -> Any:
  """Gradient and product from two gradients: the compiler sees that one of the three is asked for twice."""
  value, grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, grads, dpo.hvp_finite_difference(loss, params, has_aux=True)(vector)


def _affine(work: Workload, as_documented: bool) -> Timed:
  """A whole step of psgd-jax's affine preconditioner on Hessian-vector products, every step a fit.

  ``as_documented``: with the products of its `hessian_helper`, as its README tells, which computes them in a
  `lax.cond`; otherwise it is handed products made as ours are, and told at trace time that there is one.
  """
  tx = rivals.needed("psgd_jax.affine").affine(RATE, b1=0.0)
  helper = rivals.needed("psgd_jax.utils").hessian_helper

  def run(carry: Any, batch: Any, vector: Any) -> tuple[Any, Any]:
    params, statistics, state, (key, count) = carry
    loss, due = work.of_params(statistics, batch), True
    if as_documented:
      key, probe_key = jax.random.split(key)
      (value, statistics), grads, product, vector, due = helper(probe_key, count, loss, params, has_aux=True)
    else:
      (value, statistics), grads, product = dpo.value_and_grad_and_hvp(loss, has_aux=True)(params, vector)
    new, state = tx.update(grads, state, params, Hvp=product, vector=vector, update_preconditioner=due)
    return (optax.apply_updates(params, new), statistics, state, (key, count + 1)), value

  ahead = jax.random.key(0), jnp.zeros((), jnp.int32)
  return run, (work.params, work.statistics, tx.init(work.params), ahead), work.batch, probe(work.params)
