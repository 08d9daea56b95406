# SPDX-License-Identifier: Apache-2.0
"""A bound for how far a step may go, relative to the params, that follows the loss. Notation as in `damping_rule`, and

Δ   the radius: ‖s‖ ≤ Δ ‖θ‖, in the norm over all leaves
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.by_shape import safe_norm
from dpsgd_optax.base import check, forward_extra_args
from dpsgd_optax.transforms._control import static_arguments
from dpsgd_optax.transforms.levenberg_marquardt import levenberg_marquardt


def _within_radius(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """``inner``, its step shortened to ‖θ‖ / damping, which it is not shown."""

  def update(updates, state, params=None, *, damping, **extra):
    if params is None:
      raise ValueError("`trust_region` measures steps by `params`, got None. Pass `params` to `update`.")
    step, state = inner.update(updates, state, params, **extra)
    held = jax.tree.map(lambda s, x: x, step, params)  # a model may hold more than what moves
    length, most = safe_norm(step), safe_norm(held) / damping
    scale = jnp.where(length > most, most / jnp.where(length > 0, length, 1), 1)
    return jax.tree.map(lambda s: s * scale.astype(jnp.finfo(s.dtype).dtype), step), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


@static_arguments("inner")
def trust_region(
  inner: optax.GradientTransformation,
  radius: float = 0.1,
  *,
  growth: float = 1.3,
  shrinkage: float = 0.5,
  bounds: tuple[float, float] = (1e-6, 1.0),
) -> optax.GradientTransformationExtraArgs:
  """Wraps any transform: its steps are at most Δ ‖θ‖ long, and one on which the loss rises is zeroed and Δ halved.

  For Newton's method on young networks. There a P that has seen few probes, or a curvature that is almost nothing along
  some direction, makes steps that throw the tanh units of a network into saturation, where every derivative vanishes:
  training has stopped for good, with nothing skipped. A bound for the entries of P g (``psgd(clip=2)``) does not help,
  as the weights themselves are smaller than that; more damping does not either, as P follows it slowly. A bound for the
  step, and a look at the loss, do: with them the learning rate of a Newton method no longer decides.

  1/Δ is the λ of :func:`dpsgd_optax.levenberg_marquardt`, which this is, with ``reject=True``: Δ grows after a step
  whose reduction is more than 0.75 of −½⟨g, s⟩, and shrinks below 0.25. The wrapped transform is not shown it.

  Args:
    inner: any complete transform, with its learning rate: ``psgd(0.3, kron(), newton())``.
    radius: the first Δ, positive.
    growth, shrinkage: what Δ is multiplied by after a good step, and after one that raised the loss.
    bounds: the smallest and the largest Δ.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`, with the state and the extra arguments of
    ``levenberg_marquardt``: ``value_fn``, and ``value``, which saves a pass. With ``value`` alone it looks back, and
    no step is zeroed. ``damping`` in the state is 1/Δ.

  Raises:
    ValueError: for a radius or factors that are not positive, a ``growth`` below 1, a ``shrinkage`` above 1; at trace
      time if ``params``, or both ``value_fn`` and ``value``, are missing.

  Source: the radius of a trust region, Conn, Gould and Toint, Trust-Region Methods (2000), §6.1; here the step is
  shortened, not solved anew within the radius.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss, params = lambda p: jnp.sum(jnp.tanh(p) ** 2), jnp.array([0.5, -1.0])
    >>> tx = dpo.trust_region(optax.sgd(100.0), radius=0.2)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
    >>> bool(optax.tree.norm(updates) < 0.2001 * optax.tree.norm(params)), bool(loss(params + updates) < loss(params))
    (True, True)
  """
  check(lambda x: x > 0, radius, "radius", "positive", "It is relative to the norm of the params. Try 0.1.")
  check(lambda x: x >= 1, growth, "growth", "at least 1", "The radius is multiplied by it after a good step. Try 1.3.")
  check(lambda x: 0 < x <= 1, shrinkage, "shrinkage", "in (0, 1]", "The radius is multiplied by it. Try 0.5.")
  smallest, largest = bounds
  judged = levenberg_marquardt(
    _within_radius(forward_extra_args(inner)),
    damping=1 / radius,
    factor=1 / growth,
    bounds=(1 / largest, 1 / smallest),
    reject=True,
    reject_factor=1 / shrinkage,
  )

  def update(updates, state, params=None, *, value: Any = None, value_fn: Any = None, **extra):
    if value is None and value_fn is None:
      raise ValueError(
        "`trust_region` looks at the loss after the step, but `update` received neither `value_fn` nor `value`. Pass "
        "`value_fn=loss` (params ↦ scalar), and `value=loss_value` to save a pass."
      )
    return judged.update(updates, state, params, value=value, value_fn=value_fn, **extra)

  return optax.GradientTransformationExtraArgs(judged.init, update)
