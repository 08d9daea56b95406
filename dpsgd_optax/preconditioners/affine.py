# SPDX-License-Identifier: Apache-2.0
"""Two factors for every parameter, seen as a matrix: affine, and the pairs of scaling, whitening and normalisation.

Notation
  G        m × n matrix: the parameter with its axes merged; P G = (Q_lᵀQ_l) G (Q_rᵀQ_r); N = m n
  dense    upper triangular (d, d): whitening of features
  diagonal (d,): scaling of features
  arrow    diagonal and last column: normalisation of features, x ↦ D x + c, the last feature being the constant 1

All move by ``eq``, which is equivariant: training on transformed features is the same as training on the original ones.

Sources: arXiv:1803.09383 and arXiv:1809.10232 (the groups); psgd_tf, legacy psgd_torch; usmanqadeer1/DPSGD.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, check
from dpsgd_optax.geometry.linalg import as_matrix_shape
from dpsgd_optax.geometry.moves import Geometry, Normalizer, eq, lipschitz
from dpsgd_optax.geometry.structured import arrow_identity
from dpsgd_optax.preconditioners._factors import Layout, dense_factor, diagonal_factor, factor_kind, kron_of_array
from dpsgd_optax.preconditioners._lift import per_leaf


def squarest(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes that go to the rows, and those that go to the columns, so that m² + n² is least; of several the first."""
  axes = range(len(shape))
  candidates = [
    (rows, tuple(i for i in axes if i not in rows)) for count in axes for rows in itertools.combinations(axes, count)
  ]
  return min(candidates, key=lambda parts: sum(d * d for d in _sides(shape, parts)))


def _sides(shape: tuple[int, ...], parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
  """The lengths of the axes into which the parts are merged."""
  return tuple(math.prod(shape[i] for i in part) for part in parts)


def affine(
  *,
  max_size: float = 2048,
  max_skew: float = 1.0,
  geometry: Geometry = eq,
  step_size: float = 0.1,
  init_scale: float | None = None,
  normalizer: Normalizer = lipschitz,
  stacked: Stacked = None,
) -> Preconditioner:
  """P = P_l ⊗ P_r on every leaf, seen as the matrix that is nearest to a square one.

  Of all ways to distribute the axes of a tensor over rows and columns, the one with the least m² + n² is taken; a conv
  kernel (3, 3, 64, 64) becomes 192 × 192 where ``kron`` has four factors. Vectors have one factor.

  Args:
    max_skew: a side d is dense iff d ≤ ``max_size`` and d² ≤ ``max_skew`` · N. Static. ``jnp.inf``: all are.
    max_size, geometry, step_size, init_scale, normalizer, stacked: see :func:`dpsgd_optax.kron`.

  Raises:
    ValueError: for a step size outside (0, 1], or a scale, size or skew that is not positive.

  Source: arXiv:2402.04553 (Affine).

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> state = dpo.affine(max_skew=jnp.inf).init({"kernel": jnp.zeros((3, 3, 8, 8))})
    >>> [q.shape for q in state.buckets["3x3x8x8_float32"].q]
    [(1, 24, 24), (1, 24, 24)]
  """
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` to make both factors diagonal.")
  check(lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for diagonal factors only.")

  def layout(shape: tuple[int, ...]) -> Layout:
    parts = squarest(shape) if len(shape) > 1 else (tuple(range(len(shape))),)
    matrix, limit = _sides(shape, parts), max_skew * math.prod(shape)
    factors = tuple(factor_kind(1 < d <= max_size and d * d <= limit) for d in matrix)
    return Layout(matrix, factors, tuple(itertools.chain(*parts)))

  return _lifted(layout, geometry, step_size, init_scale, normalizer, stacked)


def scan(
  *,
  bias_row: bool = True,
  step_size: float = 0.1,
  init_scale: float | None = None,
  normalizer: Normalizer = lipschitz,
  stacked: Stacked = None,
) -> Preconditioner:
  """Scaling and normalisation: an arrow-head on the inputs of m × n kernels, a diagonal on the outputs. O(m + n).

  Made for kernels (…, in + 1, out) whose last row is the bias, the input being extended by a constant 1. Training is
  then invariant under a shift and a rescaling of each input feature, and under a rescaling of each output: batch
  normalisation of the inputs by the optimizer. Kernels (h, w, in, out) are seen as (h·w·in, out). Vectors are scaled.
  Parameters must be real. The state holds 4 m + 2 n numbers.

  Args:
    bias_row: False: the kernels have no bias row; inputs are then scaled, not shifted, and both factors are diagonal.
    step_size, init_scale, normalizer, stacked: see :func:`dpsgd_optax.kron`.

  Raises:
    ValueError: for a step size outside (0, 1], a scale that is not positive, or complex parameters.

  Departure: in Flax's layout rows are inputs, so the arrow-head is the left factor; psgd_torch has it on the right.

  Source: legacy psgd_torch (SCAN); "scan" of usmanqadeer1/DPSGD, whose reverse arrow-head is the same matrix.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> state = dpo.scan().init(jnp.zeros((5, 3)))
    >>> arrow, scale = state.buckets["5x3_float32"].q
    >>> arrow.diagonal.shape, arrow.column.shape, scale.shape
    ((1, 5), (1, 5), (1, 3))
  """
  left = arrow_identity if bias_row else diagonal_factor
  return _lifted(_pair(left, diagonal_factor), eq, step_size, init_scale, normalizer, stacked)


def scaw(
  *,
  step_size: float = 0.1,
  init_scale: float | None = None,
  normalizer: Normalizer = lipschitz,
  stacked: Stacked = None,
) -> Preconditioner:
  """Scaling and whitening: a dense triangular factor on the inputs of m × n kernels, a diagonal one on the outputs.

  With the bias as the last row of the kernel, training is invariant under all affine maps of the inputs under which a
  feature receives only itself, later ones and a constant. One of them whitens the inputs: doing so gains nothing.
  Arguments and errors are those of :func:`dpsgd_optax.scan`.

  Source: legacy psgd_torch (SCAW); "scaw" of usmanqadeer1/DPSGD.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> [q.shape for q in dpo.scaw().init(jnp.zeros((5, 3))).buckets["5x3_float32"].q]
    [(1, 5, 5), (1, 3)]
  """
  return _lifted(_pair(dense_factor, diagonal_factor), eq, step_size, init_scale, normalizer, stacked)


def _pair(left: Any, right: Any) -> Callable[[tuple[int, ...]], Layout]:
  """The layout of matrices with one factor on the rows and one on the columns; vectors are scaled."""

  def layout(shape: tuple[int, ...]) -> Layout:
    if len(shape) < 2:
      return Layout((math.prod(shape),), (diagonal_factor,))
    return Layout(as_matrix_shape(shape), (left, right))

  return layout


def _lifted(layout, geometry, step_size, init_scale, normalizer, stacked) -> Preconditioner:
  """The preconditioner of all leaves for a layout of one."""
  options = dict(geometry=geometry, normalizer=normalizer, step_size=step_size, init_scale=init_scale)
  return per_leaf(kron_of_array(layout, **options), stacked)
