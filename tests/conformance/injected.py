# SPDX-License-Identifier: Apache-2.0
"""Numbers as schedules, set while training: `optax.inject_hyperparams` in both forms."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax

import dpsgd_optax as dpo
from tests.conformance.rows import ROWS, keeps, one_step, transform
from tests.table import PARAMS, loss


class Injected(NamedTuple):
  """Attributes:
  make: constructor.
  numbers: those that are traced, every one it has.
  static: what decides shapes or is a function.
  """

  make: Callable
  numbers: dict[str, Any]
  static: tuple[str, ...] = ()


INJECTED = {
  "psgd whitening": Injected(
    dpo.psgd,
    {"learning_rate": 0.1, "b1": 0.9, "weight_decay": 1e-2, "damping": 1e-6},
    ("preconditioner", "curvature", "every", "mask", "key"),
  ),
  "dpsgd": Injected(
    dpo.dpsgd,
    {"learning_rate": 0.1, "max_update_norm": 0.3, "damping": 0.8, "factor": 0.9},
    ("preconditioner", "curvature", "every", "judge_every", "key", "bounds", "model", "reject"),
  ),
  "dpsgd, its factors": Injected(
    lambda average, eta, step_size: dpo.dpsgd(0.1, dpo.damped_kron(average=average, eta=eta, step_size=step_size)),
    {"average": 0.6, "eta": 1e-4, "step_size": 0.2},
  ),  # no row of the table: tests/contract/test_optax.py asks for it
  "bnp": Injected(
    dpo.bnp,
    {"learning_rate": 0.1, "decay": 0.5, "damping": 1e-2, "relative_damping": 0.1, "b1": 0.9, "weight_decay": 1e-4},
    ("q2", "every", "fallback", "debias", "within_batch", "average_calls", "layers"),
  ),
  "gls": Injected(
    functools.partial(dpo.gls, fallback=optax.sgd(0.1)),
    {"learning_rate": 0.1, "decay": 0.5, "damping": 1e-2, "b1": 0.9, "weight_decay": 1e-4},
    ("match", "every", "fallback", "max_size", "layers"),
  ),
  "levenberg_marquardt": Injected(
    functools.partial(dpo.levenberg_marquardt, optax.sgd(0.1)),
    {"damping": 0.5, "factor": 0.9, "reject_factor": 2.0},
    ("thresholds", "bounds", "every", "model", "reject"),
  ),
  "chain": Injected(
    lambda step_size, init_scale, damping: optax.chain(
      dpo.scale_by_preconditioner(dpo.diagonal(step_size, init_scale), dpo.newton(), damping=damping),
    ),
    {"step_size": 0.2, "init_scale": 0.5, "damping": 0.1},
  ),
  "lra": Injected(
    lambda step_size: dpo.scale_by_preconditioner(dpo.lra(step_size=step_size), dpo.whitening()), {"step_size": 0.2}
  ),
  "clipped_learning_rate": Injected(dpo.clipped_learning_rate, {"learning_rate": 0.1, "max_norm": 0.5}),
  "add_gradient_norm_penalty": Injected(dpo.add_gradient_norm_penalty, {"strength": 0.1}, ("preconditioned",)),
  "sharpness_aware": Injected(dpo.penalties.sharpness_aware, {"radius": 0.1}, ("preconditioned", "normalize")),
  "add_l1_penalty": Injected(dpo.penalties.add_l1_penalty, {"strength": 0.1}, ("power",)),
  "proximal_l1": Injected(dpo.penalties.proximal_l1, {"strength": 0.1, "learning_rate": 0.1}, ("power", "mask")),
  "proximal_l2": Injected(dpo.penalties.proximal_l2, {"strength": 0.1, "learning_rate": 0.1}, ("power", "mask")),
}


def inject_hyperparams(name: str) -> None:
  """No Python branch on a number; the other rows are asked with a factor behind them."""
  scaled = Injected(lambda scale: optax.chain(transform(name), optax.scale(scale)), {"scale": 0.5})
  make, numbers, static = INJECTED.get(name, scaled)
  tx = optax.inject_hyperparams(make, static_args=static)(**numbers)
  keeps(tx, ROWS[name].extras)
  assert set(jax.eval_shape(tx.init, PARAMS).hyperparams) >= set(numbers)


PLAIN_FORMS = {
  "levenberg_marquardt": functools.partial(dpo.levenberg_marquardt, optax.sgd(0.1)),
  "chain": functools.partial(dpo.scale_by_preconditioner, dpo.diagonal(), dpo.newton(), momentum=optax.ema(0.9)),
  "gradient penalty": functools.partial(dpo.add_gradient_norm_penalty, 0.01),
  "clipped_learning_rate": functools.partial(dpo.clipped_learning_rate, 0.1),
  "add_gradient_norm_penalty": functools.partial(dpo.add_gradient_norm_penalty, 0.1),
  "sharpness_aware": functools.partial(dpo.penalties.sharpness_aware, 0.1),
  "add_l1_penalty": functools.partial(dpo.penalties.add_l1_penalty, 0.1),
  "proximal_l1": functools.partial(dpo.penalties.proximal_l1, 0.1, 0.1),
  "proximal_l2": functools.partial(dpo.penalties.proximal_l2, 0.1, 0.1),
  "clip_output_change": functools.partial(dpo.layers.clip_output_change, 0.1),
  "trust_region": functools.partial(dpo.trust_region, optax.sgd(0.1)),
  "clip_spikes": functools.partial(dpo.clip_spikes, 8.0),
}

"""Constructors with their arguments, of the rows that are not made by one themselves."""


def plain_form(name: str) -> functools.partial:
  made = PLAIN_FORMS.get(name, ROWS[name].make)
  given = functools.partial(dpo.scale_by_preconditioner, dpo.dense(), dpo.whitening())
  return made if isinstance(made, functools.partial) else given


def inject_plainly(name: str) -> None:
  """`optax.inject_hyperparams(constructor)(…)` with the arguments of the plain run and no `static_args`: that run."""
  make = plain_form(name)
  injected = optax.inject_hyperparams(make.func)(*make.args, **make.keywords)
  runs = []
  for tx in (make(), injected):
    step, params, state = jax.jit(one_step(tx, ROWS[name].extras, loss)), PARAMS, tx.init(PARAMS)
    for _ in range(3):
      params, state, _ = step(params, state)
    runs.append(params)
  assert set(state.hyperparams) >= {"learning_rate"} & set(inspect.signature(make.func).parameters)
  chex.assert_trees_all_close(*runs, rtol=1e-5, atol=1e-6)
