# SPDX-License-Identifier: Apache-2.0
"""What a step of SGD with partial Hessian costs, as ratios inside one interleaved run, on `digits_bn`.

python -m benchmarks partial_hessian

  gradient    value and gradient, with the new running statistics
  fused       a whole step, gradient and product from one linearization, every tensor probed
  apart       the same with `hvp(loss, params)` beside `jax.value_and_grad`
  all         the same with the product over all parameters
  momentum    a whole step of SGD with momentum
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpsgd_optax as dpo
from benchmarks.engine.records import environment, load_average
from benchmarks.engine.report import Table, publish
from benchmarks.engine.timing import Call, interleaved, quartiles_of, ratio_text
from benchmarks.problems.table import build
from dpsgd_optax import training

RATIOS = {
  "SGD-PH step, fused": ("fused", "gradient"),
  "SGD-PH step, product apart": ("apart", "gradient"),
  "gradient and product over all parameters, fused": ("all", "gradient"),
  "momentum step": ("momentum", "gradient"),
}
ROUNDS, CALLS = 15, 10
WHERE = training.is_norm_param


def contestants(name: str = "digits_bn") -> dict[str, Call]:
  """Name → a compiled call without arguments."""
  problem = build(name, None, False)
  variables = problem.init(jax.random.key(0))
  params, statistics = problem.split(variables)
  batch = jax.tree.map(jnp.asarray, problem.take(problem.arrays.train, jnp.arange(problem.batch_size)))
  tx, sgd = dpo.sgd_ph(0.1, WHERE), optax.sgd(0.1, momentum=0.9)
  vector = jax.tree.map(jnp.ones_like, params)

  def loss_of(statistics, batch):
    return lambda p: problem.advance(p, statistics, batch)

  def gradient(params, statistics, batch):
    return jax.value_and_grad(loss_of(statistics, batch), has_aux=True)(params)

  def fused(params, statistics, batch, state):
    linearized = dpo.value_and_grad_then_hvp(loss_of(statistics, batch), has_aux=True, where=WHERE)
    value, grads, hvp = linearized(params)
    updates, state = tx.update(grads, state, params, hvp=hvp, refresh=True)
    return optax.apply_updates(params, updates), state, value

  def apart(params, statistics, batch, state):
    loss = loss_of(statistics, batch)
    value, grads = gradient(params, statistics, batch)
    updates, state = tx.update(grads, state, params, hvp=dpo.hvp(loss, params, has_aux=True), refresh=True)
    return optax.apply_updates(params, updates), state, value

  def everything(params, statistics, batch, vector):
    return dpo.value_and_grad_and_hvp(loss_of(statistics, batch), has_aux=True)(params, vector)

  def momentum(params, statistics, batch, state):
    value, grads = gradient(params, statistics, batch)
    updates, state = sgd.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  common = (params, statistics, batch)
  calls = {
    "gradient": (gradient, ()),
    "fused": (fused, (tx.init(params),)),
    "apart": (apart, (tx.init(params),)),
    "all": (everything, (vector,)),
    "momentum": (momentum, (sgd.init(params),)),
  }
  return {name: Call(jax.jit(call), common + more) for name, (call, more) in calls.items()}


def measure(rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, Any]:
  entered, before = contestants(), load_average()
  times = interleaved(entered, rounds, calls, seed=0)
  return {
    "problem": "digits_bn",
    "rounds": rounds,
    "calls": calls,
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": {label: quartiles_of(times, *pair) for label, pair in RATIOS.items()},
    "flops": {name: _flops(call) for name, call in entered.items()},
    "recompiled": sum(call.recompiled for call in entered.values()),
  }


def _flops(call: Call) -> float | None:
  """The compiler's own count, where it has one."""
  analysis = call.call.lower(*call.arguments).compile().cost_analysis()
  return analysis.get("flops") if analysis else None


def table(document: dict[str, Any]) -> Table:
  flops = document["flops"]

  def row(label: str) -> tuple[str, ...]:
    of, ratio = RATIOS[label], document["ratios"][label]
    counted = f"{flops[of[0]] / flops[of[1]]:.2f}" if flops[of[1]] else ""
    return label, ratio_text(ratio["cpu"]), ratio_text(ratio["wall"]), counted

  return Table(
    f"{document['problem']}: cost against the gradient, in {document['rounds']} interleaved rounds",
    ("step", "CPU ratio", "wall ratio", "flops"),
    [row(label) for label in RATIOS],
    (f"Recompilations by a second call: {document['recompiled']}. Load average {document['load_average']}.",),
  )


def add_arguments(parser: ArgumentParser) -> None:
  """None but --out."""


def run(args: Namespace) -> None:
  document = measure()
  publish(document, args.out / "partial_hessian.json", table(document))
