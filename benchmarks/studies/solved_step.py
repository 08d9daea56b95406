# SPDX-License-Identifier: Apache-2.0
"""A Gauss-Newton step beside what it cannot do without, and its compilation beside Adam's.

Poisson's equation, 500 residuals of 1009 parameters in float64. "J + Cholesky" is the Jacobian and one factorization
of a matrix of 500 that is there already; "J + K + Cholesky" forms K = J Jᵀ as well, as every solver must. A step is
the thirty-first of a run, the gradient included; "trials" is how many times it was tried, with a factorization each.
CPU seconds, the parts in turn. Writes solved_step.json.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine import arguments
from benchmarks.engine.records import environment, load_average
from benchmarks.engine.report import Table, number, quartiles, study
from benchmarks.engine.timing import compile_anew, interleaved
from benchmarks.problems import science
from dpsgd_optax.curvature._tangents import block_of

FLOORS = ("J + Cholesky", "J + K + Cholesky")
WARM = 30  # steps before the one that is timed
COMPILED = ("adam", "lbfgs", "gauss_newton", "gauss_newton, no acceleration")


def add_arguments(parser: ArgumentParser) -> None:
  parser.add_argument("--rounds", **arguments.COUNT, default=7, help="in which each part has its turn (default: 7)")
  parser.add_argument("--calls", **arguments.COUNT, default=10, help="of each part in a round (default: 10)")
  parser.add_argument("--width", **arguments.COUNT, default=21, help="units of each of the three layers (default: 21)")


def parts(width: int) -> tuple[Any, dict[str, Any]]:
  """The params, and each part as (function, arguments)."""
  u = lambda x: jnp.prod(jnp.sin(jnp.pi * x))
  problem = science._elliptic(u, 0.0, 0.0, width, 400, 100, 1.0, 64)
  params = problem.init(jax.random.key(0))
  system = problem.residuals(params)
  eye = jnp.eye(system(params).size)

  def jacobian(params: Any) -> jax.Array:
    return system.linearize(block_of("solved_step", params, params)).jacobian()

  def trained(tx: Any, **extra: Any) -> tuple[Any, tuple]:
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any) -> Any:
      value, grads = jax.value_and_grad(system.loss)(params)
      more = extra or {"value": value, "grad": grads, "value_fn": system.loss}
      updates, state = tx.update(grads, state, params, **more)
      return optax.apply_updates(params, updates), state

    return step, (params, tx.init(params))

  factor = lambda matrix: jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
  of_rows = lambda rows: factor(rows @ rows.T + eye)
  return params, {
    FLOORS[0]: (lambda p, k: (jacobian(p), factor(k)), (params, 2 * eye)),
    FLOORS[1]: (lambda p: of_rows(jacobian(p)), (params,)),
    "adam": trained(optax.adam(1e-2)),
    "lbfgs": trained(optax.lbfgs()),
    "gauss_newton": trained(dpo.gauss_newton(), residual_fn=system),
    "gauss_newton, no acceleration": trained(dpo.gauss_newton(acceleration=False), residual_fn=system),
  }


def measure(args: Namespace) -> dict[str, Any]:
  params, entered = parts(args.width)
  compiling, calls, trials = {}, {}, {}
  for name, (call, given) in entered.items():
    copied = jax.tree.map(jnp.copy, given)
    _, compiling[name] = compile_anew(call, *copied)
    program = jax.jit(call).lower(*given).compile()
    if name not in FLOORS:
      for _ in range(WARM):
        given = program(*given)
    after = jax.block_until_ready(program(*given))
    calls[name] = lambda program=program, given=given: program(*given)
    if name.startswith("gauss_newton"):
      trials[name] = int(after[1].trials - given[1].trials)
  seconds = interleaved(calls, args.rounds, args.calls)["cpu"]
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "environment": environment() | {"load_average": load_average()},
    "rounds": args.rounds,
    "calls": args.calls,
    "trials": trials,
    "cpu_seconds": {name: [float(x) for x in found] for name, found in seconds.items()},
    "compile_cpu_seconds": {name: compiling[name] for name in COMPILED},
  }


def table(document: dict[str, Any]) -> Table:
  seconds = {name: np.array(found) for name, found in document["cpu_seconds"].items()}
  compiling, rows = document["compile_cpu_seconds"], []
  for name, found in seconds.items():
    ratios = [quartiles((found / seconds[floor]).tolist()) for floor in FLOORS]
    cells = (number(compiling[name]), number(compiling[name] / compiling["adam"])) if name in compiling else ("", "")
    tried = str(document["trials"].get(name, ""))
    rows.append((name, tried, number(1e3 * float(np.median(found))), *ratios, *cells))
  header = ("part", "trials", "ms", *(f"/ ({floor})" for floor in FLOORS), "compile s", "/ adam")
  return Table(f"A step on 500 residuals of {document['parameters']} parameters, float64", header, rows)


run = study("solved_step", measure, table)
