# SPDX-License-Identifier: Apache-2.0
"""What a step costs, as ratios inside one interleaved run; beside psgd-jax if the extra `peers` is installed.

python -m benchmarks cost mlp lenet5

Every ratio is measured as `engine/timing.py` says, with one thread and with all of them (`--threads`), each in a
process of its own. The contestants are in _calls.py. "One fit in 33" is not run: it is the mean of one step with a fit
and 32 without. For every contestant the compiler's own counts are kept too, and the bytes of its state.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from benchmarks.engine.arguments import known, positive
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment, load_average
from benchmarks.engine.report import Table, number, publish
from benchmarks.engine.timing import Step, Weights, compile_anew, interleaved, quartiles_of, ratio_text
from benchmarks.studies._calls import USUAL, WORKLOADS, steps, updates

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
THREADS = {"one": ONE_THREAD, "all": ""}


def every(period: int, name: str, fit: str = "fit") -> Weights:
  """A fit in every `period` steps."""
  return {f"{name}, {fit}": 1 / period, f"{name}, no fit": 1 - 1 / period}


@dataclass(frozen=True)
class Row:
  """One ratio: of what to what, the ceiling it must keep and the one it aims at, and where these are asked for."""

  label: str
  of: Weights
  against: Weights
  must: float | None = None
  aim: float | None = None
  asked: tuple[str, ...] = ()  # workloads; empty: all


def row(label: str, of: str | Weights, against: str | Weights, *limits: Any) -> Row:
  """A contestant alone is written as its name."""
  return Row(label, *({x: 1.0} if isinstance(x, str) else x for x in (of, against)), *limits)


ALONE, OURS, THEIRS = "`update` alone: ", "update: psgd dense", "update: psgd-jax kron"
SOAP = "update: soap, bases"
MLP, BLOCKS, SECOND = ("mlp",), ("charlm", "resnet8"), "gradient and second moments"
ROWS = (
  row(ALONE + "kron, no fit", f"{OURS}, no fit", f"{THEIRS}, no fit", 0.6, 0.4, MLP),
  row(ALONE + "kron, one fit in 33", every(33, OURS), every(33, THEIRS), 0.6, 0.45, MLP),
  row(ALONE + "kron, a fit", f"{OURS}, fit", f"{THEIRS}, fit", 0.75, 0.5, MLP),
  row(ALONE + "kron, a fit, beside leaf by leaf", f"{OURS}, fit", f"{OURS} per leaf, fit", 0.3, 0.1),
  row(ALONE + "lra of rank 10, a fit", "update: psgd lra of rank 10, fit", "update: psgd-jax lra of rank 10, fit", 0.5),
  row(ALONE + "xmat, a fit", "update: psgd xmat, fit", "update: psgd-jax xmat, fit"),
  row(ALONE + "kron in blocks of 256, a fit", f"{OURS} in blocks of 256, fit", f"{OURS}, fit"),
  row(ALONE + "xmat, a fit, beside adam", "update: psgd xmat, fit", "update: adam", 4.0),
  row(ALONE + "soap, bases refreshed, beside kept", f"{SOAP} refreshed", f"{SOAP} kept"),
  row(
    ALONE + "soap, one refresh in 10, beside kron with a fit",
    {f"{SOAP} refreshed": 0.1, f"{SOAP} kept": 0.9},
    f"{OURS}, fit",
  ),
  row(
    ALONE + "soap, one refresh in 10, beside muon",
    {f"{SOAP} refreshed": 0.1, f"{SOAP} kept": 0.9},
    "update: muon",
  ),
  row("a fit not taken, beside one taken", "update: a fit not taken", "update: a fit taken", 0.02, 0.002),
  row("gradient + Hvp, fused", "gradient + Hvp", "gradient", 2.6),
  row("gradient + Hvp by finite differences", "gradient + Hvp by differences", "gradient", None, 2.0),
  row("dpsgd step, no fit due", "dpsgd, no fit", "gradient and apply", 1.05, 1.0, ("lenet5", "resnet8")),
  row("dpsgd step, Hvp and fit", "dpsgd, fit", "psgd-jax affine, fit", 0.75, 0.6, MLP),
  row("dpsgd step, Hvp and fit", "dpsgd, fit", "psgd-jax affine, fit", 0.3, 0.2, ("lenet5", "layers")),
  row("dpsgd step, both on our Hvp", "dpsgd, fit", "psgd-jax affine on our Hvp, fit"),
  row("dpsgd step, Hvp and fit every 10", every(10, "dpsgd"), "gradient", 1.35, 1.2, BLOCKS),
  row("psgd newton step, Hvp and fit every 10", every(10, "psgd newton"), "gradient", 1.35, 1.2, BLOCKS),
  row(
    "psgd newton step, fit every 10 on a quarter of the batch",
    every(10, "psgd newton", "fit on a quarter of the batch"),
    "gradient",
  ),
  row("psgd step, one fit in 33", every(33, "psgd"), "adam", 1.15, 1.05, BLOCKS),
  row("gradient with the inputs of all layers", "gradient and inputs", "gradient"),
  row("gradient with their second moments", SECOND, {"gradient": 1.0, "second moments of the inputs": 1.0}, 1.1),
  row("bnp step", "bnp", "sgd", 1.1, None, ("layers",)),
  row("gls step", "gls", "adam"),
  row("sgd_ph step, Hvp and fit", "sgd_ph", "gradient", 1.9, 1.5),
)
COMPILED, COMPILED_ELSEWHERE = {"deep": (0.2, 0.1)}, (0.5, 0.3)  # must and aim of the time to compile
OUR_COMPILATION, THEIR_COMPILATION = f"{OURS}, scheduled", f"{THEIRS}, fit"
COMPILATIONS = 3  # of each of these two, by turns


def rows_of(workload: str, names: Any) -> list[Row]:
  """The rows whose contestants were run; of equal labels the one that asks something of this workload."""
  found: dict[str, Row] = {}
  for row in ROWS:
    if {*row.of, *row.against} <= set(names) and (row.label not in found or workload in row.asked):
      found[row.label] = row
  return list(found.values())


def measure(name: str, rounds: int, calls: int) -> dict[str, Any]:
  """One workload in this process: its ratios, and what is known of each contestant."""
  before, work = load_average(), WORKLOADS[name]()
  entered = updates(work, name) | (steps(work, name) if work.loss else {})
  made = {}
  for label, (call, *arguments) in entered.items():
    made[label] = Step(call, *arguments)
    say(f"  {label}: compiled in {made[label].compile_seconds:.1f} CPU s")
  compiling = compilation(entered, made)
  times = interleaved(made, rounds, calls)
  return {
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": {row.label: quartiles_of(times, row.of, row.against) for row in rows_of(name, made)},
    "compilation": compiling,
    "recompiled": sum(step.recompiled for step in made.values()),
    "contestants": {
      label: {
        **{f"median_{kind}_ms": 1e3 * float(np.median(of[label])) for kind, of in times.items()},
        **step.counts(),
        "carry_bytes": carried(step.carry),
      }
      for label, step in made.items()
    },
  }


def compilation(entered: Mapping[str, tuple], made: Mapping[str, Step]) -> list[float]:
  """Quartiles of our CPU seconds of tracing and compiling the scheduled update over psgd-jax's, if both are there."""
  pair = (OUR_COMPILATION, THEIR_COMPILATION)
  if not {*pair} <= {*made}:
    return []
  seconds = {label: [made[label].compile_seconds] for label in pair}
  for _ in range(COMPILATIONS - 1):
    for label in pair:
      call, *arguments = entered[label]
      seconds[label].append(compile_anew(call, *arguments)[1])
  return np.percentile(np.divide(seconds[pair[0]], seconds[pair[1]]), [25, 50, 75]).tolist()


