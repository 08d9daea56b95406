# SPDX-License-Identifier: Apache-2.0
"""Kronecker preconditioner: Q = q_1 ⊗ … ⊗ q_k, one factor per axis of each tensor.

Notation
  x        a parameter of shape (d_1, …, d_k), axes of length 1 left out; N elements
  q_i      dense (d_i, d_i) or diagonal (d_i,);  p_i = q_iᴴ q_i;  P = p_1 ⊗ … ⊗ p_k
  v, h     probe vector and its image under the curvature
  L        (k,) what the steps of the factors are divided by

Sources: Li, arXiv:1803.09383 (Kron), arXiv:2402.04553, arXiv:2402.11858; the geometries: `_geometry`.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe, check, check_step_size, is_static
from dpsgd_optax.preconditioners._geometry import Factors, Geometry, Normalizer, fit_factors, lipschitz, pro
from dpsgd_optax.preconditioners._lift import Stacked, per_leaf, sampled
from dpsgd_optax.preconditioners._linalg import balancing, multiply
from dpsgd_optax.preconditioners._power import kron_power
from dpsgd_optax.preconditioners._seen import in_use, slices_waited, unseen

SMALL = 64  # numbers: an axis of 8 or less has a dense factor for nothing, that of a vector too


class KronState(NamedTuple):
  """Attributes:
  q: the factors, (d_i, d_i) or (d_i,); parameter^(1/k) units of Q; the diagonal is positive.
    () where P is fitted itself.
  p: q_iᴴ q_i, kept so that ``apply`` costs one product per dense factor.
  lipschitz: (k,), 0 before the first fit.
  idle: (d_i,) of each axis, uint8, fits since each slice was seen; (): all slices take part in every fit.
  """

  q: Factors
  p: Factors
  lipschitz: jax.Array
  idle: Factors = ()


def with_factors(q: Factors, lipschitz: jax.Array, geometry: Geometry, precision=None, idle: Factors = ()) -> KronState:
  """The state for factors that a geometry has moved."""
  return KronState(() if geometry.fits_p else q, tuple(geometry.factor_of_p(x, precision) for x in q), lipschitz, idle)


def dense_factor(d: int, dtype: Any) -> jax.Array:
  return jnp.eye(d, dtype=dtype)


def diagonal_factor(d: int, dtype: Any) -> jax.Array:
  return jnp.ones((d,), jnp.finfo(dtype).dtype)


class Layout(NamedTuple):
  """How a parameter is looked at. Static, made anew from its shape at every trace.

  Attributes:
    shape: of the tensor that has one factor per axis.
    factors: (d, dtype) -> the identity of each factor.
    order: the axes of the parameter in the order in which they are merged into that tensor; None: as they are.
  """

  shape: tuple[int, ...]
  factors: tuple[Callable[[int, Any], Any], ...]
  order: tuple[int, ...] | None = None

  def look(self, x: jax.Array) -> jax.Array:
    return (x if self.order is None else jnp.transpose(x, self.order)).reshape(self.shape)

  def back(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if self.order is None:
      return y.reshape(shape)
    inverse = sorted(range(len(shape)), key=lambda i: self.order[i])
    return jnp.transpose(y.reshape([shape[i] for i in self.order]), inverse)


def initial(layout: Layout, dtype: Any, scale: float, geometry: Geometry) -> KronState:
  """Q = scale · I, P = scale² · I."""
  each = scale ** ((2 if geometry.fits_p else 1) / len(layout.shape))
  q = tuple(factor(d, dtype) * each for d, factor in zip(layout.shape, layout.factors, strict=True))
  idle = tuple(map(unseen, layout.shape))
  return with_factors(q, jnp.zeros(len(layout.shape), jnp.finfo(dtype).dtype), geometry, idle=idle)


def refit(
  state: KronState,
  v: jax.Array | None,
  h: jax.Array,
  *,
  geometry: Geometry,
  normalizer: Normalizer,
  step_size,
  gain: jax.Array | None = None,
  precision=None,
) -> KronState:
  """Balance, move, and square. Balancing leaves the product P, and so what the fit sees, as it is.

  It comes first because DPSGD averages the factors one by one, and the split between them is then part of the rule.

  Args:
    state: before the fit.
    v: probe vector, or None.
    h: its product, damped.
    geometry: how the factors move.
    normalizer: what the step is divided by.
    step_size: in (0, 1].
    gain: that Q is multiplied by before the fit; None: 1.
    precision: of the matrix products.
  """
  of_p = None if gain is None else gain**2
  q, idle = state.q or state.p, slices_waited(state.idle, h)
  q, lip = fit_factors(
    q,
    state.p if gain is None else times_smallest(state.p, of_p),
    state.lipschitz,
    v,
    h,
    geometry=geometry,
    normalizer=normalizer,
    step_size=step_size,
    multiples=balancing(q, normalizer.size, of_p if geometry.fits_p else gain),
    precision=precision,
    seen=list(map(in_use, idle)) or None,
  )
  return with_factors(q, lip, geometry, precision, idle)


def sandwich(p: Factors, x: jax.Array, precision=None) -> jax.Array:
  """P x = x ×_1 p_1 … ×_k p_k."""
  for i, factor in enumerate(p):
    x = multiply(x, factor, i, precision)
  return x


def check_geometry(geometry: Geometry) -> None:
  if geometry.keeps_inverse:
    raise ValueError(
      "the geometry `gl` keeps the inverse of a single matrix, got it for factors. Type `dense(geometry=gl)`."
    )


def first_scale(v: jax.Array | None, h: jax.Array) -> jax.Array:
  """The scale s of Q = s I that fits the first probe: s⁴ = sqrt(E v⁴…)/sqrt(E h⁴), with E v² = 1 when whitening.

  Written with |h| divided by its maximum, so that 1e±38 neither overflows nor vanishes. And s² = P is a normal number:
  below, XLA takes it for zero, and the parameter would stand still until P has grown.
  """
  size = jnp.abs(h)
  top = jnp.max(size)
  safe = jnp.where(top > 0, top, 1)
  from_h = (jnp.mean((size / safe) ** 4) ** 0.125 * jnp.sqrt(safe)) ** -1
  scale = from_h if v is None else from_h * jnp.mean(jnp.abs(v) ** 2) ** 0.25
  return jnp.maximum(scale, 1.1 * jnp.sqrt(jnp.finfo(scale.dtype).tiny))


def first_gain(lipschitz: jax.Array, v: jax.Array | None, h: jax.Array) -> jax.Array:
  """:func:`first_scale` at the first fit, which L = 0 tells, then 1: a branch, for it reads v and h twice."""
  one = lambda v, h: jnp.ones((), jnp.finfo(h.dtype).dtype)
  return jax.lax.cond(lipschitz > 0, one, first_scale, v, h)


def times_smallest(factors: Factors, gain: jax.Array) -> Factors:
  """gain · ⊗ factors, by way of the one of the fewest numbers."""
  sizes = [sum(x.size for x in jax.tree.leaves(q)) for q in factors]
  least = sizes.index(min(sizes))
  return tuple(q * gain.astype(q.dtype) if i == least else q for i, q in enumerate(factors))


def dense_if(wanted: bool) -> Callable[[int, Any], jax.Array]:
  return dense_factor if wanted else diagonal_factor


def group(
  layout: Callable[[tuple[int, ...]], Layout],
  *,
  geometry: Geometry,
  init_scale: float | None,
  **options: Any,
) -> Preconditioner:
  """The Kronecker preconditioner of one array under a layout; ``options`` as for :func:`refit`."""

  def init(x: jax.Array) -> KronState:
    return initial(layout(x.shape), x.dtype, 1.0 if init_scale is None else init_scale, geometry)

  def fit(state: KronState, probe: Probe, *, key: jax.Array) -> KronState:
    """q_i ← move(q_i, ⟨a a*⟩_i − ⟨b b*⟩_i, step_size / L_i)."""
    if geometry.samples:
      probe = sampled(probe, key)
    seen = layout(probe.product.shape)
    h = seen.look(probe.product)
    v = None if probe.vector is None else seen.look(probe.vector)
    gain = first_gain(state.lipschitz[0], v, h) if init_scale is None else None
    return refit(state, v, h, geometry=geometry, gain=gain, **options)

  def apply(state: KronState, x: jax.Array) -> jax.Array:
    seen = layout(x.shape)
    return seen.back(sandwich(state.p, seen.look(x), options.get("precision")), x.shape)

  def power(state: KronState, x: jax.Array, exponent: Any) -> jax.Array:
    seen = layout(x.shape)
    return seen.back(kron_power(state.p, seen.look(x), exponent, precision=options.get("precision")), x.shape)

  return Preconditioner(init, fit, apply, power=power, meaning=f"geometry={geometry.name}")


def check_state_dtype(dtype: Any, geometry: Geometry, step_size: Any) -> None:
  """Half precision keeps 8 bits: too few for P itself, and for the small steps of a Q."""
  if dtype is None:
    return
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`state_dtype` must be a real floating dtype or None, got {dtype}. Try `jnp.bfloat16`.")
  if jnp.finfo(dtype).bits >= 32:
    return
  if geometry.fits_p:
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
  """The same group, computing as before, with its factors kept in ``dtype`` between the steps."""

  def convert(state: KronState, to: Callable[[jax.Array], Any]) -> KronState:
    change = lambda factors: tuple(x if jnp.iscomplexobj(x) else x.astype(to(x)) for x in factors)
    return state._replace(q=change(state.q), p=change(state.p))

  narrow = lambda state: convert(state, lambda x: dtype)
  wide = lambda state, x: convert(state, lambda _: jnp.finfo(x.dtype).dtype)
  return Preconditioner(
    init=lambda x: narrow(group.init(x)),
    fit=lambda state, probe, *, key: narrow(group.fit(wide(state, probe.product), probe, key=key)),
    apply=lambda state, x: group.apply(wide(state, x), x),
    power=group.power and (lambda state, x, exponent: group.power(wide(state, x), x, exponent)),
    meaning=group.meaning,
  )


def kron(
  *,
  max_size: float = 2048,
  max_skew: float = 1.0,
  geometry: Geometry = pro,
  step_size: float = 0.1,
  init_scale: float | None = None,
  normalizer: Normalizer = lipschitz,
  stacked: Stacked = None,
  precision=None,
  state_dtype: Any = None,
) -> Preconditioner:
  """P = ⊗ p_i on every leaf, one factor per axis.

  Fitted on Newton probes, P → ⊗|H_i + λ|⁻¹ if H = ⊗H_i; on gradients, P → (E ggᵀ)^(−½) of the best Kronecker form.
  An axis of length d gets a dense factor iff 1 < d ≤ ``max_size`` and d² ≤ ``max_skew`` · max(N, 64), otherwise a
  diagonal one: with the default the state is about as large as Adam's. Scalars and vectors longer than 8 are diagonal
  under that rule; on a vector of two, Newton's method with a diagonal factor does not get through Rosenbrock's valley.

  Args:
    max_size: the longest axis that may have a dense factor. Static (decides shapes). ``jnp.inf``: any.
    max_skew: a dense factor holds at most ``max_skew`` · max(N, 64) numbers. Static. ``jnp.inf``: all dense.
    geometry: how the factors move: ``pro``, ``quad``, ``qeq``, ``qep`` (matrix products only), ``eq`` (triangular
      solves), or ``quad4p``, ``pro4p``, which fit P itself and keep no Q. In ``python -m benchmarks defaults``, four
      problems of whitening, ``quad`` has the loss of ``pro`` in 83 to 97 % of its time; but on Newton products of the
      ill-conditioned ``logistic`` it does not settle where ``pro`` does, and so ``pro`` is the default.
    step_size: of the fit, in (0, 1]; the largest relative change of a factor per fit.
    init_scale: the initial Q = init_scale · I; None: set from the first probe that is not zero, for each matrix.
    normalizer: what the step is divided by: ``lipschitz``, ``spectral`` or ``max_abs``.
    stacked: see :func:`dpsgd_optax.per_leaf`.
    precision: of the matrix products in ``fit`` and ``apply``, as ``jax.lax.Precision`` or ``DotAlgorithmPreset``.
    state_dtype: of the factors between the steps; None: that of the parameters, float32 at least. With
      ``jnp.bfloat16`` they take half the memory; fits are computed in float32 all the same, and L stays there.
      Complex factors keep their dtype.

  Returns:
    A :class:`dpsgd_optax.Preconditioner`. Complex parameters are supported.

  Raises:
    ValueError: for a step size outside (0, 1], a scale, size or skew that is not positive, or a ``state_dtype`` that
      is not real, or below float32 for ``quad4p`` and ``pro4p``.

  Warns:
    UserWarning: if ``state_dtype`` is below float32 and ``step_size`` below 0.1.

  Departures from psgd_torch 2.0: factors are balanced at every fit, not at one in a hundred (P is the same); the
  norm is a deterministic lower bound; the initial scale is one per matrix; a matrix whose gradient is exactly zero
  keeps its factors.

  Source: arXiv:1803.09383; arXiv:2402.11858.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.kron(init_scale=1.0)
    >>> state = p.init({"kernel": jnp.zeros((3, 50)), "bias": jnp.zeros(50)})
    >>> [q.shape for q in state.buckets["3x50_float32"].q]
    [(1, 3, 3), (1, 50)]
  """
  check_step_size(step_size)
  check_geometry(geometry)
  check_state_dtype(state_dtype, geometry, step_size)
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` to make every factor diagonal.")
  check(lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for diagonal factors only, 1.0 for Adam's size.")
  check(lambda x: x > 0, init_scale, "init_scale", "positive or None", "None sets it from the first probe.")

  def layout(shape: tuple[int, ...]) -> Layout:
    kept = tuple(d for d in shape if d > 1) or (1,)
    size = math.prod(kept)
    counted = max(size, SMALL)
    return Layout(kept, tuple(dense_if(1 < d <= max_size and d * d <= max_skew * counted) for d in kept))

  options = dict(geometry=geometry, step_size=step_size, normalizer=normalizer, precision=precision)
  found = group(layout, init_scale=init_scale, **options)
  return per_leaf(found if state_dtype is None else kept_in(found, state_dtype), stacked)
