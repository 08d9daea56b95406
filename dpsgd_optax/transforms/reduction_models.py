# SPDX-License-Identifier: Apache-2.0
"""Models of how much a step lowers the loss: the `model` of `levenberg_marquardt`.

Each is (grads, step, hvp, *, rate) → M, a scalar in the unit of the loss, positive where the loss is to fall.

Notation
  g, s    gradient, and the step taken (what is added to the params)
  H, P    Hessian, preconditioner
  α, a    learning rate; the same after clipping, `rate`
"""

from collections.abc import Callable
from typing import Any

import jax

from dpsgd_optax._trees.arithmetic import dot


def half_slope(grads: Any, step: Any, hvp: Callable | None = None, *, rate: Any = None) -> jax.Array:
  """M = −½⟨g, s⟩: right for a full Newton step; for s = −α P g with P = H⁻¹ the ratio is 2 − α.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> float(dpo.half_slope(jnp.array([2.0]), jnp.array([-1.0])))
    1.0
  """
  del hvp, rate
  return -dot(grads, step) / 2


def newton_model(grads: Any, step: Any, hvp: Callable | None = None, *, rate: Any = None) -> jax.Array:
  """M = −⟨g, s⟩ (1 − a/2) for s = −a U: the quadratic model whose curvature is the inverse of the preconditioner.

  DPSGD's Eqs. 30 and 31 for the step really taken. ``levenberg_marquardt`` reads a from the state of
  :func:`dpsgd_optax.clipped_learning_rate`. No product with the Hessian.

  Raises:
    ValueError: if no rate is given.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> float(dpo.newton_model(jnp.array([2.0]), jnp.array([-1.0]), rate=0.5))
    1.5
  """
  del hvp
  if rate is None:
    raise ValueError(
      "`newton_model` needs the learning rate of the step, but no state of the inner transform has a field `rate`. "
      "End it in `clipped_learning_rate(...)`, or pass `model=quadratic_model` or `model=half_slope`."
    )
  return -dot(grads, step) * (1 - rate / 2)


def quadratic_model(grads: Any, step: Any, hvp: Callable | None = None, *, rate: Any = None) -> jax.Array:
  """M = −⟨g, s⟩ − ½⟨s, Hs⟩: right for every step, at the cost of one Hessian-vector product per judged step.

  Raises:
    ValueError: if no ``hvp`` is given.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> float(dpo.quadratic_model(jnp.array([2.0]), jnp.array([-1.0]), lambda v: 2.0 * v))
    1.0
  """
  del rate
  if hvp is None:
    raise ValueError(
      "`quadratic_model` needs a Hessian-vector product, but `update` received neither `hvp` nor `value_fn`. "
      "Pass `hvp=hvp(loss, params)`."
    )
  return -dot(grads, step) - dot(step, hvp(step)) / 2
