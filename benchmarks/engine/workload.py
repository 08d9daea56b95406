# SPDX-License-Identifier: Apache-2.0
"""A network with a batch, and the calls on it whose cost is measured: gradients, and whole steps of training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.problem import Problem
from dpsgd_optax import training

Timed = tuple[Any, ...]  # call, carry, arguments: what `timing.Step` takes


@dataclass(frozen=True)
class Workload:
  """Params, and the loss with the running statistics after the batch; without `loss` the updates alone are timed."""

  params: Any
  statistics: Any = ()
  batch: Any = ()
  loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]] | None = None

  def of_params(self, statistics: Any, batch: Any) -> Callable[[Any], tuple[jax.Array, Any]]:
    """The loss as a function of the params alone, with the new statistics."""
    assert self.loss is not None
    return lambda params: self.loss(params, statistics, batch)

  @property
  def gradients(self) -> Any:
    """Made up: what `update` alone is handed."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.01 * rng.standard_normal(x.shape), x.dtype), self.params)


def first_batch(problem: Problem) -> Workload:
  """A problem as a workload: its first batch, from seed 0."""
  params, statistics = problem.split(problem.init(jax.random.key(0)))
  batch = problem.take(problem.arrays.train, np.arange(problem.batch_size))
  return Workload(params, statistics, jax.tree.map(jnp.asarray, batch), problem.advance)


def probe(params: Any) -> Any:
  """A vector to take a product with: any will do, as it is the time that counts."""
  return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def of_gradient(work: Workload, call: Callable[..., Any]) -> Timed:
  """`call(loss, params, vector)` that returns gradients, or gradients and more."""

  def run(carry: Any, params: Any, statistics: Any, batch: Any, vector: Any) -> tuple[Any, Any]:
    return carry, call(work.of_params(statistics, batch), params, vector)

  return run, jnp.zeros(()), work.params, work.statistics, work.batch, probe(work.params)


def whole_step(work: Workload, tx: optax.GradientTransformation, fit: str | None = None, **extra: Any) -> Timed:
  """A step of training, from the loss to the new params.

  `fit` says whence the Hessian-vector product comes: from the linearization that gives the gradient, for all
  parameters ("fused") or the 1-D "leaves" alone; or by itself, of the whole batch ("apart") or its first "quarter".
  """
  tx = optax.with_extra_args_support(tx)
  where = {"where": training.is_norm_param} if fit == "leaves" else {}
  part = {"apart": 1, "quarter": 4}.get(fit or "")

  def run(carry: Any, batch: Any) -> tuple[Any, Any]:
    params, statistics, state = carry
    loss, given = work.of_params(statistics, batch), {}
    if fit in ("fused", "leaves"):
      (value, statistics), grads, given["hvp"] = dpo.value_and_grad_then_hvp(loss, has_aux=True, **where)(params)
    else:
      if part:
        of_part = work.of_params(statistics, jax.tree.map(lambda x: x[: len(x) // part], batch))
        given["hvp"] = dpo.hvp(of_part, params, has_aux=True)
      (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    ahead = lambda p: loss(p)[0]
    given |= {"value": value, "value_fn": ahead, "obj_fn": ahead}
    new, state = tx.update(grads, state, params, **given, **extra)
    return (optax.apply_updates(params, new), statistics, state), value

  return run, (work.params, work.statistics, tx.init(work.params)), work.batch
