# SPDX-License-Identifier: Apache-2.0
"""Test accuracy against strength, for every way of regularising, with Adam's P and with Kron; and what each way costs.

Digits, MLP 64-32-10, only 200 training samples, so that there is something to regularise; 300 steps of 50 samples. All
seeds and strengths of a variant are lanes of one `vmap`. Penalties of parameters are on the kernels, not the biases.
The learning rate is the same for all variants of an optimizer and was chosen without any penalty (seed 0, `tuned`).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.problem import classifier
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment, load_average, write
from benchmarks.engine.report import Table, number, publish
from benchmarks.engine.timing import Step, first_batch, interleaved, of_gradient, quartiles_of, whole_step
from benchmarks.problems import data
from benchmarks.problems.models import MLP
from benchmarks.problems.table import build

STEPS, BATCH, SAMPLES, SEEDS = 300, 50, 200, 5
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
DECAY = (1e-3, 1e-2, 1e-1, 1.0)
SPARSE = (1e-4, 1e-3, 1e-2, 1e-1)
GRADIENT = (1e-4, 1e-3, 1e-2, 1e-1)
# Smaller ones: P multiplies the penalty here, and Adam's P is 1/ε where the loss has no gradient, as at an empty pixel.
UNSEEN = (1e-7, 1e-5, 1e-3, 1e-1)
RADIUS = (1e-2, 3e-2, 1e-1, 3e-1)

PRECONDITIONERS = {"adam": lambda: dpo.second_moment(), "kron": lambda: dpo.kron()}
Parts = dict[
  str, list
]  # place -> transforms: "before" the fit, "between" fit and P, "after" P and given it, "behind" P


kernels = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
masked = lambda tx: optax.masked(tx, kernels)

# variant -> (strengths, strength and learning rate -> Parts)
VARIANTS: dict[str, tuple[tuple[float, ...], Callable[[Any, Any], Parts]]] = {
  "none": ((0.0,), lambda s, a: {}),
  "L2 in θ, seen by the fit": (DECAY, lambda s, a: {"before": [optax.add_decayed_weights(s, kernels)]}),
  "L2 in θ": (UNSEEN, lambda s, a: {"between": [optax.add_decayed_weights(s, kernels)]}),
  "L2 half way (power 0.5)": (DECAY, lambda s, a: {"after": [masked(dpo.penalties.add_l2_penalty(s, power=0.5))]}),
  "L2 in z (AdamW)": (DECAY, lambda s, a: {"behind": [optax.add_decayed_weights(s, kernels)]}),
  "L2 in z, proximal": (DECAY, lambda s, a: {"step": [dpo.penalties.proximal_l2(s, a, power=1, mask=kernels)]}),
  "L1 in θ, seen by the fit": (SPARSE, lambda s, a: {"before": [masked(dpo.penalties.add_l1_penalty(s))]}),
  "L1 in θ": (UNSEEN, lambda s, a: {"between": [masked(dpo.penalties.add_l1_penalty(s))]}),
  "L1 in z": (SPARSE, lambda s, a: {"after": [masked(dpo.penalties.add_l1_penalty(s, power=1))]}),
  "L1 in z, proximal": (SPARSE, lambda s, a: {"step": [dpo.penalties.proximal_l1(s, a, power=1, mask=kernels)]}),
  "L1 decoupled, proximal": (SPARSE, lambda s, a: {"step": [dpo.penalties.proximal_l1(s, a, mask=kernels)]}),
  "gradient norm in θ": (GRADIENT, lambda s, a: {"between": [dpo.add_gradient_norm_penalty(s)]}),
  "gradient norm in z": (GRADIENT, lambda s, a: {"between": [dpo.add_gradient_norm_penalty(s, preconditioned=True)]}),
  "sharpness in θ": (RADIUS, lambda s, a: {"between": [dpo.penalties.sharpness_aware(s)]}),
  "sharpness in z": (RADIUS, lambda s, a: {"between": [dpo.penalties.sharpness_aware(s, preconditioned=True)]}),
}


def optimizer(preconditioner: dpo.Preconditioner, parts: Parts, rate: Any) -> optax.GradientTransformationExtraArgs:
  """The parts at their positions. A proximal step has the learning rate in it."""
  after = [*parts.get("after", []), *parts.get("step", [])]
  inside = dpo.scale_by_preconditioner(
    preconditioner,
    dpo.whitening(),
    damping=1e-9,
    momentum=optax.chain(*parts.get("between", []), optax.ema(0.9)),
    after=optax.chain(*after) if after else None,
  )
  last = [] if "step" in parts else [*parts.get("behind", []), optax.scale_by_learning_rate(rate)]
  return optax.chain(*parts.get("before", []), inside, *last)


def sweep(make: Callable, build: Callable[[Any, Any], Parts], strengths: Any, rates: Any, seeds: Any) -> np.ndarray:
  """Test accuracies and shares of exactly zero kernel entries, (2, lanes): one lane per strength, rate and seed."""
  problem = classifier(MLP((32, 10)), data.digits(), batch_size=BATCH, epochs=1, evaluations=1)
  train, test = (jax.tree.map(jnp.asarray, part) for part in (problem.arrays.train, problem.arrays.test))

  def lane(strength: jax.Array, rate: jax.Array, seed: jax.Array) -> jax.Array:
    key, start, draw = jax.random.split(jax.random.key(seed), 3)
    mine = jax.random.permutation(draw, problem.train_size)[:SAMPLES]
    params = problem.init(start)
    tx = optimizer(make(), build(strength, rate), rate)

    def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
      params, state = carry
      rows = jax.random.choice(key, mine, (BATCH,), replace=False)
      of_batch = lambda p: problem.loss(p, problem.take(train, rows))
      grads = jax.grad(of_batch)(params)
      extra = {"hvp": dpo.hvp(of_batch, params), "value_fn": of_batch, "refresh": True}
      updates, state = tx.update(grads, state, params, **extra)
      return (optax.apply_updates(params, updates), state), None

    params, _ = jax.lax.scan(body, (params, tx.init(params)), jax.random.split(key, STEPS))[0]
    zero = [jnp.mean(x == 0) for x in jax.tree.leaves(params) if x.ndim > 1]
    return jnp.stack([problem.metrics(params, test)["accuracy"], jnp.mean(jnp.stack(zero))])

  # some seconds of computing do not repay the compiler's best effort
  run = jax.jit(jax.vmap(lane), compiler_options={"xla_backend_optimization_level": 1})
  return np.asarray(run(strengths, rates, seeds)).T


def tuned(name: str) -> float:
  """The learning rate of the grid with the best test accuracy without any penalty, on seed 0."""
  rates = jnp.asarray(RATES)
  zeros = jnp.zeros(len(RATES))
  accuracies, _ = sweep(PRECONDITIONERS[name], lambda s, a: {}, zeros, rates, zeros.astype(jnp.int32))
  return RATES[int(np.argmax(accuracies))]


def measure_variant(name: str, rate: float, variant: str) -> dict[str, Any]:
  strengths, build = VARIANTS[variant]
  grid, seeds = np.meshgrid(strengths, 1 + np.arange(SEEDS), indexing="ij")
  lanes = [jnp.asarray(x.reshape(-1)) for x in (grid, np.full_like(grid, rate), seeds)]
  accuracy, zeros = (x.reshape(grid.shape) for x in sweep(PRECONDITIONERS[name], build, *lanes))
  quartiles = lambda x: np.percentile(x, [25, 50, 75], axis=1).T.tolist()
  return {"strengths": strengths, "accuracy": quartiles(accuracy), "zeros": np.median(zeros, 1).tolist()}


COSTS = ("none", "L2 in z (AdamW)", "L1 in z", "L1 in z, proximal", "gradient norm in θ", "gradient norm in z")


def measure_cost(rounds: int = 15, calls: int = 10) -> dict[str, Any]:
  """A whole step with Adam's P against a gradient, of the MLP 64-128-64-10 on 1024 digits.

  `gradient + penalty`: the regularised gradient alone, without an optimizer.
  """
  work = first_batch(replace(build("digits", None, False), batch_size=1024))
  penalty = dpo.add_gradient_norm_penalty(1e-3)

  def penalised(loss: Callable, params: Any, vector: Any) -> Any:
    value, grads = jax.value_and_grad(loss, has_aux=True)(params)
    hvp = dpo.hvp(loss, params, has_aux=True)
    return value, penalty.update(grads, penalty.init(params), params, hvp=hvp)[0]

  step = lambda parts: whole_step(work, optimizer(dpo.second_moment(), parts, 1e-3), "apart", refresh=True)
  timed = {
    "gradient": of_gradient(work, lambda loss, p, v: jax.value_and_grad(loss, has_aux=True)(p)),
    "gradient + penalty": of_gradient(work, penalised),
    **{variant: step(VARIANTS[variant][1](1e-3, 1e-3)) for variant in (*COSTS, "sharpness in z")},
  }
  entered = {name: Step(*call) for name, call in timed.items()}
  before = load_average()
  times = interleaved(entered, rounds, calls)
  ratios = {name: quartiles_of(times, name, "gradient") for name in entered if name != "gradient"}
  return {"rounds": rounds, "calls": calls, "load_average": [before, load_average()], "ratios_to_a_gradient": ratios}


def table(document: dict[str, Any]) -> Table:
  rows = []
  for variant in VARIANTS:
    cells = []
    for found in document["optimizers"].values():
      if (row := found["variants"].get(variant)) is None:
        cells += ["–"] * 3
        continue
      best = max(range(len(row["strengths"])), key=lambda i: row["accuracy"][i][1])
      low, median, high = (100 * x for x in row["accuracy"][best])
      all_strengths = " ".join(f"{100 * a[1]:.1f}" for a in row["accuracy"])
      cells += [all_strengths, f"{median:.1f} [{low:.1f}, {high:.1f}]", number(row["strengths"][best])]
    cost = document["cost"]["ratios_to_a_gradient"].get(variant)
    rows.append((variant, *cells, f"{cost['cpu'][1]:.2f}" if cost else "–"))
  names = [f"{name}: {what}" for name in document["optimizers"] for what in ("all strengths", "best", "at")]
  note = (
    f"Test accuracy in %, median [quartiles] of {SEEDS} seeds, {SAMPLES} training samples; the best strength is chosen "
    "on the same seeds, so differences within the quartiles mean nothing. Cost: a step with Adam's P over a gradient."
  )
  return Table("Regularisation on digits", ("penalty", *names, "cost"), rows, (note,))


def run(args: Namespace) -> None:
  """All variants; what is done is kept."""
  path = args.out / "regularization.json"
  document: dict[str, Any] = {"plan": {"steps": STEPS, "batch": BATCH, "samples": SAMPLES, "seeds": SEEDS}}
  document |= {"environment": environment(), "optimizers": {}, "cost": measure_cost()}
  for name in PRECONDITIONERS:
    rate = tuned(name)
    found = document["optimizers"][name] = {"learning_rate": rate, "variants": {}}
    for variant in VARIANTS:
      found["variants"][variant] = measure_variant(name, rate, variant)
      say(f"{name}, {variant}: {[round(100 * a[1], 1) for a in found['variants'][variant]['accuracy']]}")
      write(document, path)
  publish(document, path, table(document))
