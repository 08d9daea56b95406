# SPDX-License-Identifier: Apache-2.0
"""Proximal steps of penalties, in the variables of P."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.paths import is_hole
from dpsgd_optax.base import check_learning_rate
from dpsgd_optax.penalties.l1_l2 import _at, _check_strength, _counted, _is_one, _seen
from dpsgd_optax.transforms.injection import static_arguments

Mask = Any | Callable[[Any], Any] | None


def _levels(strength: Any, params: Any, mask: Mask) -> Any:
  """aλ for each leaf, 0 where it is not penalised."""
  mask = mask(params) if callable(mask) else mask
  if mask is None:
    return jax.tree.map(lambda _: strength, params)
  part = lambda chosen, leaves: leaves if is_hole(leaves) else jax.tree.map(lambda _: strength * chosen, leaves)
  return jax.tree.map(part, mask, params)


def _proximal(name: str, learning_rate: Any, prox: Callable) -> optax.GradientTransformationExtraArgs:
  """updates ← prox(θ − a updates) − θ, written so that θ + updates is the value of the prox to the last bit at 0."""

  def step(updates, params, count, *, fitted=None, **extra):
    del extra
    a = _at(learning_rate, count)
    moved = jax.tree.map(lambda p, u: p - a * u, params, updates)
    return jax.tree.map(jnp.subtract, prox(moved, a, count, fitted), params)

  return _counted(step, name)


def _check_proximal(strength: Any, learning_rate: Any) -> None:
  _check_strength(strength)
  check_learning_rate(learning_rate)


def _closed_form_missing(name: str, power: Any) -> ValueError:
  return ValueError(
    f"`{name}(power={power})` has a closed form only if P is diagonal, and this preconditioner is not. "
    "Type `power=1` (in the preconditioned variables, any P with a root), or use `second_moment()` or `diagonal()`."
  )


@static_arguments("mask")
def proximal_l1(
  strength: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule, *, power: Any = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
  """θ ← the minimiser of ½‖R⁻¹(θ' − q)‖² + aλ‖P^(−s/2) θ'‖₁ over θ', with q = θ − a · updates. Exact zeros.

  It takes the place of ``optax.scale_by_learning_rate``, which the level of the threshold depends on, and must be the
  last transform. The closed forms:

    power=None  S_aλ(q)                 P not looked at: proximal gradient descent; behind an adaptive method, the
                                        look-alike of AdamW that is L1 in neither variable
    power=s     S_c(q), c = aλ P^(1−s/2)    diagonal P
    power=1     R S_aλ(R⁻¹ q)           any P with a root: in z the metric is Euclidean, so the thresholds separate.
                                        For diagonal P the same as the line above; else the exact zeros are those of z

  Args:
    strength: λ ≥ 0, number or schedule.
    learning_rate: a, number or schedule.
    power: s; 0: L1 in θ, 1: in z, the recommended one; None: P is not looked at. A number only as ``after``.
    mask: which leaves are penalised: a prefix tree of bools, or a function from params to one; None: all. (Under
      ``optax.masked`` the other leaves would miss the learning rate too.)

  Raises:
    ValueError: for a negative strength or learning rate; at trace time, for a ``power`` outside of
      ``scale_by_preconditioner``, or other than 1 for a P that is not diagonal.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> after = dpo.penalties.proximal_l1(0.25, learning_rate=0.5, power=1)
    >>> tx = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), after=after)
    >>> params = jnp.array([1.0, 0.5625])
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
    >>> bool(jnp.allclose(params + updates, jnp.array([0.375, 0.0]), atol=1e-5))
    True
  """
  _check_proximal(strength, learning_rate)

  def threshold(x, level):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - level, 0)

  def prox(q, a, count, fitted):
    level = _levels(a * _at(strength, count), q, mask)
    if power is None:
      return jax.tree.map(threshold, q, level)
    p = _seen(fitted, "proximal_l1", f"power={power}")
    if p.diagonal is not None:
      return jax.tree.map(threshold, q, p.power(level_like(level, q), 1 - power / 2))
    if _is_one(power):
      return p.root(jax.tree.map(threshold, p.root(q, inverse=True), level))
    raise _closed_form_missing("proximal_l1", power)

  def level_like(level, q):
    return jax.tree.map(lambda c, x: jnp.full(jnp.shape(x), c, jnp.abs(x).dtype), level, q)

  return _proximal("proximal_l1", learning_rate, prox)


@static_arguments("mask")
def proximal_l2(
  strength: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule, *, power: Any = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
  """θ ← the minimiser of ½‖R⁻¹(θ' − q)‖² + aλ/2 ‖P^(−s/2) θ'‖² over θ', with q = θ − a · updates.

  (I + aλ P^(1−s))⁻¹ q: the implicit form of decay, stable for every a λ. As :func:`proximal_l1`, it takes the place of
  ``optax.scale_by_learning_rate``. ``power=1`` is q / (1 + aλ) for every P, ``None`` the same without a P.

  Args:
    strength: λ ≥ 0, number or schedule.
    learning_rate: a, number or schedule.
    power: s; 0: L2 in θ, 1: in z (AdamW's, implicit); None: P is not looked at. A number only as ``after``, and other
      than 1 only for a diagonal P.
    mask: which leaves are penalised, as for :func:`proximal_l1`.

  Raises:
    ValueError: as :func:`proximal_l1`.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx, params = dpo.penalties.proximal_l2(1.0, learning_rate=0.25), jnp.array([1.0, 2.0])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    >>> params + updates
    Array([0.8, 1.6], dtype=float32)
  """
  _check_proximal(strength, learning_rate)

  def prox(q, a, count, fitted):
    level = _levels(a * _at(strength, count), q, mask)
    shrink = lambda x, c: x / (1 + c)
    if power is None:
      return jax.tree.map(shrink, q, level)
    p = _seen(fitted, "proximal_l2", f"power={power}")
    if p.diagonal is not None:
      # the level is a number for each leaf, so that it commutes with P
      weight = p.power(jax.tree.map(jnp.ones_like, q), 1 - power)
      return jax.tree.map(lambda x, c, w: x / (1 + c * w), q, level, weight)
    if _is_one(power):
      return jax.tree.map(shrink, q, level)
    raise _closed_form_missing("proximal_l2", power)

  return _proximal("proximal_l2", learning_rate, prox)
