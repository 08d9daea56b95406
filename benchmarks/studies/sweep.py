# SPDX-License-Identifier: Apache-2.0
"""Many whole runs in one compiled call: 16 learning rates × 4 seeds on digits, and what rarer fits save there.

`lax.scan` over the steps outside, `vmap` over seeds and rates inside. When P is fitted is decided outside the
`vmap`, from the number of the step, which all runs share, and reach `update` as `refresh`: a predicate that is not
batched, so that `lax.cond` stays a branch. Left to the count in the state, which `vmap` makes one per run, it becomes a
select that computes every fit.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.progress import say
from benchmarks.engine.records import compilations, environment, load_average
from benchmarks.engine.report import Table, number
from benchmarks.problems.table import Problem, batches, build, limit
from benchmarks.studies.cost import cell, save

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
  epochs = -(-steps // problem.steps_per_epoch)
  return np.stack([list(itertools.islice(batches(problem, seed, epochs), steps)) for seed in seeds], axis=1)


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
  calls = {name: jax.jit(whole_run(problem, whiten, **options)) for name, options in RUNS.items()}
  first = {}
  for name, call in calls.items():
    begin = time.perf_counter()
    jax.block_until_ready(call(rates, seeds, rows, train))
    first[name] = time.perf_counter() - begin
  times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in calls} for kind in ("cpu", "wall")}
  order = np.random.default_rng(0)
  for _ in range(rounds):
    for name in order.permutation(list(calls)):
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(calls[name](rates, seeds, rows, train))
      times["wall"][name].append(time.perf_counter() - wall)
      times["cpu"][name].append(time.process_time() - cpu)
  base = next(iter(RUNS))
  ratios = {
    name: {kind: np.percentile(np.divide(of[name], of[base]), [25, 50, 75]).tolist() for kind, of in times.items()}
    for name in calls
  }
  return {"steps": steps, "rounds": rounds, "ratios": ratios, "seconds": times, "first_call_seconds": first}


def measure(problem: Problem) -> dict[str, Any]:
  """The document: the sweep itself, and the times."""
  before = load_average()
  train = {name: jnp.asarray(array) for name, array in problem.arrays.train.items()}
  test = {name: jnp.asarray(array) for name, array in problem.arrays.test.items()}
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


def median(values: list[float | None]) -> float:
  """Of the seeds; what broke off is infinite."""
  return float(np.median([np.inf if value is None or np.isnan(value) else value for value in values]))


def show(document: dict[str, Any]) -> None:
  rows = [
    (f"{run['learning_rate']:.2g}", number(median(run["last_epoch_loss"])), f"{median(run['test_accuracy']):.1%}")
    for run in document["runs"]
  ]
  note = f"Medians over {len(document['seeds'])} seeds; {len(rows) * len(document['seeds'])} runs in one compiled call."
  Table(f"{document['problem']}, psgd whitening", ("rate", "loss, last epoch", "test accuracy"), rows, (note,)).show()
  timing = document["timing"]
  rows = [(name, cell(ratio["cpu"]), cell(ratio["wall"])) for name, ratio in timing["ratios"].items()]
  note = f"{timing['steps']} steps of all runs, {timing['rounds']} interleaved rounds; ratios to the first line."
  Table("The fit, decided once for all runs", ("P is fitted", "CPU ratio", "wall ratio"), rows, (note,)).show()


def run(out: Path) -> None:
  """Measure, show, save."""
  document = measure(limit(build("digits", None, folded=False), None))
  show(document)
  save(document, out / "sweep.json")
  say(f"wrote {out / 'sweep.json'}")
