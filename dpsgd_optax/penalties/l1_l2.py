# SPDX-License-Identifier: Apache-2.0
"""Regularisation under preconditioning: a penalty is a transform, and its position says which variables it is meant in.

Notation
  θ, g     parameters, gradient of the loss
  P, R     the preconditioner and its root, P = R Rᵀ
  z        the preconditioned ("intrinsic") variables, θ = R z;  gradient descent in z is θ ← θ − a P g
  λ, a     strength of the penalty, learning rate
  s        `power`: the penalty is r(P^(−s/2) θ), so 0 means in θ, 1 in z
  S_c      soft thresholding, sign(x) max(|x| − c, 0)

The positions are: before P is fitted, between fit and P (`momentum=` of `scale_by_preconditioner`), and behind P, in
sight of it (`after=`) or not (further on in the chain). Written out, with P for `scale_by_preconditioner(…)`,

  decay = optax.add_decayed_weights(λ), l1 = add_l1_penalty(λ), gnp = add_gradient_norm_penalty(λ),
  sam = sharpness_aware(ρ), and gnp', sam' the same with `preconditioned=True`:

| penalty        | in θ, seen by the fit | in θ, not seen by the fit        | in z                                |
|----------------|-----------------------|----------------------------------|-------------------------------------|
| λ/2 ‖·‖²       | chain(decay, P)       | momentum=chain(decay, ema)       | chain(P, decay), that is AdamW      |
|   proximal     |                       | after=proximal_l2(λ, a, power=0) | after=proximal_l2(λ, a, power=1)    |
|   0 < s < 1    |                       | after=add_l2_penalty(λ, power=s) |                                     |
| λ ‖·‖₁         | chain(l1, P)          | momentum=chain(l1, ema)          | after=add_l1_penalty(λ, power=1)    |
|   proximal     |                       | after=proximal_l1(λ, a, power=0) | after=proximal_l1(λ, a, power=1)    |
| λ/2 ‖∇L‖²      | chain(gnp, P)         | momentum=chain(gnp, ema)         | momentum=chain(gnp', ema)           |
| sharpness      | chain(sam, P)         | momentum=chain(sam, ema)         | momentum=chain(sam', ema)           |

`chain(P, l1)`, the look-alike of AdamW, is L1 in neither variable. Without momentum,
`scale_by_preconditioner(…, direction=gradient_norm(λ))` is the gradient penalty in z.

P is held constant within a step: the identities hold for each step; the penalty in z itself moves with P.

Sources: Ye, arXiv:2410.00232 (the change of variables; AdamW as L2 in z); AdamW, arXiv:1711.05101; sharpness-aware
minimization, arXiv:2010.01412. The formulas are derived from θ = R z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax.base import check_not_negative, is_static
from dpsgd_optax.transforms.fitted import Fitted


class PenaltyState(NamedTuple):
  """Attributes:
  count: (), int32, calls of ``update``; schedules are taken at it.
  """

  count: jax.Array


def _at(value: Any, count: Any) -> Any:
  return value(count) if callable(value) else value


def _counted(step: Callable[..., Any], name: str) -> optax.GradientTransformationExtraArgs:
  """``step(updates, params, count, **extra)`` as a transform whose state is a count."""

  def init(params):
    del params
    return PenaltyState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError(f"`{name}` is a function of the params, got None. Type `update(grads, state, params)`.")
    new = step(updates, params, state.count, **extra)
    new = jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), new, updates)
    return new, PenaltyState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def _add(updates: Any, strength: Any, term: Any) -> Any:
  return jax.tree.map(lambda u, t: u + strength * t, updates, term)


def _seen(fitted: Fitted | None, name: str, argument: str) -> Fitted:
  if fitted is None:
    raise ValueError(
      f"`{name}({argument})` must see P, but `update` received no `fitted`: it stands outside of the preconditioner. "
      f"Put it inside: `scale_by_preconditioner(…, momentum=…)` before P, `after=…` behind it."
    )
  return fitted


def _check_strength(strength: Any, name: str = "strength") -> None:
  check_not_negative(strength, name, "It is a number λ ≥ 0, or a schedule of such. Try 1e-4.")


def _is_one(power: Any) -> bool:
  """Known to be 1 when traced: then z is at hand for every P that has a root, diagonal or not."""
  return is_static(power) and power == 1


def add_l1_penalty(strength: optax.ScalarOrSchedule, *, power: Any = None) -> optax.GradientTransformationExtraArgs:
  """updates ← updates + λ P^(1−s/2) sign(P^(−s/2) θ): the gradient step of λ‖P^(−s/2) θ‖₁, sign(0) = 0.

  ``power=None``: λ sign(θ), anywhere in a chain; before P it is L1 in θ. ``power=1``, only as ``after``: L1 in z, with
  the step λ R sign(R⁻¹θ), the counterpart of what AdamW is to L2. Zeros are not exact: see :func:`proximal_l1`.

  Args:
    strength: λ ≥ 0, number or schedule.
    power: s; None: P is not looked at. 1 works for every P with a root, other numbers where powers of P are known.

  Raises:
    ValueError: for a negative strength; at trace time, for a ``power`` outside of ``scale_by_preconditioner``, or one
      that the preconditioner does not have.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = optax.chain(dpo.penalties.add_l1_penalty(0.5), optax.sgd(1.0))
    >>> params = jnp.array([2.0, -3.0, 0.0])
    >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
    Array([-0.5,  0.5, -0. ], dtype=float32)
  """
  _check_strength(strength)

  def step(updates, params, count, *, fitted=None, **extra):
    del extra
    sign = lambda tree: jax.tree.map(jnp.sign, tree)
    if power is None:
      term = sign(params)
    elif _is_one(power):
      p = _seen(fitted, "add_l1_penalty", f"power={power}")
      term = p.root(sign(p.root(params, inverse=True)))
    else:
      p = _seen(fitted, "add_l1_penalty", f"power={power}")
      term = p.power(sign(p.power(params, -power / 2)), 1 - power / 2)
    return _add(updates, _at(strength, count), term)

  return _counted(step, "add_l1_penalty")


def add_l2_penalty(strength: optax.ScalarOrSchedule, *, power: Any) -> optax.GradientTransformationExtraArgs:
  """updates ← updates + λ P^(1−s) θ: the gradient step of λ/2 ‖P^(−s/2) θ‖², a family from L2 (s = 0) to AdamW (s = 1).

  For s = 1 this is ``optax.add_decayed_weights(λ)`` behind P, for s = 0 without momentum the same before P.
  Only as ``after``.

  Args:
    strength: λ ≥ 0, number or schedule.
    power: s. 0 and 1 work for every P, other numbers where powers of P are known (``second_moment``, ``diagonal``,
      ``kron``, ``damped_kron``, ``dense``; the last three pay an eigendecomposition of each factor).

  Raises:
    ValueError: for a negative strength; at trace time, outside of ``scale_by_preconditioner``, or for a power that the
      preconditioner does not have.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> after = dpo.penalties.add_l2_penalty(0.1, power=0.5)
    >>> tx = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), after=after)
    >>> params = jnp.ones(2)
    >>> tx.update(jnp.array([1.0, 0.01]), tx.init(params), params)[0].round(3)  # 1 + 0.1 / sqrt(|g|)
    Array([1.1, 2. ], dtype=float32)
  """
  _check_strength(strength)

  def step(updates, params, count, *, fitted=None, **extra):
    del extra
    p = _seen(fitted, "add_l2_penalty", f"power={power}")
    return _add(updates, _at(strength, count), p.power(params, 1 - power))

  return _counted(step, "add_l2_penalty")
