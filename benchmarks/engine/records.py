# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: one JSON document per problem and setting.

    schema       version of this layout
    plan         what every contestant got: data, epochs, batch, decay, evaluation grid, ...
    contestants  label -> name, options, parameters, state_bytes, compile_seconds
    sessions     seeds, machine, versions and load of each invocation that added to the file
    runs         one per (seed, contestant): curves on a common grid of steps

Curves: step, gradients (gradient evaluations), seconds and cpu_seconds (training only: no compilation, no evaluation),
train_loss, test_loss, test_accuracy, damping, ratio. Numbers that are not finite are null.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
  """What all contestants of one file have in common. Two runs may share a file iff their plans are equal."""

  problem: str
  setting: str
  data: str
  train_size: int
  test_size: int
  evaluated_train_samples: int
  evaluated_test_samples: int
  batch_size: int
  epochs: float
  steps: int
  evaluate_every: int
  steps_per_epoch: int
  decay_per_epoch: float
  folded_biases: bool
  seconds: float | None = None  # of training, after which a run ends; None: it ends after `steps`
  clock: str = "seconds"  # the curve that counts them: wall time, or "cpu_seconds"


@dataclass
class Run:
  """The training of one contestant from one seed."""

  optimizer: str
  seed: int
  finished: bool = False  # False: stopped because the loss was not finite any more
  skipped: int | None = None  # steps that the optimizer skipped because of non-finite numbers
  curves: dict[str, list[float]] = field(default_factory=dict)

  def append(self, point: dict[str, float]) -> None:
    for name, number in point.items():
      self.curves.setdefault(name, []).append(number)

  def final(self, curve: str = "train_loss") -> float:
    """The last value of a curve; infinite if the run broke off."""
    return self.curves[curve][-1] if self.finished else math.inf


@dataclass
class Results:
  """One document, in memory."""

  name: str
  plan: Plan
  contestants: dict[str, dict[str, Any]] = field(default_factory=dict)
  sessions: list[dict[str, Any]] = field(default_factory=list)
  runs: list[Run] = field(default_factory=list)

  def seeds(self) -> list[int]:
    """The seeds for which every contestant was run."""
    done = {(run.seed, run.optimizer) for run in self.runs}
    return sorted(seed for seed in {run.seed for run in self.runs} if all((seed, c) in done for c in self.contestants))

  def of(self, label: str) -> list[Run]:
    """The runs of one contestant, by seed."""
    return sorted((run for run in self.runs if run.optimizer == label), key=lambda run: run.seed)


class ResumeError(Exception):
  """A results file does not fit what was asked for. The message says what to type."""


def environment() -> dict[str, Any]:
  """Versions and machine; nothing that names the host or its user."""
  packages = ("jax", "jaxlib", "optax", "flax", "numpy")
  return {
    "python": platform.python_version(),
    **{name: version(name) for name in packages},
    "system": platform.system(),
    "architecture": platform.machine(),
    "cpus": os.cpu_count(),
    "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "device": jax.devices()[0].device_kind,
  }


_COMPILATIONS: list[float] = []


def _heard(event: str, seconds: float, **about: Any) -> None:
  del about
  if event.endswith("/backend_compile_duration"):
    _COMPILATIONS.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_heard)


def compilations() -> int:
  """How often XLA has compiled in this process, since this module was imported."""
  return len(_COMPILATIONS)


def load_average() -> float:
  """Runnable processes over the last minute, on average."""
  return round(os.getloadavg()[0], 2)


def rounded(value: Any) -> Any:
  """Floats to six significant digits, non-finite ones to None, all the way down."""
  if isinstance(value, dict):
    return {key: rounded(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(item) for item in value]
  if isinstance(value, float | np.floating):
    return float(f"{value:.6g}") if math.isfinite(value) else None
  return value


def replace(path: Path, text: str) -> None:
  """Write the file under a temporary name first, so that an interrupt never leaves half of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".part")
  partial.write_text(text)
  partial.replace(path)


def write(document: dict[str, Any], path: Path) -> None:
  """A study's document, whose layout is the study's own."""
  replace(path, json.dumps(rounded(document), indent=1) + "\n")


def save(results: Results, path: Path) -> None:
  """The document of runs: everything readable, and one line for each run."""
  document = {"schema": SCHEMA} | rounded(asdict(results))
  head = json.dumps({key: item for key, item in document.items() if key != "runs"}, indent=1)
  runs = ",\n  ".join(json.dumps(run, separators=(",", ":")) for run in document["runs"])
  replace(path, f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n')


def load(path: Path) -> Results:
  """Read a document; null in a curve becomes NaN."""
  document = json.loads(path.read_text())
  if document.get("schema") != SCHEMA:
    raise ResumeError(f"{path} has schema {document.get('schema')}, expected {SCHEMA}. Remove it and run again.")

  def run(entry: dict[str, Any]) -> Run:
    curves = entry["curves"].items()
    known = {name: [math.nan if number is None else number for number in curve] for name, curve in curves}
    return Run(**(entry | {"curves": known}))

  plan = document["plan"]
  # documents from before this was noted: the first 4000 at most
  plan = Plan(**{"evaluated_test_samples": min(plan["test_size"], 4_000)} | plan)
  runs = [run(entry) for entry in document["runs"]]
  return Results(document["name"], plan, document["contestants"], document["sessions"], runs)


def runs_in(folder: Path) -> list[Path]:
  """The documents of runs in a folder, trials left out: those of other studies have no schema."""
  paths = [path for path in sorted(folder.glob("*.json")) if not path.stem.startswith("trials-")]
  return [path for path in paths if "schema" in json.loads(path.read_text())]


def resume(path: Path, plan: Plan, contestants: dict[str, dict[str, Any]]) -> Results | None:
  """The earlier results if they can be continued, None if there are none, an error if they do not fit."""
  if not path.exists():
    return None
  earlier = load(path)
  asked, found = rounded(asdict(plan)), asdict(earlier.plan)
  different = [f"{name} ({found[name]} there, {asked[name]} now)" for name in asked if asked[name] != found[name]]
  different += [
    f"options of {label}"
    for label, entry in contestants.items()
    if label in earlier.contestants and earlier.contestants[label]["options"] != rounded(entry["options"])
  ]
  if different:
    raise ResumeError(
      f"{path} was made with other settings: {', '.join(different)}. Ask for the same again, give this run "
      "another file with `--name`, or leave out `--resume` to start anew."
    )
  return earlier
