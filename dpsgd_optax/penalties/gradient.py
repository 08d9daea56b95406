# SPDX-License-Identifier: Apache-2.0
"""Penalties of the gradient's norm, and the sharpness-aware direction. Notation and places: `dpsgd_optax.penalties`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.paths import has_holes
from dpsgd_optax.base import check_automatic
from dpsgd_optax.curvature.observers import given_product
from dpsgd_optax.penalties.penalty import add, check_strength, penalty, seen
from dpsgd_optax.transforms._control import scheduled

_OTHERWISE = ", or `hvp=hvp_finite_difference(loss, params)`, which costs one more gradient and no second derivative"


def add_gradient_norm_penalty(
  strength: optax.ScalarOrSchedule, *, preconditioned: bool = False
) -> optax.GradientTransformationExtraArgs:
  """updates ← g + λ H g, the gradient of L + λ/2 ‖∇L‖²; or g + λ H P g, that of L + λ/2 gᵀPg = L + λ/2 ‖∇_z L‖².

  If the fit sees the regularised gradients (see the places in ``dpsgd_optax.penalties``), let λ grow from 0, by a
  schedule: a second moment of them does harm early in training.

  Reads ``hvp`` (v ↦ Hv) or ``value_fn``, as :func:`dpsgd_optax.newton`; ``hvp_finite_difference(loss, params)`` will do
  too. Inside ``optax.masked`` the penalty is on the block of the other leaves. P is constant in this derivative.
  Cost: one product.

  Args:
    strength: λ ≥ 0, number or schedule.
    preconditioned: penalise ‖∇_z L‖, z = R⁻¹θ, in place of ‖∇L‖. Only as, or in, ``momentum``. Static.

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
  name = "add_gradient_norm_penalty"

  def step(updates, params, strength, *, hvp=None, value_fn=None, value=None, fitted=None, **extra):
    del extra
    vector = seen(fitted, f"{name}(preconditioned=True)").apply(updates) if preconditioned else updates
    return add(updates, strength, given_product(name, params, hvp, value_fn, value, _OTHERWISE)(vector))

  return penalty(name, step, strength=strength)


def gradient_norm(strength: optax.ScalarOrSchedule) -> Callable[..., Any]:
  """A ``direction`` of ``scale_by_preconditioner``: P (u + λ H P u), the gradient of L + λ/2 gᵀPg, preconditioned.

  u is what comes out of the momentum. For a mean of regularised gradients type
  ``momentum=chain(add_gradient_norm_penalty(λ, preconditioned=True), optax.ema(b1))`` instead.

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
  check_strength(strength)

  def direction(apply, updates, params, *, hvp=None, value_fn=None, value=None, count=0, **extra):
    del extra
    product = given_product("gradient_norm", params, hvp, value_fn, value, _OTHERWISE)
    return apply(add(updates, scheduled(strength, count), product(apply(updates))))

  return direction


def sharpness_aware(
  radius: optax.ScalarOrSchedule, *, preconditioned: bool = False, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
  """updates ← ∇L(θ + ρ v / √(gᵀv)), v = g or P g: the gradient where the loss is worst nearby, to first order.

  To first order in ρ this is the gradient of L + ρ‖∇L‖, or of L + ρ√(gᵀPg): the norm, not squared. Unlike
  ``optax.contrib.sam`` it can stand as ``momentum``, so that P is fitted on g alone, and knows ``preconditioned``.

  Reads ``value_fn``, params → loss on the batch of the gradient. Cost: one gradient beside the gradient.

  Args:
    radius: ρ ≥ 0, number or schedule, in units of the params (of z if ``preconditioned``).
    preconditioned: the ball is ‖R⁻¹ Δθ‖ ≤ ρ in place of ‖Δθ‖ ≤ ρ. Only as, or in, ``momentum``. Static.
    normalize: False: move by ρ v, which is a gradient-norm penalty of strength ρ, by a difference. Static.

  Raises:
    ValueError: for a negative radius; at trace time, without ``value_fn``, inside ``optax.masked`` or
      ``optax.partition``, or with ``preconditioned`` outside of ``scale_by_preconditioner``.

  Source: arXiv:2010.01412, Eq. 2 and 3.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss, params = lambda x: jnp.sum(x**2) / 2, jnp.array([3.0, 4.0])
    >>> tx = dpo.penalties.sharpness_aware(0.5)
    >>> tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)[0]
    Array([3.3, 4.4], dtype=float32)
  """
  name = "sharpness_aware"

  def step(updates, params, radius, *, value_fn=None, fitted=None, **extra):
    del extra
    check_automatic(updates)
    if value_fn is None:
      raise ValueError(f"`{name}` takes a second gradient, but `update` received no `value_fn`. Pass `value_fn=loss`.")
    if has_holes(params):
      raise ValueError(
        f"`{name}` evaluates the loss at all params, got some of them masked. Put it outside of `optax.masked` and "
        "`optax.partition`, or type `add_gradient_norm_penalty` with `hvp=hvp(loss, params)`."
      )
    vector = seen(fitted, f"{name}(preconditioned=True)").apply(updates) if preconditioned else updates
    if normalize:
      norm = jnp.sqrt(jnp.maximum(jnp.real(optax.tree.vdot(updates, vector)), 0))
      radius = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0)
    moved = jax.tree.map(lambda p, v: (p + radius * v).astype(jnp.result_type(p)), params, vector)
    return jax.tree.map(jnp.conj, jax.grad(value_fn)(moved))

  return penalty(name, step, radius=radius)
