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

from dpsgd_optax.base import check_automatic, check_learning_rate, check_not_negative, is_static
from dpsgd_optax.fitted import Fitted, is_hole
from dpsgd_optax.injection import static_arguments
from dpsgd_optax.products import hvp as hessian_product


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
    >>> tx = optax.chain(dpo.add_l1_penalty(0.5), optax.sgd(1.0))
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
    >>> after = dpo.add_l2_penalty(0.1, power=0.5)
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
    >>> after = dpo.proximal_l1(0.25, learning_rate=0.5, power=1)
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
    >>> tx, params = dpo.proximal_l2(1.0, learning_rate=0.25), jnp.array([1.0, 2.0])
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


def _hessian(name: str, params: Any, hvp: Any, value_fn: Any) -> Callable:
  """v ↦ H v from what ``update`` received."""
  if hvp is not None:
    return hvp
  if value_fn is None or params is None:
    raise ValueError(
      f"`{name}` needs products with the Hessian, but `update` received no `hvp`. Pass `hvp=hvp(loss, params)`, or "
      "`hvp=hvp_finite_difference(loss, params)`, which costs one more gradient and no second derivative."
    )
  return hessian_product(value_fn, params)


def add_gradient_norm_penalty(
  strength: optax.ScalarOrSchedule, *, preconditioned: bool = False
) -> optax.GradientTransformationExtraArgs:
  """updates ← g + λ H g, the gradient of L + λ/2 ‖∇L‖²; or g + λ H P g, that of L + λ/2 gᵀPg = L + λ/2 ‖∇_z L‖².

  Before P the fit sees the penalty too: ``chain(add_gradient_norm_penalty(λ), scale_by_preconditioner(…))``. As
  ``momentum=chain(add_gradient_norm_penalty(λ), optax.ema(0.9))`` it does not, and the mean is of the regularised
  gradients. Early in training a second moment of regularised gradients is known to do harm; if the fit sees them,
  let λ grow from 0 (a schedule).

  Reads ``hvp`` (v ↦ Hv), or ``value_fn``, from which it makes it. The product is the caller's choice:
  ``hvp(loss, params)``, exact, or ``hvp_finite_difference(loss, params)``, (∇L(θ + δv) − ∇L(θ)) / δ. Inside
  ``optax.masked`` the penalty is on the other leaves' block. P is constant in this derivative.

  Args:
    strength: λ ≥ 0, number or schedule.
    preconditioned: penalise ‖∇_z L‖, z = R⁻¹θ, in place of ‖∇L‖. Only as, or in, ``momentum``. Static.

  Cost: one product; with ``hvp`` 1.3 to 1.6 gradients beside the gradient.

  Raises:
    ValueError: for a negative strength; at trace time, without ``hvp`` and ``value_fn``, or with ``preconditioned``
      outside of ``scale_by_preconditioner``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss, params = lambda x: jnp.sum(jnp.array([1.0, 10.0]) * x**2) / 2, jnp.ones(2)
    >>> tx = dpo.add_gradient_norm_penalty(0.1)  # g + 0.1 H g
    >>> tx.update(jax.grad(loss)(params), tx.init(params), params, hvp=dpo.hvp(loss, params))[0]
    Array([ 1.1, 20. ], dtype=float32)
  """
  _check_strength(strength)
  name = "add_gradient_norm_penalty"

  def step(updates, params, count, *, hvp=None, value_fn=None, fitted=None, **extra):
    del extra
    vector = _seen(fitted, name, "preconditioned=True").apply(updates) if preconditioned else updates
    return _add(updates, _at(strength, count), _hessian(name, params, hvp, value_fn)(vector))

  return _counted(step, name)


