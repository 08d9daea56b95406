# SPDX-License-Identifier: Apache-2.0
"""The optimizer alone, without a model: what `update` costs beside psgd-jax and Adam, interleaved, as ratios.

Workload: the gradients of an MLP 784-512-512-10. "One fit in 33" is measured over PERIOD updates, as it is used.
psgd-jax 0.2.9 (extra `peers`) does not import today; `psgd_jax` below gives back the two names that it misses.

psgd-jax holds the factors, not P; ours keeps P as well, so that a step without a fit costs one product per factor.
"""

import importlib
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks import cost
from benchmarks.records import environment, load_average
from benchmarks.report import Table

WIDTHS = (784, 512, 512, 10)
PERIOD = 33
NEVER, ALWAYS = 1e-9, 1.0
TARGETS = {
  "kron, no fit": ("psgd, no fit", "psgd-jax, no fit", 0.6),
  "kron, one fit in 33": ("psgd, one fit in 33", "psgd-jax, one fit in 33", 0.6),
  "kron, a fit every step": ("psgd, every step", "psgd-jax, every step", 0.75),
  "lra of rank 10, a fit every step": ("lra", "psgd-jax lra", 0.5),
  "xmat, a fit every step": ("xmat", "adam", 4.0),
}


def psgd_jax(module: str) -> Any:
  """A module of it, importable again: `optax._src.clipping` and `jax.tree_unflatten` are gone from optax and jax."""
  name = "optax._src.clipping"
  if name not in sys.modules:
    clipping = types.ModuleType(name)
    clipping.clip_by_global_norm = optax.clip_by_global_norm
    clipping.clip_by_block_rms = optax.clip_by_block_rms
    clipping.clip = optax.clip
    sys.modules[name] = clipping
  if not hasattr(jax, "tree_unflatten"):
    jax.tree_unflatten = jax.tree_util.tree_unflatten
  try:
    return importlib.import_module(f"psgd_jax.{module}")
  except ModuleNotFoundError:
    raise SystemExit("error: psgd-jax is not installed. Type: pip install 'dpsgd_optax[peers]'") from None


def params_of(widths: tuple[int, ...] = WIDTHS) -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  shapes = {f"w{i}": pair for i, pair in enumerate(itertools.pairwise(widths))}
  shapes |= {f"b{i}": (d,) for i, d in enumerate(widths[1:])}
  return {name: jnp.asarray(rng.standard_normal(shape) * 0.05, jnp.float32) for name, shape in shapes.items()}


def contestants() -> dict[str, tuple[optax.GradientTransformation, dict[str, Any]]]:
  """Name -> the transform and what its `update` is given."""
  kron, lra = psgd_jax("kron").kron, psgd_jax("low_rank_approximation").low_rank_approximation
  theirs = lambda p: kron(1e-3, b1=0.9, preconditioner_update_probability=p)
  ours = lambda p=None, **options: dpo.psgd(1e-3, p, b1=0.9, **options)
  dense = dpo.kron(max_skew=100.0)  # both factors of every matrix dense, vectors diagonal: the structure of psgd-jax
  return {
    "adam": (optax.adam(1e-3), {}),
    "psgd-jax, no fit": (theirs(NEVER), {}),
    "psgd-jax, one fit in 33": (theirs(1 / PERIOD), {}),
    "psgd-jax, every step": (theirs(ALWAYS), {}),
    "psgd-jax lra": (lra(1e-3, b1=0.9, preconditioner_update_probability=ALWAYS), {}),
    "psgd, no fit": (ours(dense), {"refresh": False}),
    "psgd, one fit in 33": (ours(dense, every=PERIOD), {}),
    "psgd, every step": (ours(dense, every=1), {"refresh": True}),
    "psgd default, every step": (ours(every=1), {"refresh": True}),
    "lra": (ours(dpo.lra(rank=10), every=1), {"refresh": True}),
    "xmat": (ours(dpo.xmat(), every=1), {"refresh": True}),
  }


class Updates:
  """Updates in a row, the state going on from call to call."""

  def __init__(self, name: str, tx: optax.GradientTransformation, options: dict[str, Any], params: Any):
    self.count = PERIOD if str(PERIOD) in name else 2
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    self.params, self.grads = params, grads
    self.state = jax.tree.map(jnp.copy, tx.init(params))  # they are donated: no two may be one buffer

    def update(grads: Any, state: Any, params: Any) -> Any:
      return tx.update(grads, state, params, **options)

    self.update: Callable = jax.jit(update, donate_argnums=1)
    self()

  def __call__(self) -> Any:
    for _ in range(self.count):
      updates, self.state = self.update(self.grads, self.state, self.params)
    return updates


def measure(rounds: int = 7, seed: int = 0) -> dict[str, Any]:
  """Seconds per update of each contestant, state bytes, and the ratios with their targets."""
  params, before = params_of(), load_average()
  made = {name: Updates(name, tx, options, params) for name, (tx, options) in contestants().items()}
  times = cost.interleaved(made, rounds, 1, seed)
  for found in times.values():
    for name, call in made.items():
      found[name] = [seconds / call.count for seconds in found[name]]
  return {
    "workload": f"mlp {'-'.join(map(str, WIDTHS))}, optimizer only",
    "rounds": rounds,
    "environment": environment(),
    "load_average": [before, load_average()],
    "ratios": {label: cost.quartiles_of(times, ours, theirs) for label, (ours, theirs, _) in TARGETS.items()},
    "targets": {label: target for label, (*_, target) in TARGETS.items()},
    "median_cpu_ms": {name: 1e3 * float(np.median(found)) for name, found in times["cpu"].items()},
    "state_bytes": {name: dpo.state_bytes(tx, params) for name, (tx, _) in contestants().items()},
  }


def table(document: dict[str, Any]) -> Table:
  """One row per target."""
  size = lambda name: f"{document['state_bytes'][name] / 2**20:.1f}"
  rows = [
    (label, theirs, cost.cell(ratio["cpu"]), cost.cell(ratio["wall"]), f"{target:g}", size(ours), size(theirs))
    for label, ratio in document["ratios"].items()
    for ours, theirs, target in [TARGETS[label]]
  ]
  header = ("update", "against", "CPU ratio", "wall ratio", "aim", "state MiB", "its state MiB")
  note = f"Load average {document['load_average']}. The state holds the momentum, and ours also P."
  return Table(f"{document['workload']}: {document['rounds']} interleaved rounds", header, rows, (note,))
