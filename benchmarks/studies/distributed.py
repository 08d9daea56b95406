# SPDX-License-Identifier: Apache-2.0
"""The same training on many devices and several processes: an example, and a check against one device.

python -m benchmarks distributed --devices 8                 eight virtual CPU devices, or those that there are
python -m benchmarks distributed --devices 8 --processes 2   the same, four in each of two processes, over loopback
python -m benchmarks distributed digits --devices 4          another problem

What a script of your own needs is in `train`: a mesh, `dpo.sharded`, and arrays placed on the mesh; on several hosts
`jax.distributed.initialize` before all else. The virtual devices share the processor: they show that the program is
right, and what is exchanged, not that it is fast.
"""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dpsgd_optax as dpo
from benchmarks.engine import arguments
from benchmarks.engine.calls import SpecError
from benchmarks.engine.devices import COLLECTIVES, LAYOUTS, QUICK_TO_COMPILE, specs_of
from benchmarks.engine.problem import Problem, batches
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, number, publish
from benchmarks.problems.table import PROBLEMS, build

PROBLEM, STEPS = "charlm(layers=8,width=32,block=32)", 10


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """A host array on the mesh; each process sends what its devices hold."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def exchanges(compiled: jax.stages.Compiled) -> dict[str, int]:
  """How often each collective stands in a program."""
  found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
  return dict(Counter(found))


def train(problem: Problem, mesh: Mesh, layout: str, steps: int = STEPS, seed: int = 1) -> dict[str, Any]:
  """Losses of a run of whitening PSGD on all devices of the mesh, and what each device holds and sends."""
  shapes = jax.eval_shape(problem.init, jax.random.key(seed))
  specs = specs_of(layout, shapes, mesh)
  tx = dpo.sharded(dpo.psgd(3e-3, b1=0.9, every=1), mesh, specs)
  on = lambda spec: NamedSharding(mesh, spec)
  params = jax.jit(problem.init, out_shardings=jax.tree.map(on, specs))(jax.random.key(seed))
  state = jax.jit(tx.init)(params)

  def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(problem.loss)(params, batch)
    updates, state = tx.update(grads, state, params, refresh=True)
    return optax.apply_updates(params, updates), state, value

  losses, compiled = [], None
  for rows in itertools.islice(batches(problem, seed), steps):
    batch = {name: place(array[rows], on(P("data"))) for name, array in problem.arrays.train.items()}
    if compiled is None:
      compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    params, state, value = compiled(params, state, batch)
    losses.append(float(value))
  return {
    "losses": losses,
    "params_bytes_per_device": dpo.diagnostics.bytes_per_device(params),
    "state_bytes_per_device": dpo.diagnostics.bytes_per_device(state),
    "exchanges": exchanges(compiled) if compiled is not None else {},
  }


def work(order: dict[str, Any]) -> None:
  """One process of several: join the others, train on all their devices; the first one writes down the results."""
  if order["processes"] > 1:
    jax.distributed.initialize(order["address"], order["processes"], order["process"])
  if jax.device_count() < order["devices"]:
    raise SpecError(f"`--devices {order['devices']}`: there are {jax.device_count()}. Type `--devices` with no more.")
  devices = jax.devices()[: order["devices"]]
  mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
  problem = build(order["problem"], order["data_dir"], folded=False)
  if problem.batch_size % len(devices):
    raise SpecError(f"the batch of {problem.batch_size} must be a multiple of `--devices`, got {len(devices)}.")
  found = {layout: train(problem, mesh, layout, order["steps"]) for layout in LAYOUTS}
  if order["process"] == 0:
    Path(order["out"]).write_text(json.dumps({"layouts": found, "environment": environment()}))


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def launch(problem: str, devices: int, processes: int, steps: int, data_dir: str | None) -> dict[str, Any]:
  """Run `work` in so many processes of this machine, with virtual devices where the platform is the CPU."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices // processes}"
  flags += f" {QUICK_TO_COMPILE}"
  with TemporaryDirectory() as folder:
    order = {"problem": problem, "devices": devices, "processes": processes, "steps": steps, "data_dir": data_dir}
    order |= {"address": f"localhost:{free_port()}", "out": str(Path(folder) / "found.json")}
    command = [sys.executable, "-m", "benchmarks.studies.distributed"]
    logs = [Path(folder) / f"{i}.log" for i in range(processes)]
    workers = [
      subprocess.Popen(
        [*command, json.dumps(order | {"process": i})],
        env=os.environ | {"XLA_FLAGS": flags.strip()},
        stderr=log.open("w"),
      )
      for i, log in enumerate(logs)
    ]
    while any(worker.poll() is None for worker in workers) and not any(worker.returncode for worker in workers):
      time.sleep(0.1)
    for worker in workers:
      if worker.poll() is None:  # without its fellow it would wait for ever
        worker.kill()
    if any(worker.wait() for worker in workers):
      raise SpecError("a process failed:\n" + "\n".join(log.read_text()[-2000:] for log in logs))
    return json.loads(Path(order["out"]).read_text())


def measure(problem: str, devices: int, processes: int = 1, steps: int = STEPS, data_dir: str | None = None) -> Any:
  """The document: both layouts on the devices, and the data-parallel one on one device."""
  if devices % processes:
    raise SpecError(f"`--devices` must be a multiple of `--processes`, got {devices} and {processes}.")
  many = launch(problem, devices, processes, steps, data_dir)
  one = launch(problem, 1, 1, steps, data_dir)["layouts"][LAYOUTS[0]]
  for found in many["layouts"].values():
    found["largest_difference"] = float(np.max(np.abs(np.subtract(found["losses"], one["losses"]))))
  return many | {"problem": problem, "devices": devices, "processes": processes, "steps": steps, "one": one}


def table(document: dict[str, Any]) -> Table:
  """A row per layout, and one device."""
  runs = {"one device": document["one"] | {"largest_difference": 0.0}} | document["layouts"]
  rows = []
  for name, found in runs.items():
    held = (number(found[f"{what}_bytes_per_device"] / 1e3) for what in ("params", "state"))
    exchanged = ", ".join(f"{count} {kind}" for kind, count in sorted(found["exchanges"].items())) or "none"
    rows.append((name, number(found["losses"][-1]), f"{found['largest_difference']:.1e}", *held, exchanged))
  header = ("layout", "last loss", "largest difference", "params, kB", "state, kB", "exchanges in the program")
  note = f"Bytes of one device. {document['steps']} steps, a fit on each."
  title = f"{document['problem']} on {document['devices']} devices in {document['processes']} process(es)"
  return Table(title, header, rows, (note,))


def add_arguments(parser: ArgumentParser) -> None:
  add, count = parser.add_argument, arguments.positive(int)
  name = arguments.known("problem", PROBLEMS)
  add("problem", nargs="?", default=PROBLEM, type=name, metavar="PROBLEM", help="(default: %(default)s)")
  add("--devices", type=count, default=8, help="virtual ones on a CPU (default: %(default)d)")
  add("--processes", type=count, default=1, help="over which the devices are divided (default: %(default)d)")
  arguments.add(parser, "data_dir")


def run(args: Namespace) -> None:
  document = measure(args.problem, args.devices, args.processes, data_dir=args.data_dir)
  publish(document, args.out / f"distributed-{args.devices}x{args.processes}.json", table(document))


if __name__ == "__main__":
  work(json.loads(sys.argv[1]))
