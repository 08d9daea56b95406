# SPDX-License-Identifier: Apache-2.0
"""How `gauss_newton` solves for its step: values for its argument `solver`.

Notation
  J, b       rows of the linearized residuals, (n, N), and the right-hand side, (n,)
  λ          the damping
  s          the step: argmin ‖J s + b‖² + λ ‖s‖²
  K, A       J Jᵀ (n, n) and Jᵀ J (N, N)
  L          lower triangular, L Lᵀ = K + λI or A + λI

| solver                 | s                          | memory     | takes                           |
|------------------------|----------------------------|------------|---------------------------------|
| `rows()`               | −Jᵀ (K + λI)⁻¹ b           | n N, n²    | few samples                     |
| `columns()`            | −(A + λI)⁻¹ Jᵀ b           | n N, N²    | few parameters                  |
| `columns(chunk=m)`     | the same                   | m N, N²    | few parameters, many samples    |
| `conjugate_gradients()`| the same, iterated         | N          | many of both                    |

All are the same step in exact arithmetic. **Digits.** To form K or A squares the condition of J. Where λ is above
their rounding, L is a Cholesky factor, and the step is corrected once by a residual formed with J itself ("corrected
seminormal equations", Björck, Numerical Methods for Least Squares Problems, 1996, §6.6.5); below it L comes from a QR
factorization of J, which squares nothing. So float32 keeps what it can at a λ of 1e-9 of the trace too.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.draws import normal_like
from dpsgd_optax.base import Preconditioner, Probe, check_period
from dpsgd_optax.curvature._linearized import Linearized

BLOCK = 4  # K is formed in so many blocks a side, of which those above the diagonal are left out
ROUNDING = 8  # λ below so many eps · tr K is below the rounding of K


class Solver(NamedTuple):
  """How the step of a linearized least-squares problem is computed.

  Attributes:
    name: as it is typed.
    bytes: (n, N, itemsize) -> the bytes of its matrices.
    init: params -> state; arrays of fixed shapes.
    prepare: (linearized, state, λ, key) -> (linearized, factorize, state, scale): ``factorize(λ)`` returns b ↦ s, and
      scale is tr K = tr A, or another number that is not finite if J is not.
  """

  name: str
  bytes: Callable[[int, int, int], int]
  init: Callable[[Any], Any]
  prepare: Callable[..., tuple]


def _stateless(params: Any) -> tuple:
  del params
  return ()


def _lower_gram(rows: jax.Array) -> jax.Array:
  """The lower triangle of rows · rowsᵀ, in blocks; what stands above the diagonal blocks is zero."""
  n = rows.shape[0]
  if n < 32 * BLOCK:
    return rows @ rows.T
  edges = [n * i // BLOCK for i in range(BLOCK + 1)]
  strips = [
    jnp.pad(rows[start:stop] @ rows[:stop].T, ((0, 0), (0, n - stop))) for start, stop in itertools.pairwise(edges)
  ]
  return jnp.concatenate(strips)


def _factor(gram: jax.Array, trace: jax.Array, damping: Any, matrix: Callable[[], jax.Array] | None) -> tuple:
  """(L, λ): by Cholesky, or where λ is below the rounding of ``gram`` by the QR factorization of ``matrix``, (·, k)."""
  eps = float(jnp.finfo(gram.dtype).eps)
  eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
  if matrix is None:
    damping = jnp.maximum(damping, ROUNDING * eps * trace)
    return jax.lax.linalg.cholesky(gram + damping * eye, symmetrize_input=False), damping
  damping = jnp.maximum(damping, eps ** (4 / 3) * trace)
  by_cholesky = lambda: jax.lax.linalg.cholesky(gram + damping * eye, symmetrize_input=False)
  by_qr = lambda: jnp.linalg.qr(jnp.concatenate([matrix(), jnp.sqrt(damping) * eye]), mode="r").T
  above = damping > ROUNDING * eps * trace
  if not isinstance(above, jax.core.Tracer):
    return (by_cholesky if above else by_qr)(), damping
  return jax.lax.cond(above, by_cholesky, by_qr), damping


def _inverse(lower: jax.Array, x: jax.Array) -> jax.Array:
  """(L Lᵀ)⁻¹ x."""
  half = jax.lax.linalg.triangular_solve(lower, x[:, None], left_side=True, lower=True)
  return jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)[:, 0]


def rows() -> Solver:
  """s = −Jᵀ (J Jᵀ + λI)⁻¹ b, a factorization n × n: for no more residuals than parameters.

  Example:
    >>> import dpsgd_optax as dpo
    >>> dpo.solvers.rows().bytes(400, 921, 8) / 2**20  # of 400 residuals of 921 parameters in float64
    8.06...
  """

  def prepare(given: Linearized, state, damping, key):
    del damping, key
    matrix, given = given.with_jacobian()
    gram = _lower_gram(matrix)
    trace = jnp.trace(gram)

    def factorize(damping):
      lower, damping = _factor(gram, trace, damping, lambda: matrix.T)
      root = jnp.sqrt(damping)

      def solve(b):
        """(s, t) is the shortest solution of J s + √λ t = −b; the second pair of solves mends what the first left."""
        y = _inverse(lower, b)
        s, t = -given.pull(y), -root * y
        y = _inverse(lower, -b - given.push(s) - root * t)
        return s + given.pull(y)

      return solve

    return given, factorize, state, trace

  return Solver("rows()", lambda n, size, item: item * (2 * n * size + 2 * n * n), _stateless, prepare)


def columns(chunk: int | None = None) -> Solver:
  """s = −(Jᵀ J + λI)⁻¹ Jᵀ b, a factorization N × N: for fewer parameters than residuals.

  Args:
    chunk: J is formed for so many samples at a time, and never as a whole; λ then counts as at least its rounding,
      8 eps tr(Jᵀ J). None: J as a whole.

  Raises:
    ValueError: for a ``chunk`` below 1.

  Example:
    >>> import dpsgd_optax as dpo
    >>> dpo.solvers.columns().bytes(100_000, 1000, 4) / 2**20, dpo.solvers.columns(500).bytes(100_000, 1000, 4) / 2**20
    (770.5..., 11.4...)
  """
  if chunk is not None:
    check_period(chunk, "chunk")

  def prepare(given: Linearized, state, damping, key):
    del damping, key
    if chunk is None or given.gram is None:
      matrix, given = given.with_jacobian()
      gram, rows_of = _lower_gram(matrix.T), lambda: matrix
    else:
      gram, rows_of = given.gram(chunk), None
    trace = jnp.trace(gram)

    def factorize(damping):
      lower, damping = _factor(gram, trace, damping, rows_of)

      def solve(b):
        s = -_inverse(lower, given.pull(b))
        return s - _inverse(lower, given.pull(b + given.push(s)) + damping * s)

      return solve

    return given, factorize, state, trace

  held = lambda n: n if chunk is None else min(n, chunk)
  count = lambda n, size, item: item * (2 * held(n) * size + 2 * size * size)
  return Solver("columns()" if chunk is None else f"columns(chunk={chunk})", count, _stateless, prepare)


def conjugate_gradients(
  preconditioner: Preconditioner | None = None, *, iterations: int = 50, tolerance: float = 1e-6, probes: int = 1
) -> Solver:
  """Products with J and Jᵀ only: conjugate gradients on (Jᵀ J + λI) s = −Jᵀ b, preconditioned by a fitted P.

  The residual is carried as a vector of n rows (CGLS, Björck 1996, §7.4), so that the condition of J is not squared
  where it is subtracted. P is fitted on each step to ``probes`` pairs (v, Jᵀ J v), damped by λ: P → (Jᵀ J + λI)⁻¹. This
  puts the preconditioners of this package to the use they have in linear algebra: an approximate P costs iterations,
  not accuracy.

  Args:
    preconditioner: ``kron()``, ``diagonal()``, ``lra()``, …; None: none.
    iterations: at most; each costs one product with J and one with Jᵀ.
    tolerance: stop where the preconditioned gradient has fallen to this fraction.
    probes: products for the fit of P on each step.

  Raises:
    ValueError: for ``iterations`` or ``probes`` below 1.

  Example:
    >>> import dpsgd_optax as dpo
    >>> dpo.solvers.conjugate_gradients(dpo.kron(), iterations=20).bytes(100_000, 1_000_000, 4) / 2**20
    19.8...
  """
  check_period(iterations, "iterations")
  check_period(probes, "probes")

  def fitted(given: Linearized, state, damping, key):
    """The state of P after the fits, and ‖J v‖², whose mean is tr K."""
    image = jnp.zeros(())
    for drawn in jax.random.split(key, probes):
      vector_key, fit_key = jax.random.split(drawn)
      vector = normal_like(vector_key, given.to_tree(jnp.zeros(given.size, given.residual.dtype)))
      image = given.push(given.to_vector(vector))
      if preconditioner is not None:
        probe = Probe(vector, given.to_tree(given.pull(image)))
        state = preconditioner.fit(state, probe, key=fit_key, damping=damping)
    return state, jnp.sum(image * image)

  def prepare(given: Linearized, state, damping, key):
    new, scale = fitted(given, state, damping, key)
    apply = lambda x: x if preconditioner is None else given.to_vector(preconditioner.apply(new, given.to_tree(x)))
    solve = lambda damping: lambda b: _cgls(given, apply, damping, b, iterations, tolerance)
    return given, solve, new, scale

  init = _stateless if preconditioner is None else preconditioner.init
  return Solver("conjugate_gradients()", lambda n, size, item: item * (5 * size + 2 * n), init, prepare)


def _cgls(given: Linearized, apply: Callable, damping: Any, b: jax.Array, iterations: int, tolerance: float):
  """s, by conjugate gradients on the normal equations with ρ = −b − J s carried along."""

  def step(carry):
    k, s, rho, d, gamma, first = carry
    w = given.push(d)
    alpha = gamma / (w @ w + damping * (d @ d))
    s, rho = s + alpha * d, rho - alpha * w
    q = given.pull(rho) - damping * s
    z = apply(q)
    new = q @ z
    return k + 1, s, rho, z + (new / gamma) * d, new, first

  q = given.pull(-b)
  z = apply(q)
  gamma = q @ z
  going = lambda c: (c[0] < iterations) & (c[4] > tolerance**2 * c[5])
  return jax.lax.while_loop(going, step, (0, jnp.zeros_like(q), -b, z, gamma, gamma))[1]
