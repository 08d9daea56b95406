# SPDX-License-Identifier: Apache-2.0
"""Times as ratios. On a shared machine a time means nothing, but a ratio of two that were taken side by side does.

`interleaved` runs a few calls of each contestant in every round, in a fresh random order, by wall clock and of CPU.
Ratios are formed within a round; their median and quartiles over the rounds are what is reported.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Times = dict[str, dict[str, list[float]]]  # "cpu" or "wall" -> contestant -> seconds per call, by round


def interleaved(entered: Mapping[str, Callable[[], Any]], rounds: int, calls: int, seed: int) -> Times:
  """Seconds per call of each contestant in each round, by wall clock and of CPU; a fresh random order in each round."""
  order = random.Random(seed)
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


def quartiles_of(times: Times, a: str, b: str) -> dict[str, list[float]]:
  """Quartiles of the ratio a / b, formed within each round."""
  return {kind: np.percentile(np.divide(of[a], of[b]), [25, 50, 75]).tolist() for kind, of in times.items()}


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
  """A compiled call `carry, *arguments -> carry, result` that goes on from its own carry, which is donated."""

  def __init__(self, call: Callable[..., tuple[Any, Any]], carry: Any, *arguments: Any):
    self.carry = jax.tree.map(jnp.copy, carry)  # no two donated arrays may be one buffer
    self.arguments = arguments
    before = process_types(self.carry)
    self.compiled, self.compile_seconds = compile_anew(call, self.carry, *arguments)
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
