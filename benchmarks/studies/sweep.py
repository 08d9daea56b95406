# SPDX-License-Identifier: Apache-2.0
"""Many whole runs in one compiled call: 16 learning rates × 4 seeds on digits, and what rarer fits save there.

`lax.scan` over the steps is outside, `vmap` over seeds and rates inside. Whether P is fitted is decided outside the
`vmap`, by the number of the step, which all runs share. It reaches `update` as `refresh`, a predicate that is not
batched, and `lax.cond` stays a branch. The count in the state is one for each run under `vmap`: a decision by it
becomes a select, which computes every fit.
"""

import itertools
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.analysis import spread
from benchmarks.engine.problem import Problem, batches
from benchmarks.engine.records import compilations, environment, load_average
from benchmarks.engine.report import Table, number, publish
from benchmarks.engine.timing import interleaved, quartiles_of, ratio_text
from benchmarks.problems.table import build

RATES = np.geomspace(1e-4, 1e-1, 16)
SEEDS = (1, 2, 3, 4)
STEPS, EVERY = 276, 10  # 12 epochs of digits
TIMED_STEPS, ROUNDS = 30, 4
RUNS = {
  "every step": {"every": 1},
  f"every {EVERY}th step": {"every": EVERY},
  f"every {EVERY}th step, by the count of each run": {"every": EVERY, "shared": False},
}


def rows_of(problem: Problem, seeds: tuple[int, ...], steps: int) -> np.ndarray:
  """(steps, seeds, batch): the batches of the runner."""
  return np.stack([list(itertools.islice(batches(problem, seed), steps)) for seed in seeds], axis=1)


def whole_run(problem: Problem, make: Callable, every: int = 1, shared: bool = True) -> Callable:
  """(rates, seeds, rows, train) -> training losses (rates, seeds, steps) and params: init, all steps, all runs.

  Args:
    problem: with a loss of params alone.
    make: (rate, key, every) -> transform.
    every: fit on every ``every``-th step.
    shared: whether the choice is made once for all runs; if not, each run makes it from its own count.
  """

  def step(rate: Any, seed: Any, carry: Any, rows: Any, train: Any, **choice: Any) -> tuple[Any, jax.Array]:
    params, state = carry
    batch = problem.take(train, rows)
    value, grads = jax.value_and_grad(problem.loss)(params, batch)
    updates, state = make(rate, jax.random.key(seed), every).update(grads, state, params, **choice)
    return (optax.apply_updates(params, updates), state), value

  def start(rate: Any, seed: Any) -> Any:
    params = problem.init(jax.random.key(seed))
    return params, make(rate, jax.random.key(seed), every).init(params)

  def run(rates: jax.Array, seeds: jax.Array, rows: jax.Array, train: Any) -> tuple[jax.Array, Any]:
    def all_runs(carry: Any, now: Any) -> tuple[Any, jax.Array]:
      t, taken = now
      choice = {"refresh": t % every == 0} if shared else {}
      one = lambda rate, seed, carry, rows: step(rate, seed, carry, rows, train, **choice)
      over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0))
      return jax.vmap(over_seeds, in_axes=(0, None, 0, None))(rates, seeds, carry, taken)

    begin = jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None))(rates, seeds)
    (params, _), losses = jax.lax.scan(all_runs, begin, (jnp.arange(len(rows)), rows))
    return jnp.moveaxis(losses, 0, -1), params

  return run


def whiten(rate: Any, key: Any, every: int) -> optax.GradientTransformationExtraArgs:
  return dpo.psgd(rate, dpo.kron(geometry=dpo.quad), every=every, b1=0.9, key=key)


def timed(problem: Problem, train: Any, steps: int = TIMED_STEPS, rounds: int = ROUNDS) -> dict[str, Any]:
  """CPU and wall seconds of each of RUNS, interleaved; ratios to fitting on every step."""
  rates, seeds = jnp.asarray(RATES, jnp.float32), jnp.asarray(SEEDS)
  rows = rows_of(problem, SEEDS, steps)
  run = lambda options: jax.jit(whole_run(problem, whiten, **options))
  calls = {name: partial(run(options), rates, seeds, rows, train) for name, options in RUNS.items()}
  first = {name: seconds for name, (seconds,) in interleaved(calls, 1, 1)["wall"].items()}
  times = interleaved(calls, rounds, 1)
  ratios = {name: quartiles_of(times, name, next(iter(RUNS))) for name in calls}
  return {"steps": steps, "rounds": rounds, "ratios": ratios, "seconds": times, "first_call_seconds": first}


def measure(problem: Problem) -> dict[str, Any]:
  before = load_average()
  train, test = (jax.tree.map(jnp.asarray, part) for part in (problem.arrays.train, problem.arrays.test))
  sweep = jax.jit(whole_run(problem, whiten, every=EVERY))
  arguments = jnp.asarray(RATES, jnp.float32), jnp.asarray(SEEDS), rows_of(problem, SEEDS, STEPS), train
  compiled = compilations()
  losses, params = sweep(*arguments)
  compiled = compilations() - compiled
  accuracy = jax.jit(jax.vmap(jax.vmap(lambda p: problem.metrics(p, test)["accuracy"])))(params)
  final = np.asarray(losses)[..., -problem.steps_per_epoch :].mean(-1)
  return {
    "problem": problem.name,
    "steps": STEPS,
    "every": EVERY,
    "seeds": list(SEEDS),
    "environment": environment(),
    "runs": [
      {"learning_rate": float(rate), "last_epoch_loss": final[i].tolist(), "test_accuracy": np.asarray(a).tolist()}
      for i, (rate, a) in enumerate(zip(RATES, accuracy, strict=True))
    ],
    "compilations": compiled,
    "timing": timed(problem, train),
    "load_average": [before, load_average()],
  }


def tables(document: dict[str, Any]) -> tuple[Table, Table]:
  """What the runs led to, and what deciding on the fit once for all of them saves."""
  middle = lambda values: spread(values).median
  rows = [
    (f"{run['learning_rate']:.2g}", number(middle(run["last_epoch_loss"])), f"{middle(run['test_accuracy']):.1%}")
    for run in document["runs"]
  ]
  note = f"Medians over {len(document['seeds'])} seeds; {len(rows) * len(document['seeds'])} runs in one compiled call."
  runs = Table(f"{document['problem']}, psgd whitening", ("rate", "loss, last epoch", "test accuracy"), rows, (note,))
  timing = document["timing"]
  rows = [(name, ratio_text(ratio["cpu"]), ratio_text(ratio["wall"])) for name, ratio in timing["ratios"].items()]
  note = f"{timing['steps']} steps of all runs, {timing['rounds']} interleaved rounds; ratios to the first line."
  return runs, Table("The fit, decided once for all runs", ("P is fitted", "CPU ratio", "wall ratio"), rows, (note,))


def run(args: Namespace) -> None:
  document = measure(build("digits", None, folded=False))
  publish(document, args.out / "sweep.json", *tables(document))
