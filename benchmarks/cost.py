# SPDX-License-Identifier: Apache-2.0
"""What a step costs, as ratios inside one interleaved run.

Every round runs a few calls of each contestant, in a fresh random order; ratios are formed within a round, and their
median and quartiles over the rounds are reported, of CPU and of wall seconds. An absolute time on a shared machine
means nothing.

  fused / gradient          value, gradient and Hessian-vector product in one pass, against value and gradient
  no fit / gradient+apply   a whole DPSGD step on which nothing is fitted or judged, against the least it must do
  fit / gradient            a whole DPSGD step that fits and does not judge
  recompiled                compilations by a second call of each: must be 0
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.problems import Problem
from benchmarks.records import environment, load_average, rounded
from benchmarks.report import Table

RATIOS = {
  "gradient + Hvp, fused": ("fused", "gradient"),
  "DPSGD step, no fit due": ("no fit", "gradient+apply"),
  "DPSGD step with a fit": ("fit", "gradient"),
  "Adam step": ("adam", "gradient"),
}


def contestants(problem: Problem) -> dict[str, "Call"]:
  """Name -> a compiled call without arguments."""
  params, statistics = problem.split(problem.init(jax.random.key(0)))
  batch = {name: jnp.asarray(array[: problem.batch_size]) for name, array in problem.arrays.train.items()}
  vector = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
  tx, adam = dpo.dpsgd(0.1), optax.adam(1e-3)
  p = dpo.damped_kron()
  state, adam_state, p_state = tx.init(params), adam.init(params), p.init(params)

  def loss_of(batch: Any) -> Callable[[Any], jax.Array]:
    return lambda q: problem.advance(q, statistics, batch)[0]

  def gradient(params, batch):
    return jax.value_and_grad(loss_of(batch))(params)

  def fused(params, batch, vector):
    return dpo.value_and_grad_and_hvp(loss_of(batch))(params, vector)

  def gradient_apply(params, batch, p_state):
    value, grads = gradient(params, batch)
    return value, jax.tree.map(lambda w, u: w - 0.1 * u, params, p.apply(p_state, grads))

  def dpsgd(refresh: bool) -> Callable:
    def step(params, batch, state):
      loss = loss_of(batch)
      value, grads = gradient(params, batch)
      extra = {"hvp": dpo.hvp(loss, params)} if refresh else {}
      updates, state = tx.update(
        grads, state, params, value=value, value_fn=loss, refresh=refresh, judge=False, **extra
      )
      return optax.apply_updates(params, updates), state, value

    return step

  def adam_step(params, batch, state):
    value, grads = gradient(params, batch)
    updates, state = adam.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  calls = {
    "gradient": (gradient, (params, batch)),
    "fused": (fused, (params, batch, vector)),
    "gradient+apply": (gradient_apply, (params, batch, p_state)),
    "no fit": (dpsgd(False), (params, batch, state)),
    "fit": (dpsgd(True), (params, batch, state)),
    "adam": (adam_step, (params, batch, adam_state)),
  }
  return {name: Call(jax.jit(call), arguments) for name, (call, arguments) in calls.items()}


class Call:
  """A jitted function with its arguments; the compile seconds of the first call."""

  def __init__(self, call: Callable, arguments: tuple):
    self.call, self.arguments = call, arguments
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    self.first_seconds = time.perf_counter() - start
    jax.block_until_ready(call(*arguments))
    self.recompiled = call._cache_size() - 1

  def __call__(self) -> Any:
    return self.call(*self.arguments)


def interleaved(
  entered: dict[str, Callable[[], Any]], rounds: int, calls: int, seed: int
) -> dict[str, dict[str, list]]:
  """Seconds per call of each contestant in each round, by wall clock and of CPU; a fresh random order in each round."""
  order = random.Random(seed)
  times: dict[str, dict[str, list]] = {kind: {name: [] for name in entered} for kind in ("cpu", "wall")}
  for _ in range(rounds):
    names = list(entered)
    order.shuffle(names)
    for name in names:
      call = entered[name]
      clock, process = time.perf_counter(), time.process_time()
      for _ in range(calls):
        result = call()
      jax.block_until_ready(result)
      times["wall"][name].append((time.perf_counter() - clock) / calls)
      times["cpu"][name].append((time.process_time() - process) / calls)
  return times


def quartiles_of(times: dict[str, dict[str, list]], a: str, b: str) -> dict[str, list[float]]:
  """Quartiles of the ratio a / b, formed within each round."""
  return {kind: np.percentile(np.divide(of[a], of[b]), [25, 50, 75]).tolist() for kind, of in times.items()}


def measure(problem: Problem, rounds: int = 15, calls: int = 10, seed: int = 0) -> dict[str, Any]:
  """Seconds of each contestant in each round, and the table of ratios."""
  entered, before = contestants(problem), load_average()
  times = interleaved(entered, rounds, calls, seed)
  ratios = {label: quartiles_of(times, *pair) for label, pair in RATIOS.items()}
  return {
    "problem": problem.name,
    "batch_size": problem.batch_size,
    "rounds": rounds,
    "calls": calls,
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": ratios,
    "median_cpu_ms": {name: 1e3 * float(np.median(seconds)) for name, seconds in times["cpu"].items()},
    "first_call_seconds": {name: call.first_seconds for name, call in entered.items()},
    "recompiled": sum(call.recompiled for call in entered.values()),
  }


def cell(quartiles: list[float]) -> str:
  low, median, high = quartiles
  return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table(document: dict[str, Any]) -> Table:
  """One row per ratio: median [quartiles]."""

  rows = [
    (label, RATIOS[label][1], cell(ratio["cpu"]), cell(ratio["wall"])) for label, ratio in document["ratios"].items()
  ]
  note = f"Recompilations by a second call: {document['recompiled']}. Load average {document['load_average']}."
  return Table(
    f"{document['problem']}, batch {document['batch_size']}: cost in {document['rounds']} interleaved rounds",
    ("step", "against", "CPU ratio", "wall ratio"),
    rows,
    (note,),
  )


def save(document: dict[str, Any], path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rounded(document), indent=1) + "\n")
