# SPDX-License-Identifier: Apache-2.0
"""One invocation: compile the contestants, run the seeds that are missing, save after each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.engine.contestant import Contestant
from benchmarks.engine.problem import Problem
from benchmarks.engine.progress import Reporter, say
from benchmarks.engine.records import Plan, Results, Run, environment, load_average, resume, save
from benchmarks.engine.report import number
from benchmarks.engine.runner import Evaluator, Racer, compiled, describe, race, variants_of
from benchmarks.engine.saved import Keeper


def run(
  problem: Problem,
  plan: Plan,
  entered: Sequence[Contestant],
  seeds: Sequence[int],
  path: Path,
  resumed: bool = False,
  kept: bool = False,
  known: dict[Any, Racer] | None = None,
) -> Results:
  """Trains. Whenever this stops, the finished seeds are on disk; KeyboardInterrupt passes through.

  With `kept`, what `engine/saved.py` lists is written beside the document. `known`: contestants that an earlier call
  compiled for the same problem and plan; those that are compiled here are added.
  """
  about = {contestant.label: describe(problem, contestant, plan) for contestant in entered}
  results = (resume(path, plan, about) if resumed else None) or Results(path.stem, plan)
  results.contestants |= {label: results.contestants.get(label, {}) | entry for label, entry in about.items()}
  wanted = {contestant.label for contestant in entered}
  missing = [seed for seed in seeds if not wanted <= {run.optimizer for run in results.runs if run.seed == seed}]
  say(f"{path.stem}: {plan.data}; {plan.steps} steps of {plan.batch_size} samples, seeds {list(seeds)}")
  if not missing:
    say(f"{path.stem}: nothing left to do")
    return results
  train = jax.tree.map(jnp.asarray, problem.arrays.train)
  racers, known = [], {} if known is None else known
  for contestant in entered:
    kind, needed = contestant.compilation(), variants_of(contestant, plan)
    if kind not in known or not needed <= known[kind].steps.keys():
      known[kind] = compiled(problem, contestant, plan, train)
      say(f"  compiled {contestant.label} in {known[kind].compile_seconds:.1f} s")
    racers.append(replace(known[kind], contestant=contestant))
    results.contestants[contestant.label]["compile_seconds"] = known[kind].compile_seconds
  evaluate = Evaluator(problem)
  session = {"seeds": [], "environment": environment(), "load_average": [load_average()]}
  results.sessions.append(session)
  chunks = -(-plan.steps // plan.evaluate_every)
  with Reporter(len(missing) * len(racers) * chunks) as reporter:
    for seed in missing:
      start = monotonic()

      def tell(run: Run) -> None:
        step, loss = run.curves["step"][-1], run.curves["train_loss"][-1]
        reporter.advance(f"seed {run.seed}  {run.optimizer} step {step}: {number(loss)}")

      keeper = Keeper(problem, path.with_name(f"{path.stem}-saved"), seed) if kept else None
      runs = race(problem, racers, plan, train, evaluate, seed, tell, keeper.see if keeper else lambda lane: None)
      if keeper:
        keeper.write()
      results.runs = [run for run in results.runs if run.seed != seed or run.optimizer not in wanted] + runs
      session["seeds"].append(seed)
      session["load_average"].append(load_average())
      save(results, path)
      ends = ", ".join(f"{run.optimizer} {number(run.final())}" for run in runs)
      reporter.line(f"  seed {seed} in {monotonic() - start:.0f} s: {ends}")
  return results
