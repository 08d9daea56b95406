# SPDX-License-Identifier: Apache-2.0
"""What ought to be the defaults of `psgd`: geometries, cadences, and other people's Kron beside ours; all tuned alike.

python -m benchmarks defaults                           every question
python -m benchmarks defaults "newton geometry"         one of them; the others in the file are kept
python -m benchmarks defaults rivals --resume --problems digits,xor    these problems besides those in the file

For each problem and each choice: four learning rates on seed TUNING_SEED, then the best of them on seeds 1, 2, ...;
CPU seconds of training are a ratio to those of the first choice of the same seed, run side by side. Rates are chosen
and choices compared by the settled loss, the largest of the last three evaluations: a run that jumps is not taken for a
good one because it happened to end low. The final losses are kept beside it.
"""

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import rivals
from benchmarks.engine import arguments, calls
from benchmarks.engine.analysis import spread
from benchmarks.engine.calls import Options
from benchmarks.engine.progress import say
from benchmarks.engine.records import ResumeError, Run, write
from benchmarks.engine.report import Table, number
from benchmarks.engine.tune_then_race import tune_then_race
from benchmarks.optimizers import Races, typed

PROBLEMS: dict[str, dict[str, Any]] = {
  "digits": {"epochs": 12},  # 276 steps
  "mnist": {"epochs": 4, "train_size": 4000, "test_size": 500, "evaluations": 6},  # 252
  "charlm(layers=1,block=32)": {"epochs": 0.025, "test_size": 500, "evaluations": 4},  # 392
  "xor(length=16)": {"epochs": 2},  # 2048
  "addition": {"epochs": 1, "test_size": 500, "evaluations": 5},  # 450
  "logistic": {"epochs": 50},  # 150
  "quadratic": {"epochs": 20},  # 400
}
NETWORKS = (
  "digits",
  "mnist",
  "charlm(layers=1,block=32)",
  "xor(length=16)",
)  # for the questions that are not on geometry
LAST = 3  # evaluations


class Choice(NamedTuple):
  """A contestant: its name in the table of optimizers, its options, and the rates that it is tried with."""

  optimizer: str
  options: Options
  rates: tuple[float, ...]


WHITENING, NEWTON = (1e-3, 3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.2, 0.5)
GEOMETRIES = {name: {"preconditioner": f"kron(geometry={name})"} for name in ("pro", "quad", "qeq")}
EVERY = {"annealed": {}} | {str(period): {"every": period} for period in (1, 10, 33)}
RIVALS = {
  "psgd": Choice("psgd_whiten", {"b1": rivals.MOMENTUM}, WHITENING),
  **{name: Choice(package, {"geometry": geometry}, WHITENING) for name, (package, geometry) in rivals.KRONS.items()},
  "muon": Choice("muon", {}, (3e-3, 1e-2, 3e-2, 1e-1)),
  "adam": Choice("adam", {}, WHITENING),
}
QUESTIONS: dict[str, dict[str, Choice]] = {
  "whitening geometry": {name: Choice("psgd_whiten", options, WHITENING) for name, options in GEOMETRIES.items()},
  "newton geometry": {name: Choice("psgd_newton", options, NEWTON) for name, options in GEOMETRIES.items()},
  "rivals": RIVALS,
  "every": {name: Choice("psgd_whiten", options, WHITENING) for name, options in EVERY.items()},
  "preconditioner": {"kron": Choice("psgd_whiten", {"b1": 0.95}, WHITENING)}
  | {
    name: Choice("psgd_whiten", {"preconditioner": f"soap({options})", "b1": 0.95, "every": 1}, WHITENING)
    for name, options in {"soap": "", "soap, short sides": "max_skew=1.0", "soap, kl": "moments=kl"}.items()
  },
}


def choices_of(question: str) -> dict[str, Choice]:
  """Those that can be had here: a package that is not installed does not race."""
  there = lambda choice: choice.optimizer not in rivals.PACKAGES or rivals.module(choice.optimizer)
  return {name: choice for name, choice in QUESTIONS[question].items() if there(choice)}


def problems_of(question: str) -> list[str]:
  """Where it is asked, if nobody says so."""
  return [problem for problem in PROBLEMS if "geometry" in question or problem in NETWORKS]


def settled(run: Run) -> float:
  """The largest of the last training losses; infinite if the run broke off."""
  last = run.curves["train_loss"][-LAST:]
  return max(last) if run.finished and all(map(math.isfinite, last)) else math.inf


