# SPDX-License-Identifier: Apache-2.0
"""DPSGD's preconditioner: Kronecker factors of each weight matrix, averaged over time, then damped.

Notation ([paper] is M. U. Qadeer, Damped Preconditioned Stochastic Gradient Descent)
  G, U         the gradient of a weight matrix (m, n), and U = P G; a tensor is seen as (all leading axes, last axis)
  P_L, P_R     Q_LᵀQ_L (m, m) and Q_RᵀQ_R (n, n), the fitted factors;  Pbar: their weighted averages
  τ, η         adaptive damping (given to ``fit`` as ``damping``) and the constant below it; c = sqrt(τ + η)
  s_L, s_R     what is added to the eigenvalues of Pbar_L and of Pbar_R, see `tikhonov`

This is a damping of the *factors*, in the space of P: more of it makes the step longer and closer to the plain
gradient, the opposite of damping the curvature (fitting on Hv + λv), which makes it shorter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, Probe, check, check_not_negative
from dpsgd_optax.geometry.linalg import as_matrix_shape, kron_power, multiply
from dpsgd_optax.geometry.moves import Factors, Geometry, Normalizer, quad, spectral
from dpsgd_optax.preconditioners._damped import sampled, unless_zero
from dpsgd_optax.preconditioners._factors import (
  KronState,
  Layout,
  check_max_padding,
  check_options,
  factor_kind,
  factors_of_p,
  initial,
  move_factors,
  size_classes,
)
from dpsgd_optax.preconditioners._lift import batched
from dpsgd_optax.tikhonov import Average, Form, factored, recursive


class DampedKronState(NamedTuple):
  """Attributes:
  kron: the undamped factors.
  count: (), int32, averages taken so far.
  average: (Pbar_L, Pbar_R), undamped; None without averaging.
  memory: what the average needs beside itself, or None.
  shifts: (3,), added to Pbar_L, to Pbar_R, and the multiple of G itself.
  means: (2,), the mean eigenvalues of Pbar_L and Pbar_R.
  """

  kron: KronState
  count: jax.Array
  average: Factors | None
  memory: Factors | None
  shifts: jax.Array
  means: jax.Array

  def factors(self) -> Factors:
    """(Pbar_L, Pbar_R), undamped."""
    return factors_of_p(self.kron) if self.average is None else self.average


def damped_kron(
  *,
  average: float | Average | None = 0.8,
  eta: float = 1e-5,
  form: Form = factored,
  geometry: Geometry = quad,
  normalizer: Normalizer = spectral,
  step_size: float = 0.3,
  repeats: int = 1,
  max_size: float = 2048,
  max_vector_size: float | None = 1024,
  max_padding: float = 2.0,
  stacked: Stacked = None,
) -> Preconditioner:
  """P = (Pbar_L + s_L I) ⊗ (Pbar_R + s_R I) on every leaf, seen as a matrix: DPSGD's P.

  Each ``fit`` moves the factors on a probe (Eq. 49 of the paper), then averages them (Eq. 47), then damps the averages
  (Eq. 36 or 46). On steps without a probe, ``advance`` does the last two. Both take τ as ``damping``; None leaves the
  factors undamped, whatever η is.

  Args:
    average: β_max of Eq. 47 in [0, 1), or a ``tikhonov.Average`` such as ``tikhonov.two_tap(0.7, 0.3)``; None: no
      averaging, and none kept in the state.
    eta: η, added to τ under the root; in squared units of P.
    form: ``tikhonov.factored`` (Eq. 46) or ``tikhonov.additive`` (Eq. 36).
    geometry: see :func:`dpsgd_optax.kron`; the default needs matrix products only, the paper's is ``eq``.
    normalizer: ``spectral`` or ``max_abs`` (the paper's runs, with step_size 0.01).
    repeats: successive moves on one and the same probe (1 in the paper).
    max_size: a longer side gets a diagonal factor. Static.
    max_padding: see :func:`dpsgd_optax.kron`.
    max_vector_size: vectors up to this length get a dense factor (k, k), longer ones a diagonal one, so 0 makes all
      diagonal; None leaves vectors and scalars to the plain gradient, at the same learning rate. Static.
    step_size: see :func:`dpsgd_optax.kron`. The paper has 0.1, with β = 0.7 and a fit on every step. A larger step
      needs fewer fits, and a larger β averages its noise out.
    stacked: see :func:`dpsgd_optax.kron`.

  Raises:
    ValueError: for a step size outside (0, 1], an average outside [0, 1), a negative eta, repeats below 1.

  Departures from the author's code, which the paper supports: the averages, not the instantaneous factors, are
  applied; they are averages of undamped factors; a conv kernel (kh, kw, in, out) is the matrix (kh·kw·in, out).

  Source: M. U. Qadeer, Damped Preconditioned Stochastic Gradient Descent.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.damped_kron()
    >>> state = p.init({"kernel": jnp.zeros((3, 3, 2, 4))})
    >>> [q.shape for q in state.buckets["3x3x2x4_float32"].kron.q]
    [(1, 18, 18), (1, 4, 4)]
  """
  check_options(geometry, step_size)
  check_max_padding(max_padding)
  check_not_negative(eta, "eta", "It is added to the damping under a square root. Try 1e-5.")
  check(lambda x: x >= 1, repeats, "repeats", "at least 1", "The paper moves once per probe: `repeats=1`.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use 1 to make every factor diagonal.")
  check(lambda x: x >= 0, max_vector_size, "max_vector_size", "not negative, or None", "None: plain gradient.")
  if average is not None and not isinstance(average, Average):
    average = recursive(average)

  def layout(shape: tuple[int, ...]) -> Layout:
    limit = (max_vector_size or 0) if len(shape) < 2 else max_size
    matrix = as_matrix_shape(shape)
    return Layout(matrix, tuple(factor_kind(1 < d <= limit) for d in matrix))

  options = dict(geometry=geometry, normalizer=normalizer, step_size=step_size)
  each_step = average is not None and average.each_step
  keep_p = average is None or each_step

  def init(x: jax.Array) -> DampedKronState:
    kron = initial(layout(x.shape), x, 1.0, geometry, keep_p)
    # until something is averaged P is the identity; the first weight β_0 = 0 then forgets it
    first = None if average is None else factors_of_p(kron)
    memory = factors_of_p(kron) if average is not None and average.remembers else None
    zeros, ones = jnp.zeros(3, jnp.finfo(x.dtype).dtype), jnp.ones(2, jnp.finfo(x.dtype).dtype)
    return DampedKronState(kron, jnp.zeros((), jnp.int32), first, memory, zeros, ones)

  def averaged(state: DampedKronState, shape: Any = None) -> DampedKronState:
    """The average with the factors as they are now, and its mean eigenvalues; ``shape``: see `batched`."""
    current, memory = factors_of_p(state.kron), state.memory
    if average is not None:
      current, memory = average.advance(state.count, state.average, memory, current)
    traces = jnp.stack([jnp.sum(p if p.ndim == 1 else jnp.real(jnp.diagonal(p))) for p in current])
    sizes = jnp.array([len(p) for p in current], traces.dtype) if shape is None else _matrix_sizes(shape, traces.dtype)
    mean = None if average is None else current
    return DampedKronState(state.kron, state.count + 1, mean, memory, state.shifts, traces / sizes)

  def damp(state: DampedKronState, damping: Any) -> DampedKronState:
    shifts = jnp.zeros_like(state.shifts)
    if damping is not None:
      c = jnp.sqrt(jnp.asarray(damping + eta, shifts.dtype))
      shifts = jnp.stack(form(state.means[0], state.means[1], c)).astype(shifts.dtype)
    return state._replace(shifts=shifts)

  def advance(state: DampedKronState, *, damping) -> DampedKronState:
    return damp(averaged(state) if each_step else state, damping)

  def fit(state: DampedKronState, probe: Probe, *, key: jax.Array, damping, shape: Any = None) -> DampedKronState:
    if geometry.samples:
      probe = sampled(probe, key)

    kron = unless_zero(probe.product, lambda x: _refitted(state.kron, x, repeats, **options), probe, state.kron)
    return damp(averaged(state._replace(kron=kron), shape), damping)

  group = Preconditioner(init, fit, _product, advance, power=_power, meaning=_meaning(geometry, form))
  # an average that moves between the fits needs the sizes of its matrices, of which only a fit is told
  classes = None if each_step else size_classes(layout, geometry, max_padding)
  return batched(_matrices_only(group) if max_vector_size is None else group, stacked, classes)


def _meaning(geometry: Geometry, form: Form) -> str:
  return f"geometry={geometry.name}, form={getattr(form, '__name__', 'own')}"


def _refitted(kron: KronState, probe: Probe, repeats: int, **options: Any) -> KronState:
  """The factors after ``repeats`` moves on one probe; ``options`` as for `move_factors`."""
  matrix = as_matrix_shape(probe.product.shape)
  v, h = jax.tree.map(lambda x: x.reshape(matrix), (probe.vector, probe.product))
  new = kron
  for _ in range(repeats):
    new = move_factors(new, v, h, **options)
  return jax.tree.map(lambda new, old: new.astype(old.dtype), new, kron)


def _matrix_sizes(shape: jax.Array, dtype: Any) -> jax.Array:
  """`as_matrix_shape` of a shape that is an array of floats."""
  sizes = [jnp.prod(shape[:-1]), shape[-1]] if len(shape) > 1 else [jnp.prod(shape), jnp.ones((), shape.dtype)]
  return jnp.stack(sizes).astype(dtype)


def _product(state: DampedKronState, x: jax.Array) -> jax.Array:
  """U = (Pbar_L + s_L I) G (Pbar_R + s_R I) + c G."""
  g = x.reshape(as_matrix_shape(x.shape))
  left, right = state.factors()
  s_left, s_right, c = state.shifts.astype(x.dtype)
  u = multiply(g, left, 0) + s_left * g
  u = multiply(u, right, 1) + s_right * u
  return (u + c * g).reshape(x.shape)


def _power(state: DampedKronState, x: jax.Array, exponent: Any) -> jax.Array:
  """((Pbar_L + s_L I) ⊗ (Pbar_R + s_R I) + c I)^exponent x."""
  *shifts, c = state.shifts
  one = lambda p: jnp.eye(len(p), dtype=p.dtype) if p.ndim > 1 else jnp.ones_like(p)
  shifted = tuple(p + s * one(p) for p, s in zip(state.factors(), shifts, strict=True))
  return kron_power(shifted, x.reshape(as_matrix_shape(x.shape)), exponent, c).reshape(x.shape)


def _matrices_only(group: Preconditioner) -> Preconditioner:
  """``group``; vectors and scalars keep no state, (), and have P = I."""

  def unless_empty(function: Any, index: int) -> Callable:
    """``function``; with an empty state its argument ``index``: the state itself, or the updates."""
    return lambda *args, **options: function(*args, **options) if args[0] else args[index]

  return group._replace(
    init=lambda x: group.init(x) if x.ndim > 1 else (),
    fit=unless_empty(group.fit, 0),
    advance=unless_empty(group.advance, 0),
    apply=unless_empty(group.apply, 1),
    power=unless_empty(group.power, 1),
  )
