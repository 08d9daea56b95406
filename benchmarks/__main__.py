# SPDX-License-Identifier: Apache-2.0
"""The command line.

python -m benchmarks demo                              digits, all optimizers, a table and a picture, in a few minutes
python -m benchmarks mnist curves --setting author     the paper's runs, in the author's setting
python -m benchmarks mnist --optimizers ablation       the four cells: damping and averaging, each on and off
python -m benchmarks mnist --optimizers betas          the sweep over the weight of the average
python -m benchmarks mnist --optimizers "psgd,dpsgd(average=0.5, judge_every=10)"
python -m benchmarks "xor(length=55, cell=lstm)"       a problem with options
python -m benchmarks tune mnist                        choose the learning rates, the same number of trials for each
python -m benchmarks cost mlp lenet5                   cost of a step as ratios in one interleaved run (extra `peers`)
python -m benchmarks condition                         condition number of a layer's Hessian under each preconditioner
python -m benchmarks regularization                    test accuracy against strength for each penalty, and its cost
python -m benchmarks robustness                        zeros, an outlier, a NaN, bfloat16: every preconditioner
python -m benchmarks soak                              10^5 fits of every preconditioner on a drifting curvature
python -m benchmarks defaults                          geometry and cadence of `psgd`, on four problems
python -m benchmarks sharpness digits-tuned            of a run made with --save; so do forgetting, entropy, plasticity
python -m benchmarks gls                               the claims of the note on GLS: losses, cost, autoencoders
python -m benchmarks rl CartPole-v1                    PPO on an environment of gymnax (extra `rl`)
python -m benchmarks sweep                             16 learning rates x 4 seeds of whole runs in one compiled call
python -m benchmarks distributed --devices 8           a transformer on many devices; --processes 2: on several hosts
python -m benchmarks scale                             step time and memory of large transformers on 8 to 1024 devices
python -m benchmarks diagonality                       how diagonal the Hessian of each norm layer is, of any problem
python -m benchmarks partial_hessian                   cost of a step of SGD with partial Hessian
python -m benchmarks batch_sizes                       batch-norm preconditioning, batch norm and neither, down to 1
python -m benchmarks report                            Markdown tables from the results kept in --out
python -m benchmarks readme                            the figures of README.md, written anew from them
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import hyperparameters
from benchmarks.engine.calls import SpecError, file_name, name_of
from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, ResumeError, load
from benchmarks.engine.report import claim_table, tables
from benchmarks.engine.session import prepare, run
from benchmarks.optimizers import split
from benchmarks.problems.data import DataError
from benchmarks.problems.table import PROBLEMS
from benchmarks.studies import _kept as studies
from benchmarks.studies import _workloads as workloads
from benchmarks.studies import (
  batch_sizes,
  condition,
  cost,
  defaults,
  diagonality,
  distributed,
  gls,
  partial_hessian,
  readme,
  regularization,
  rl,
  robustness,
  scale,
  soak,
  sweep,
  tune,
)
from benchmarks.studies._kept import STUDIES

WHOLE = {
  "condition": condition,
  "partial_hessian": partial_hessian,
  "regularization": regularization,
  "robustness": robustness,
  "soak": soak,
}
DEVICES = ("distributed", "scale", "sweep")
# commands whose documents have a layout of their own
ALONE = ("batch_sizes", "defaults", "diagonality", "gls", "rl", *DEVICES, *WHOLE)
NOT_RUNS = ("tune-", "trials-", "cost-", "study-", *ALONE)
COMMANDS = ("demo", "tune", "cost", *ALONE, *STUDIES, "report", "readme")


def positive(kind: type) -> Any:
  """An argparse type: a number above zero."""

  def convert(text: str) -> Any:
    if not (value := kind(text)) > 0:
      raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value

  convert.__name__ = f"positive {kind.__name__}"
  return convert


def parser() -> argparse.ArgumentParser:
  known = f"problems: {', '.join(PROBLEMS)}; or one of the commands {', '.join(COMMANDS)}"
  found = argparse.ArgumentParser(
    "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = found.add_argument
  add("what", nargs="*", default=["demo"], metavar="PROBLEM", help=known)
  names = ", ".join(hyperparameters.GRIDS)
  add("--optimizers", default="", help=f"comma-separated: {names}; or {', '.join(hyperparameters.GROUPS)}")
  add("--setting", choices=("author", "tuned"), default="tuned", help="whose hyper-parameters (default: tuned)")
  add("--seeds", type=positive(int), help="how many, from 1 on (default: 5 on small problems, 3 on large ones)")
  add("--epochs", type=positive(float), help="passes over the training data (default: the problem's)")
  add("--batch-size", type=positive(int), help="samples per step (default: the problem's)")
  add("--train-size", type=positive(int), help="use only the first N training samples")
  add("--test-size", type=positive(int), help="evaluate on the first N test samples only")
  add("--evaluations", type=positive(int), help="points of each curve (default: the problem's)")
  add("--decay", type=positive(float), help="learning-rate factor after each epoch (default: the setting's)")
  add("--folded", action=argparse.BooleanOptionalAction, help="biases as a row of the kernels (default: by setting)")
  add("--target", type=positive(float), action="append", default=[], help="another target loss; may be repeated")
  add("--devices", type=positive(int), default=8, help="of `distributed` (default: 8, virtual ones on a CPU)")
  add("--processes", type=positive(int), default=1, help="of `distributed`, over which the devices are divided")
  for option, (value, text) in scale.HARDWARE.items():
    add(f"--{option}", type=positive(float), default=value, help=f"of `scale`: {text} (default: %(default)g)")
  add("--threads", choices=tuple(cost.THREADS), help="of `cost`: that many, in this process (default: both, apart)")
  add("--rounds", type=positive(int), default=9, help="of `cost` (default: %(default)d)")
  add("--calls", type=positive(int), default=4, help="of `cost`, in each round (default: %(default)d)")
  add("--data-dir", help="folder with mnist/, fashion_mnist/ (default: $DPSGD_OPTAX_DATA, or a download)")
  add("--out", type=Path, default=hyperparameters.RESULTS, help="where JSON and PNG go (default: benchmarks/results)")
  add("--name", help="name of the files (default: PROBLEM-SETTING)")
  add("--save", action="store_true", help="keep final variables and predictions in --out, for the analyses")
  add("--resume", action="store_true", help="keep the finished seeds of an earlier run")
  return found


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
  """The arguments that `prepare` takes as they are."""
  names = ("data_dir", "epochs", "batch_size", "train_size", "test_size", "evaluations", "decay", "folded")
  return {name: getattr(arguments, name) for name in names}


def show(results: Results, out: Path, targets: list[float]) -> None:
  """Tables, and the picture beside the JSON."""
  from benchmarks.engine.plots import plot  # matplotlib is slow to import

  for table in tables(results, targets or hyperparameters.targets(results.plan.problem)):
    table.show()
  if results.seeds():
    picture = out / f"{results.name}.png"
    plot(results, picture)
    say(f"wrote {out / results.name}.json and {picture}")


def run_problem(name: str, arguments: argparse.Namespace) -> None:
  problem, plan, entered = prepare(name, arguments.setting, arguments.optimizers, **overrides(arguments))
  path = arguments.out / f"{arguments.name or f'{file_name(name)}-{arguments.setting}'}.json"
  seeds = range(1, 1 + (arguments.seeds or problem.default_seeds))
  try:
    results = run(problem, plan, entered, seeds, path, arguments.resume, arguments.save)
  except KeyboardInterrupt:
    done = load(path) if path.exists() else None
    say(f"\nstopped; seeds kept in {path}: {done.seeds() if done else 'none'}. Go on with --resume.")
    if done:
      show(done, arguments.out, arguments.target)
    raise
  show(results, arguments.out, arguments.target)


def tune_problem(name: str, arguments: argparse.Namespace) -> None:
  optimizers = split(arguments.optimizers or "all")
  unknown = [optimizer for optimizer in optimizers if optimizer not in hyperparameters.GRIDS]
  if unknown:
    raise SpecError(f"{unknown} cannot be tuned: there is no grid of that name in hyperparameters.py.")
  problem, plan, entered = prepare(name, "tuned", tune.grid_of(optimizers), **overrides(arguments))
  path = arguments.out / f"{arguments.name or f'trials-{file_name(name)}'}.json"
  results = run(problem, plan, entered, [hyperparameters.TUNING_SEED], path, arguments.resume)
  tune.trial_table(name, tune.trials(results)).show()
  path = arguments.out / f"tune-{file_name(name)}.json"
  chosen = tune.save_trials(results, path)
  say(f"chosen: {chosen}\nwrote {path}; runs in the setting `tuned` read it from {hyperparameters.RESULTS.name}/")


def cost_of_workloads(names: list[str], arguments: argparse.Namespace) -> None:
  for name in names or workloads.USUAL:
    document = cost.run(name, arguments.threads, arguments.rounds, arguments.calls)
    cost.save(document, arguments.out / f"cost-{name}.json")
    cost.details(document).show()
    cost.table(document).show()


def report(arguments: argparse.Namespace) -> None:
  """Markdown for every document in the folder."""
  paths = [path for path in sorted(arguments.out.glob("*.json")) if not path.stem.startswith(NOT_RUNS)]
  documents = [load(path) for path in paths]
  if claim := claim_table(documents):
    say(claim.markdown() + "\n")
  for results in documents:
    for table in tables(results, arguments.target or hyperparameters.targets(results.plan.problem)):
      say(table.markdown() + "\n")


def studied(command: str, runs: list[str], arguments: argparse.Namespace) -> int:
  """An analysis of runs that were kept."""
  if not runs:
    parser().error(f"{command} needs the name of a run made with --save, for example: {command} digits-tuned")
  try:
    for run_name in runs:
      studies.measure(command, run_name, arguments.out, arguments.data_dir)
  except (DataError, SpecError, ResumeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def main(argv: list[str] | None = None) -> int:
  arguments = parser().parse_args(argv)
  first, *rest = arguments.what
  command, names = (first, rest) if first in COMMANDS else ("run", arguments.what)
  if command == "demo":
    names, arguments.name = ["digits"], arguments.name or "demo"
    arguments.optimizers = arguments.optimizers or "demo"
  if command in STUDIES:
    return studied(command, names, arguments)
  if command == "rl":
    environments, names = names, []
  kind, known = ("workload", workloads.WORKLOADS) if command == "cost" else ("problem", PROBLEMS)
  if unknown := [name for name in names if name_of(name) not in known]:
    parser().error(f"no {kind} is called {unknown}; known are {', '.join(known)}")
  if command == "cost":
    cost_of_workloads(names, arguments)
    return 0
  if command == "tune" and not names:
    parser().error("tune needs a problem, for example: python -m benchmarks tune digits")
  actions = {"tune": tune_problem, "run": run_problem, "demo": run_problem}
  try:
    if command == "report":
      report(arguments)
    elif command == "readme":
      readme.write(arguments.out)
    elif command == "defaults":
      defaults.measure(arguments.out, arguments.seeds or 3, arguments.data_dir, arguments.resume)
    elif command == "batch_sizes":
      batch_sizes.run_all(arguments.out, arguments.seeds or 5)
    elif command == "gls":
      gls.measure(arguments.out, arguments.seeds or 5, arguments.data_dir)
    elif command == "rl":
      rl.measure(arguments.out, environments, arguments.optimizers, arguments.seeds or 5)
    elif command == "sweep":
      sweep.run(arguments.out)
    elif command == "scale":
      scale.run(arguments.out, {option: vars(arguments)[option.replace("-", "_")] for option in scale.HARDWARE})
    elif command == "distributed":
      problem, names = (names or [distributed.PROBLEM])[0], []
      distributed.run(arguments.out, problem, arguments.devices, arguments.processes, arguments.data_dir)
    elif command == "diagonality":
      diagonality.measure(arguments.out, names, arguments.seeds or 3, arguments.data_dir)
      names = []
    elif command in WHOLE:
      WHOLE[command].run(arguments.out)
    for name in names:
      actions[command](name, arguments)
  except (DataError, SpecError, ResumeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
