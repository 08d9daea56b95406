# SPDX-License-Identifier: Apache-2.0
"""The search for a step of `gauss_newton`: trials with more and more damping. Notation as there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.by_shape import all_finite
from dpsgd_optax.curvature._linearized import Linearized
from dpsgd_optax.transforms.damping_rule import Record, Rule, look_ahead

LONGEST_BEND = 0.75  # ‖2a‖ / ‖s‖ of a step that is believed, Transtrum and Sethna's α
TOLERANCE = 0.1  # relative difference of the gradient given and Jᵀ r that is no mistake


class Options(NamedTuple):
  rule: Rule
  adapt: bool
  acceleration: bool
  tries: int
  rate: Any
  momentum: Any


def agrees(updates: Any, given: Linearized, scale: jax.Array) -> jax.Array:
  """Whether g = Jᵀ r, to a tenth or to rounding: if not, the gradient is not that of the residuals.

  Of complex leaves the real parts are compared, which a conjugate has too.
  """
  real = lambda tree: given.to_vector(jax.tree.map(jnp.real, tree))
  ours = real(given.to_tree(given.pull(given.residual)))
  rounding = float(jnp.finfo(ours.dtype).eps) ** 0.5 * jnp.sqrt(scale * jnp.sum(given.residual**2))
  return jnp.linalg.norm(real(updates) - ours) <= TOLERANCE * jnp.linalg.norm(ours) + rounding


def _trial(options: Options, given: Linearized, factorize: Any, damping: Any, last: Any) -> tuple:
  """(step taken, J s of its straight part, whether it bends too much) for one λ.

  SPRING: s = ν s₋ − (Jᵀ J + λI)⁻¹ Jᵀ (r + ν J s₋). Acceleration: a = −½ (Jᵀ J + λI)⁻¹ Jᵀ ∂²r(s, s).
  """
  rate, nu = options.rate, options.momentum
  solve = factorize(damping)
  s = solve(given.residual) if last is None else nu * last + solve(given.residual + nu * given.push(last))
  image = rate * given.push(s)
  if not options.acceleration or given.bend is None:
    return rate * s, image, jnp.array(False)
  a = solve(given.bend(s) / 2)
  bent = ~(4 * jnp.sum(a * a) <= LONGEST_BEND**2 * jnp.sum(s * s)) & jnp.any(s != 0)
  straight = jnp.where(bent, 0, rate**2) * jnp.where(jnp.isfinite(a), a, 0)
  return rate * s + straight, image, bent


def _searched(options: Options, given: Linearized, factorize: Any, record: Record, last: Any, sound: Any) -> tuple:
  """Trials until one is not rejected: (record, step, J s, whether all were rejected, their number).

  J and its products serve all trials: one more costs a factorization and a pass of the loss.
  """
  at: Any = given.loss
  value = at(None)

  def attempt(carry):
    tried, record, *_ = carry
    step, image, bent = _trial(options, given, factorize, record.damping, last)
    predict = lambda: (-(given.residual @ image) - image @ image / 2).astype(record.damping.dtype)
    loss = lambda step: jnp.where(bent & options.rule.reject, jnp.inf, at(step))
    record, lost = look_ahead(options.rule, record, loss, value, step, predict)
    return tried + 1, record, step, image, lost

  zero = jnp.zeros(given.size, given.residual.dtype), jnp.zeros_like(given.residual)
  carry = (jnp.where(sound, 0, options.tries).astype(jnp.int32), record, *zero, jnp.array(True))
  going = lambda carry: (carry[0] < options.tries) & carry[4]
  if isinstance(carry[0], jax.core.Tracer):
    carry = jax.lax.while_loop(going, attempt, carry) if options.tries > 1 else attempt(carry)
  else:  # outside `jit` a loop would be compiled anew on each step
    while going(carry):
      carry = attempt(carry)
  tried, record, step, image, lost = carry
  return record, step, image, lost, jnp.where(sound, tried, 0)


def taken_step(options: Options, given: Linearized, factorize: Any, record: Record, last: Any, sound: Any) -> tuple:
  """(step, record, whether it is to be zeroed, trials)."""
  if options.adapt:
    record, step, _, lost, tried = _searched(options, given, factorize, record, last, sound)
    return step, record, lost | ~all_finite(step), tried
  step, *_ = _trial(options, given, factorize, record.damping, last)
  return step, record, ~all_finite(step), sound.astype(jnp.int32)
