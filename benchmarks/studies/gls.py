# SPDX-License-Identifier: Apache-2.0
"""GLS beside Adam and others: losses, layers wider than their input, and the cost of a step.

classifiers   loss after equal steps; at SGD's step length, for each rate; steps and seconds to where Adam ends
autoencoder   layers wider than their input: plain GLS, three remedies, Kron whitening, Adam
cost          seconds of a step beside Adam's, in interleaved rounds, on both MLPs
single layer  `irls_fit`, the method of one layer that GLS comes from, beside the others

Every contestant is tuned with five learning rates on seed 0 and then run on seeds 1, 2, ...
"""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dpsgd_optax as dpo
from benchmarks.engine import analysis, arguments
from benchmarks.engine.calls import name_of
from benchmarks.engine.progress import say
from benchmarks.engine.records import Run, environment, load_average, rounded, write
from benchmarks.engine.report import Table, number, quartiles
from benchmarks.engine.runner import compiled, make_plan
from benchmarks.engine.timing import interleaved, quartiles_of, ratio_text
from benchmarks.engine.tune_then_race import tune_then_race
from benchmarks.hyperparameters import ADAPTIVE_GRID, GRIDS
from benchmarks.optimizers import Races, contestants, typed
from benchmarks.problems.data import DataError
from benchmarks.problems.table import build

Contestant = tuple[str, dict[str, Any], Sequence[float]]  # optimizer, its options, learning rates
DUAL: dict[str, Any] = {"decay": None, "from_outputs": True}
FIRST_ORDER: dict[str, Contestant] = {"SGD": ("sgd", {}, GRIDS["sgd"]), "Adam": ("adam", {}, ADAPTIVE_GRID)}
CLASSIFIERS: dict[str, Contestant] = FIRST_ORDER | {
  "GLS": ("gls", DUAL, GRIDS["gls"]),
  "GLS, running S": ("gls", {"from_outputs": True}, GRIDS["gls"]),
  "GLS, running S, every 5": ("gls", {"from_outputs": True, "every": 5}, GRIDS["gls"]),
  "GLS, length of SGD": ("gls", DUAL | {"match": "match_total"}, GRIDS["sgd"]),
}
SMALL: dict[str, Contestant] = CLASSIFIERS | {
  "BNP": ("bnp", {}, GRIDS["bnp"]),
  "Kron whitening": ("psgd_whiten", {"preconditioner": "kron(geometry=quad)"}, ADAPTIVE_GRID),
  "DPSGD": ("dpsgd", {}, GRIDS["dpsgd"]),
  "muon": ("muon", {}, GRIDS["muon"]),
}
AUTOENCODER_GRID = (0.02, 0.05, 0.1, 0.2, 0.4)
WIDE: dict[str, Any] = {"damping": 0.01}
REMEDIES: dict[str, dict[str, Any]] = {
  "plain": {},
  "trust region": {"max_output_change": 0.1},
  "output whitening": {"output_damping": 1.0},
  "whitening and trust region": {"output_damping": 0.1, "max_output_change": 0.1},
}
AUTOENCODERS: dict[str, Contestant] = FIRST_ORDER | {
  **{f"GLS, {name}": ("gls", WIDE | options, AUTOENCODER_GRID) for name, options in REMEDIES.items()},
  "GLS, curvature step": ("gls_curvature", WIDE, AUTOENCODER_GRID),
  "Kron whitening": ("psgd_whiten", {"preconditioner": "kron(geometry=quad)"}, ADAPTIVE_GRID),
}
LARGE: dict[str, Contestant] = FIRST_ORDER | {
  **{f"GLS, {name}": ("gls", DUAL | WIDE | options, GRIDS["gls"]) for name, options in REMEDIES.items()},
  "Kron whitening": AUTOENCODERS["Kron whitening"],
}
LAYERS: dict[str, Contestant] = FIRST_ORDER | {
  "GLS": ("gls", {"decay": 0.0, "damping": 1e-3}, (0.5, 1.0, 2.0, 4.0, 8.0))
}
FEW = {"train_size": 2000, "test_size": 1000, "evaluations": 20}  # an evaluation costs more than the steps between
RACES: dict[str, tuple[dict[str, Any], dict[str, Contestant]]] = {
  "ae_digits": ({}, AUTOENCODERS),
  "single_layer": ({"epochs": 300}, LAYERS),
  "mlp_mnist": ({"train_size": 6000, "epochs": 20}, CLASSIFIERS),
  "digits": ({}, SMALL),
  "mlp_cifar10(batches=1)": ({"train_size": 6000, "epochs": 20}, {k: CLASSIFIERS[k] for k in ("SGD", "Adam", "GLS")}),
  "uci": ({}, SMALL),
  "curves": ({"epochs": 5} | FEW, LARGE),
  "ae_cifar10(batches=1)": ({"epochs": 10} | FEW, LARGE),
}
COSTS = ("mlp_mnist", "mlp_cifar10(batches=1)")
PERIOD = 20  # steps of one call: a multiple of every period of fits