def carried(tree: Any) -> int:
  """Bytes of the arrays, keys left out."""
  keys = jax.dtypes.prng_key
  return sum(x.nbytes for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, keys))


def in_processes(name: str, threads: str | None, rounds: int, calls: int) -> dict[str, Any]:
  """A workload with one thread and with all, each in a process of its own; or in this one, if `threads` says which."""
  if threads is not None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '').replace(ONE_THREAD, '')} {THREADS[threads]}".strip()
    return {"workload": name, "rounds": rounds, "calls": calls, "threads": {threads: measure(name, rounds, calls)}}
  document: dict[str, Any] = {}
  for mode in THREADS:
    say(f"{name}, threads: {mode}")
    with TemporaryDirectory() as folder:
      command = ["cost", name, "--threads", mode, "--out", folder, "--rounds", str(rounds), "--calls", str(calls)]
      subprocess.run([sys.executable, "-m", "benchmarks", *command], check=True)
      found = json.loads((Path(folder) / f"cost-{name}.json").read_text())
    document = found | {"threads": document.get("threads", {}) | found["threads"]}
  return document


def table(document: dict[str, Any]) -> Table:
  """One row per ratio: median [quartiles] of the CPU seconds with one thread, of the wall seconds with each."""
  name, modes = document["workload"], document["threads"]
  first = next(iter(modes.values()))
  rows = []
  for row in rows_of(name, first["contestants"]):
    asked = not row.asked or name in row.asked
    limits = (f"{limit:g}" if asked and limit is not None else "" for limit in (row.must, row.aim))
    cells = [ratio_text(mode["ratios"][row.label][kind]) for mode in modes.values() for kind in ("cpu", "wall")]
    rows.append((row.label, " + ".join(row.against).replace("update: ", ""), *cells, *limits))
  rows += _compiled(name, modes)
  header = tuple(f"{kind}, {mode} thread{'s' * (mode == 'all')}" for mode in modes for kind in ("CPU", "wall"))
  note = "; ".join(f"load average {mode['load_average']}, threads: {key}" for key, mode in modes.items())
  again = sum(mode["recompiled"] for mode in modes.values())
  return Table(
    f"{name}: cost in {document['rounds']} interleaved rounds of {document['calls']} calls",
    ("what", "against", *header, "must", "aim"),
    rows,
    (f"Recompilations by a second call: {again}; {note}.",),
  )


