# SPDX-License-Identifier: Apache-2.0
"""P as it stands in one step: the extra argument `fitted` that `scale_by_preconditioner` hands to its transforms.

Notation
  P    the preconditioner just fitted, symmetric and positive
  R    a root, P = R Rᵀ: symmetric, R = P^½, unless the preconditioner has another
  z    the preconditioned ("intrinsic") variables, θ = R z
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.paths import map_with_holes
from dpsgd_optax.base import Preconditioner, is_static


class Fitted:
  """P of this step, and its powers and root where the preconditioner knows them.

  A tree may have holes (``optax.MaskedNode``, as under ``optax.masked``). They count as zeros and come back as holes:
  what acts is the block of P that belongs to the other leaves.

  Args:
    preconditioner: the value.
    state: its state, already fitted in this step; an attribute.
    like: any tree with the leaves of the params, for their shapes.
  """

  def __init__(self, preconditioner: Preconditioner, state: Any, like: Any):
    self._preconditioner, self.state, self._like = preconditioner, state, like

  def apply(self, x: Any) -> Any:
    """P x."""
    return self._block(self._preconditioner.apply, x)

  @property
  def diagonal(self) -> Any:
    """The diagonal of P as a tree like the params, or None if P is not known to be diagonal."""
    if not self._preconditioner.diagonal:
      return None
    ones = jax.tree.map(lambda x: jnp.ones(jnp.shape(x), working_dtype(jnp.result_type(x))), self._like)
    return jax.tree.map(jnp.abs, self._preconditioner.apply(self.state, ones))

  def power(self, x: Any, exponent: Any) -> Any:
    """P^exponent x. The exponents 0 and 1, as Python numbers, need nothing of the preconditioner."""
    if is_static(exponent) and exponent in (0, 1):
      return self.apply(x) if exponent else x
    if self._preconditioner.diagonal:
      return map_with_holes(x, self.diagonal, lambda a, d: a * d**exponent)
    if self._preconditioner.power is None:
      raise ValueError(
        f"a power of P is needed (exponent {exponent}), but this preconditioner has no `power`. Type `power=1` (in the "
        "preconditioned variables) or `power=0` (in the original ones), or use `kron`, `dense` or `second_moment`."
      )
    return self._block(self._preconditioner.power, x, exponent)

  def root(self, x: Any, inverse: bool = False) -> Any:
    """R x or R⁻¹ x: from the preconditioned variables to the params, or back."""
    p = self._preconditioner
    if p.root is not None:
      return self._block(p.root, x, inverse)
    if p.power is None and not p.diagonal:
      raise ValueError(
        "the preconditioned variables z = R⁻¹θ need a root of P = R Rᵀ, but this preconditioner has none of "
        "`diagonal`, `power` and `root`. Give your `Preconditioner` one of them, or type `kron` or `second_moment`."
      )
    return self.power(x, -0.5 if inverse else 0.5)

  def _block(self, product: Callable, x: Any, *more: Any) -> Any:
    filled = map_with_holes(x, self._like, lambda a, _: a, lambda like: jax.tree.map(jnp.zeros_like, like))
    return map_with_holes(x, product(self.state, filled, *more), lambda _, b: b)
