# SPDX-License-Identifier: Apache-2.0
"""Small networks to high precision: every contestant for equal CPU seconds, on equations, regression and a spin chain.

python -m benchmarks science                                     all problems, 20 CPU seconds a run
python -m benchmarks science poisson "waves(bits=32)" --seconds 60 --resume
python -m benchmarks science --page                              the tables of notebooks/science.md, from the JSON

Each contestant that has a number to tune has three trials on seed 0, and up to two more beyond the end of its grid if
the best stands there; then its best races on seeds 1, 2, … . A run ends by its CPU seconds, and a rate that falls does
so with them. One program a contestant is compiled, and its compilation and the evaluations are not counted. The seeds
are the outer loop, so that all contestants see the same hours of a machine. Writes science-PROBLEM.json.
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from benchmarks.studies import solved_step

CHUNKS = 100  # of a run: the rate of one that falls is constant within each
MARKS = (0.1, 0.25, 0.5, 1.0)  # parts of the budget at which a run is looked at
MOST_TRIALS = 5
PAGE = Path(__file__).parents[2] / "notebooks" / "science.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks science --page` -->", "<!-- /figures -->"


class Entrant(NamedTuple):
  """``start(problem, number)`` gives (params -> carry, (carry, rate) -> carry, carry -> params).

  ``numbers``: what is tried, evenly spaced by a factor. ``falls``: the rate is the number times a cosine that ends at
  0; else the number itself. ``static``: the number is part of the program, not a rate.
  """

  start: Callable[[Problem, float], tuple[Callable, Callable, Callable]]
  numbers: tuple[float, ...]
  falls: bool = False
  static: bool = False


def transform(
  make: Callable[[Any], Any], *numbers: float, falls: bool = True, static: bool = False, solved: bool = False
):
  """An optax transform, made of its rate."""

  def start(problem: Problem, value: float) -> tuple[Callable, Callable, Callable]:
    loss = lambda p: problem.loss(p, {})
    made = lambda rate: optax.with_extra_args_support(make(value if static else lambda count: rate))

    def step(carry: Any, rate: Any) -> Any:
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      extra = {"value": value, "grad": grads, "value_fn": loss}
      if solved:
        assert problem.residuals is not None
        extra["residual_fn"] = problem.residuals(params)
      updates, state = made(rate).update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state

    return lambda params: (params, made(jnp.float32(value)).init(params)), step, lambda carry: carry[0]

  return Entrant(start, numbers, falls and not static, static)


def solver(make: Callable[[Problem], tuple[Callable, Callable]]) -> Entrant:
  """A solver of another package, step by step, from (params -> state, state -> state); it has no number to tune.

  What of its state is no array is kept outside of the program.
  """

  def start(problem: Problem, value: float) -> tuple[Callable, Callable, Callable]:
    del value
    first, step = make(problem)
    held: dict[str, Any] = {}
    numeric = (jax.Array, np.ndarray, np.generic, float, int)

    def arrays_of(state: Any) -> list:
      leaves, held["treedef"] = jax.tree.flatten(state)
      held["rest"] = [None if isinstance(x, numeric) else x for x in leaves]
      return [jnp.asarray(x) for x in leaves if isinstance(x, numeric)]

    def whole(arrays: list) -> Any:
      given = iter(arrays)
      return jax.tree.unflatten(held["treedef"], [next(given) if x is None else x for x in held["rest"]])

    go = lambda arrays, rate: arrays_of(step(whole(arrays)))
    return lambda params: arrays_of(first(params)), go, lambda arrays: whole(arrays)[0]

  return Entrant(start, (0.0,), static=True)


def optimistix(name: str) -> Callable[[Problem], tuple[Callable, Callable]]:
  def make(problem: Problem) -> tuple[Callable, Callable]:
    import optimistix as optx

    made: Any = getattr(optx, name)(rtol=1e-14, atol=1e-14)
    squares = name == "LevenbergMarquardt"
    residuals = problem.residuals
    assert residuals is not None
    fn = (lambda p, args: (residuals(p)(p), None)) if squares else (lambda p, args: (problem.loss(p, {}), None))
    options: dict[str, Any] = {"jac": "bwd"} if squares else {}

    def first(params: Any) -> Any:
      struct = jax.eval_shape(lambda p: fn(p, None)[0], params)
      return params, made.init(fn, params, None, options, struct, None, frozenset())

    def step(state: Any) -> Any:
      params, state, _ = made.step(fn, state[0], None, options, state[1], frozenset())
      return params, state

    return first, step

  return make


def nlls_gram(problem: Problem) -> tuple[Callable, Callable]:
  """Levenberg-Marquardt of nlls-gram, as it comes."""
  import nlls_gram as nlls

  residuals = problem.residuals
  assert residuals is not None
  made: Any = nlls.LevenbergMarquardt(lambda p: residuals(p)(p))

  def step(state: Any) -> Any:
    params, state, *_ = made.update(state[0], state[1])
    return params, state

  return lambda params: (params, made.init(params)), step


TENTH = 10**-0.5
RATES = (0.01 * TENTH, 0.01, 0.01 / TENTH)
soap = lambda rate: dpo.psgd(rate, dpo.soap(), b1=0.95, every=1)
psgd = lambda rate: dpo.psgd(rate, b1=0.9)
dpsgd = lambda rate: dpo.dpsgd(rate, dpo.damped_kron(average=0.7, step_size=0.1), every=1)  # as in its paper
lbfgs = lambda memory: optax.lbfgs(memory_size=int(memory))
OURS: dict[str, Entrant] = {
  "gauss_newton": transform(dpo.gauss_newton, 0.5, 1.0, 2.0, falls=False, solved=True),
  "soap": transform(soap, *RATES),
  "psgd": transform(psgd, *RATES),
  "psgd in a trust region": transform(lambda rate: dpo.trust_region(psgd(rate)), *RATES),
  "dpsgd": transform(dpsgd, *(10 * rate for rate in RATES), falls=False),
  "adam": transform(optax.adam, *RATES),
  "muon": transform(optax.contrib.muon, *RATES),
  "lbfgs": transform(lbfgs, 10, 20, 40, static=True),
}
PEERS = {
  "optimistix LM": ("optimistix", solver(optimistix("LevenbergMarquardt"))),
  "optimistix BFGS": ("optimistix", solver(optimistix("BFGS"))),
  "nlls-gram": ("nlls-gram", solver(nlls_gram)),
}
OF_RESIDUALS = ("optimistix LM", "nlls-gram")  # which take r itself, and a spin chain has none


def versions() -> dict[str, str]:
  """Of the packages that are raced and are here."""
  found = {}
  for package, _ in PEERS.values():
    try:
      found[package] = version(package)
    except PackageNotFoundError:
      continue
  return found


def entrants() -> dict[str, Entrant]:
  """Those that can run here."""
  here = versions()
  return OURS | {label: entrant for label, (package, entrant) in PEERS.items() if package in here}


def add_arguments(parser: ArgumentParser) -> None:
  names = [row.__name__ for row in science.ROWS]
  known = arguments.known("problem", names)
  parser.add_argument("problems", nargs="*", type=known, metavar="PROBLEM", help=f"any of {', '.join(names)}")
  parser.add_argument("--seconds", **arguments.NUMBER, default=20.0, help="CPU seconds of a run (default: 20)")
  parser.add_argument("--tuning-seconds", **arguments.NUMBER, help="of a trial (default: a third of a run)")
  parser.add_argument("--only", default="", help="contestants, with commas (default: all that are installed)")
  parser.add_argument("--fixed", default="", help="numbers that are not tuned: gauss_newton=1.0,adam=0.01")
  parser.add_argument("--page", action="store_true", help="run nothing; write the tables of the page")
  arguments.add(parser, "data_dir", "resume", seeds=5)


def run(args: Namespace) -> None:
  if args.page:
    PAGE.write_text(page(args.out))
    return
  chosen = [name for name in args.only.split(",") if name] or list(entrants())
  if unknown := [name for name in chosen if name not in entrants()]:
    raise SpecError(f"{', '.join(unknown)} is none of the contestants that can run here: {', '.join(entrants())}.")
  fixed = {name: float(value) for name, _, value in (part.partition("=") for part in args.fixed.split(",") if part)}
  for name in args.problems or [row.__name__ for row in science.ROWS]:
    race(name, chosen, fixed, args)


def race(name: str, chosen: list[str], fixed: dict[str, float], args: Namespace) -> None:
  """Trials of all contestants, then the seeds one after the other; what is in the document already is kept."""
  problem = build(name, args.data_dir, False)
  path = args.out / f"science-{file_name(name)}.json"
  document = json.loads(path.read_text()) if args.resume and path.exists() else {"runs": {}}
  if document.get("seconds", args.seconds) != args.seconds:
    raise SpecError(f"{path} has runs of {document['seconds']:g} seconds. Give the same, or another folder as `--out`.")
  trial = args.tuning_seconds or args.seconds / 3
  document |= {"problem": name, "seconds": args.seconds, "tuning_seconds": trial, "tuning_seed": TUNING_SEED}
  document |= {"environment": environment() | versions()}
  if not isinstance(problem.residuals(problem.init(jax.random.key(0))), dpo.curvature.residuals.Residuals):
    chosen = [label for label in chosen if label not in OF_RESIDUALS]
  programs: dict[str, Program] = {}
  for label in chosen:
    runs = document["runs"].setdefault(label, {"trials": {}, "seeds": {}})
    if all(str(seed) in runs["seeds"] for seed in range(1, 1 + args.seeds)):
      continue
    programs[label] = tuned(problem, entrants()[label], fixed.get(label), trial, runs)
    write(document, path)
    say(f"  {name} {label}: {runs['number']:g} of {', '.join(runs['trials']) or 'no trials'}")
  for seed in range(1, 1 + args.seeds):
    for label, program in programs.items():
      runs = document["runs"][label]
      if str(seed) not in runs["seeds"]:
        runs["seeds"][str(seed)] = program.timed(runs["number"], seed, args.seconds)
        runs["load_average"] = load_average()
        write(document, path)
        say(f"  {name} {label} seed {seed}: error {number(runs['seeds'][str(seed)]['error'][-1])}")
  table(document).show()
  say(f"wrote {path}")


def tuned(problem: Problem, entrant: Entrant, fixed: float | None, seconds: float, runs: dict[str, Any]) -> "Program":
  """The trials, the best number of which comes into ``runs``, and its program."""
  numbers = [float(f"{tried:.4g}") for tried in (entrant.numbers if fixed is None else (fixed,))]
  program = Program(problem, entrant, numbers[0])
  losses = {float(tried): math.inf if loss is None else loss for tried, loss in runs["trials"].items()}
  while len(numbers) > 1 and len(losses) < MOST_TRIALS:
    if waiting := [tried for tried in numbers if tried not in losses]:
      tried = waiting[0]
    elif at_edge(losses):
      tried = best(losses) * (numbers[1] / numbers[0]) ** (1 if best(losses) == max(losses) else -1)
    else:
      break
    tried = float(f"{tried:.4g}")
    program = program.of(tried)
    found = program.timed(tried, TUNING_SEED, seconds)["loss"][-1]
    losses[tried] = found if math.isfinite(found) else math.inf
    runs["trials"] = {f"{tried:g}": loss for tried, loss in losses.items()}
  chosen = runs["number"] if runs["seeds"] else best(losses) if losses else numbers[0]
  program = program.of(chosen)
  runs |= {"number": chosen, "at edge": bool(losses) and at_edge(losses)}
  runs["compile_cpu_seconds"] = program.compiling
  return program


class Program:
  """A contestant on a problem, compiled once: any number of steps at any rate."""

  def __init__(self, problem: Problem, entrant: Entrant, value: float):
    self.problem, self.entrant, self.value = problem, entrant, value
    self.first, step, self.params_of = entrant.start(problem, value)
    carry = self.first(problem.init(jax.random.key(TUNING_SEED)))
    begin = time.process_time()
    steps = lambda carry, rate, count: jax.lax.fori_loop(0, count, lambda _, carry: step(carry, rate), carry)
    self.go = jax.jit(steps).lower(carry, jnp.float32(value), jnp.int32(1)).compile()
    self.compiling = time.process_time() - begin
    self.metrics = jax.jit(lambda p: problem.metrics(p, {}))
    self.per_step = 0.0

  def of(self, value: float) -> "Program":
    """The same for another number."""
    same = value == self.value or not self.entrant.static
    return self if same else Program(self.problem, self.entrant, value)

  def advance(self, carry: Any, rate: float, count: int) -> tuple[Any, float]:
    """The carry after so many steps, and the CPU seconds they took."""
    start = time.process_time()
    carry = jax.block_until_ready(self.go(carry, jnp.float32(rate), jnp.int32(count)))
    return carry, time.process_time() - start

  def timed(self, value: float, seed: int, seconds: float) -> dict[str, Any]:
    """One run: error and loss at MARKS, steps and milliseconds a step, all of CPU time."""
    carry = self.first(self.problem.init(jax.random.key(seed)))
    if not self.per_step:
      self.per_step = max(self.advance(carry, value, 3)[1] / 3, 1e-5)
    spent, done, curves = 0.0, 0, {"seconds": [], "error": [], "loss": []}
    for mark in MARKS:
      while spent < mark * seconds:
        rate = value * (1 + math.cos(math.pi * min(1, spent / seconds))) / 2 if self.entrant.falls else value
        count = max(1, round(min(seconds / CHUNKS, mark * seconds - spent) / self.per_step))
        carry, took = self.advance(carry, rate, count)
        spent, done = spent + took, done + count
        self.per_step = 0.9 * self.per_step + 0.1 * took / count
      found = jax.device_get(self.metrics(self.params_of(carry)))
      curves["seconds"].append(spent)
      curves["loss"].append(float(found["loss"]))
      curves["error"].append(float(found["error"]))
    return curves | {"steps": done, "ms_per_step": spent / done * 1e3}


def ends(runs: dict[str, Any], mark: float = 1.0) -> np.ndarray:
  """The error of each seed at a mark; infinite if it was lost."""
  at = MARKS.index(mark)
  found = [run["error"][at] for _, run in sorted(runs["seeds"].items(), key=lambda item: int(item[0]))]
  return np.array([np.inf if error is None else error for error in found])


def table(document: dict[str, Any]) -> Table:
  """The contestants of a problem, from the lowest median."""
  rows = []
  raced = {label: runs for label, runs in document["runs"].items() if runs["seeds"]}
  for label, runs in sorted(raced.items(), key=lambda item: np.median(ends(item[1]))):
    low, middle, high = np.quantile(ends(runs), [0.25, 0.5, 0.75], method="nearest")
    mean = lambda name, runs=runs: float(np.median([found[name] for found in runs["seeds"].values()]))
    cells = [number(float(np.median(ends(runs, mark)))) for mark in (0.25, 0.5)]
    rows.append(
      (
        label,
        f"{runs['number']:.3g}{' (edge)' if runs['at edge'] else ''}" if runs["number"] else "",
        *cells,
        f"{number(float(middle))} [{number(float(low))}, {number(float(high))}]",
        number(mean("ms_per_step")),
        number(runs["compile_cpu_seconds"]),
      )
    )
  seconds, count = document["seconds"], max(len(r["seeds"]) for r in document["runs"].values())
  header = ("contestant", "tuned", f"{seconds / 4:g} s", f"{seconds / 2:g} s", f"{seconds:g} s", "ms/step", "compile s")
  title = f"{document['problem']}: relative error after CPU seconds, median [quartiles] of {count} seeds"
  return Table(title, header, rows)


def documents(results: Path) -> dict[str, dict[str, Any]]:
  """By problem, in the order of the problems."""
  found = [json.loads(path.read_text()) for path in results.glob("science-*.json")]
  order = [row.__name__ for row in science.ROWS]
  key = lambda document: (order.index(document["problem"].partition("(")[0]), document["problem"])
  return {document["problem"]: document for document in sorted(found, key=key)}


def summary(found: dict[str, dict[str, Any]]) -> Table:
  """The median of each contestant on each problem; the lowest of each is marked."""
  labels = list(dict.fromkeys(label for document in found.values() for label in document["runs"]))
  rows = []
  for name, document in found.items():
    medians = {label: float(np.median(ends(runs))) for label, runs in document["runs"].items() if runs["seeds"]}
    lowest = min(medians.values())
    mark = lambda x, lowest=lowest: f"**{number(x)}**" if x == lowest else number(x)
    rows.append((f"{name}, {document['seconds']:g} s", *(mark(medians[x]) if x in medians else "" for x in labels)))
  return Table("Median relative error at equal CPU seconds", ("problem", *labels), rows)


def page(results: Path) -> str:
  """The page with its figures brought up to date."""
  found = documents(results)
  tables = [summary(found), *map(table, found.values())] if found else []
  if (path := results / "solved_step.json").exists():
    tables.append(solved_step.table(json.loads(path.read_text())))
  before, rest = PAGE.read_text().split(BEGIN)
  figures = "\n\n".join(each.markdown() for each in tables)
  return f"{before}{BEGIN}\n\n{figures}\n\n{END}{rest.split(END)[1]}"
