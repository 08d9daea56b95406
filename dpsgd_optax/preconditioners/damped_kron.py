# SPDX-License-Identifier: Apache-2.0
"""DPSGD's preconditioner: Kronecker factors of each weight matrix, averaged over time, then damped.

Notation (arXiv papers cited where a formula comes from them; [paper] is Qadeer's DPSGD)
  W, G         a weight matrix (m, n) and its gradient; a tensor is seen as (all leading axes, last axis)
  Q_L, Q_R     upper triangular factors;  P_L = Q_LᵀQ_L (m, m),  P_R = Q_RᵀQ_R (n, n)
  Pbar         their weighted averages
  τ, η         adaptive damping (given to ``fit`` as ``damping``) and the constant below it; c = sqrt(τ + η)
  π            (tr Pbar_L / m) / (tr Pbar_R / n)
  U            the preconditioned gradient

This is a damping of the *factors*, in the space of P: more of it makes the step longer and closer to the plain
gradient, the opposite of damping the curvature (fitting on Hv + λv), which makes it shorter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check, check_not_negative, check_step_size
from dpsgd_optax.geometry.linalg import as_matrix_shape, kron_power, multiply
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer, quad, spectral
from dpsgd_optax.preconditioners._damped import sampled, unless_zero
from dpsgd_optax.preconditioners._factors import KronState, Layout, check_geometry, dense_if, initial, refit
from dpsgd_optax.preconditioners._lift import batched
from dpsgd_optax.tikhonov import Average, Form, factored, recursive


class DampedKronState(NamedTuple):
  """Attributes:
  kron: the undamped factors.
  count: (), int32, averages taken so far.
  average: (Pbar_L, Pbar_R), undamped; None without averaging.
  memory: what the average needs beside itself, or None.
  shifts: (3,), added to Pbar_L, to Pbar_R, and the multiple of G itself.
  """

  kron: KronState
  count: jax.Array
  average: Factors | None
  memory: Factors | None
  shifts: jax.Array


def _mean_eigenvalue(p: jax.Array) -> jax.Array:
  return jnp.mean(p if p.ndim == 1 else jnp.real(jnp.diagonal(p)))


def damped_kron(
  *,
  average: float | Average | None = 0.7,
  eta: float = 1e-5,
  form: Form = factored,
  geometry: Geometry = quad,
  normalizer: Normalizer = spectral,
  step_size: float = 0.1,
  repeats: int = 1,
  max_size: float = 2048,
  max_vector_size: float | None = 1024,
  stacked: Stacked = None,
  precision: Any = None,
) -> Preconditioner:
  """P = (Pbar_L + shift_L I) ⊗ (Pbar_R + shift_R I) on every leaf, seen as a matrix: DPSGD's P.

  Each ``fit`` moves the factors on a probe (Lie-group step, [paper] Eq. 49), then averages them (Eq. 47), then damps
  the averages with τ = ``damping`` (Eq. 36 or 46). On steps without a probe, ``advance`` does the last two.

  Args:
    average: β_max of Eq. 47 in [0, 1), or an :class:`Average` such as ``two_tap(0.7, 0.3)``; None: no averaging,
      and none kept in the state.
    eta: η, added to τ under the root; in squared units of P.
    form: ``tikhonov.factored`` (Eq. 46) or ``tikhonov.additive`` (Eq. 36).
    geometry: how the factors move; the default needs matrix products only, the paper's is ``eq`` (triangular solves).
    normalizer: ``spectral`` (with step_size 0.1) or ``max_abs`` (the paper's runs, with step_size 0.01).
    step_size: of the fit, in (0, 1].
    repeats: successive moves on one and the same probe (1 in the paper).
    max_size: a longer side gets a diagonal factor. Static.
    max_vector_size: vectors up to this length get a dense factor (k, k), longer ones a diagonal one, so 0 makes all
      diagonal; None leaves vectors and scalars to the plain gradient, at the same learning rate. Static.
    stacked: see :func:`dpsgd_optax.per_leaf`.
    precision: of the matrix products, as ``jax.lax.Precision``.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` with all four parts.

  Raises:
    ValueError: for a step size outside (0, 1], an average outside [0, 1), a negative eta, repeats below 1.

  Departures from the author's code, which the paper supports: the averages, not the instantaneous factors, are
  applied; they are averages of undamped factors; a conv kernel (kh, kw, in, out) is the matrix (kh·kw·in, out).

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.damped_kron()
    >>> state = p.init({"kernel": jnp.zeros((3, 3, 2, 4))})
    >>> [q.shape for q in state.buckets["3x3x2x4_float32"].kron.q]
    [(1, 18, 18), (1, 4, 4)]
  """
  check_step_size(step_size)
  check_geometry(geometry)
  check_not_negative(eta, "eta", "It is added to the damping under a square root. Try 1e-5.")
  check(lambda x: x >= 1, repeats, "repeats", "at least 1", "The paper moves once per probe: `repeats=1`.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use 1 to make every factor diagonal.")
  check(lambda x: x >= 0, max_vector_size, "max_vector_size", "not negative, or None", "None: plain gradient.")
  if average is not None and not isinstance(average, Average):
    average = recursive(average)

  def plain(shape) -> bool:
    return len(shape) < 2 and max_vector_size is None

  def layout(shape: tuple[int, ...]) -> Layout:
    limit = max_vector_size if len(shape) < 2 else max_size
    matrix = as_matrix_shape(shape)
    return Layout(matrix, tuple(dense_if(1 < d <= limit) for d in matrix))

  def init(x: jax.Array) -> DampedKronState | tuple:
    if plain(x.shape):
      return ()
    kron = initial(layout(x.shape), x.dtype, 1.0, geometry)
    # until something is averaged P is the identity; the first weight β_0 = 0 then forgets it
    first = None if average is None else kron.p
    memory = kron.p if average is not None and average.remembers else None
    return DampedKronState(kron, jnp.zeros((), jnp.int32), first, memory, jnp.zeros(3, jnp.finfo(x.dtype).dtype))

  def advance(state: DampedKronState | tuple, *, damping) -> DampedKronState | tuple:
    if not isinstance(state, DampedKronState):
      return state
    mean, memory = state.kron.p, state.memory
    if average is not None:
      mean, memory = average.advance(state.count, state.average, memory, state.kron.p)
    shifts = jnp.zeros_like(state.shifts)
    if damping is not None:
      c = jnp.sqrt(jnp.asarray(damping + eta, shifts.dtype))
      shifts = jnp.stack(form(_mean_eigenvalue(mean[0]), _mean_eigenvalue(mean[1]), c))
    kept = None if average is None else mean
    return DampedKronState(state.kron, state.count + 1, kept, memory, shifts.astype(state.shifts.dtype))

  def fit(state: DampedKronState | tuple, probe: Probe, *, key: jax.Array, damping) -> DampedKronState | tuple:
    if not isinstance(state, DampedKronState):
      return state
    if geometry.samples:
      probe = sampled(probe, key)

    def move(probe: Probe) -> KronState:
      shape = as_matrix_shape(probe.product.shape)
      h = probe.product.reshape(shape)
      v = None if probe.vector is None else probe.vector.reshape(shape)
      kron = state.kron
      for _ in range(repeats):
        kron = refit(kron, v, h, geometry=geometry, normalizer=normalizer, step_size=step_size, precision=precision)
      return jax.tree.map(lambda new, old: new.astype(old.dtype), kron, state.kron)

    return advance(state._replace(kron=unless_zero(probe.product, move, probe, state.kron)), damping=damping)

  def apply(state: DampedKronState | tuple, x: jax.Array) -> jax.Array:
    """U = (Pbar_L + s_L I) G (Pbar_R + s_R I) + c G."""
    if not isinstance(state, DampedKronState):
      return x
    g = x.reshape(as_matrix_shape(x.shape))
    left, right = state.kron.p if state.average is None else state.average
    s_left, s_right, c = state.shifts.astype(x.dtype)
    u = multiply(g, left, 0, precision) + s_left * g
    u = multiply(u, right, 1, precision) + s_right * u
    return (u + c * g).reshape(x.shape)

  def power(state: DampedKronState | tuple, x: jax.Array, exponent: Any) -> jax.Array:
    """((Pbar_L + s_L I) ⊗ (Pbar_R + s_R I) + c I)^exponent x."""
    if not isinstance(state, DampedKronState):
      return x
    factors = state.kron.p if state.average is None else state.average
    *shifts, c = state.shifts
    one = lambda p: jnp.eye(len(p), dtype=p.dtype) if p.ndim > 1 else jnp.ones_like(p)
    shifted = tuple(p + s * one(p) for p, s in zip(factors, shifts, strict=True))
    g = x.reshape(as_matrix_shape(x.shape))
    return kron_power(shifted, g, exponent, c, precision).reshape(x.shape)

  meaning = f"geometry={geometry.name}, form={getattr(form, '__name__', 'own')}"
  return batched(Preconditioner(init, fit, apply, advance, power=power, meaning=meaning), stacked)
