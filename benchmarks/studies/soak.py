# SPDX-License-Identifier: Apache-2.0
"""A hundred thousand fits of every preconditioner on a curvature that never stands still.

Notation
  D(t)   diagonal, its entries drift over six decades, each with a period of its own, 2000 to 20000 fits
  u(t)   unit vector that turns;  H(t) = √D (I + ½ u uᵀ) √D
  Newton fits on (v, H v); whitening on g = √H' z with H' = D(t), z ~ N(0, I): the gradient's own scale drifts

Two runs side by side: gradients and products as float32, and rounded to bfloat16 on the way, as those of bfloat16
params are. Every EVERY fits P is written out as a matrix and looked at:

  finite      every number of the state, at every look
  asymmetry   largest |P − Pᵀ| / |P|
  definite    least eigenvalue of (P + Pᵀ)/2 over the largest; above −1e-6, what float32 can tell
  reach       smallest and largest p_ii against what it should be, over the second half: dead or runaway parameters
  frozen      looks in a row, at most, at which some p_ii had not moved by 1e-4: its curvature moves by more
"""

import itertools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import dpsgd_optax as dpo
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment, write
from benchmarks.engine.report import Table, number, publish
from benchmarks.optimizers import PRECONDITIONERS

SHAPES = {"bias": (4,), "kernel": (4, 3)}
FITS, EVERY = 100_000, 1_000
DAMPING = 1e-6


def curvature(t: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """√D and u at fit t."""
  i = jnp.arange(size, dtype=jnp.float32)
  period = 2000 * 10 ** (i / size)
  d = 10.0 ** (3 * jnp.sin(2 * jnp.pi * (t / period + i / 7)))
  u = jnp.sin(2 * jnp.pi * t / 5000 + i)
  return jnp.sqrt(d), u / jnp.linalg.norm(u)


def rounded(x: jax.Array, narrow: jax.Array) -> jax.Array:
  return jnp.where(narrow, x.astype(jnp.bfloat16).astype(x.dtype), x)


def fits(p: dpo.Preconditioner, newton: bool, unravel: Callable, size: int) -> Callable:
  """(state, first t, narrow) -> state after EVERY fits."""

  def one(carry, key):
    state, t, narrow = carry
    root, u = curvature(t, size)
    z = rounded(jax.random.normal(key, (size,)), narrow)
    x = root * z
    h = root * (x + 0.5 * u * jnp.dot(u, x)) if newton else x
    probe = dpo.Probe(unravel(z) if newton else None, unravel(rounded(h, narrow)))
    return (p.fit(state, probe, key=jax.random.fold_in(key, 1), damping=DAMPING), t + 1, narrow), None

  def run(state, t, narrow):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), EVERY)
    return jax.lax.scan(one, (state, jnp.float32(t), narrow), keys)[0][0]

  return run


def expected(t: float, newton: bool, size: int) -> np.ndarray:
  """The diagonal of H⁻¹, or of D^(−½)."""
  root, u = (np.asarray(x, np.float64) for x in curvature(jnp.float32(t), size))
  return np.diag(np.linalg.inv(np.outer(root, root) * (np.eye(size) + 0.5 * np.outer(u, u)))) if newton else 1 / root


def look(p: np.ndarray, diagonal: np.ndarray, before: np.ndarray) -> dict[str, Any]:
  """What one matrix says."""
  size = np.abs(p).max()
  eigenvalues = np.linalg.eigvalsh((p + p.T) / 2)
  ratio = np.diag(p) / diagonal
  moved = np.abs(np.diag(p) - before) / np.abs(before)
  return {
    "asymmetry": np.abs(p - p.T).max() / size,
    "definite": eigenvalues[0] / eigenvalues[-1],
    "ratio": (ratio.min(), ratio.max()),
    "moved": bool((moved > 1e-4).all()),
  }


def longest(flags: list[bool]) -> int:
  """The longest run of True."""
  return max((sum(run) for _, run in itertools.groupby(flags)), default=0)