def compare(problem: str, options: dict[str, Any], choices: Mapping[str, Choice], seeds: Sequence[int]) -> Any:
  """One problem: final losses of every choice, and its CPU seconds beside those of the first on the same seed."""
  label = lambda name, rate: typed(choices[name].optimizer, choices[name].options, rate)
  races = Races(problem, label, {"evaluations": 10} | options)
  raced = tune_then_race({name: choice.rates for name, choice in choices.items()}, races, seeds, settled)
  base = {run.seed: run.curves["cpu_seconds"][-1] for run in next(iter(raced.values())).runs}
  found = {
    name: {
      **entry.finals("train_loss", "test_loss"),
      "cpu_seconds": [run.curves["cpu_seconds"][-1] for run in entry.runs],
      "seconds_ratio": [run.curves["cpu_seconds"][-1] / base[run.seed] for run in entry.runs],
      "settled_loss": [settled(run) for run in entry.runs],
      "learning_rate": entry.learning_rate,
      "trials": entry.trials,
    }
    for name, entry in raced.items()
  }
  assert races.last is not None
  return {"plan": vars(races.last.plan), "sessions": races.last.sessions, "choices": found}


def table(question: str, document: dict[str, Any]) -> Table:
  """A row per problem: the median settled loss, and the CPU seconds beside the first choice."""
  cell = lambda of: f"{number(spread(of['settled_loss']).median)} ({spread(of['seconds_ratio']).median:.2f})"
  note = f"Largest of the last {LAST} training losses, median over {document['seeds']} seeds (CPU seconds as a ratio)."
  return _table(f"psgd, {question}", cell, document[question], note)


def finals(question: str, document: dict[str, Any]) -> Table:
  """The same races by the final loss alone, and in absolute CPU seconds, which compare within a row."""
  cell = lambda of: f"{number(spread(of['train_loss']).median)} ({number(spread(of['cpu_seconds']).median)} s)"
  note = "Median final training loss (median CPU seconds of training)."
  return _table(f"psgd, {question}: how it ended", cell, document[question], note)


def _table(title: str, cell: Callable[[dict[str, Any]], str], answers: dict[str, Any], note: str) -> Table:
  names = list(dict.fromkeys(name for found in answers.values() for name in found["choices"]))
  cells = lambda choices: [cell(choices[name]) if name in choices else "" for name in names]
  rows = [(problem, *cells(found["choices"])) for problem, found in answers.items()]
  return Table(title, ("problem", *names), rows, (note,))


def add_arguments(parser: ArgumentParser) -> None:
  names = arguments.known("question", QUESTIONS)
  parser.add_argument("questions", nargs="*", type=names, metavar="QUESTION", help=f"any of {', '.join(QUESTIONS)}")
  short = {calls.name_of(problem): problem for problem in PROBLEMS}
  one = arguments.known("problem", short)
  each = lambda text: [short[calls.name_of(one(part))] for part in calls.split(text)]
  parser.add_argument("--problems", type=each, help=f"comma-separated, of {', '.join(short)} (default: by question)")
  arguments.add(parser, "data_dir", "resume", seeds=3)


def kept(args: Namespace, path: Any) -> dict[str, Any]:
  """What the file has already: all of it with --resume, what is not asked for without."""
  document: dict[str, Any] = {"seeds": args.seeds}
  earlier = json.loads(path.read_text()) if path.exists() else {}
  asked = [] if args.resume else args.questions or QUESTIONS
  answers = {question: earlier[question] for question in QUESTIONS if question in earlier and question not in asked}
  if answers and earlier["seeds"] != args.seeds:
    raise ResumeError(f"{path} was made with {earlier['seeds']} seeds. Type as many, or another --out.")
  return document | answers


def run(args: Namespace) -> None:
  """The questions asked; what is finished is kept whenever it stops, and with --resume not done again."""
  path = args.out / "defaults.json"
  document = kept(args, path)
  for question in args.questions or QUESTIONS:
    choices, answers = choices_of(question), document.setdefault(question, {})
    for problem in args.problems or problems_of(question):
      if problem not in answers:
        seeds = range(1, 1 + args.seeds)
        answers[problem] = compare(problem, PROBLEMS[problem] | {"data_dir": args.data_dir}, choices, seeds)
        write(document, path)
    table(question, document).show()
    finals(question, document).show()
  say(f"wrote {path}")
