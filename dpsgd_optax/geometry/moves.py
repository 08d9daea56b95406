# SPDX-License-Identifier: Apache-2.0
"""The one formula by which every factor of a Kronecker product moves, and the values that tell the geometries apart.

Notation
  Q = q_1 ⊗ … ⊗ q_k, P = QᴴQ; (v, h) the probe, v = None: integrated out
  a, b    the probe seen through Q
  T1, T2  the moments ⟨a a*⟩_i and ⟨b b*⟩_i, E ⟨b b*⟩_i where v is integrated out: (d, d), (d,), or a multiple of I
  E       T1 − T2, the (half) gradient of the criterion hᴴPh + vᴴP⁻¹v along the group
  L, μ    what the step is divided by, μ = step_size / L, so that ‖μE‖ ≤ step_size and q never leaves the group

Every fit is q_i ← move(q_i, project(T1 − T2), step_size / L). A geometry says where the probe is looked at
(lift), which part of E lies in the Lie algebra (project), and how q moves; a normalizer says what L is.

Sources: arXiv:1512.04202 (EQ), arXiv:2402.11858 and psgd_torch 2.0 (the inverse-free ones); arXiv:1803.09383 (Kron).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.geometry import linalg
from dpsgd_optax.geometry.linalg import hermitian, largest_diagonal, largest_entry, multiply, solve_adjoint, square
from dpsgd_optax.geometry.norms import procrustes, procrustes_step
from dpsgd_optax.geometry.seen import Seen
from dpsgd_optax.geometry.structured import LowRank

Factors = tuple[jax.Array, ...]


def _expected_of_v(q: Factors, shape: tuple[int, ...], seen: Seen | None = None) -> list:
  """E ⟨v v*⟩_i = (N/d_i) I of the N numbers that were seen, kept as the number N/d_i."""
  if seen is None:
    return [jnp.asarray(math.prod(shape) / d, jnp.finfo(x.dtype).dtype) for x, d in zip(q, shape, strict=True)]
  counts = [jnp.sum(s, dtype=jnp.finfo(x.dtype).dtype) for x, s in zip(q, seen, strict=True)]
  return [jnp.asarray(math.prod(counts[:i] + counts[i + 1 :]), x.dtype) for i, x in enumerate(counts)]


def _expected_of_inverse(q: Factors, shape: tuple[int, ...], seen: Seen | None = None) -> list:
  """E ⟨b b*⟩_i = s_i Π_{j≠i} tr s_j with b = Q⁻ᴴv and s = q⁻ᴴq⁻¹."""
  seen = [jnp.ones(d, bool) for d in shape] if seen is None else seen
  ones = [s.astype(x.dtype) if x.ndim == 1 else jnp.diag(s.astype(x.dtype)) for x, s in zip(q, seen, strict=True)]
  inverses = [solve_adjoint(one, x, 0) for one, x in zip(ones, q, strict=True)]
  traces = [jnp.sum(jnp.abs(x) ** 2) for x in inverses]
  others = [math.prod(traces[:i] + traces[i + 1 :]) for i in range(len(q))]
  return [linalg.gram(x, 0, factor) * other for x, factor, other in zip(inverses, q, others, strict=True)]


def unchanged(q, t):
  """A moment that every factor sees alike."""
  del q
  return t


class Geometry(NamedTuple):
  """Where the probe is looked at, and how a factor moves.

  Attributes:
    lift: (q, p, v, h) -> (a, b); b is None where v is.
    project: the part of a dense E that lies in the group's Lie algebra.
    move: (q, E, μ) -> q for a dense factor, homogeneous of degree one in q: the unit of q does not matter.
    move_diagonal: the same for a diagonal factor.
    samples: True if v should be drawn when whitening, not integrated out.
    expected: (q, shape, seen) -> E ⟨b b*⟩_i of each factor, v integrated out, of the slices that were seen (None: all).
    moment: (q, T) -> T as the factor sees it.
    fits_p: True if what is moved is P itself: its factors are then Hermitian positive and P = q.
    keeps_inverse: True if ``lift`` wants q⁻¹ in the place of p.
    name: by which a saved state tells its geometry.
  """

  lift: Callable
  project: Callable
  move: Callable
  move_diagonal: Callable
  samples: bool = False
  expected: Callable = _expected_of_v
  moment: Callable = unchanged
  fits_p: bool = False
  keeps_inverse: bool = False
  name: str = "own"

  @property
  def inverse_free(self) -> bool:
    """Whether a fit leaves zeros of q at the ends of its axes as they are, so that factors may be padded with them."""
    return self.lift is _through_p

  def factor_of_p(self, q: jax.Array) -> jax.Array:
    """The factor of P that belongs to a factor that is moved."""
    return q if self.fits_p else square(q)


class Normalizer(NamedTuple):
  """What the step of a factor is divided by: L ← max(memory · L + (1 − memory) · ℓ, ℓ), ℓ = measure(…).

  Attributes:
    measure: (T1, T2, E, norm) -> ℓ; T1 and T2 are None for a dense factor where ``of_difference``.
    memory: 0 divides by ℓ itself; with 0.9 a single outlier keeps the factors still for about 130 steps.
    size: what balancing makes equal among the factors.
    of_difference: True promises that ``measure`` looks at E alone: one product then makes E, where T1 and T2 take two.
  """

  measure: Callable
  memory: float
  size: Callable
  of_difference: bool = False


def _through_q(q, p, v, h):
  """a = Q h, b = Q⁻ᴴ v."""
  del p
  for i, factor in enumerate(q):
    h = multiply(h, factor, i)
    v = None if v is None else solve_adjoint(v, factor, i)
  return h, v


def _through_p(q, p, v, h):
  """a = P h, b = v: no inverse anywhere. Where p is not at hand (None), P h = Qᴴ(Q h)."""
  if p is not None:
    return linalg.sandwich(p, h), v
  for i, factor in enumerate(q):
    h = multiply(multiply(h, factor, i), jnp.conj(factor.T), i)
  return h, v


def _through_inverse(q, inverse, v, h):
  """a = Q h, b = Q⁻ᴴ v, the inverse being at hand."""
  for i, factor in enumerate(q):
    h = multiply(h, factor, i)
    v = multiply(v, jnp.conj(inverse[i].T), i)
  return h, v


def keep_all(e):
  """Every matrix lies in the Lie algebra."""
  return e


def _scale(q, e, mu):
  return q - mu * e * q


def _times(q, e, mu):
  return q - (e @ q) * mu


def _both_sides(q, e, mu):
  left = q - (e @ q) * mu
  return hermitian(left - (left @ e) * mu)


def _through_one_factor(q, t):
  """q T qᴴ: the moment of Ph or of v once the factor q is applied to them along its axis."""
  if isinstance(t, LowRank):
    return t.through(q)
  if q.ndim == 1:
    return jnp.real(q * jnp.conj(q)) * t
  if t.ndim == 0:
    return t * square(jnp.conj(q.T))
  return jnp.matmul(jnp.matmul(q, t), jnp.conj(q.T))


eq = Geometry(_through_q, linalg.triu, _times, _scale, samples=True, expected=_expected_of_inverse, name="eq")
"""q ← q − μ triu(E) q, q upper triangular, a = Qh, b = Q⁻ᴴv: the classic fit, equivariant under its group.
Two triangular solves per matrix, which are slow on GPUs. Whitening draws v; ``eq._replace(samples=False)`` integrates
it out, at the cost of an inverse of every dense factor. psgd_torch gave that up: it wants a better estimate of L."""
gl = Geometry(_through_inverse, keep_all, _times, _scale, samples=True, keeps_inverse=True, name="gl")
"""q ← q − μ E q with any invertible q, a = Qh, b = Q⁻ᴴv: equivariant under all invertible maps. For ``dense`` only,
where q⁻¹ is kept and follows by the identity of Woodbury: no solve, no triangle."""
qep = Geometry(_through_p, keep_all, _times, _scale, moment=_through_one_factor, name="qep")
"""q ← q − μ E q, a = q Ph, b = q v: matrix products only, two more per factor than ``qeq``."""
qeq = Geometry(_through_p, keep_all, lambda q, e, mu: q - (q @ e) * mu, _scale, name="qeq")
"""q ← q − μ q E, a = Ph, b = v: matrix products only. P is that of ``quad4p``, and cannot lose definiteness."""
quad = Geometry(
  _through_p,
  keep_all,
  lambda q, e, mu: _both_sides(q, e, mu / 2),
  lambda q, e, mu: q * (1 - mu * e / 2) ** 2,
  name="quad",
)
"""q ← sym((I − μE/2) q (I − μE/2)), q Hermitian positive: matrix products only."""
pro = Geometry(_through_p, keep_all, lambda q, e, mu: procrustes_step(_times(q, e, mu)), _scale, name="pro")
"""q ← q − μ E q, then one rotation towards the Hermitian positive matrices (the literature's Q^0.5 E Q^1.5):
an online Newton-Schulz iteration; matrix products only."""
quad4p = Geometry(_through_p, keep_all, _both_sides, lambda q, e, mu: q * (1 - mu * e) ** 2, fits_p=True, name="quad4p")
"""P ← sym((I − μE) P (I − μE)): ``qeq`` without its Q, at half the memory. Rounding can make P indefinite, so a state
below float32 is refused."""
pro4p = Geometry(
  _through_p, keep_all, lambda p, e, mu: hermitian(procrustes(_times(p, e, mu))), _scale, fits_p=True, name="pro4p"
)
"""P ← P − μ E P, then up to ten rotations towards the Hermitian positive matrices and the Hermitian part of what they
leave. A state below float32 is refused. A rotation divides the rounding of a nearly symmetric P by its own norm, so
that P cannot be fitted to the last bits."""


def _second_order(t1, t2, e, norm):
  del e
  if t1.ndim == 1:
    return jnp.max(t1 + t2)
  return norm(t1) + t2 if t2.ndim == 0 else norm(t1 + t2)


def _first_order(t1, t2, e, norm):
  del t1, t2
  return jnp.max(jnp.abs(e)) if e.ndim == 1 else norm(e)


lipschitz = Normalizer(_second_order, 0.9, largest_entry)
"""L tracks ‖T1 + T2‖, an estimate of the gradient's Lipschitz constant, with memory 0.9: psgd_torch 2.0."""
spectral = Normalizer(_first_order, 0.0, largest_diagonal, of_difference=True)
"""L = ‖E‖ by its lower bound, exact for a vector, without memory: DPSGD's rule, step size 0.1."""
max_abs = Normalizer(lambda t1, t2, e, norm: largest_entry(e), 0.0, largest_entry, of_difference=True)
"""L = max |E_ij| without memory: Li's rule of 2018, step size 0.01; much slower than the others."""
trace = Normalizer(lambda t1, t2, e, norm: t1.trace() + t2.trace(), 0.9, largest_entry)
"""L tracks tr(T1 + T2) with memory 0.9: for the outer products of a vector ‖T1‖ + ‖T2‖, at most twice ‖T1 + T2‖."""
