# SPDX-License-Identifier: Apache-2.0
"""Kronecker preconditioner: Q = q_1 ⊗ … ⊗ q_k, one factor per axis of each tensor.

Notation
  x        a parameter of shape (d_1, …, d_k), axes of length 1 left out; N elements
  q_i      dense (d_i, d_i) or diagonal (d_i,);  p_i = q_iᴴ q_i;  P = p_1 ⊗ … ⊗ p_k

How the factors move is said by a geometry, see `geometry.moves`.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
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


def check_state_dtype(dtype: Any, geometry: Geometry | None, step_size: Any, stochastic: bool) -> None:
  """Half precision keeps 8 bits: too few for P itself, and for the small steps of a Q."""
  narrow = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
  if stochastic and not narrow:
    raise ValueError(
      f"`stochastic_rounding` needs a `state_dtype` below float32, got {dtype}. Type `state_dtype=jnp.bfloat16`, or "
      "leave out `stochastic_rounding`."
    )
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
  if is_static(step_size) and step_size < 0.1 and not stochastic:
    warnings.warn(
      f"with `state_dtype={jnp.dtype(dtype).name}` a step size of {step_size} is often below half a unit in the last "
      "place, so that the factors stand still. Type `stochastic_rounding=True`, or use step_size=0.1 or more.",
      stacklevel=3,
    )


def rounded(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
  """x in a narrower dtype, up or down at random, so that the mean over many roundings is x.

  The nearest number would leave x where it is as long as its steps are below half a unit in the last place. What lies
  outside the range of ``dtype`` is rounded to the nearest.
  """
  near = x.astype(dtype)
  back = near.astype(x.dtype)
  other = jnp.nextafter(near, jnp.where(x > back, jnp.inf, -jnp.inf).astype(dtype))
  gap = jnp.abs(other.astype(x.dtype) - back)
  share = jnp.where(jnp.isfinite(gap) & (gap > 0), jnp.abs(x - back) / jnp.where(gap > 0, gap, 1), 0)
  return jnp.where(jax.random.uniform(key, x.shape, x.dtype) < share, other, near)


def kept_in(group: Preconditioner, dtype: Any, stochastic: bool) -> Preconditioner:
  """The same group, which computes as before, with its factors kept in ``dtype`` between the steps."""

  def convert(state: KronState, to: Callable[[jax.Array, int], jax.Array]) -> KronState:
    change = lambda factors: tuple(x if jnp.iscomplexobj(x) else to(x, i) for i, x in enumerate(factors))
    return state._replace(q=change(state.q), p=change(state.p))

  nearest = lambda state: convert(state, lambda x, i: x.astype(dtype))
  wide = lambda state, x: convert(state, lambda y, i: y.astype(jnp.finfo(x.dtype).dtype))

  def fit(state, probe, *, key, **options):
    new = group.fit(wide(state, probe.product), probe, key=key, **options)
    if not stochastic:
      return nearest(new)
    return convert(new, lambda x, i: rounded(x, dtype, jax.random.fold_in(key, i)))

  return group._replace(
    init=lambda x: nearest(group.init(x)),
    fit=fit,
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
  stochastic_rounding: bool = False,
  keep_p: bool = False,
  batch_size: int | None = None,
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
      solves), or ``geometry.quad4p``, ``geometry.pro4p``, which fit P itself and keep no Q. None: ``qeq`` on
      gradients, which is the cheapest and settles within 4 % of ``pro`` or lower on all seven problems of ``python -m
      benchmarks defaults``; ``pro`` on Newton probes, where ``quad`` settles lower on one of them and higher on two.
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
    stochastic_rounding: with a narrow ``state_dtype``, round up or down at random, so that small steps do not stall.
    keep_p: keep P beside Q. ``apply`` then costs one product per dense factor in place of two, and the factors take
      twice the memory. Worth it where layers are wide and batches small: an MLP of width 512 on batches of 256.
    batch_size: matrices of a stack that are fitted and applied at once, the others after them (``jax.lax.map``): less
      memory for many equal layers. None: all.

  Raises:
    ValueError: for a step size outside (0, 1], a scale, size or skew that is not positive, or a ``state_dtype`` that
      is not real, or below float32 for ``quad4p`` and ``pro4p``.

  Warns:
    UserWarning: if ``state_dtype`` is below float32, ``step_size`` below 0.1, and rounding is to the nearest.

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
  check_state_dtype(state_dtype, geometry, step_size, stochastic_rounding)
  check_max_padding(max_padding)
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` to make every factor diagonal.")
  check(lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for diagonal factors only, 1.0 for Adam's size.")

  def layout(shape: tuple[int, ...]) -> Layout:
    kept = tuple(d for d in shape if d > 1) or (1,)
    limit = max_skew * max(math.prod(kept), MIN_LEAF)
    return Layout(kept, tuple(factor_kind(1 < d <= max_size and d * d <= limit) for d in kept))

  options = dict(geometry=geometry, normalizer=normalizer, step_size=step_size, init_scale=init_scale, keep_p=keep_p)
  group = kron_of_array(layout, **options)
  classes = size_classes(layout, geometry, max_padding)
  kept = group if state_dtype is None else kept_in(group, state_dtype, stochastic_rounding)
  return per_leaf(kept, stacked, classes, batch_size)
