# SPDX-License-Identifier: Apache-2.0
"""The rule of Levenberg and Marquardt: what one step, judged by the loss, says of the damping λ.

Notation
  θ, s      params and the step really taken, learning rate and clipping included
  M         predicted reduction of the loss;  actual = loss(θ) − loss(θ + s)
  λ, ω      the damping;  the factor by which it shrinks
  lo, hi    thresholds of actual / M

The ratio is signed, since an increase of the loss is a failure. It is compared without a division: actual ≥ lo · M.

Sources: Levenberg (1944), Marquardt (1963); thresholds and ω of arXiv:1503.05671 §6.5; DPSGD Eqs. 29 to 33.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import select
from dpsgd_optax.base import check, check_not_negative, check_period, is_static

ROUNDING = 10  # reductions of so many units in the last place of the loss say nothing


class Record(NamedTuple):
  """What judging a step changes, fields of the state. Scalars."""

  damping: Any
  ratio: Any
  actual: Any
  predicted: Any


class Rule(NamedTuple):
  """The arguments of ``levenberg_marquardt`` that say how λ changes; ``initial`` is its ``damping``."""

  initial: Any
  factor: Any
  thresholds: Any
  bounds: Any
  reject: Any
  reject_factor: Any


def no_loss(dtype: Any) -> jax.Array:
  """``previous`` where no step waits for its verdict: finite, since some wrappers multiply a state by zero."""
  return jnp.full((), jnp.finfo(dtype).max, dtype)


def check_rule(rule: Rule, every: Any) -> None:
  check_period(every, "every")
  check(lambda x: x > 0, rule.factor, "factor", "positive", "λ is multiplied by it after a good step. Try 19/20.")
  check_not_negative(rule.initial, "damping", "It is the initial λ. Try 1.0.")
  for name, example in (("thresholds", "(0.25, 0.75)"), ("bounds", "(1e-10, 1e10)")):
    low, high = pair = getattr(rule, name)
    if is_static(low) and is_static(high) and not low <= high:
      raise ValueError(f"`{name}` must be (low, high) with low ≤ high, got {pair}. Try {example}.")


def adapt_damping(
  damping: jax.typing.ArrayLike,
  actual: jax.typing.ArrayLike,
  predicted: jax.typing.ArrayLike,
  *,
  factor: jax.typing.ArrayLike = 19 / 20,
  thresholds: tuple[float, float] = (0.25, 0.75),
  bounds: tuple[Any, Any] = (1e-10, 1e10),
) -> jax.Array:
  """The rule, DPSGD Eq. 33: shrink λ after a step as good as predicted, grow it after a bad one, then clip it.

  λ ← ω λ    if M > 0 and actual > hi · M
  λ ← λ / ω  unless M > 0 and actual ≥ lo · M     (NaN counts as bad)
  λ ← clip(λ, bounds)

  Args:
    damping, actual, predicted: λ; loss(θ) − loss(θ + s), positive if the loss fell; M. Scalars.
    factor, thresholds, bounds: ω, (lo, hi), and the smallest and largest λ.

  Example:
    >>> import dpsgd_optax as dpo
    >>> [round(float(dpo.adapt_damping(1.0, actual, 1.0)), 3) for actual in (0.9, 0.5, 0.1)]
    [0.95, 1.0, 1.053]
  """
  low, high = thresholds
  damping, actual, predicted = jnp.asarray(damping), jnp.asarray(actual), jnp.asarray(predicted)
  good = (predicted > 0) & (actual > high * predicted)
  bad = ~((predicted > 0) & (actual >= low * predicted))
  moved = jnp.where(good, damping * factor, jnp.where(bad, damping / factor, damping))
  return jnp.clip(moved, bounds[0], bounds[1])


def _verdict(rule: Rule, old: Record, before: Any, actual: Any, predicted: Any) -> Record:
  """The record after one judged step, from the loss before it; a step of length zero says nothing."""
  damping, cast = old.damping, lambda x: jnp.asarray(x, old.damping.dtype)
  least = ROUNDING * float(jnp.finfo(actual.dtype).eps) * jnp.abs(before).astype(actual.dtype)
  lost_in_rounding = (jnp.abs(actual) <= least) & (jnp.abs(predicted) <= least)
  known = predicted != 0
  judged = known & ~lost_in_rounding
  ratio = actual / jnp.where(judged, predicted, 1)
  arguments = {"factor": rule.factor, "thresholds": rule.thresholds, "bounds": rule.bounds}
  adapted = adapt_damping(damping, actual, predicted, **arguments).astype(damping.dtype)
  shrunk = cast(damping * jnp.minimum(rule.factor, 1 / cast(rule.factor)))
  back = jnp.where(damping > rule.initial, jnp.maximum(shrunk, cast(rule.initial)), damping)
  unjudged = old._replace(damping=jnp.where(known, back, damping))
  return select(judged, Record(adapted, ratio, actual, predicted), unjudged)


def look_ahead(rule: Rule, old: Record, loss: Callable, value: Any, step: Any, predict: Callable) -> tuple:
  """The record after judging this step by the loss at θ and at θ + s, and whether the step is to be zeroed."""
  dtype = old.damping.dtype
  before = jnp.asarray(loss(None) if value is None else value, dtype)
  after = jnp.asarray(loss(step), dtype)
  actual = before - after
  lost = ~jnp.isfinite(after) | ((actual < 0) if rule.reject else False)
  back = 1 / rule.factor if rule.reject_factor is None else rule.reject_factor
  turned = jnp.clip(old.damping * back, *rule.bounds).astype(dtype)
  new = _verdict(rule, old, before, actual, predict())
  new = new._replace(damping=jnp.where(lost & rule.reject, turned, new.damping))
  return select(jnp.isfinite(before), new, old), lost  # a loss that was lost before the step says nothing of it


def look_back(rule: Rule, old: Record, previous: jax.Array, value: Any, finite: jax.Array) -> Record:
  """The record after judging the step before this one, by the loss of this call, if one waits for its verdict."""
  dtype = old.damping.dtype
  waiting = (jnp.abs(previous) < no_loss(dtype)) & finite
  return select(waiting, _verdict(rule, old, previous, (previous - value).astype(dtype), old.predicted), old)
