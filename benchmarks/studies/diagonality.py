# SPDX-License-Identifier: Apache-2.0
"""How diagonal the Hessian is in each norm layer of a network: what SGD with partial Hessian takes for zero.

python -m benchmarks diagonality                                  the norm layers of `digits_bn`, every kind
python -m benchmarks diagonality "digits_bn(norm=group)"          of one problem, or of several

At the initial parameters and after training by momentum; loss in training mode on one batch; medians over the seeds.
Results of other problems stay in the file. For a loss of your own: `dpsgd_optax.diagonality(loss, params, where)`.
"""

import itertools
import json
from argparse import ArgumentParser, Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dpsgd_optax as dpo
from benchmarks.engine import arguments
from benchmarks.engine.calls import SpecError
from benchmarks.engine.problem import batches
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, publish
from benchmarks.engine.runner import compiled, make_plan
from benchmarks.optimizers import contestants
from benchmarks.problems.table import PROBLEMS, build
from dpsgd_optax import training

NORMS = tuple(f"digits_bn(norm={norm})" for norm in ("batch", "layer", "group", "weight"))
STEPS, LEARNING_RATE = 100, 0.1
POINTS = ("initial", "trained")


def measured(name: str, seeds: int, data_dir: str | None) -> dict[str, Any]:
  """Tensor → point → share, error and negative, lists over the seeds."""
  problem = build(name, data_dir, False)
  train = jax.tree.map(jnp.asarray, problem.arrays.train)
  (entered,) = contestants(f"sgd(learning_rate={LEARNING_RATE}, momentum=0.9)", {}, name)
  racer = compiled(problem, entered, make_plan(problem, "tuned", 1, 1.0, False, 1), train)

  @jax.jit
  def observe(variables, rows):
    params, statistics = problem.split(variables)
    loss = lambda p: problem.advance(p, statistics, problem.take(train, rows))
    return dpo.diagonality(loss, params, training.is_norm_param, has_aux=True)

  found: dict[str, Any] = {}
  for seed in range(1, seeds + 1):
    variables = problem.init(jax.random.key(seed))
    first, *rows = itertools.islice(batches(problem, seed), STEPS + 1)
    try:
      at = {"initial": observe(variables, first)}
    except ValueError as error:
      raise SpecError(f"`{name}` has nothing to measure: {error}") from error
    lane = racer.start(variables, seed)
    lane.train(train, rows, 0)
    at["trained"] = observe(lane.variables, first)
    for point, tensors in jax.device_get(at).items():
      for tensor, numbers in tensors.items():
        for kind, number in numbers._asdict().items():
          of = found.setdefault(tensor, {}).setdefault(point, {})
          of.setdefault(kind, []).append(np.asarray(number).mean().item())
  return found


def table(document: dict[str, Any]) -> Table:
  def cell(of: dict[str, Any], kind: str) -> str:
    return " / ".join(f"{np.median(of[point][kind]):.2f}" for point in POINTS)

  rows = [
    (name, tensor, *(cell(of, kind) for kind in ("share", "error", "negative")))
    for name, tensors in document["problems"].items()
    for tensor, of in tensors["tensors"].items()
  ]
  return Table(
    f"Hessian of norm layers at the start / after {STEPS} steps of momentum",
    ("problem", "tensor", "off-diagonal share of the norm", "‖H·1 − d‖ / ‖d‖", "negative entries of d"),
    rows,
    ("Medians over the seeds. 0 and 0 would be a diagonal block.",),
  )


def add_arguments(parser: ArgumentParser) -> None:
  name = arguments.known("problem", PROBLEMS)
  parser.add_argument("problems", nargs="*", type=name, metavar="PROBLEM", help="(default: `digits_bn`, every norm)")
  arguments.add(parser, "data_dir", seeds=3)


def run(args: Namespace) -> None:
  path = args.out / "diagonality.json"
  document = json.loads(path.read_text()) if path.exists() else {"problems": {}}
  document["environment"] = environment()
  for name in args.problems or NORMS:
    plan = {"steps": STEPS, "learning_rate": LEARNING_RATE, "seeds": list(range(1, args.seeds + 1))}
    document["problems"][name] = plan | {"tensors": measured(name, args.seeds, args.data_dir)}
    say(f"measured {name}")
  publish(document, path, table(document))
