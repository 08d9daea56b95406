# SPDX-License-Identifier: Apache-2.0
"""Small networks to high precision: every contestant for equal CPU seconds, on equations, regression and a spin chain.

python -m benchmarks science                                     all problems, 20 CPU seconds a run
python -m benchmarks science poisson "waves(bits=32)" --seconds 5 --seeds 3 --resume

Each contestant has five trials on seed 0, of the same seconds, and runs its best on seeds 1, 2, … . What has no number
to tune has none. Steps are compiled in chunks; compilation and evaluation are not counted. Writes science-PROBLEM.json.
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine import arguments
from benchmarks.engine.calls import SpecError, file_name
from benchmarks.engine.problem import Problem
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment, load_average, write
from benchmarks.engine.report import Table, number
from benchmarks.engine.tune_then_race import TUNING_SEED, at_edge, best
from benchmarks.problems import science
from benchmarks.problems.table import build

CHUNK_SECONDS = 0.2  # of CPU, of the steps that are compiled together, as far as a step allows
MARKS = (0.05, 0.1, 0.25, 0.5, 1.0)  # parts of the budget at which a run is looked at


class Entrant(NamedTuple):
  """``start(problem, number, steps)`` gives (params -> carry, carry -> carry, carry -> params); ``numbers``: tried."""

  start: Callable[[Problem, float, int], tuple[Callable, Callable, Callable]]
  numbers: tuple[float, ...]


def transform(make: Callable[[float, int], Any], *numbers: float, solved: bool = False) -> Entrant:
  """An optax transform, made of the number that is tuned and the steps that the budget allows."""

  def start(problem: Problem, value: float, steps: int) -> tuple[Callable, Callable, Callable]:
    tx = optax.with_extra_args_support(make(value, steps))
    loss = lambda p: problem.loss(p, {})

    def step(carry: Any) -> Any:
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      extra = {"value": value, "grad": grads, "value_fn": loss}
      if solved:
        assert problem.residuals is not None
        extra["residual_fn"] = problem.residuals(params)
      updates, state = tx.update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state

    return lambda params: (params, tx.init(params)), step, lambda carry: carry[0]

  return Entrant(start, numbers)


def cosine(make: Callable[..., Any], **options: Any) -> Callable[[float, int], Any]:
  """With a rate that falls to nothing over the steps of the budget."""
  return lambda rate, steps: make(optax.cosine_decay_schedule(rate, steps), **options)


def optimistix(name: str) -> Entrant:
  """A solver of Optimistix, step by step; it has no number to tune."""

  def start(problem: Problem, value: float, steps: int) -> tuple[Callable, Callable, Callable]:
    import optimistix as optx

    del value, steps
    solver = getattr(optx, name)(rtol=1e-14, atol=1e-14)
    squares = name == "LevenbergMarquardt"
    residuals = problem.residuals
    assert residuals is not None
    fn = (lambda p, args: (residuals(p)(p), None)) if squares else (lambda p, args: (problem.loss(p, {}), None))
    options: dict[str, Any] = {"jac": "bwd"} if squares else {}
    tags: frozenset = frozenset()

    def first(params: Any) -> Any:
      struct = jax.eval_shape(lambda p: fn(p, None)[0], params)
      state = solver.init(fn, params, None, options, struct, None, tags)
      arrays = jax.tree.leaves(state)
      held["treedef"], held["rest"] = jax.tree.structure(state), [x for x in arrays if not isinstance(x, jax.Array)]
      held["is array"] = [isinstance(x, jax.Array) for x in arrays]
      return params, [x for x in arrays if isinstance(x, jax.Array)]

    held: dict[str, Any] = {}

    def step(carry: Any) -> Any:
      params, arrays = carry
      given, rest = iter(arrays), iter(held["rest"])
      state = jax.tree.unflatten(held["treedef"], [next(given) if is_ else next(rest) for is_ in held["is array"]])
      params, state, _ = solver.step(fn, params, None, options, state, tags)
      return params, [x for x, is_ in zip(jax.tree.leaves(state), held["is array"], strict=True) if is_]

    return first, step, lambda carry: carry[0]

  return Entrant(start, (0.0,))


ENTRANTS: dict[str, Entrant] = {
  "adam": transform(cosine(optax.adam), 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
  "muon": transform(cosine(optax.contrib.muon), 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
  "lbfgs": transform(lambda memory, steps: optax.lbfgs(memory_size=int(memory)), 5, 10, 20, 50, 100),
  "psgd": transform(cosine(dpo.psgd, b1=0.9), 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
  "dpsgd": transform(lambda rate, steps: dpo.dpsgd(rate), 0.05, 0.1, 0.2, 0.5, 1.0),
  "gauss_newton": transform(lambda rate, steps: dpo.gauss_newton(rate), 0.03, 0.1, 0.5, 1.0, 1.5, solved=True),
}
if hasattr(dpo, "soap"):
  ENTRANTS["soap"] = transform(cosine(dpo.soap), 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PEERS = {"optimistix LM": "LevenbergMarquardt", "optimistix BFGS": "BFGS"}


def entrants() -> dict[str, Entrant]:
  """Those that can run here."""
  try:
    import optimistix as _  # noqa: F401
  except ImportError:
    return ENTRANTS
  return ENTRANTS | {label: optimistix(name) for label, name in PEERS.items()}


def add_arguments(parser: ArgumentParser) -> None:
  names = [row.__name__ for row in science.ROWS]
  known = arguments.known("problem", names)
  parser.add_argument("problems", nargs="*", type=known, metavar="PROBLEM", help=f"any of {', '.join(names)}")
  parser.add_argument("--seconds", **arguments.NUMBER, default=20.0, help="CPU seconds of a run (default: 20)")
  parser.add_argument("--only", default="", help="contestants, with commas (default: all that are installed)")
  parser.add_argument("--fixed", default="", help="numbers that are not tuned: gauss_newton=1.0,adam=0.01")
  arguments.add(parser, "data_dir", "resume", seeds=5)


def run(args: Namespace) -> None:
  chosen = [name for name in args.only.split(",") if name] or list(entrants())
  if unknown := [name for name in chosen if name not in entrants()]:
    raise SpecError(f"{', '.join(unknown)} is none of the contestants that can run here: {', '.join(entrants())}.")
  fixed = {name: float(value) for name, _, value in (part.partition("=") for part in args.fixed.split(",") if part)}
  for name in args.problems or [row.__name__ for row in science.ROWS]:
    problem = build(name, args.data_dir, False)
    path = args.out / f"science-{file_name(name)}.json"
    document = json.loads(path.read_text()) if args.resume and path.exists() else {"runs": {}}
    document |= {"problem": name, "seconds": args.seconds, "environment": environment()}
    for label in chosen:
      compete(problem, label, args, fixed.get(label), document, path)
    show(document, path)


def compete(problem: Problem, label: str, args: Namespace, value: float | None, document: dict, path: Path) -> None:
  """Trials on the tuning seed, then the seeds; what is in the document already is kept."""
  entrant = entrants()[label]
  runs = document["runs"].setdefault(label, {"trials": {}, "seeds": {}})
  if optimistix_cannot(label, problem):
    document["runs"].pop(label)
    return
  numbers = (value,) if value is not None else entrant.numbers
  for tried in numbers if len(numbers) > 1 else ():
    if f"{tried:g}" not in runs["trials"]:
      found = timed(problem, entrant, tried, TUNING_SEED, args.seconds)
      runs["trials"][f"{tried:g}"] = found["loss"][-1] if math.isfinite(found["loss"][-1]) else math.inf
      write(document, path)
  losses = {float(tried): math.inf if loss is None else loss for tried, loss in runs["trials"].items()}
  rate = best(losses) if losses else numbers[0]
  runs |= {"number": rate, "at edge": bool(losses) and at_edge(losses)}
  for seed in range(1, 1 + args.seeds):
    if str(seed) not in runs["seeds"]:
      runs["seeds"][str(seed)] = timed(problem, entrant, rate, seed, args.seconds)
      runs["load_average"] = load_average()
      write(document, path)
  ends = [found["error"][-1] for found in runs["seeds"].values()]
  say(f"  {document['problem']} {label} ({rate:g}): error {', '.join(map(number, ends))}")


def optimistix_cannot(label: str, problem: Problem) -> bool:
  """Least squares in the narrow sense needs r itself, which a spin chain has not."""
  if label != "optimistix LM":
    return False
  assert problem.residuals is not None
  return not isinstance(problem.residuals(problem.init(jax.random.key(0))), dpo.curvature.residuals.Residuals)


def timed(problem: Problem, entrant: Entrant, value: float, seed: int, seconds: float) -> dict[str, Any]:
  """One run: error and loss at MARKS, steps, milliseconds a step and seconds of compiling, all of CPU time."""
  params = problem.init(jax.random.key(seed))
  metrics = jax.jit(lambda p: problem.metrics(p, {}))
  millis = per_step(problem, entrant, value, params)
  steps = max(1, int(seconds / millis * 1e3))
  first, step, of = entrant.start(problem, value, steps)
  carry = first(params)
  length = int(np.clip(CHUNK_SECONDS / millis * 1e3, 1, 500))
  start = time.process_time()
  chunk = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(c), None), c, length=length)[0]).lower(carry).compile()
  compiling = time.process_time() - start
  spent, done, curves = 0.0, 0, {"seconds": [], "error": [], "loss": []}
  for mark in MARKS:
    while spent < mark * seconds:
      start = time.process_time()
      carry = jax.block_until_ready(chunk(carry))
      spent += time.process_time() - start
      done += length
    found = jax.device_get(metrics(of(carry)))
    curves["seconds"].append(spent)
    curves["loss"].append(float(found["loss"]))
    curves["error"].append(float(found["error"]))
  return curves | {"steps": done, "ms_per_step": spent / done * 1e3, "compile_cpu_seconds": compiling}


def per_step(problem: Problem, entrant: Entrant, value: float, params: Any) -> float:
  """CPU milliseconds of a step, roughly: the length of the schedule and of a chunk depend on it."""
  first, step, _ = entrant.start(problem, value, 1000)
  carry, count = first(params), 10
  go = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(c), None), c, length=count)[0])
  jax.block_until_ready(go(carry))
  start = time.process_time()
  for _ in range(2):
    carry = jax.block_until_ready(go(carry))
  return max((time.process_time() - start) / (2 * count) * 1e3, 1e-3)


def show(document: dict[str, Any], path: Path) -> None:
  """The table and the picture."""
  rows = []
  for label, runs in document["runs"].items():
    ends = np.array([[np.nan if e is None else e for e in found["error"]] for found in runs["seeds"].values()])
    if not len(ends):
      continue
    low, middle, high = np.nanpercentile(ends[:, -1], [25, 50, 75])
    mean = lambda name, runs=runs: float(np.median([found[name] for found in runs["seeds"].values()]))
    cells = [number(float(np.nanmedian(ends[:, MARKS.index(mark)]))) for mark in (0.1, 0.25)]
    rows.append(
      (
        f"{label} ({runs['number']:g}{', edge' if runs['at edge'] else ''})",
        *cells,
        f"{number(float(middle))} [{number(float(low))}, {number(float(high))}]",
        number(mean("ms_per_step")),
        number(mean("compile_cpu_seconds")),
      )
    )
  seconds, count = document["seconds"], max(len(r["seeds"]) for r in document["runs"].values())
  header = ("contestant", f"{seconds / 10:g} s", f"{seconds / 4:g} s", f"{seconds:g} s", "ms/step", "compile s")
  title = f"{document['problem']}: relative error after CPU seconds, median [quartiles] of {count} seeds"
  Table(title, header, rows).show()
  say(f"wrote {path}")
