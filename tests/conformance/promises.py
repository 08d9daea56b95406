# SPDX-License-Identifier: Apache-2.0
"""Promises × optimizers, one table: every promise asked of every row, or the reason why it cannot hold."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tests.conformance.injected import inject_hyperparams, inject_plainly
from tests.conformance.problems import PROBLEMS, converges
from tests.conformance.rows import ROWS, keeps, transform, wrapped
from tests.conformance.trees import (
  CONTAINERS,
  ODD_TREES,
  container,
  donation,
  dtype_kept,
  flax_serialization,
  init_from_shapes,
  numpy_inputs,
  numpy_serialization,
  odd_tree,
  x64,
)
from tests.conformance.wrappers import (
  debug_nans,
  explicit_axes,
  lookahead,
  loss_falls,
  map_params,
  masked,
  no_recompilation,
  partition,
  same_key_same_run,
  scan,
  strictly,
  strong_types,
  unjitted_loop,
  unknown_extra_arguments,
  weak_scalars,
  wide_numbers,
)
from tests.table import OPTIMIZERS, Row, loss

PROMISES: dict[str, Callable[[str], None]] = {
  "unknown extra arguments are ignored": unknown_extra_arguments,
  "structure, shape, dtype and weak type stay": strong_types,
  "the second call does not compile": no_recompilation,
  "same key, same run, bit for bit": same_key_same_run,
  "the loss falls": loss_falls,
  "lax.scan": scan,
  "inject_hyperparams": inject_hyperparams,
  "MultiSteps": wrapped(lambda tx: optax.MultiSteps(tx, every_k_schedule=2)),
  "chain": wrapped(lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5))),
  "named_chain": wrapped(lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx))),
  "masked": masked,
  "partition": partition,
  "apply_if_finite": wrapped(lambda tx: optax.apply_if_finite(tx, 5)),
  "conditionally_transform": wrapped(
    lambda tx: optax.conditionally_transform(tx, lambda step, **_: step % 2 == 0, forward_extra_args=True)
  ),
  "flatten": lambda name: keeps(optax.flatten(transform(name)), ROWS[name].extras, loss=loss),
  "schedule_free": wrapped(lambda tx: optax.contrib.schedule_free(tx, 0.1)),
  "reduce_on_plateau": wrapped(lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()), "value"),
  "mechanize": wrapped(optax.contrib.mechanize),
  "lookahead": lookahead,
  "lookahead(reset_state=True)": functools.partial(lookahead, reset_state=True),
  "tree.map_params": map_params,
  **{f"{jnp.dtype(d).name} params": dtype_kept(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)},
  "x64": x64,
  "numpy arrays": numpy_inputs,
  **{kind: container(kind) for kind in CONTAINERS},
  "init from shapes": init_from_shapes,
  "donation of a fresh state": donation,
  "flax serialization": flax_serialization,
  "serialization of each leaf by numpy": numpy_serialization,
  "jax_debug_nans": debug_nans,
  "rank promotion raise": strictly(jax.numpy_rank_promotion, "raise"),
  "strict dtype promotion": strictly(jax.numpy_dtype_promotion, "strict"),
  "a loop that is not jitted compiles once": unjitted_loop,
  "inject_hyperparams, plain form": inject_plainly,
  "explicit mesh axes": explicit_axes,
  "bfloat16 updates from float32 numbers": wide_numbers,
  "weakly typed scalars": weak_scalars,
  **{kind: odd_tree(kind) for kind in ODD_TREES},
  **{f"converges: {problem}": converges(problem) for problem in PROBLEMS},
}

RUNS = ("the second call does not compile", "same key, same run, bit for bit", "the loss falls")

"""Promises of optimizers, not of single transforms."""

SLOW = tuple(f"converges: {problem}" for problem in PROBLEMS if problem != "mixed tensors")


def optimizes(promise: str) -> bool:
  return promise in RUNS or promise.startswith("converges")


class Excuse(NamedTuple):
  """Attributes:
  promise: which promises, as a regular expression.
  about: (name, row) -> whether it is about this row.
  error: what comes in place of a result.
  says: what its message says, as a regular expression.
  reason: why, in the table.
  """

  promise: str
  about: Callable[[str, Row], bool]
  error: type[Exception] | tuple[type[Exception], ...]
  says: str
  reason: str

  def covers(self, promise: str, name: str) -> bool:
    return bool(re.fullmatch(self.promise, promise)) and self.about(name, ROWS[name])


EXCUSES = [
  Excuse(
    r"lookahead.*",
    lambda name, row: bool(row.extras),
    ValueError,
    r"`update` received n(o|either) `",
    "`optax.lookahead` hands no extra argument on, and without it there is no step",
  ),
  Excuse(
    "flatten",
    lambda name, row: bool({"hvp", "value_fn", "residual_fn"} & row.extras),
    (ValueError, IndexError, TypeError),
    r"structure of the parameters|index|float32",
    "the loss and its Hessian take the tree, not one vector",
  ),
  Excuse(
    "flatten",
    lambda name, row: "layer_inputs" in row.extras and name != "gls",
    ValueError,
    "no such layer, only a single array",
    "one vector has no layers",
  ),
  Excuse(
    "strict dtype promotion",
    lambda name, row: name == "chain",
    ValueError,
    "float'>\", 'int32'",
    "`optax.ema` raises a float to an integer power, and `optax.adam` with it",
  ),
  Excuse(
    "masked|partition",
    lambda name, row: "value_fn" in row.extras and "value" not in row.extras,
    ValueError,
    "evaluates the loss at all params.*Put it outside",
    "it evaluates the loss, which needs all params",
  ),
]


def excuse(promise: str, name: str) -> Excuse | None:
  return next((x for x in EXCUSES if x.covers(promise, name)), None)


def cells() -> list[tuple[str, str]]:
  """(promise, row) of the whole table."""
  return [(p, name) for p, name in itertools.product(PROMISES, ROWS) if name in OPTIMIZERS or not optimizes(p)]


class Broken(AssertionError):
  """A cell that is not what the table says."""


def ask(promise: str, name: str) -> str:
  """ "holds", or the reason why it cannot; raises if the table is wrong."""
  excused = excuse(promise, name)
  if excused is None:
    PROMISES[promise](name)
    return "holds"
  try:
    PROMISES[promise](name)
  except excused.error as error:
    if re.search(excused.says, str(error)):
      return excused.reason
    raise Broken(f"{name} breaks {promise!r} with another message than {excused.says!r}: {error}") from error
  raise Broken(f"{name} keeps {promise!r}: take its excuse out of the table")
