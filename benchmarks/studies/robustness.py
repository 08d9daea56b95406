# SPDX-License-Identifier: Apache-2.0
"""What a bad stretch of gradients does to every preconditioner, measured against an undisturbed twin.

Every optimizer is `psgd` at learning rate 1 that fits on every step, on a kernel and a bias whose gradients are
N(0, I). Newton products are D v with D diagonal; what disturbs the gradient disturbs them too.

  zeros    all gradients before DISTURBED are zero
  outlier  the gradient at DISTURBED is 1000 times as large
  nan      the gradient at DISTURBED is NaN
  bf16     parameters and gradients are bfloat16 throughout
  spike    the gradient at DISTURBED is 1e3 or 1e18 times as large, and there is a momentum of 0.9 that remembers it;
           with the guard of `psgd` (`max_jump`) and without

An update is measured by its root mean square, and compared with the twin's of the same step; the worse of kernel and
bias counts, and the worst of the seeds. A run has recovered when the ratio stays within BAND to the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, number, study
from benchmarks.optimizers import PRECONDITIONERS

SHAPES = {"bias": (6,), "kernel": (8, 6)}
DISTURBED, AFTER, SEEDS, BAND = 2000, 1000, 3, 2.0

SPIKES = {f"×{scale:.0e}": scale for scale in (1e3, 1e18)}
CURVATURES = {"whitening": dpo.whitening, "newton": dpo.newton}


def disturbances(disturbed: int, after: int) -> dict[str, np.ndarray]:
  """What the gradient of each step is multiplied by."""
  t = np.arange(disturbed + after)
  where = {"twin": (t < 0, 1), "zeros": (t < disturbed, 0)}
  where |= {name: (t == disturbed, scale) for name, scale in {"outlier": 1000, "nan": np.nan, **SPIKES}.items()}
  return {name: np.where(steps, scale, 1).astype(np.float32) for name, (steps, scale) in where.items()}


def simulate(
  make: Callable, curvature: Callable, dtype: Any, options: dict[str, Any], scales: jax.Array, draws: Any, seed: Any
) -> dict[str, Any]:
  """The root mean square of every update, (steps, leaves), and the steps that were skipped."""
  like = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
  curvatures = {name: jnp.logspace(0, 1, x.size).reshape(x.shape) for name, x in like.items()}
  tx = dpo.psgd(1.0, make(), curvature(), every=1, key=jax.random.key(seed), **options)

  def step(state, scale_and_draw):
    scale, draw = scale_and_draw
    times = lambda x: scale.astype(x.dtype) * x
    product = lambda v: jax.tree.map(lambda x, d: times(x) * d.astype(x.dtype), v, curvatures)
    updates, state = tx.update(jax.tree.map(lambda x: times(x.astype(dtype)), draw), state, like, hvp=product)
    squares = [jnp.mean(jnp.square(u.astype(jnp.float32))) for u in jax.tree.leaves(updates)]
    return state, jnp.sqrt(jnp.stack(squares))

  state, sizes = jax.lax.scan(step, tx.init(like), (scales, draws))
  return {"rms": sizes, "skipped": optax.tree.get(state, "skipped")}


def ratios(sizes: np.ndarray, twin: np.ndarray) -> np.ndarray:
  """How far from the twin, as a factor of at least 1: (seeds, steps), the worse leaf."""
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = sizes / twin
    return np.nan_to_num(np.maximum(ratio, 1 / ratio), nan=np.inf, posinf=np.inf).max(-1)


def recovered(ratio: np.ndarray) -> int | None:
  """Steps until all seeds stay within BAND; None: not before the end."""
  outside = np.flatnonzero((ratio > BAND).any(0))
  count = int(outside[-1]) + 1 if len(outside) else 0
  return count if count < ratio.shape[1] else None


def measure_one(
  make: Callable, curvature: Callable, disturbed: int = DISTURBED, after: int = AFTER, seeds: int = SEEDS
) -> dict[str, Any]:
  """One row: every disturbance of one preconditioner under one criterion."""
  scales = disturbances(disturbed, after)
  rng, size = np.random.default_rng(0), (seeds, disturbed + after)
  draws = {name: rng.standard_normal((*size, *shape), np.float32) for name, shape in SHAPES.items()}

  def runs(dtype, names, **options):
    chosen = [scales[name] for name in names]
    over_seeds = jax.vmap(partial(simulate, make, curvature, dtype, options), in_axes=(None, 0, 0))
    together = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    return jax.device_get(together(np.stack(chosen), draws, np.arange(seeds)))

  names = ("twin", "zeros", "outlier", "nan")
  found = runs(jnp.float32, names)
  of = dict(zip(names, found["rms"], strict=True))
  narrow = runs(jnp.bfloat16, ["twin"])["rms"][0]
  ratio = {name: ratios(sizes, of["twin"])[:, disturbed:] for name, sizes in {**of, "bf16": narrow}.items()}
  first = of["zeros"][:, disturbed]

  def spikes(**options):
    twin, *spoilt = runs(jnp.float32, ["twin", *SPIKES], b1=0.9, **options)["rms"]
    return [recovered(ratios(sizes, twin)[:, disturbed + 1 :]) for sizes in spoilt]

  return {
    "zeros": {"smallest_first": first.min(), "largest_first": first.max(), "recovered": recovered(ratio["zeros"])},
    "outlier": {"largest": of["outlier"][:, disturbed:].max(), "recovered": recovered(ratio["outlier"][:, 1:])},
    "nan": {
      "largest_at_nan": of["nan"][:, disturbed].max(),
      "skipped": int(found["skipped"][names.index("nan")].max()),
      "recovered": recovered(ratio["nan"][:, 1:]),
    },
    "bf16": {"median_ratio": np.median(ratio["bf16"])},
    "spike": {"guarded": spikes(), "unguarded": spikes(max_jump=None)},
    "finite": bool(np.isfinite(found["rms"]).all() and np.isfinite(narrow).all()),
  }


def measure() -> dict[str, Any]:
  rows = []
  for name, make in PRECONDITIONERS.items():
    for criterion, curvature in CURVATURES.items():
      rows.append({"preconditioner": name, "criterion": criterion, **measure_one(make, curvature)})
      say(f"  {rows[-1]}")
  settings = {"disturbed": DISTURBED, "after": AFTER, "seeds": SEEDS, "band": BAND, "spikes": list(SPIKES.values())}
  return {"settings": settings, "environment": environment(), "rows": rows}


def table(document: dict[str, Any]) -> Table:
  """One line per preconditioner and criterion."""
  settings = document["settings"]
  count = lambda steps: "never" if steps is None else str(steps)
  steps = lambda found: count(found["recovered"])

  def cells(row: dict[str, Any]) -> tuple[str, ...]:
    zeros, outlier, spikes = row["zeros"], row["outlier"], zip(*row["spike"].values(), strict=True)
    first = f"{number(zeros['smallest_first'])} to {number(zeros['largest_first'])}"
    found = (row["preconditioner"], row["criterion"], first, steps(zeros), number(outlier["largest"]), steps(outlier))
    found += (steps(row["nan"]), number(row["bf16"]["median_ratio"]))
    return found + tuple(f"{count(guarded)} ({count(unguarded)})" for guarded, unguarded in spikes)

  header = ("preconditioner", "criterion", f"{settings['disturbed']} zeros: first update", "recovered")
  header += ("×1000: largest update", "recovered", "NaN: recovered", "bfloat16")
  header += tuple(f"momentum, ×{spike:.0e}: recovered (no guard)" for spike in settings["spikes"])
  notes = (
    "Updates as root mean squares, clipped to 2 by `psgd`. Recovered: steps until they stay within a factor of "
    f"{settings['band']:g} of an undisturbed twin's, worst of {settings['seeds']} seeds. bfloat16: median factor "
    "between the updates of bfloat16 and of float32 parameters. The step with the NaN is skipped, and counted.",
  )
  return Table("Bad gradients: what they do to the next steps", header, [cells(row) for row in document["rows"]], notes)


run = study("robustness", lambda args: measure(), table)
