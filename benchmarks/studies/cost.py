# SPDX-License-Identifier: Apache-2.0
"""What a step costs, as ratios inside one interleaved run; beside psgdax, rollfast and others of the extra `peers`.

python -m benchmarks cost mlp lenet5

Every ratio is measured as `engine/timing.py` says, with one thread and with all of them (`--threads`), each in a
process of its own. The contestants are in _calls.py; of several rivals the fastest counts. "One fit in 33" is not run:
it is the mean of one step with a fit and 32 without. Besides seconds there are rows of the CPU seconds that compiling
takes, of the bytes of the state and of the kernels in the compiled program; the last two do not depend on the machine.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
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
from benchmarks.engine.timing import (
  Step,
  Times,
  Weights,
  compile_anew,
  interleaved,
  mean_of,
  quartiles,
  quartiles_of,
  ratio_text,
)
from benchmarks.rivals import KRONS
from benchmarks.studies._calls import BLOCK, USUAL, WORKLOADS, steps, updates

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
  against: tuple[Weights, ...]  # the lowest of them; none: the number itself
  must: float | None = None
  aim: float | None = None
  asked: tuple[str, ...] = ()  # workloads; empty: all
  what: str = "seconds"  # or "compiling", "bytes", "kernels"

  def rivals(self, names: Iterable[str]) -> list[Weights]:
    """Those it is against that were run."""
    return [who for who in self.against if {*who} <= {*names}]

  @property
  def names(self) -> set[str]:
    """All contestants of the row."""
    return {name for who in (self.of, *self.against) for name in who}

  def known(self, names: Iterable[str]) -> bool:
    """Whether these contestants suffice for it."""
    return {*self.of} <= {*names} and (not self.against or bool(self.rivals(names)))


Who = str | Weights | tuple[str | Weights, ...] | None  # a contestant alone is written as its name


def row(label: str, of: str | Weights, against: Who, *limits: Any, what: str = "seconds") -> Row:
  weights = lambda who: {who: 1.0} if isinstance(who, str) else who
  several = against if isinstance(against, tuple) else () if against is None else (against,)
  return Row(label, weights(of), tuple(map(weights, several)), *limits, what=what)


ALONE, OURS, DENSE, THEIRS = "`update` alone: ", "update: psgd", "update: psgd dense", "update: psgd-jax kron"
SOAP, THEIR_SOAP = "update: soap, bases", "update: SOAP_JAX, bases"
BLOCKS = f"{OURS} dense pro in blocks of {BLOCK}, fit", "update: distributed-kron pro, fit"
RIVALS_FIT, RIVALS_NO_FIT = (tuple(f"update: {name}, {fit}" for name in KRONS) for fit in ("fit", "no fit"))
PSGDAX = tuple(name for name in RIVALS_FIT if "psgdax" in name)
SMALL, MLP, COMPILED, DEEP = ("small",), ("mlp",), ("mlp", "charlm"), ("deep",)
TRAINED, SECOND = ("charlm", "resnet8"), "gradient and second moments"
FIRST = "dpsgd, fit"  # compiled before all else, so that nothing is ready for it
SECONDS = (
  row(ALONE + "psgd, a fit", f"{OURS}, fit", RIVALS_FIT, 0.6, 0.5),
  row(ALONE + "psgd, no fit", f"{OURS}, no fit", RIVALS_NO_FIT, 0.55, 0.45),
  row(ALONE + "psgd, a fit, beside adam", f"{OURS}, fit", "update: adam"),
  row(ALONE + "psgd, no fit, beside adam", f"{OURS}, no fit", "update: adam"),
  row(ALONE + f"kron in dense blocks of {BLOCK}, a fit", *BLOCKS),
  row(ALONE + "kron, no fit", f"{DENSE}, no fit", f"{THEIRS}, no fit"),
  row(ALONE + "kron, one fit in 33", every(33, DENSE), every(33, THEIRS)),
  row(ALONE + "kron, a fit", f"{DENSE}, fit", f"{THEIRS}, fit"),
  row(ALONE + "kron, a fit, beside leaf by leaf", f"{DENSE}, fit", f"{DENSE} per leaf, fit", 0.3, 0.1),
  row(ALONE + "lra of rank 10, a fit", "update: psgd lra of rank 10, fit", "update: psgd-jax lra of rank 10, fit", 0.5),
  row(ALONE + "xmat, a fit", "update: psgd xmat, fit", "update: psgd-jax xmat, fit"),
  row(ALONE + "kron in blocks of 256, a fit", f"{DENSE} in blocks of 256, fit", f"{DENSE}, fit"),
  row(ALONE + "xmat, a fit, beside adam", "update: psgd xmat, fit", "update: adam", 4.0),
  row(ALONE + "soap, bases refreshed, beside kept", f"{SOAP} refreshed", f"{SOAP} kept"),
  row(
    ALONE + "soap, one refresh in 10, beside kron with a fit",
    {f"{SOAP} refreshed": 0.1, f"{SOAP} kept": 0.9},
    f"{OURS}, fit",
  ),
  row(
    ALONE + "soap, one refresh in 10",
    {f"{SOAP} refreshed": 0.1, f"{SOAP} kept": 0.9},
    {f"{THEIR_SOAP} refreshed": 0.1, f"{THEIR_SOAP} kept": 0.9},
    0.6,
    0.4,
  ),
  row(
    ALONE + "soap, one refresh in 10, beside muon",
    {f"{SOAP} refreshed": 0.1, f"{SOAP} kept": 0.9},
    "update: muon",
  ),
  row("a fit not taken, beside one taken", "update: a fit not taken", "update: a fit taken", 0.02, 0.002),
  row("gradient + Hvp, fused", "gradient + Hvp", "gradient", 2.6),
  row("gradient + Hvp by finite differences", "gradient + Hvp by differences", "gradient", None, 2.0),
  row("psgd step, no fit", "psgd, no fit", "adam", 1.5, 1.2, SMALL),
  row("psgd step, a fit", "psgd, fit", "adam", 3.5, 2.5, SMALL),
  row("dpsgd step, no fit", "dpsgd, no fit", "adam", 1.8, 1.5, SMALL),
  row("dpsgd step, Hvp and fit, beside adam", "dpsgd, fit", "adam", 5.0, 3.5, SMALL),
  row("dpsgd step, no fit due", "dpsgd, no fit", "gradient and apply", 1.05, 1.0, ("lenet5", "resnet8")),
  row("dpsgd step, Hvp and fit", "dpsgd, fit", "psgd-jax affine, fit", 0.75, 0.6, MLP),
  row("dpsgd step, Hvp and fit", "dpsgd, fit", "psgd-jax affine, fit", 0.3, 0.2, ("lenet5", "layers")),
  row("dpsgd step, both on our Hvp", "dpsgd, fit", "psgd-jax affine on our Hvp, fit"),
  row("dpsgd step, Hvp and fit every 10", every(10, "dpsgd"), "gradient", 1.2, 1.1, TRAINED),
  row("psgd newton step, Hvp and fit every 10", every(10, "psgd newton"), "gradient", 1.2, 1.1, TRAINED),
  row(
    "psgd newton step, fit every 10 on a quarter of the batch",
    every(10, "psgd newton", "fit on a quarter of the batch"),
    "gradient",
  ),
  row("psgd step, one fit in 33", every(33, "psgd"), "adam", 1.02, 1.0, TRAINED),
  row("gradient with the inputs of all layers", "gradient and inputs", "gradient"),
  row("gradient with their second moments", SECOND, {"gradient": 1.0, "second moments of the inputs": 1.0}, 1.1),
  row("bnp step", "bnp", "sgd", 1.1, None, ("layers",)),
  row("gls step", "gls", "adam"),
  row("sgd_ph step, Hvp and fit", "sgd_ph", "gradient", 1.9, 1.5),
)
COUNTS = (
  row("kernels: psgd step, no fit", "psgd, no fit", "adam", 2.0, 1.5, SMALL, what="kernels"),
  row("kernels: psgd step, a fit", "psgd, fit", "adam", 5.0, 3.5, SMALL, what="kernels"),
  row("kernels: dpsgd step, no fit", "dpsgd, no fit", "adam", 2.5, 2.0, SMALL, what="kernels"),
  row("kernels: dpsgd step, Hvp and fit", "dpsgd, fit", "adam", 8.0, 5.0, SMALL, what="kernels"),
  row("bytes of the state: psgd", f"{OURS}, fit", PSGDAX, 1.05, what="bytes"),
  row(
    "bytes of the state: psgd of bfloat16 factors", f"{OURS} of bfloat16 factors, fit", PSGDAX, None, 0.8, what="bytes"
  ),
  row("bytes of the state: psgd, beside adam", f"{OURS}, fit", "update: adam", what="bytes"),
  row("bytes of the state: soap", f"{SOAP} kept", f"{THEIR_SOAP} kept", 0.6, 0.4, what="bytes"),
  row("compiling `update`: psgd", f"{OURS}, scheduled", PSGDAX, 0.5, 0.35, COMPILED, what="compiling"),
  row("compiling `update`: psgd", f"{OURS}, scheduled", PSGDAX, 0.1, 0.06, DEEP, what="compiling"),
  row(f"compiling `update`: kron in dense blocks of {BLOCK}", *BLOCKS, 1.0, 0.7, what="compiling"),
  row("first compilation of a dpsgd step, CPU seconds", FIRST, None, 5.0, 3.0, SMALL, what="compiling"),
)
ROWS = SECONDS + COUNTS
CALLS = {"small": 100}  # of each contestant in a round where 4 would be too short to be timed
ONE_PROCESS = {"small": ("one",)}  # workloads that are not measured with all threads
COMPILATIONS, LONG = 3, 20.0  # of each contestant of a row on compiling, by turns; those of so many seconds once


def rows_of(workload: str, names: Iterable[str]) -> list[Row]:
  """The rows whose contestants were run; of equal labels the one that asks something of this workload."""
  found: dict[str, Row] = {}
  for row in ROWS:
    if row.known(names) and (row.label not in found or workload in row.asked):
      found[row.label] = row
  return list(found.values())


def ratio_of(row: Row, quantities: Mapping[str, Times]) -> dict[str, Any]:
  """Quartiles of each kind of the quantity, beside the rival whose median of the first kind is the lowest."""
  kinds = quantities[row.what]
  first = next(iter(kinds.values()))
  if not row.against:
    return {"against": "", **{kind: quartiles(mean_of(of, row.of)) for kind, of in kinds.items()}}
  best = min(row.rivals(first), key=lambda who: np.median(mean_of(first, who)))
  return {"against": " + ".join(best), **quartiles_of(kinds, row.of, best)}


def measure(name: str, rounds: int, calls: int) -> dict[str, Any]:
  """One workload in this process: its ratios, and what is known of each contestant."""
  before, work = load_average(), WORKLOADS[name]()
  entered = updates(work, name) | (steps(work, name) if work.loss else {})
  made, compiled = {}, {}
  for label in sorted(entered, key=lambda label: label != FIRST):
    call = entered[label][0]
    made[label] = Step(*entered[label], like=compiled.get(call))
    if compiled.setdefault(call, made[label]) is made[label]:
      say(f"  {label}: compiled in {made[label].compile_seconds:.1f} CPU s")
  rows, known = rows_of(name, made), {label: step.counts() for label, step in made.items()}
  for label, step in made.items():
    known[label]["carry_bytes"] = carried(step.carry)
  exactly = lambda what: {"count": {label: [float(of[what] or 0)] for label, of in known.items()}}
  quantities = {
    "seconds": (times := interleaved(made, rounds, calls)),
    "compiling": {"cpu": compilations(entered, made, rows)},
    "bytes": exactly("carry_bytes"),
    "kernels": exactly("kernels"),
  }
  return {
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": {row.label: ratio_of(row, quantities) for row in rows},
    "recompiled": sum(step.recompiled for step in made.values()),
    "contestants": {
      label: {f"median_{kind}_ms": 1e3 * float(np.median(of[label])) for kind, of in times.items()} | about
      for label, about in known.items()
    },
  }


def compilations(entered: Mapping[str, tuple], made: Mapping[str, Step], rows: Iterable[Row]) -> dict[str, list[float]]:
  """CPU seconds of tracing and compiling, anew and by turns, of the contestants of rows on it that are compared."""
  seconds = {label: [step.compile_seconds] for label, step in made.items()}
  asked = [
    name for row in rows if row.what == "compiling" and row.against for who in (row.of, *row.against) for name in who
  ]
  repeated = [label for label in dict.fromkeys(asked) if label in made]
  if any(seconds[label][0] > LONG for label in repeated):
    return seconds
  for _ in range(COMPILATIONS - 1):
    for label in repeated:
      seconds[label].append(compile_anew(*entered[label])[1])
  return seconds


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
  for mode in ONE_PROCESS.get(name, THREADS):
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
    if row.label not in first["ratios"]:  # a document from before there was this row
      continue
    asked = not row.asked or name in row.asked
    limits = (f"{limit:g}" if asked and limit is not None else "" for limit in (row.must, row.aim))
    found = [mode["ratios"][row.label] for mode in modes.values()]
    cells = [ratio_text(of[kind]) if kind in of else "" for of in found for kind in ("cpu", "wall")]
    if "count" in found[0]:
      cells[0] = f"{found[0]['count'][1]:.2f}"
    against = found[0].get("against", " + ".join(next(iter(row.against), ())))
    rows.append((row.label, against.replace("update: ", ""), *cells, *limits))
  header = tuple(f"{kind}, {mode} thread{'s' * (mode == 'all')}" for mode in modes for kind in ("CPU", "wall"))
  note = "; ".join(f"load average {mode['load_average']}, threads: {key}" for key, mode in modes.items())
  again = sum(mode["recompiled"] for mode in modes.values())
  return Table(
    f"{name}: cost in {document['rounds']} interleaved rounds of {document['calls']} calls",
    ("what", "against", *header, "must", "aim"),
    rows,
    (f"Recompilations by a second call: {again}; {note}.",),
  )


def details(document: dict[str, Any]) -> Table:
  """Every contestant: its time, and what the compiler says of it, with one thread if that was run."""
  threads, mode = next(iter(document["threads"].items()))

  def row(label: str, of: dict[str, Any]) -> tuple[str, ...]:
    counted = (number(of[key]) if of[key] is not None else "" for key in ("flops", "bytes", "temporary_bytes"))
    times = (f"{of['median_cpu_ms']:.2f}", f"{of['median_wall_ms']:.2f}", f"{of['compile_cpu_seconds']:.1f}")
    return label, *times, str(of["instructions"]), str(of.get("kernels", "")), *counted, number(of["carry_bytes"])

  header = ("call", "CPU ms", "wall ms", "compile CPU s", "instructions", "kernels")
  header += ("flops", "bytes", "temporary bytes", "carried bytes")
  title = f"{document['workload']}: every contestant, threads: {threads}"
  return Table(title, header, [row(label, of) for label, of in mode["contestants"].items()])


def add_arguments(parser: ArgumentParser) -> None:
  add, name = parser.add_argument, known("workload", WORKLOADS)
  add(
    "workloads", nargs="*", type=name, metavar="WORKLOAD", help=f"{', '.join(WORKLOADS)} (default: {', '.join(USUAL)})"
  )
  add("--threads", choices=tuple(THREADS), help="that many, in this process (default: both, apart)")
  add("--rounds", type=positive(int), default=9, help="interleaved (default: %(default)d)")
  add("--calls", type=positive(int), help="of each contestant in a round (default: 4; of `small` 100)")


def run(args: Namespace) -> None:
  for name in args.workloads or USUAL:
    document = in_processes(name, args.threads, args.rounds, args.calls or CALLS.get(name, 4))
    publish(document, args.out / f"cost-{name}.json", details(document), table(document))
