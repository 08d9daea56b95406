# SPDX-License-Identifier: Apache-2.0
"""One sandwich for every fit of a Kronecker factor, and the values that tell them apart.

Notation
  Q = q_1 ⊗ … ⊗ q_k, P = QᴴQ; (v, h) the probe, v = None: integrated out
  a, b    the probe seen through Q
  T1, T2  ⟨a a*⟩_i and ⟨b b*⟩_i, (d, d) dense or (d,) diagonal; T2 is the number N/d_i where v is integrated out
  E       T1 − T2, the (half) gradient of the criterion hᴴPh + vᴴP⁻¹v along the group
  L       what the step is divided by, so that ‖μE‖ ≤ step_size and q never leaves the group

Every fit is q_i ← move(q_i, (step_size / L) · project(T1 − T2)). A geometry says where the probe is looked at
(lift), which part of E lies in the Lie algebra (project), and how q moves; a normalizer says what L is.

Sources: arXiv:1512.04202 (EQ), arXiv:2402.11858 and psgd_torch 2.0 (the inverse-free ones); arXiv:1803.09383 (Kron).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.preconditioners._linalg import (
  balance,
  gram,
  hermitian,
  largest_diagonal,
  largest_entry,
  multiply,
  norm_bound,
  procrustes_step,
  solve_adjoint,
  tiny,
)

Factors = tuple[jax.Array, ...]


class Geometry(NamedTuple):
  """Where the probe is looked at, and how a factor moves.

  Attributes:
    lift: (q, p, v, h, precision) -> (a, b); b is None where v is and the geometry can integrate it out.
    project: the part of a dense E that lies in the group's Lie algebra.
    move: (q, E) -> q for a dense factor, E already scaled by step_size / L.
    move_diagonal: the same for a diagonal factor.
    samples: True if the geometry cannot integrate v out and wants a sample of it.
  """

  lift: Callable
  project: Callable
  move: Callable
  move_diagonal: Callable
  samples: bool = False


class Normalizer(NamedTuple):
  """What the step of a factor is divided by: L ← max(memory · L + (1 − memory) · ℓ, ℓ), ℓ = measure(…).

  Attributes:
    measure: (T1, T2, E, norm) -> ℓ.
    memory: 0 divides by ℓ itself; with 0.9 a single outlier keeps the factors still for about 130 steps.
    size: what balancing makes equal among the factors.
  """

  measure: Callable
  memory: float
  size: Callable


def _through_q(q, p, v, h, precision):
  """a = Q h, b = Q⁻ᴴ v."""
  del p
  for i, factor in enumerate(q):
    h = multiply(h, factor, i, precision)
    v = solve_adjoint(v, factor, i)
  return h, v


def _through_p(q, p, v, h, precision):
  """a = P h, b = v: no inverse anywhere."""
  del q
  for i, factor in enumerate(p):
    h = multiply(h, factor, i, precision)
  return h, v


def _keep(e):
  return e


def _scale(q, e):
  return q - e * q


def _quad(q, e):
  left = q - e @ q / 2
  return hermitian(left - left @ e / 2)


eq = Geometry(_through_q, jnp.triu, lambda q, e: q - e @ q, _scale, samples=True)
"""q ← q − μ triu(E) q, q upper triangular, a = Qh, b = Q⁻ᴴv: the classic fit, equivariant under its group.
Two triangular solves per matrix, which are slow on GPUs. Whitening samples v."""

qeq = Geometry(_through_p, _keep, lambda q, e: q - q @ e, _scale)
"""q ← q − μ q E, a = Ph, b = v: matrix products only. P is what fitting P itself by ``quad`` would give,
and it cannot lose positive-definiteness."""

quad = Geometry(_through_p, _keep, _quad, lambda q, e: q * (1 - e / 2) ** 2)
"""q ← sym((I − μE/2) q (I − μE/2)), q Hermitian positive: matrix products only."""

pro = Geometry(_through_p, _keep, lambda q, e: procrustes_step(q - e @ q), _scale)
"""q ← q − μ E q, then one rotation towards the Hermitian positive matrices (the literature's Q^0.5 E Q^1.5):
an online Newton-Schulz iteration; matrix products only."""


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

spectral = Normalizer(_first_order, 0.0, largest_diagonal)
"""L = ‖E‖, by its lower bound, without memory: DPSGD's rule (`specnorm`), step size 0.1."""

max_abs = Normalizer(lambda t1, t2, e, norm: jnp.max(jnp.abs(e)), 0.0, largest_entry)
"""L = max |E_ij| without memory: Li's rule of 2018, step size 0.01; much slower than the others."""


def second_moments(x, v, axis, dense, precision):
  """T1 or T2 of one factor; v integrated out: E ⟨v v*⟩_i = (N/d_i) I, kept as the number."""
  if v is None:
    return jnp.asarray(x.size / x.shape[axis], jnp.finfo(x.dtype).dtype)
  return gram(v, axis, dense, precision)


def fit_factors(
  q: Factors,
  p: Factors,
  lip: jax.Array,
  v: jax.Array | None,
  h: jax.Array,
  *,
  geometry: Geometry,
  normalizer: Normalizer,
  step_size,
  norms: tuple[Callable, ...] | None = None,
  precision=None,
) -> tuple[Factors, jax.Array]:
  """One fit of all factors on one probe, all from the same a and b (Jacobi, not Gauss-Seidel).

  Args:
    q: factors, dense (d_i, d_i) or diagonal (d_i,).
    p: qᴴq of each.
    lip: (k,), the L of each factor; 0 before the first fit.
    v: (d_1, …, d_k) probe vector, or None.
    h: its product, or the gradient; damped already.
    geometry: lift, project and move.
    normalizer: how L is measured.
    step_size: in (0, 1].
    norms: one norm estimate per factor in place of the deterministic bound, to replay recorded random numbers.
    precision: of the matrix products.

  Returns:
    The new factors, not balanced, and the new L.
  """
  a, b = geometry.lift(q, p, v, h, precision)
  moved, tracked = [], []
  for i, factor in enumerate(q):
    dense, norm = factor.ndim == 2, norm_bound if norms is None else norms[i]
    t1 = gram(a, i, dense, precision)
    t2 = second_moments(a, b, i, dense, precision)
    if not dense:
      e = t1 - t2
    elif t2.ndim == 0:
      e = geometry.project(t1 - t2 * jnp.eye(len(t1), dtype=t1.dtype))
    else:
      e = geometry.project(t1 - t2)
    measured = normalizer.measure(t1, t2, e, norm).astype(lip.dtype)
    bound = jnp.maximum(normalizer.memory * lip[i] + (1 - normalizer.memory) * measured, measured)
    e = e * (step_size / (bound + tiny(bound))).astype(e.real.dtype)
    moved.append((geometry.move if dense else geometry.move_diagonal)(factor, e))
    tracked.append(bound)
  return tuple(moved), jnp.stack(tracked)


__all__ = [
  "Geometry",
  "Normalizer",
  "balance",
  "eq",
  "fit_factors",
  "lipschitz",
  "max_abs",
  "pro",
  "qeq",
  "quad",
  "spectral",
]
