# SPDX-License-Identifier: Apache-2.0
"""What it takes to compile `update`: seconds, instructions, flops, bytes, beside psgd-jax and Adam (extra `peers`).

CPU seconds of this process, which a busy machine does not change much, tracing included; the persistent compilation
cache must be off. Every optimizer is compiled once on each workload, in random order, the first of all not counted.
"""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks import peers, problems
from benchmarks.cost import save
from benchmarks.records import environment, load_average
from benchmarks.report import Table, number

DEPTH, WIDTH = 100, 64
TARGETS = {"deep": 0.2, "lenet5": 0.5, "charlm": 0.5, "mlp": 0.5}


def deep() -> Any:
  """Equal dense layers, kernels alone."""
  return {f"w{i}": jnp.zeros((WIDTH, WIDTH)) for i in range(DEPTH)}


def lenet5() -> Any:
  shapes = {
    "conv0": (5, 5, 1, 6),
    "conv1": (5, 5, 6, 16),
    "dense0": (256, 120),
    "dense1": (120, 84),
    "dense2": (84, 10),
  }
  return {name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])} for name, shape in shapes.items()}


def charlm() -> Any:
  """Four layers of width 128."""
  return problems.build("charlm(layers=4,width=128)", None, False).init(jax.random.key(0))["params"]


def workloads() -> dict[str, Callable[[], Any]]:
  return {"mlp": peers.params_of, "lenet5": lenet5, "charlm": charlm, "deep": deep}


def contestants() -> dict[str, Callable[[], optax.GradientTransformation]]:
  kron = peers.psgd_jax("kron").kron
  return {
    "adam": lambda: optax.adam(1e-3),
    "psgd-jax": lambda: kron(1e-3, b1=0.9),
    "psgd": lambda: dpo.psgd(1e-3, b1=0.9),
    "psgd, all factors dense": lambda: dpo.psgd(1e-3, dpo.kron(max_skew=100.0), b1=0.9),
  }


def compiled(make: Callable[[], optax.GradientTransformation], params: Any) -> dict[str, float]:
  """Trace and compile one update."""
  tx = make()
  with contextlib.redirect_stdout(io.StringIO()):  # psgd-jax prints the sizes of its state
    state = tx.init(params)
    start = time.process_time()
    found = jax.jit(lambda g, s, p: tx.update(g, s, p)).lower(params, state, params).compile()
  seconds = time.process_time() - start
  costs = found.cost_analysis()
  return {
    "cpu_seconds": seconds,
    "instructions": found.as_text().count(" = "),
    "flops": float(costs["flops"]),
    "bytes": float(costs["bytes accessed"]),
    "state_bytes": dpo.state_bytes(tx, params),
  }


def measure(seed: int = 0) -> dict[str, Any]:
  before = load_average()
  rng = np.random.default_rng(seed)
  made, entered = {name: make() for name, make in workloads().items()}, contestants()
  compiled(entered["adam"], {"w": jnp.zeros(3)})
  found: dict[str, dict[str, Any]] = {name: {} for name in made}
  pairs = [(workload, name) for workload in made for name in entered]
  for i in rng.permutation(len(pairs)):
    workload, name = pairs[i]
    found[workload][name] = compiled(entered[name], made[workload])
  leaves = {name: len(jax.tree.leaves(params)) for name, params in made.items()}
  return {"environment": environment(), "load_average": [before, load_average()], "leaves": leaves, "found": found}


def table(document: dict[str, Any]) -> Table:
  rows = []
  for workload, found in document["found"].items():
    theirs = found["psgd-jax"]["cpu_seconds"]
    for name in contestants():
      entry = found[name]
      rows.append(
        (
          workload,
          str(document["leaves"][workload]),
          name,
          f"{entry['cpu_seconds']:.1f}",
          f"{entry['cpu_seconds'] / theirs:.2f}",
          f"{TARGETS[workload]:g}" if name.startswith("psgd,") or name == "psgd" else "",
          str(entry["instructions"]),
          number(entry["flops"]),
          number(entry["bytes"]),
        )
      )
  header = (
    "parameters of",
    "leaves",
    "optimizer",
    "CPU s",
    "of psgd-jax",
    "must",
    "HLO instructions",
    "flops",
    "bytes",
  )
  note = f"Load average {document['load_average']}. `psgd-jax` has dense factors for matrices, as the last line."
  return Table("Compiling `update` alone", header, rows, (note,))


def run(out: Path) -> None:
  """Measure, show, save."""
  document = measure()
  table(document).show()
  save(document, out / "compile.json")