def gradient_norm(strength: optax.ScalarOrSchedule) -> Callable[..., Any]:
  """A ``direction`` of ``scale_by_preconditioner``: P (u + λ H P u), the gradient of L + λ/2 gᵀPg, preconditioned.

  u is what comes out of the momentum. Where the mean is to be one of regularised gradients, type
  ``momentum=chain(add_gradient_norm_penalty(λ, preconditioned=True), optax.ema(b1))`` instead; without momentum the two
  are the same.

  Args:
    strength: λ ≥ 0, number or schedule of the count of steps.

  Raises:
    ValueError: for a negative strength; at trace time, if ``update`` received neither ``hvp`` nor ``value_fn``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss, params = lambda x: jnp.sum(jnp.array([1.0, 10.0]) * x**2) / 2, jnp.ones(2)
    >>> tx = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), direction=dpo.gradient_norm(0.1))
    >>> tx.update(jax.grad(loss)(params), tx.init(params), params, hvp=dpo.hvp(loss, params))[0].round(3)
    Array([1.1, 1.1], dtype=float32)
  """
  _check_strength(strength)

  def direction(apply, updates, params, *, hvp=None, value_fn=None, count=0, **extra):
    del extra
    product = _hessian("gradient_norm", params, hvp, value_fn)
    return apply(_add(updates, _at(strength, count), product(apply(updates))))

  return direction


def sharpness_aware(
  radius: optax.ScalarOrSchedule, *, preconditioned: bool = False, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
  """updates ← ∇L(θ + ρ v / √(gᵀv)), v = g or P g: the gradient where the loss is worst nearby, to first order.

  To first order in ρ this is the gradient of L + ρ‖∇L‖, or of L + ρ√(gᵀPg): the norm, not squared. Without
  ``normalize``, ∇L(θ + ρ v): a gradient-norm penalty of strength ρ whose difference is taken at the length ρ.
  It differs from ``optax.contrib.sam`` in that P may be fitted on g alone (as ``momentum``), and in ``preconditioned``.

  Reads ``value_fn``, params → loss on the batch of the gradient.

  Args:
    radius: ρ ≥ 0, number or schedule, in units of the params (of z if ``preconditioned``).
    preconditioned: the ball is ‖R⁻¹ Δθ‖ ≤ ρ in place of ‖Δθ‖ ≤ ρ. Only as, or in, ``momentum``. Static.
    normalize: False: move by ρ v. Static.

  Cost: one gradient beside the gradient.

  Raises:
    ValueError: for a negative radius; at trace time, without ``value_fn``, inside ``optax.masked`` or
      ``optax.partition``, or with ``preconditioned`` outside of ``scale_by_preconditioner``.

  Source: arXiv:2010.01412, Eq. 2 and 3.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss, params = lambda x: jnp.sum(x**2) / 2, jnp.array([3.0, 4.0])
    >>> tx = dpo.sharpness_aware(0.5)
    >>> tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)[0]
    Array([3.3, 4.4], dtype=float32)
  """
  _check_strength(radius, "radius")
  name = "sharpness_aware"

  def step(updates, params, count, *, value_fn=None, fitted=None, **extra):
    del extra
    check_automatic(updates)
    if value_fn is None:
      raise ValueError(f"`{name}` takes a second gradient, but `update` received no `value_fn`. Pass `value_fn=loss`.")
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
      raise ValueError(
        f"`{name}` evaluates the loss at all params, got some of them masked. Put it outside of `optax.masked` and "
        "`optax.partition`, or type `add_gradient_norm_penalty` with `hvp=hvp(loss, params)`."
      )
    vector = _seen(fitted, name, "preconditioned=True").apply(updates) if preconditioned else updates
    length = _at(radius, count)
    if normalize:
      norm = jnp.sqrt(jnp.maximum(jnp.real(optax.tree.vdot(updates, vector)), 0))
      length = jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0)
    moved = jax.tree.map(lambda p, v: (p + length * v).astype(jnp.result_type(p)), params, vector)
    return jax.tree.map(jnp.conj, jax.grad(value_fn)(moved))

  return _counted(step, name)
