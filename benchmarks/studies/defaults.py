# SPDX-License-Identifier: Apache-2.0
"""Which geometry and which cadence ought to be the default of `psgd`: every choice, tuned alike, on four problems.

For each problem and each choice: RATES on seed TUNING_SEED, then the best of them on seeds 1, 2, ...; the median of the
final training loss, and the seconds of training as a ratio to the first choice of the same seed, run side by side.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, ResumeError, rounded
from benchmarks.engine.report import Table, number
from benchmarks.engine.session import prepare, run
from benchmarks.hyperparameters import TUNING_SEED

RATES = (1e-3, 3e-3, 1e-2)
PROBLEMS: dict[str, dict[str, Any]] = {
  "digits": {"epochs": 12},
  "mnist": {"epochs": 2, "train_size": 8000},
  "charlm": {"epochs": 0.1},  # 785 steps
  "xor(length=16)": {"epochs": 2},
}
CHOICES = {
  "geometry": {name: {"preconditioner": f"kron(geometry={name})"} for name in ("pro", "quad", "qeq", "eq")},
  "every": {
    "annealed": {},
    "1": {"every": 1},
    "10": {"every": 10},
    "33": {"every": 33},
  },
}


def contestant(options: dict[str, Any], rate: float) -> str:
  """As it is written on the command line."""
  return f"psgd_whiten({','.join(f'{name}={value}' for name, value in (options | {'learning_rate': rate}).items())})"


def tuned(results: Results, names: dict[str, dict[float, str]]) -> dict[str, float]:
  """The rate of the lowest final training loss of each choice; a run that broke off counts as infinite."""
  final = {run.optimizer: run.final() for run in results.runs}
  return {choice: min(labels, key=lambda rate: final[labels[rate]]) for choice, labels in names.items()}


def measured(results: Results, chosen: dict[str, str]) -> dict[str, Any]:
  """Final losses and seconds, by choice and seed."""
  first = results.of(next(iter(chosen.values())))
  base = {run.seed: run.curves["seconds"][-1] for run in first}
  found = {}
  for choice, label in chosen.items():
    runs = results.of(label)
    found[choice] = {
      "train_loss": [run.final() for run in runs],
      "test_loss": [run.final("test_loss") for run in runs],
      "seconds_ratio": [run.curves["seconds"][-1] / base[run.seed] for run in runs],
    }
  return found


def compare(problem: str, options: dict[str, Any], choices: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
  """One cell row: tune, then run."""
  label = lambda choice, rate: contestant(choices[choice], rate).replace(" ", "")
  names = {choice: {rate: label(choice, rate) for rate in RATES} for choice in choices}
  with TemporaryDirectory() as folder:

    def race(labels: list[str], seeds: Sequence[int]) -> Results:
      built, plan, entered = prepare(problem, "tuned", ",".join(labels), evaluations=4, **options)
      return run(built, plan, entered, seeds, Path(folder) / "defaults.json")

    trials = race([name for rates in names.values() for name in rates.values()], [TUNING_SEED])
    rates = tuned(trials, names)
    results = race([names[choice][rate] for choice, rate in rates.items()], seeds)
  found = measured(results, {choice: names[choice][rate] for choice, rate in rates.items()})
  trial = {run.optimizer: run.final() for run in trials.runs}
  for choice, rate in rates.items():
    found[choice] |= {"learning_rate": rate, "trials": {f"{r:g}": trial[names[choice][r]] for r in RATES}}
  return {"plan": vars(results.plan), "sessions": results.sessions, "choices": found}


def table(question: str, document: dict[str, Any]) -> Table:
  """A row per problem: the median loss, and the seconds beside the first choice."""

  def cell(entry: dict[str, Any]) -> str:
    losses = [float("inf") if x is None else x for x in entry["train_loss"]]
    return f"{number(float(np.median(losses)))} ({np.median(entry['seconds_ratio']):.2f})"

  rows = [(problem, *map(cell, found["choices"].values())) for problem, found in document[question].items()]
  header = ("problem", *CHOICES[question])
  note = f"Median final training loss over {document['seeds']} seeds (seconds as a ratio to `{header[1]}`)."
  return Table(f"psgd whitening, {question}", header, rows, (note,))


def measure(out: Path, seeds: int = 3, data_dir: str | None = None, resume: bool = False) -> None:
  """All of it, to defaults.json; what is finished is kept whenever it stops, and with `resume` not done again."""
  path = out / "defaults.json"
  document: dict[str, Any] = {"seeds": seeds, "rates": list(RATES)} | {question: {} for question in CHOICES}
  if resume and path.exists():
    kept = json.loads(path.read_text())
    if any(kept[name] != document[name] for name in ("seeds", "rates")):
      raise ResumeError(f"{path} was made with other seeds or rates. Leave --resume out, or type another --out.")
    document |= {question: kept[question] for question in CHOICES}
  for question, choices in CHOICES.items():
    for problem, options in PROBLEMS.items():
      if problem in document[question]:
        continue
      found = compare(problem, options | {"data_dir": data_dir}, choices, range(1, 1 + seeds))
      document[question][problem] = found
      path.write_text(json.dumps(rounded(document), indent=1) + "\n")
    table(question, document).show()
  say(f"wrote {path}")