def compare(
  problem: str, entered: dict[str, Contestant], seeds: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
  """Tune each contestant, run it; final losses, and when it was where Adam ends."""
  races = Races(problem, lambda label, rate: typed(*entered[label][:2], rate), options)
  raced = tune_then_race({label: grid for label, (_, _, grid) in entered.items()}, races, seeds)
  targets = {run.seed: run.final() for run in raced["Adam"].runs}

  def to_adam(run: Run, axis: str) -> float:
    """Where the curve passes Adam's end, as a share of its own run."""
    return analysis.reached(run.curves[axis], run.curves["train_loss"], targets[run.seed]) / run.curves[axis][-1]

  found = {}
  for label, entry in raced.items():
    losses = [run.curves["train_loss"] for run in entry.runs]
    found[label] = {
      "typed": races.typed(label, entry.learning_rate),
      "trials": entry.trials,
      **entry.finals("train_loss", "test_loss"),
      "seconds": [run.curves["seconds"][-1] for run in entry.runs],
      **{f"{axis}_to_adam": [to_adam(run, axis) for run in entry.runs] for axis in ("step", "seconds")},
      "curve": np.median(losses, 0).tolist() if len(set(map(len, losses))) == 1 else None,
    }
  assert races.last is not None
  return {"plan": vars(races.last.plan), "sessions": races.last.sessions, "contestants": found}


def one_layer(problem: str, seeds: Sequence[int]) -> dict[str, Any]:
  """`irls_fit` on the data of `single_layer`, from the starts of these seeds."""
  built = build(problem, None, False)
  x, y = (jnp.asarray(built.arrays.train[name]) for name in "xy")
  fit = jax.jit(lambda kernel, bias: dpo.irls_fit(x, y, start=(kernel, bias)))
  found = []
  for seed in seeds:
    (layer,) = jax.tree.leaves(built.init(jax.random.key(seed)), is_leaf=lambda node: "kernel" in node)
    found.append(fit(layer["kernel"], layer["bias"]))
  return {
    "sweeps": [int(result.iterations[0]) for result in found],
    "train_loss": [float(result.loss[0]) for result in found],
    "gradient_norm": [float(result.gradient[0]) for result in found],
  }


def cost(problem: str, data_dir: str | None, rounds: int = 9) -> dict[str, Any]:
  """Seconds of PERIOD steps of each contestant beside Adam's, in interleaved rounds."""
  built = build(problem, data_dir, False)
  plan = make_plan(built, "tuned", 1, 1.0, False, 1)
  train = jax.tree.map(jnp.asarray, built.arrays.train)
  rows = [np.arange(built.batch_size, dtype=np.int32)] * PERIOD
  calls, before = {}, load_average()
  for label, contestant in CLASSIFIERS.items():
    if label.startswith("GLS, running S") and problem != "mlp_mnist":
      continue  # 3073 inputs: its system is 24 times the batch
    (entered,) = contestants(typed(*contestant[:2], 1e-3), {}, problem)
    lane = compiled(built, entered, plan, train).start(built.init(jax.random.key(0)), 0)
    calls[label] = lambda lane=lane: lane.train(train, rows, 0)
  times = interleaved(calls, rounds, 1)
  return {
    "batch_size": built.batch_size,
    "rounds": rounds,
    "steps": PERIOD,
    "load_average": [before, load_average()],
    "ratios": {label: quartiles_of(times, label, "Adam") for label in calls},
    "median_cpu_ms": {label: 1e3 * float(np.median(times["cpu"][label])) / PERIOD for label in calls},
  }


def race_table(problem: str, found: dict[str, Any]) -> Table:
  """Median [quartiles] over the seeds."""
  rows = []
  for label, entry in found["contestants"].items():
    rate = entry["typed"].rpartition("learning_rate=")[2].rstrip(")")
    seconds = _seconds_to_adam(found, label)
    cells = map(quartiles, (entry["train_loss"], entry["test_loss"], entry["step_to_adam"], seconds))
    rows.append((label, rate, *cells))
  plan = found["plan"]
  header = ("optimizer", "rate", "train loss", "test loss", "steps to Adam's loss", "seconds to Adam's loss")
  note = (
    "To Adam's loss: when the optimizer has the final training loss of Adam on that seed, as a share of Adam's run."
  )
  return Table(f"{problem}: {plan['steps']} steps, {plan['train_size']} samples", header, rows, (note,))


def length_table(found: dict[str, Any]) -> Table:
  """SGD and GLS with SGD's step length, rate by rate, seed 0."""
  of = {label: found["contestants"][label]["trials"] for label in ("SGD", "GLS, length of SGD")}
  rows = [(label, *map(number, trials.values())) for label, trials in of.items()]
  return Table("Train loss at equal step length, by learning rate", ("optimizer", *of["SGD"]), rows)


def summary(document: dict[str, Any]) -> Table:
  """One row per problem: Adam, the GLS that ends lowest on the tuning seed, and who ends lowest of all."""
  rows = []
  for problem, found in document["races"].items():
    of = found["contestants"]
    best_trial = lambda label, of=of: min(math.inf if x is None else x for x in of[label]["trials"].values())
    best = min((label for label in of if label.startswith("GLS")), key=best_trial)
    lowest = min(of, key=lambda label: analysis.spread(of[label]["train_loss"]).median)
    middle = lambda values: number(analysis.spread(values).median)
    mine, steps = (middle(of[best][name]) for name in ("train_loss", "step_to_adam"))
    seconds, winner = middle(_seconds_to_adam(found, best)), f"{lowest} {middle(of[lowest]['train_loss'])}"
    adam = middle(of["Adam"]["train_loss"])
    rows.append((problem, str(found["plan"]["steps"]), adam, best, mine, steps, seconds, winner))
  header = ("problem", "steps", "Adam", "GLS", "its loss", "steps to Adam's loss", "seconds to Adam's loss", "lowest")
  ratios = {name_of(problem): found["ratios"]["GLS"]["cpu"] for problem, found in document["cost"].items()}
  costs = ", ".join(f"{ratio_text(ratio)} on {name}" for name, ratio in ratios.items())
  note = (
    f"Median training loss over {document['seeds']} seeds, five rates each; shares of Adam's run; – is not reached. "
    f"A step of plain GLS beside one of Adam's: {costs}. It fits the training data: its test loss is often higher."
  )
  return Table("GLS beside Adam (`python -m benchmarks gls`)", header, rows, (note,))


def _seconds_to_adam(found: dict[str, Any], label: str) -> list[float | None]:
  """As a share of the seconds of Adam's run of the same seed."""
  entry, adam = found["contestants"][label], found["contestants"]["Adam"]["seconds"]
  parts = zip(entry["seconds_to_adam"], entry["seconds"], adam, strict=True)
  return [None if share is None else share * mine / his for share, mine, his in parts]


def cost_table(problem: str, found: dict[str, Any]) -> Table:
  rows = [(label, ratio_text(ratio["cpu"]), ratio_text(ratio["wall"])) for label, ratio in found["ratios"].items()]
  title = f"{problem}, batch {found['batch_size']}: time of an epoch beside Adam's"
  return Table(title, ("optimizer", "CPU ratio", "wall ratio"), rows)


def measure(part: str, problem: str, seeds: Sequence[int], data_dir: str | None) -> dict[str, Any]:
  if part == "cost":
    return cost(problem, data_dir)
  options, entered = RACES[problem]
  irls = {"irls": one_layer(problem, seeds)} if name_of(problem) == "single_layer" else {}
  return compare(problem, entered, seeds, options | {"data_dir": data_dir}) | irls


def show(part: str, problem: str, found: dict[str, Any]) -> None:
  """The tables of one part."""
  if part == "cost":
    cost_table(problem, found).show()
    return
  race_table(problem, found).show()
  if "GLS, length of SGD" in found["contestants"]:
    length_table(found).show()
  if "irls" in found:
    say(f"irls_fit: {found['irls']}")


add_arguments = lambda parser: arguments.add(parser, "data_dir", seeds=5)


def run(args: Namespace) -> None:
  """All of it; what is finished is kept whenever it stops, and not done again."""
  path = args.out / "gls.json"
  empty: dict[str, Any] = {"seeds": args.seeds, "environment": environment(), "races": {}, "cost": {}}
  document = json.loads(path.read_text()) if path.exists() else empty
  for part, problem in [("cost", problem) for problem in COSTS] + [("races", problem) for problem in RACES]:
    if problem not in document[part]:
      try:
        document[part][problem] = rounded(measure(part, problem, range(1, 1 + args.seeds), args.data_dir))
      except DataError as error:
        say(f"{problem} left out: {error}")
        continue
      write(document, path)
    show(part, problem, document[part][problem])
  say(f"wrote {path}")
