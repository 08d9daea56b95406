# SPDX-License-Identifier: Apache-2.0
"""The cost of a step, as ratios. On a shared machine a time means nothing; a ratio of two taken side by side does.

`interleaved` runs a few calls of each contestant in every round, in a fresh random order, by wall clock and of CPU.
Ratios are formed within a round; their median and quartiles over the rounds are what is reported. What is called is a
`Step`: a gradient or a whole step of training on a `Workload`, which is a network with a batch.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.problem import Problem
from benchmarks.engine.program import kernels
from dpsgd_optax import training

Times = dict[str, dict[str, list[float]]]  # "cpu" or "wall" -> contestant -> seconds per call, by round
Weights = dict[str, float]  # contestant -> its share of the steps


def interleaved(entered: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> Times:
  """Seconds per call of each contestant in each round, by wall clock and of CPU; a fresh random order in each round."""
  order = random.Random(0)
  times: Times = {kind: {name: [] for name in entered} for kind in ("cpu", "wall")}
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


def mean_of(times: Mapping[str, list[float]], who: str | Weights) -> np.ndarray:
  """Seconds of a contestant, or of a mixture of some, by round."""
  weights = {who: 1.0} if isinstance(who, str) else who
  return np.sum([weight * np.asarray(times[name]) for name, weight in weights.items()], axis=0)


def quartiles(values: np.ndarray) -> list[float]:
  return np.percentile(values, [25, 50, 75]).tolist()


def quartiles_of(times: Times, a: str | Weights, b: str | Weights) -> dict[str, list[float]]:
  """Quartiles of the ratio a / b, formed within each round."""
  return {kind: quartiles(mean_of(of, a) / mean_of(of, b)) for kind, of in times.items()}


def ratio_text(quartiles: list[float]) -> str:
  """Median [quartiles]."""
  low, median, high = quartiles
  return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def compile_anew(call: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
  """The call traced and compiled, and the CPU seconds of it; nothing is remembered from an earlier time."""
  start = time.process_time()
  anew = jax.jit(lambda *arguments: call(*arguments), donate_argnums=0)
  return anew.lower(*arguments).compile(), time.process_time() - start


class Step:
  """A compiled call `carry, *arguments -> carry, result` that goes on from its own carry, which is donated.

  `like`: another step of the same call, on arguments of the same types: what it compiled is used again.
  """

  def __init__(self, call: Callable[..., tuple[Any, Any]], carry: Any, *arguments: Any, like: "Step | None" = None):
    self.carry = jax.tree.map(jnp.copy, carry)  # no two donated arrays may be one buffer
    self.arguments = arguments
    before = process_types(self.carry)
    anew = lambda: compile_anew(call, self.carry, *arguments)
    self.compiled, self.compile_seconds = anew() if like is None else (like.compiled, like.compile_seconds)
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
      "instructions": (text := self.compiled.as_text()).count(" = "),
      "kernels": kernels(text).total(),
      "flops": costs.get("flops"),
      "bytes": costs.get("bytes accessed"),
      "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def process_types(tree: Any) -> list[Any]:
  """Shapes, dtypes and weak types: what a second call has to find unchanged if it is not to compile again."""
  return [(x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(tree))]


Timed = tuple[Any, ...]  # call, carry, arguments: what `Step` takes


@dataclass(frozen=True)
class Workload:
  """What is trained. The loss gives the running statistics after the batch too; without one only updates are timed."""

  params: Any
  statistics: Any = ()
  batch: Any = ()
  loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]] | None = None

  def of_params(self, statistics: Any, batch: Any) -> Callable[[Any], tuple[jax.Array, Any]]:
    """The loss as a function of the params alone, with the new statistics."""
    assert self.loss is not None
    return lambda params: self.loss(params, statistics, batch)

  @property
  def gradients(self) -> Any:
    """Made up: what `update` alone is handed."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.01 * rng.standard_normal(x.shape), x.dtype), self.params)


def first_batch(problem: Problem) -> Workload:
  """A problem as a workload: its first batch, from seed 0."""
  params, statistics = problem.split(problem.init(jax.random.key(0)))
  batch = problem.take(problem.arrays.train, np.arange(problem.batch_size))
  return Workload(params, statistics, jax.tree.map(jnp.asarray, batch), problem.advance)


def probe(params: Any) -> Any:
  """A vector to take a product with: any will do, as it is the time that counts."""
  return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def of_gradient(work: Workload, call: Callable[..., Any]) -> Timed:
  """`call(loss, params, vector)`, which returns gradients and whatever it likes, on the workload."""

  def run(carry: Any, params: Any, statistics: Any, batch: Any, vector: Any) -> tuple[Any, Any]:
    return carry, call(work.of_params(statistics, batch), params, vector)

  return run, jnp.zeros(()), work.params, work.statistics, work.batch, probe(work.params)


def whole_step(work: Workload, tx: optax.GradientTransformation, fit: str | None = None, **extra: Any) -> Timed:
  """A step of training, from the loss to the new params.

  `fit` says what the optimizer is fitted on. It is a Hessian-vector product from the linearization that gives the
  gradient, for all parameters ("fused") or for norm layers alone ("leaves"); or one that is computed by itself, of the
  whole batch ("apart") or of its first "quarter"; or what enters each layer ("inputs").
  """
  tx = optax.with_extra_args_support(tx)
  where = {"where": training.is_norm_param} if fit == "leaves" else {}
  part = {"apart": 1, "quarter": 4}.get(fit or "")

  def run(carry: Any, batch: Any) -> tuple[Any, Any]:
    params, statistics, state = carry
    loss, given = work.of_params(statistics, batch), {}
    if fit in ("fused", "leaves"):
      (value, statistics), grads, given["hvp"] = dpo.value_and_grad_then_hvp(loss, has_aux=True, **where)(params)
    elif fit == "inputs":
      (value, statistics), grads, given["layer_inputs"] = dpo.capture(loss, has_aux=True)(params)
    else:
      if part:
        of_part = work.of_params(statistics, jax.tree.map(lambda x: x[: len(x) // part], batch))
        given["hvp"] = dpo.hvp(of_part, params, has_aux=True)
      (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    ahead = lambda p: loss(p)[0]
    given |= {"value": value, "value_fn": ahead, "obj_fn": ahead}
    new, state = tx.update(grads, state, params, **given, **extra)
    return (optax.apply_updates(params, new), statistics, state), value

  return run, (work.params, work.statistics, tx.init(work.params)), work.batch
