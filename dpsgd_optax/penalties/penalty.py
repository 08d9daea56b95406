# SPDX-License-Identifier: Apache-2.0
"""What all penalties share: numbers that may be schedules, the count they are taken at, and how P is seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax.base import check_learning_rate, check_not_negative, is_static
from dpsgd_optax.transforms._control import cast_like, scheduled
from dpsgd_optax.transforms.fitted import Fitted


class PenaltyState(NamedTuple):
  """Attributes:
  count: (), int32, calls of ``update``; schedules are taken at it.
  """

  count: jax.Array


def check_strength(strength: Any, name: str = "strength") -> None:
  check_not_negative(strength, name, "It is a number λ ≥ 0, or a schedule of such. Try 1e-4.")


def penalty(name: str, step: Callable[..., Any], **numbers: Any) -> optax.GradientTransformationExtraArgs:
  """``step(updates, params, **numbers, **extra)`` → updates, as a transform whose state is a count.

  None of the ``numbers`` may be negative; ``step`` is given those that are schedules as numbers. ``name`` is that of
  the constructor, for messages.
  """
  for argument, number in numbers.items():
    if argument == "learning_rate":
      check_learning_rate(number)
    else:
      check_strength(number, argument)

  def init(params):
    del params
    return PenaltyState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError(f"`{name}` is a function of the params, got None. Type `update(grads, state, params)`.")
    now = {argument: scheduled(number, state.count) for argument, number in numbers.items()}
    new = cast_like(step(updates, params, **{**extra, **now}), updates)
    return new, PenaltyState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def add(updates: Any, strength: Any, term: Any) -> Any:
  """updates + strength · term."""
  return jax.tree.map(lambda u, t: u + strength * t, updates, term)


def seen(fitted: Fitted | None, call: str) -> Fitted:
  """P of this step; raises where ``call``, as the user typed it, stands in no sight of P."""
  if fitted is None:
    raise ValueError(
      f"`{call}` must see P, but `update` received no `fitted`: it stands outside of the preconditioner. "
      f"Put it inside: `scale_by_preconditioner(…, momentum=…)` before P, `after=…` behind it."
    )
  return fitted


def is_one(power: Any) -> bool:
  """Known to be 1 when traced: then z is at hand for every P that has a root, diagonal or not."""
  return is_static(power) and power == 1