def _compiled(name: str, modes: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """Seconds of tracing and compiling the scheduled update, beside psgd-jax's; and the bytes of the state."""
  found = next(iter(modes.values()))["contestants"]
  ours, theirs = found.get(OUR_COMPILATION), found.get(THEIR_COMPILATION)
  if not ours or not theirs:
    return []
  must, aim = COMPILED.get(name, COMPILED_ELSEWHERE)
  seconds = [text for mode in modes.values() for text in (ratio_text(mode["compilation"]), "")]
  memory = (f"{ours['carry_bytes'] / theirs['carry_bytes']:.2f}", *[""] * (len(seconds) - 1))
  theirs = THEIRS.removeprefix("update: ")
  return [
    ("compiling `update`", theirs, *seconds, f"{must:g}", f"{aim:g}"),
    ("bytes of the state, P kept", theirs, *memory, "", ""),
  ]


def details(document: dict[str, Any]) -> Table:
  """Every contestant: its time, and what the compiler says of it, with one thread if that was run."""
  threads, mode = next(iter(document["threads"].items()))

  def row(label: str, of: dict[str, Any]) -> tuple[str, ...]:
    counted = (number(of[key]) if of[key] is not None else "" for key in ("flops", "bytes", "temporary_bytes"))
    times = (f"{of['median_cpu_ms']:.2f}", f"{of['median_wall_ms']:.2f}", f"{of['compile_cpu_seconds']:.1f}")
    return label, *times, str(of["instructions"]), *counted, number(of["carry_bytes"])

  header = ("call", "CPU ms", "wall ms", "compile CPU s", "instructions")
  header += ("flops", "bytes", "temporary bytes", "carried bytes")
  title = f"{document['workload']}: every contestant, threads: {threads}"
  return Table(title, header, [row(label, of) for label, of in mode["contestants"].items()])


def add_arguments(parser: ArgumentParser) -> None:
  add, name = parser.add_argument, known("workload", WORKLOADS)
  add("workloads", nargs="*", type=name, metavar="WORKLOAD", help=f"{', '.join(WORKLOADS)} (default: all but gpt2)")
  add("--threads", choices=tuple(THREADS), help="that many, in this process (default: both, apart)")
  add("--rounds", type=positive(int), default=9, help="interleaved (default: %(default)d)")
  add("--calls", type=positive(int), default=4, help="of each contestant in a round (default: %(default)d)")


def run(args: Namespace) -> None:
  for name in args.workloads or USUAL:
    document = in_processes(name, args.threads, args.rounds, args.calls)
    publish(document, args.out / f"cost-{name}.json", details(document), table(document))