def measure_one(make: Callable, newton: bool, total: int = FITS) -> list[dict[str, Any]]:
  """Two rows: float32 and bfloat16."""
  p, params = make(), {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  flat, unravel = ravel_pytree(params)
  size = flat.size
  run = jax.jit(jax.vmap(fits(p, newton, unravel, size), in_axes=(0, None, 0)))
  columns = jax.vmap(lambda state, e: ravel_pytree(p.apply(state, unravel(e)))[0], in_axes=(None, 0))
  matrix = jax.jit(jax.vmap(lambda state: columns(state, jnp.eye(size)).T))
  state = jax.tree.map(lambda x: jnp.stack([x, x]), p.init(params))
  narrow, looks, alive = jnp.array([False, True]), [[], []], [True, True]
  before = np.diagonal(np.asarray(matrix(state), np.float64), axis1=1, axis2=2)
  for t in range(0, total, EVERY):
    state = run(state, t, narrow)
    matrices = np.asarray(matrix(state), np.float64)
    for i in range(2):
      floats = [np.asarray(x[i], np.float32) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
      alive[i] = alive[i] and all(np.isfinite(x).all() for x in floats) and bool(np.isfinite(matrices[i]).all())
      if alive[i]:
        looks[i].append(look(matrices[i], expected(t + EVERY, newton, size), before[i]))
    before = np.diagonal(matrices, axis1=1, axis2=2)
  return [summary(found, ok, name) for found, ok, name in zip(looks, alive, ("float32", "bfloat16"), strict=True)]


def summary(looks: list[dict[str, Any]], finite: bool, dtype: str) -> dict[str, Any]:
  half = looks[len(looks) // 2 :] or [{"ratio": (np.nan, np.nan)}]
  return {
    "dtype": dtype,
    "finite": finite,
    "looks": len(looks),
    "asymmetry": max((x["asymmetry"] for x in looks), default=np.nan),
    "definite": min((x["definite"] for x in looks), default=np.nan),
    "smallest_ratio": min(x["ratio"][0] for x in half),
    "largest_ratio": max(x["ratio"][1] for x in half),
    "frozen": longest([not x["moved"] for x in looks]),
  }


def sound(row: dict[str, Any]) -> bool:
  """State finite, P symmetric and positive to the accuracy of float32, no entry that has stopped to learn."""
  return bool(row["finite"] and row["asymmetry"] < 1e-4 and row["definite"] > -1e-6 and row["frozen"] <= 2)


def table(document: dict[str, Any]) -> Table:
  """One line per preconditioner, criterion and dtype."""

  def cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = f"{number(row['smallest_ratio'])} to {number(row['largest_ratio'])}"
    found = (row["preconditioner"], row["criterion"], row["dtype"], "yes" if row["sound"] else "NO")
    return (*found, number(row["asymmetry"]), number(row["definite"]), ratios, str(row["frozen"]))

  header = ("preconditioner", "criterion", "products", "sound")
  header += ("asymmetry", "least / largest", "p_ii / ideal", "frozen")
  notes = (
    f"{document['fits']} fits on a curvature that drifts over six decades, P looked at every {document['every']}. "
    "Sound: all states finite, P symmetric to 1e-4 and positive to −1e-6 of its largest eigenvalue, no entry of its "
    "diagonal unchanged at more than two looks in a row.",
  )
  return Table("Soak", header, [cells(row) for row in document["rows"]], notes)


def run(args: Namespace) -> None:
  """Every preconditioner under both criteria; the document is saved as it grows."""
  path = args.out / "soak.json"
  document = {"fits": FITS, "every": EVERY, "damping": DAMPING, "environment": environment(), "rows": []}
  for name, make in PRECONDITIONERS.items():
    for newton in (False, True):
      head = {"preconditioner": name, "criterion": "newton" if newton else "whitening"}
      for row in measure_one(make, newton):
        document["rows"].append({**head, **row, "sound": sound(row)})
        say(f"  {document['rows'][-1]}")
      write(document, path)
  publish(document, path, table(document))
