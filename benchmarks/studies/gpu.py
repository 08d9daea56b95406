# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in ten minutes: tests, milliseconds of a step on four networks, ResNet-18 on CIFAR-10; `make gpu`.

python -m benchmarks gpu               writes gpu.json; on a machine without a GPU the same with tiny networks
python -m benchmarks gpu --minutes 30  the same parts, longer

Each part is a process of its own with a share of the time: one that does not end in it is stopped, what it had written
by then is kept, and the others go on. The times are absolute, those of one device that did nothing else. On a CPU
everything is tiny, made-up data in the place of CIFAR-10, and the file is gpu-tiny.json: it shows that all parts run.
"""

import json
import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine import arguments
from benchmarks.engine.devices import QUICK_TO_COMPILE
from benchmarks.engine.problem import Arrays, Problem, classifier
from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, environment, load_average, write
from benchmarks.engine.report import Table, number, publish
from benchmarks.engine.runner import make_plan
from benchmarks.engine.session import run as run_session
from benchmarks.engine.timing import Step, Timed, Workload, interleaved, mean_of, of_gradient, quartiles, whole_step
from benchmarks.optimizers import contestants
from benchmarks.problems.data import DataError
from benchmarks.problems.models import MLP, Transformer
from benchmarks.problems.resnet import ResNet
from benchmarks.problems.table import build
from benchmarks.studies._calls import RATE, WORKLOADS, classification
from benchmarks.studies.cost import carried, every

SHARES = {"device": 0.1, "tests": 0.2, "cost": 0.42, "training": 0.28}  # of the time; a part may not take more
TESTS = (  # other people's arrays, closed forms and laws: what a device could get wrong
  *("tests/golden/test_golden_kron.py", "tests/golden/test_golden_dpsgd.py", "tests/golden/test_golden_affine.py"),
  *("tests/laws/test_fixed_points.py", "tests/laws/test_damping.py", "tests/unit/test_products.py"),
)
TINY_TESTS = ("tests/unit/test_products.py", "-k", "complex")
REAL = ("mlp", "charlm", "resnet18", "gpt2")
TINY: dict[str, Callable[[], Workload]] = {
  "mlp": lambda: classification(MLP((6, 4)), (8, 5), 4),
  "charlm": lambda: classification(Transformer(7, 1, 8, 2), (2, 4), 7),
}
FLOOR, PERIOD, ROUNDS = 33, 10, 7
MIXTURES = {f"psgd, one fit in {FLOOR}": every(FLOOR, "psgd"), f"dpsgd, a fit every {PERIOD}": every(PERIOD, "dpsgd")}
SHOWN = ("gradient", "adamw", "muon", *MIXTURES, "psgd, no fit", "psgd, fit", "dpsgd, no fit", "dpsgd, fit")
TRAINED = "psgd_whiten(learning_rate=0.001,b1=0.9),adamw(learning_rate=0.001),dpsgd(learning_rate=0.05,every=10)"
TINY_TRAINED = "psgd_whiten(learning_rate=0.001,b1=0.9),adamw(learning_rate=0.001)"
IMAGES = "cifar10(model=resnet18)"
MADE_UP = 50_000, 10_000  # images of noise where there is no CIFAR-10


def calls_on(work: Workload) -> dict[str, Callable[[], Timed]]:
  """What is timed on each network; made when it is its turn, so that the states do not lie in memory before."""
  step, dpsgd, psgd = partial(whole_step, work), dpo.dpsgd(RATE), dpo.psgd(RATE, b1=0.9)
  return {
    "gradient": lambda: of_gradient(work, lambda f, p, v: jax.value_and_grad(f, has_aux=True)(p)),
    "adamw": lambda: step(optax.adamw(RATE)),
    "muon": lambda: step(optax.contrib.muon(RATE)),
    "psgd, no fit": lambda: step(psgd, refresh=False),
    "psgd, fit": lambda: step(psgd, refresh=True),
    "dpsgd, no fit": lambda: step(dpsgd, refresh=False, judge=False),
    "dpsgd, fit": lambda: step(dpsgd, "fused", refresh=True, judge=False),
  }


def about(step: Step) -> dict[str, Any]:
  """What the compiler counts; seconds of compiling side by side say nothing."""
  return {k: v for k, v in step.counts().items() if k != "compile_cpu_seconds"} | {"carry_bytes": carried(step.carry)}


def cost_of(work: Workload, rounds: int, shortest: float) -> dict[str, Any]:
  """Wall milliseconds of each call, and what is known of it; those that do not fit into memory with their error."""
  start, failed = time.perf_counter(), {}

  def compiled(name: str, make: Callable[[], Timed]) -> Step | None:
    try:
      return Step(*make())
    except jax.errors.JaxRuntimeError as error:  # most likely out of memory: the others can be timed all the same
      failed[name] = str(error).partition("\n")[0][:200]
      say(f"  {name}: {failed[name]}")
      return None

  entered = calls_on(work)
  with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiling is most of the time
    steps = dict(zip(entered, pool.map(compiled, entered, entered.values()), strict=True))
  made = {name: step for name, step in steps.items() if step is not None}
  say(f"  compiled in {time.perf_counter() - start:.0f} s")
  start = time.perf_counter()
  jax.block_until_ready([step() for step in made.values()])
  calls = max(1, min(20, round(shortest * len(made) / (time.perf_counter() - start))))
  times = interleaved(made, rounds, calls)["wall"]
  mixed = {name: weights for name, weights in MIXTURES.items() if {*weights} <= {*times}}
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(work.params)),
    "calls_in_a_round": calls,
    "wall_ms": {name: quartiles(1e3 * mean_of(times, who)) for name, who in {**{n: n for n in times}, **mixed}.items()},
    "known": {name: about(step) for name, step in made.items()},
    "failed": failed,
  }


def cost_part(args: Namespace, keep: Callable[[Any], None]) -> None:
  """All networks, the largest last; each is written down when it is done."""
  found = {}
  for name in TINY if args.tiny else REAL:
    say(name)
    work = TINY[name]() if args.tiny else WORKLOADS[name]()
    found[name] = cost_of(work, 2 if args.tiny else ROUNDS, 0.0 if args.tiny else 0.05)
    keep(found)


def images(tiny: bool, data_dir: str | None) -> Problem:
  """ResNet-18 on CIFAR-10, or on made-up images of that size if the data cannot be had; or a tiny one."""
  try:
    if not tiny:
      return build(IMAGES, data_dir, folded=False)
  except DataError as error:
    say(f"  no CIFAR-10, so the images are made up: {str(error)[:120]}")
  rng, size, (train, test) = np.random.default_rng(0), 8 if tiny else 32, (64, 32) if tiny else MADE_UP

  def made(count: int) -> dict[str, np.ndarray]:
    x = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    return {"x": x, "y": (x.mean((1, 2, 3)) * 10).astype(np.int32) % 10}

  model = ResNet((2, 4), 1) if tiny else ResNet((64, 128, 256, 512), 2)
  arrays = Arrays(made(train), made(test), "made up: images of noise")
  options = dict(statistics=True, batch_size=16 if tiny else 128, epochs=1, evaluations=1)
  return replace(classifier(model, arrays, **options), name=f"{'tiny' if tiny else 'made-up'} images")


def train_part(args: Namespace, keep: Callable[[Any], None]) -> None:
  """As many epochs as fit, after some steps that say how long they take; the rates are guesses, not tuned."""
  start, problem = time.monotonic(), images(args.tiny, args.data_dir)
  entered, known = contestants(TINY_TRAINED if args.tiny else TRAINED, {}, problem.name), {}
  with TemporaryDirectory() as folder:

    def raced(epochs: float, evaluations: int, seed: int) -> Results:
      plan = make_plan(problem, "made up", epochs, 1.0, False, evaluations)
      return run_session(problem, plan, entered, [seed], Path(folder) / f"{seed}.json", known=known)

    few = 12 / problem.steps_per_epoch
    trial = raced(few, 1, 0)
    once = sum(run.final("seconds") for run in trial.runs) / few  # seconds of an epoch of all
    left = 0.75 * (args.minutes * 60 * SHARES["training"]) - (time.monotonic() - start)
    epochs = 2 if args.tiny else max(1, int(left / once))
    keep(asdict(raced(epochs, min(2 * epochs, 20), 1)))


def device_part(args: Namespace, keep: Callable[[Any], None]) -> None:
  """What there is; and that it computes at all."""
  platform = jax.devices()[0].platform
  assert float(jnp.ones(3).sum()) == 3.0
  keep({"environment": environment(), "platform": platform, "load_average": load_average()})


def tests(args: Namespace) -> dict[str, Any]:
  """The quick tests of TESTS on this device, in float32 as it is on a CPU: products of TF32 would fail tolerances."""
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(TINY_TESTS if args.tiny else TESTS)]
  if (workers := min(6, (os.cpu_count() or 1) // 2)) > 1 and not args.tiny:  # they share the card
    command += ["-n", str(workers), "--dist", "loadgroup"]
  setting = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  setting.pop("JAX_ENABLE_COMPILATION_CACHE", None)
  start, root = time.monotonic(), Path(__file__).parents[2]
  limit = args.minutes * 60 * SHARES["tests"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=root, env=setting)
    text, ended = done.stdout, "ended" if done.returncode in (0, 1) else f"failed with code {done.returncode}"
  except subprocess.TimeoutExpired as error:
    ended = f"stopped after {limit:.0f} s"
    text = f"{(error.stdout or b'').decode()}\n{ended}"
  last = (text.strip().splitlines() or ["nothing"])[-1]
  count = lambda word: sum(int(number) for number in re.findall(rf"(\d+) {word}", last))
  names = re.findall(r"^FAILED (\S+)", text, re.M)
  found = {"summary": last.strip("= "), "passed": count("passed"), "failed": count("failed"), "failures": names}
  return found | {"ended": ended, "seconds": time.monotonic() - start}


PARTS: dict[str, Callable[[Namespace, Callable[[Any], None]], None]] = {
  "device": device_part,
  "cost": cost_part,
  "training": train_part,
}


def in_process(part: str, args: Namespace) -> dict[str, Any]:
  """A part in a process of its own: what it wrote, and whether it ended in its time."""
  start = time.monotonic()
  limit = max(60.0, args.minutes * 60 * SHARES[part])
  setting = dict(os.environ)
  if args.tiny:
    setting["XLA_FLAGS"] = f"{setting.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
  with TemporaryDirectory() as folder:
    command = ["gpu", "--part", part, "--out", folder, "--minutes", str(args.minutes)] + ["--tiny"] * bool(args.tiny)
    command += ["--data-dir", args.data_dir] if args.data_dir else []
    try:
      code = subprocess.run([sys.executable, "-m", "benchmarks", *command], timeout=limit, env=setting).returncode
      ended = "ended" if code == 0 else f"failed with code {code}"
    except subprocess.TimeoutExpired:
      ended = f"stopped after {limit:.0f} s"
    path = Path(folder) / f"{part}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
  return {"found": found, "ended": ended, "seconds": time.monotonic() - start}


def measure(args: Namespace) -> dict[str, Any]:
  """The document. The device is asked first: without a GPU everything else is tiny."""
  device = in_process("device", args)
  platform = device["found"].get("platform", "none")
  args.tiny = args.tiny or platform == "cpu"
  say(f"platform: {platform}" + "; tiny networks" * args.tiny)
  document = {"tiny": args.tiny, "minutes": args.minutes, **device["found"]}
  say("tests")
  document["tests"] = tests(args)
  say(f"  {document['tests']['summary']}")
  parts = {part: in_process(part, args) for part in ("cost", "training")}
  ended = {part: {key: about[key] for key in ("ended", "seconds")} for part, about in parts.items()}
  return document | {part: about["found"] for part, about in parts.items()} | {"parts": ended}


def where(document: dict[str, Any]) -> str:
  about = document["environment"]
  return f"{about['device']}, jax {about['jax']}" + ", tiny networks" * document["tiny"]


def cost_table(document: dict[str, Any]) -> Table:
  """A row per network: wall milliseconds of a step, and the size of the state beside the params for the whole ones."""

  def cell(found: dict[str, Any], name: str) -> str:
    return "failed" if name in found["failed"] else number(found["wall_ms"].get(name, (None,) * 3)[1])

  rows = [
    (name, f"{found['parameters'] / 1e6:.2g}", *(cell(found, call) for call in SHOWN))
    for name, found in document["cost"].items()
  ]
  tests = document["tests"]
  notes = (
    "Medians of interleaved rounds. " + "; ".join(f"{part}: {of['ended']}" for part, of in document["parts"].items()),
    f"Tests on this device: {tests['summary']}.",
  )
  header = ("network", "million parameters", *SHOWN)
  return Table(f"{where(document)}: wall milliseconds of a step", header, rows, notes)


def training_table(document: dict[str, Any]) -> Table:
  """A row per optimizer: where it stood at the end, and what a step took with nothing else in between."""
  found, rows = document["training"], []
  for run in found.get("runs", ()):
    end = {name: curve[-1] for name, curve in run["curves"].items()}
    cells = (
      end["train_loss"],
      end["test_loss"],
      100 * end["test_accuracy"],
      1e3 * end["seconds"] / max(1, end["step"]),
    )
    rows.append((run["optimizer"], *map(number, cells)))
  plan = found.get("plan", {"epochs": 0, "data": "nothing", "problem": IMAGES})
  header = ("optimizer", "train loss", "test loss", "test acc. %", "ms/step")
  title = f"{where(document)}: {plan['problem']}, {plan['epochs']:g} epochs, one seed"
  return Table(title, header, rows, (f"Data: {plan['data']}. The learning rates are guesses.",))


def tables(document: dict[str, Any]) -> tuple[Table, ...]:
  return cost_table(document), training_table(document)


def add_arguments(parser: ArgumentParser) -> None:
  add = parser.add_argument
  add("--minutes", type=arguments.positive(float), default=10.0, help="of all parts together (default: %(default)g)")
  add("--tiny", action="store_true", help="tiny networks (default: on a CPU)")
  add("--part", choices=tuple(PARTS), help="one of them, in this process: what the others are started with")
  arguments.add(parser, "data_dir")


def run(args: Namespace) -> None:
  if args.part:
    PARTS[args.part](args, lambda found: write(found, args.out / f"{args.part}.json"))
    return
  document = measure(args)
  publish(document, args.out / ("gpu-tiny.json" if args.tiny else "gpu.json"), *tables(document))
  tested, parts = document["tests"], document["parts"].values()
  if tested["failed"] or any(of["ended"] != "ended" for of in (tested, *parts)):
    raise SystemExit(1)
