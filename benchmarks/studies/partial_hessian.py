# SPDX-License-Identifier: Apache-2.0
"""What a step of SGD with partial Hessian costs, as ratios inside one interleaved run, on `digits_bn`.

python -m benchmarks partial_hessian

  gradient    value and gradient, with the new running statistics
  fused       a whole step, gradient and product from one linearization, every tensor probed
  apart       the same with `hvp(loss, params)` beside `jax.value_and_grad`
  all         the same with the product over all parameters
  momentum    a whole step of SGD with momentum
"""

from typing import Any

import jax
import optax

import dpsgd_optax as dpo
from benchmarks.engine.records import environment, load_average
from benchmarks.engine.report import Table, study
from benchmarks.engine.timing import Step, first_batch, interleaved, of_gradient, quartiles_of, ratio_text, whole_step
from benchmarks.problems.table import build
from dpsgd_optax import training

RATIOS = {
  "SGD-PH step, fused": ("fused", "gradient"),
  "SGD-PH step, product apart": ("apart", "gradient"),
  "gradient and product over all parameters, fused": ("all", "gradient"),
  "momentum step": ("momentum", "gradient"),
}
ROUNDS, CALLS = 15, 10


def contestants(name: str = "digits_bn") -> dict[str, Step]:
  work = first_batch(build(name, None, False))
  tx = dpo.sgd_ph(0.1, training.is_norm_param)
  calls = {
    "gradient": of_gradient(work, lambda loss, p, v: jax.value_and_grad(loss, has_aux=True)(p)),
    "fused": whole_step(work, tx, "leaves", refresh=True),
    "apart": whole_step(work, tx, "apart", refresh=True),
    "all": of_gradient(work, lambda loss, p, v: dpo.value_and_grad_and_hvp(loss, has_aux=True)(p, v)),
    "momentum": whole_step(work, optax.sgd(0.1, momentum=0.9)),
  }
  return {name: Step(*call) for name, call in calls.items()}


def measure(rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, Any]:
  entered, before = contestants(), load_average()
  times = interleaved(entered, rounds, calls)
  return {
    "problem": "digits_bn",
    "rounds": rounds,
    "calls": calls,
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": {label: quartiles_of(times, *pair) for label, pair in RATIOS.items()},
    "flops": {name: step.counts()["flops"] for name, step in entered.items()},
    "recompiled": sum(step.recompiled for step in entered.values()),
  }


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


run = study("partial_hessian", lambda args: measure(), table)
