# SPDX-License-Identifier: Apache-2.0
"""The adaptive methods as a preconditioner: P = diag(1/D), D the root of the second moment of the gradient.

Notation
  h      what is observed: the gradient (whitening), or H v (Newton)
  v      the mean of |h|², or its sum
  D      √v̂ + ε, v̂ = v without the bias of its start at zero

Sources: AdaGrad, Duchi et al., JMLR 12 (2011); RMSProp, Tieleman and Hinton (2012); Adam, arXiv:1412.6980; as
preconditioners, arXiv:2410.00232.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check_fraction, check_not_negative
from dpsgd_optax.preconditioners._lift import batched


class SecondMomentState(NamedTuple):
  """Attributes:
  count: (), int32, fits.
  moment: shape of the parameter, v ≥ 0, in gradient².
  """

  count: jax.Array
  moment: jax.Array


def second_moment(
  decay: float | None = 0.999, eps: float = 1e-8, *, debias: bool = True, stacked: Stacked = None
) -> Preconditioner:
  """P = diag(1/D): what AdaGrad, RMSProp and Adam multiply the gradient by. Memory: one copy of the parameters.

    Adam     ``second_moment(0.999)`` with ``momentum=optax.ema(0.9)``
    RMSProp  ``second_moment(0.9, debias=False)``
    AdaGrad  ``second_moment(None)``, the sum in place of the mean

  Fitted on gradients it is theirs to the last bits: v ← βv + (1 − β)g². On Newton probes D is the norm of each row of
  H, the second moment of (Hv)_i, as AdaHessian's without its averaging over blocks. P = I until the first fit. Damped,
  P → (E g² + λ²)^(−½); for Newton probes D is that of the rows of H + λI.

  Args:
    decay: β, weight kept of the old mean, in [0, 1); None: the sum of all squares.
    eps: ε ≥ 0, added to the root, in units of the gradient.
    debias: divide v by 1 − βᵗ. A sum has no bias. Static.
    stacked: see :func:`dpsgd_optax.per_leaf`; P is the same with and without.

  Raises:
    ValueError: for a decay outside [0, 1) or a negative ``eps``.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> ours = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), momentum=optax.ema(0.9))
    >>> theirs, params, grads = optax.scale_by_adam(), jnp.zeros(2), jnp.array([1e-3, 10.0])
    >>> for tx in (ours, theirs):
    ...   tx.update(grads, tx.init(params), params)[0].round(3)
    Array([1., 1.], dtype=float32)
    Array([1., 1.], dtype=float32)
  """
  check_fraction(decay, "decay")
  check_not_negative(eps, "eps", "It bounds P by 1/eps. Try 1e-8.")

  def init(x: jax.Array) -> SecondMomentState:
    return SecondMomentState(jnp.zeros((), jnp.int32), jnp.zeros(x.shape, jnp.finfo(x.dtype).dtype))

  def fit(state: SecondMomentState, probe: Probe, *, key: jax.Array, damping) -> SecondMomentState:
    """v ← βv + (1 − β)(|h|² + λ²)."""
    del key
    lam = jnp.asarray(damping, state.moment.dtype)
    if probe.vector is None:
      square = jnp.abs(probe.product) ** 2 + lam**2
    else:
      square = jnp.abs(probe.product + lam * probe.vector) ** 2
    moment = state.moment + square if decay is None else decay * state.moment + (1 - decay) * square
    return SecondMomentState(state.count + 1, moment.astype(state.moment.dtype))

  def apply(state: SecondMomentState, x: jax.Array) -> jax.Array:
    weight = 1 - decay ** state.count.astype(state.moment.dtype) if debias and decay is not None else 1
    seen = state.count > 0
    d = jnp.sqrt(state.moment / jnp.where(seen, weight, 1)) + eps
    return x / jnp.where(seen, d, 1).astype(state.moment.dtype)

  return batched(Preconditioner(init, fit, apply, diagonal=True), stacked)
