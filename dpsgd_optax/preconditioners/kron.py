# SPDX-License-Identifier: Apache-2.0
"""Kronecker preconditioner: Q = q_1 ⊗ … ⊗ q_k, one factor per axis of each tensor.

Notation
  x        a parameter of shape (d_1, …, d_k), axes of length 1 left out; N elements
  q_i      dense (d_i, d_i) or diagonal (d_i,);  p_i = q_iᴴ q_i;  P = p_1 ⊗ … ⊗ p_k

How the factors move is said by a geometry, see `geometry.moves`.
"""

import math
import warnings
from typing import Any

import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, check, is_static
from dpsgd_optax.geometry.moves import Geometry, Normalizer, lipschitz
from dpsgd_optax.preconditioners._factors import (
  KronState,
  Layout,
  check_max_padding,
  factor_kind,
  kron_of_array,
  size_classes,
)
from dpsgd_optax.preconditioners._lift import per_leaf

MIN_LEAF = 64  # numbers that `max_skew` counts at least: an axis of 8 or less has a dense factor, that of a vector too


def check_state_dtype(dtype: Any, geometry: Geometry | None, step_size: Any) -> None:
  """Half precision keeps 8 bits: too few for P itself, and for the small steps of a Q."""
  if dtype is None:
    return
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`state_dtype` must be a real floating dtype or None, got {dtype}. Try `jnp.bfloat16`.")
  if jnp.finfo(dtype).bits >= 32:
    return
  if geometry is not None and geometry.fits_p:
    raise ValueError(
      f"`state_dtype` must be float32 at least for a geometry that fits P itself, got {jnp.dtype(dtype).name}: "
      "rounding costs P its definiteness. Use `geometry=dpsgd_optax.qeq`, which fits the same P, or leave out "
      "`state_dtype`."
    )
  if is_static(step_size) and step_size < 0.1:
    warnings.warn(
      f"with `state_dtype={jnp.dtype(dtype).name}` a step size of {step_size} is often below half a unit in the last "
      "place, so that the factors stand still. Use step_size=0.1 or more, or a float32 state.",
      stacklevel=3,
    )


def kept_in(group: Preconditioner, dtype: Any) -> Preconditioner:
  """The same group, which computes as before, with its factors kept in ``dtype`` between the steps."""

  def convert(state: KronState, to: Any) -> KronState:
    change = lambda factors: tuple(x if jnp.iscomplexobj(x) else x.astype(to) for x in factors)
    return state._replace(q=change(state.q), p=change(state.p))

  narrow = lambda state: convert(state, dtype)
  wide = lambda state, x: convert(state, jnp.finfo(x.dtype).dtype)
  return group._replace(
    init=lambda x: narrow(group.init(x)),
    fit=lambda state, probe, *, key: narrow(group.fit(wide(state, probe.product), probe, key=key)),
    apply=lambda state, x: group.apply(wide(state, x), x),
    power=group.power and (lambda state, x, exponent: group.power(wide(state, x), x, exponent)),
  )


def kron(
  *,
  max_size: float = 2048,
  max_skew: float = 1.0,
  geometry: Geometry | None = None,
  step_size: float = 0.1,
  init_scale: float | None = None,
  normalizer: Normalizer = lipschitz,
  max_padding: float = 2.0,
  stacked: Stacked = None,
  state_dtype: Any = None,
) -> Preconditioner:
  """P = ⊗ p_i on every leaf, one factor per axis.

  Fitted on Newton probes, P → ⊗|H_i + λ|⁻¹ if H = ⊗H_i; on gradients, P → (E ggᵀ)^(−½) of the best Kronecker form.
  An axis of length d gets a dense factor iff 1 < d ≤ ``max_size`` and d² ≤ ``max_skew`` · max(N, 64), otherwise a
  diagonal one: with the default the state is about as large as Adam's. Scalars and vectors longer than 8 are diagonal
  under that rule; on a vector of two, Newton's method with a diagonal factor does not get through Rosenbrock's valley.
  Parameters may be complex. Matrix products have the precision of ``jax.default_matmul_precision``.

  Args:
    max_size: the longest axis that may have a dense factor. Static (decides shapes). ``jnp.inf``: any.
    max_skew: a dense factor holds at most ``max_skew`` · max(N, 64) numbers. Static. ``jnp.inf``: all dense.
    geometry: how the factors move: ``pro``, ``quad``, ``qeq``, ``qep`` (matrix products only), ``eq`` (triangular
      solves), or ``geometry.quad4p``, ``geometry.pro4p``, which fit P itself and keep no Q. None: ``quad`` on gradients,
      where it is as good as ``pro`` and cheaper (``python -m benchmarks defaults``); ``pro`` on Newton probes, where
      ``quad`` does not settle if H is ill-conditioned.
    step_size: of the fit, in (0, 1]; the largest relative change of a factor per fit.
    init_scale: the initial Q = init_scale · I; None: set from the first probe that is not zero, for each matrix.
    normalizer: what the step is divided by: ``geometry.lipschitz``, ``geometry.spectral`` or ``geometry.max_abs``.
    max_padding: matrices of similar shape are padded with zeros and share a stack, which saves the launches of small
      ones, as long as the work of a fit grows by no more than this factor, at least 1. Wide layers are not padded. 1.0:
      only equal shapes share one. Static. P is the same.
    stacked: see :func:`dpsgd_optax.per_leaf`.
    state_dtype: of the factors between the steps; None: that of the parameters, float32 at least. With
      ``jnp.bfloat16`` they take half the memory; fits are computed in float32 all the same, and L stays there.
      Complex factors keep their dtype.

  Raises:
    ValueError: for a step size outside (0, 1], a scale, size or skew that is not positive, or a ``state_dtype`` that
      is not real, or below float32 for ``quad4p`` and ``pro4p``.

  Warns:
    UserWarning: if ``state_dtype`` is below float32 and ``step_size`` below 0.1.

  Departures from psgd_torch 2.0: factors are balanced at every fit, not at one in a hundred (P is the same); the
  norm is a deterministic lower bound; the initial scale is one per matrix; a matrix whose gradient is exactly zero
  keeps its factors.

  Source: arXiv:1803.09383; arXiv:2402.04553; arXiv:2402.11858.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.kron(init_scale=1.0)
    >>> state = p.init({"kernel": jnp.zeros((3, 50)), "bias": jnp.zeros(50)})
    >>> [q.shape for q in state.buckets["3x50_float32"].q]
    [(1, 3, 3), (1, 50)]
  """
  check_state_dtype(state_dtype, geometry, step_size)
  check_max_padding(max_padding)
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` to make every factor diagonal.")
  check(lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for diagonal factors only, 1.0 for Adam's size.")

  def layout(shape: tuple[int, ...]) -> Layout:
    kept = tuple(d for d in shape if d > 1) or (1,)
    limit = max_skew * max(math.prod(kept), MIN_LEAF)
    return Layout(kept, tuple(factor_kind(1 < d <= max_size and d * d <= limit) for d in kept))

  options = dict(geometry=geometry, normalizer=normalizer, step_size=step_size, init_scale=init_scale)
  group = kron_of_array(layout, **options)
  classes = size_classes(layout, geometry, max_padding)
  return per_leaf(group if state_dtype is None else kept_in(group, state_dtype), stacked, classes)
