# SPDX-License-Identifier: Apache-2.0
"""Which geometry, cadence and P ought to be the default of `psgd`: every choice, tuned alike, on four problems.

For each problem and each choice: RATES on seed TUNING_SEED, then the best of them on seeds 1, 2, ...; the median of the
final training loss, and the seconds of training as a ratio to the first choice of the same seed, run side by side.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from benchmarks.engine import arguments
from benchmarks.engine.analysis import spread
from benchmarks.engine.progress import say
from benchmarks.engine.records import ResumeError, write
from benchmarks.engine.report import Table, number
from benchmarks.engine.tune_then_race import tune_then_race
from benchmarks.optimizers import Races, typed

RATES = (1e-3, 3e-3, 1e-2)
PROBLEMS: dict[str, dict[str, Any]] = {
  "digits": {"epochs": 12},
  "mnist": {"epochs": 2, "train_size": 8000},
  "charlm": {"epochs": 0.1},  # 785 steps
  "xor(length=16)": {"epochs": 2},
}
CHOICES = {
  "geometry": {name: {"preconditioner": f"kron(geometry={name})"} for name in ("pro", "quad", "qeq", "eq")},
  "every": {"annealed": {}} | {str(period): {"every": period} for period in (1, 10, 33)},
  "preconditioner": {"kron": {}, "kron, b1": {"b1": 0.95}}
  | {
    name: {"preconditioner": f"soap({options})", "b1": 0.95, "every": 1}
    for name, options in {"soap": "", "soap, short sides": "max_skew=1.0", "soap, kl": "moments=kl"}.items()
  },
}


def compare(problem: str, options: dict[str, Any], choices: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
  """One problem: final losses of every choice, and its seconds beside those of the first on the same seed."""
  label = lambda choice, rate: typed("psgd_whiten", choices[choice], rate)
  races = Races(problem, label, {"evaluations": 4} | options)
  raced = tune_then_race(dict.fromkeys(choices, RATES), races, seeds)
  base = {run.seed: run.curves["seconds"][-1] for run in next(iter(raced.values())).runs}
  found = {
    choice: {
      **entry.finals("train_loss", "test_loss"),
      "seconds_ratio": [run.curves["seconds"][-1] / base[run.seed] for run in entry.runs],
      "learning_rate": entry.learning_rate,
      "trials": entry.trials,
    }
    for choice, entry in raced.items()
  }
  assert races.last is not None
  return {"plan": vars(races.last.plan), "sessions": races.last.sessions, "choices": found}


def table(question: str, document: dict[str, Any]) -> Table:
  """A row per problem: the median loss, and the seconds beside the first choice."""
  cell = lambda of: f"{number(spread(of['train_loss']).median)} ({spread(of['seconds_ratio']).median:.2f})"
  rows = [(problem, *map(cell, found["choices"].values())) for problem, found in document[question].items()]
  header = ("problem", *CHOICES[question])
  note = f"Median final training loss over {document['seeds']} seeds (seconds as a ratio to `{header[1]}`)."
  return Table(f"psgd whitening, {question}", header, rows, (note,))


add_arguments = lambda parser: arguments.add(parser, "data_dir", "resume", seeds=3)


def run(args: Namespace) -> None:
  """All of it; what is finished is kept whenever it stops, and with --resume not done again."""
  path = args.out / "defaults.json"
  document: dict[str, Any] = {"seeds": args.seeds, "rates": list(RATES)} | {question: {} for question in CHOICES}
  if args.resume and path.exists():
    kept = json.loads(path.read_text())
    if any(kept[name] != document[name] for name in ("seeds", "rates")):
      raise ResumeError(f"{path} was made with other seeds or rates. Leave --resume out, or type another --out.")
    document |= {question: kept.get(question, {}) for question in CHOICES}
  for question, choices in CHOICES.items():
    for problem, options in PROBLEMS.items():
      if problem not in document[question]:
        seeds = range(1, 1 + args.seeds)
        document[question][problem] = compare(problem, options | {"data_dir": args.data_dir}, choices, seeds)
        write(document, path)
    table(question, document).show()
  say(f"wrote {path}")
