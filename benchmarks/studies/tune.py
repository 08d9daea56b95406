# SPDX-License-Identifier: Apache-2.0
"""Choose learning rates: the same number of trials for every optimizer, on a seed that the results do not use.

python -m benchmarks tune mnist      writes tune-mnist.json, from which runs in the setting `tuned` take their rates
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks.engine import arguments
from benchmarks.engine.calls import SpecError, file_name
from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, write
from benchmarks.engine.report import Table, number
from benchmarks.engine.session import run as run_session
from benchmarks.engine.tune_then_race import TUNING_SEED, at_edge, best
from benchmarks.hyperparameters import GRIDS
from benchmarks.optimizers import prepare, split, typed
from benchmarks.problems.table import PROBLEMS

Trials = dict[str, dict[float, float]]  # optimizer -> learning rate -> final training loss


def add_arguments(parser: ArgumentParser) -> None:
  parser.add_argument("problems", nargs="+", type=arguments.known("problem", PROBLEMS), metavar="PROBLEM")
  parser.add_argument("--optimizers", default="all", help=f"comma-separated: {', '.join(GRIDS)} (default: all)")
  parser.add_argument("--name", help="name of the file of all trials (default: trials-PROBLEM)")
  arguments.add(parser, *arguments.PLAN, "resume")


def run(args: Namespace) -> None:
  optimizers = split(args.optimizers or "all")
  if unknown := [optimizer for optimizer in optimizers if optimizer not in GRIDS]:
    raise SpecError(f"{unknown} cannot be tuned: there is no grid of that name in hyperparameters.py.")
  grid = ",".join(typed(name, {}, rate) for name in optimizers for rate in GRIDS[name])
  for name in args.problems:
    problem, plan, entered = prepare(name, "tuned", grid, **arguments.plan_of(args))
    path = args.out / f"{args.name or f'trials-{file_name(name)}'}.json"
    results = run_session(problem, plan, entered, [TUNING_SEED], path, args.resume)
    trial_table(name, trials(results)).show()
    path = args.out / f"tune-{file_name(name)}.json"
    chosen = save_trials(results, path)
    say(f"chosen: {chosen}\nwrote {path}; runs in the setting `tuned` read it from {arguments.RESULTS.name}/")


def trials(results: Results) -> Trials:
  """What each learning rate led to; infinite if training broke off."""
  found: Trials = {}
  for label, about in results.contestants.items():
    (run,) = results.of(label)
    found.setdefault(about["name"], {})[about["options"]["learning_rate"]] = run.final()
  return found


def trial_table(problem: str, found: Trials) -> Table:
  """All trials, the best one starred; a best one at the edge of the grid is pointed out."""
  rows = []
  for name, losses in found.items():
    chosen = best(losses)
    rows.append((name, *(f"{rate:g}: {number(loss)}{' *' * (rate == chosen)}" for rate, loss in losses.items())))
  edges = [name for name, losses in found.items() if at_edge(losses)]
  notes = (f"At the edge of the grid: {', '.join(edges)}.",) if edges else ()
  width = max(map(len, rows))  # an earlier run, resumed, may have had another grid
  padded = [row + ("",) * (width - len(row)) for row in rows]
  header = ("optimizer", *(f"trial {i}" for i in range(1, width)))
  return Table(f"{problem}: final training loss by learning rate, seed {TUNING_SEED}", header, padded, notes)


def save_trials(results: Results, path: Path) -> dict[str, float]:
  """Write trials and choices; return the choices."""
  found = trials(results)
  chosen = {name: best(losses) for name, losses in found.items()}
  document = {
    "plan": vars(results.plan),
    "environment": results.sessions[-1]["environment"],
    "trials": {name: {f"{rate:g}": loss for rate, loss in losses.items()} for name, losses in found.items()},
    "chosen": chosen,
  }
  write(document, path)
  return chosen
