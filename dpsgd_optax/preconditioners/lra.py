# SPDX-License-Identifier: Apache-2.0
"""Low-rank approximation: Q = (I + U Vᵀ) diag(d), one vector for all parameters.

Notation
  n, r     number of parameters, rank
  w        (n, 2r), the columns of U, then those of V
  K        I + VᵀU, (r, r): (I + UVᵀ)⁻¹ = I − U K⁻¹ Vᵀ (Woodbury)
  v, h     probe vector and its image under the damped curvature
  x, y     d ⊙ h and v ⊘ d
  a, b     Qh = x + U t with t = Vᵀx;  Q⁻ᵀv = y − V c with Kᵀc = Uᵀy
  e, f     Ph ⊘ d = a + V s with s = Uᵀa = Uᵀx + UᵀU t;  d ⊙ P⁻¹v = b − U z with K z = Vᵀb

What costs time is to read w. The inner products of its columns, wᵀw, are kept in the state, so that P g reads w twice,
and a fit four times: for the inner products with x and y, for a, b, e, f, to move it, and for the new wᵀw.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import Preconditioner, Probe, check, check_real, check_step_size
from dpsgd_optax.geometry.fit import check_init_scale, scale_before_fit, tracked_step
from dpsgd_optax.geometry.seen import count_idle, idle_counters, zero_unseen
from dpsgd_optax.preconditioners._damped import sampled
from dpsgd_optax.preconditioners._views import raveled

BALANCED_EVERY = 10  # fits


class LRAState(NamedTuple):
  """Attributes:
  w: (n, 2r), U and V side by side.
  gram: (2r, 2r), wᵀw.
  d: (n,), the diagonal; positive.
  lipschitz: (3,), what the steps of d, U and V are divided by; 0 before the first fit.
  idle: (n,), uint8, fits since each entry was seen; (): all take part in every fit.
  """

  w: jax.Array
  gram: jax.Array
  d: jax.Array
  lipschitz: jax.Array
  idle: Any = ()


class ProbeThroughQ(NamedTuple):
  """The probe seen through Q, and what of U and V the steps need. See the notation of the module."""

  k: jax.Array
  a: jax.Array
  b: jax.Array
  e: jax.Array
  f: jax.Array
  y: jax.Array
  t: jax.Array
  s: jax.Array
  c: jax.Array
  z: jax.Array


def state_of(w: jax.Array, d: jax.Array, lipschitz: jax.Array, idle: Any = ()) -> LRAState:
  """The state with the inner products of the columns of ``w``."""
  return LRAState(w, jnp.matmul(w.T, w), d, lipschitz, idle)


def blocks(gram: jax.Array) -> jax.Array:
  """(2, 2, r, r): [[UᵀU, UᵀV], [VᵀU, VᵀV]]."""
  rank = len(gram) // 2
  return gram.reshape(2, rank, 2, rank).swapaxes(1, 2)


def products_with(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Uᵀx and Vᵀx."""
  ux, vx = jnp.split(jnp.matmul(x, w), 2)
  return ux, vx


def balanced(state: LRAState) -> LRAState:
  """The same Q, up to O(ε⁴), with α = UᵀU and β = VᵀV nearer to each other: ε is the tilt of U and V."""
  (alpha, _), (_, beta) = blocks(state.gram)
  rho = (jnp.trace(alpha) / jnp.trace(beta)) ** 0.25
  alpha, beta = alpha / rho**2, beta * rho**2
  tilt = 0.1 * (alpha - beta) / (jnp.trace(alpha) + jnp.trace(beta))
  eye, half = jnp.eye(len(alpha), dtype=alpha.dtype), tilt @ tilt / 2
  mix = jax.scipy.linalg.block_diag((eye - tilt + half) / rho, (eye + tilt + half) * rho)
  return state._replace(w=jnp.matmul(state.w, mix), gram=mix @ state.gram @ mix)


def probe_through_q(state: LRAState, v: jax.Array, h: jax.Array) -> ProbeThroughQ:
  """Everything that depends on w, in two passes over it."""
  x, y = state.d * h, v / state.d
  (uu, _), (vu, vv) = blocks(state.gram)
  k = jnp.eye(len(vu), dtype=vu.dtype) + vu
  (ux, vx), (uy, vy) = (jnp.split(inner, 2) for inner in jnp.matmul(jnp.stack([x, y]), state.w))
  lu = jax.scipy.linalg.lu_factor(k)
  t, c = vx, jax.scipy.linalg.lu_solve(lu, uy, trans=1)
  s = ux + uu @ t
  z = jax.scipy.linalg.lu_solve(lu, vy - vv @ c)
  # the weights of the columns of U and of V in a − x, b − y, e − a, f − b
  zero = jnp.zeros_like(t)
  sums = jnp.concatenate([jnp.stack([t, zero, zero, -z], 1), jnp.stack([zero, -c, s, zero], 1)])
  ax, by, ea, fb = jnp.matmul(state.w, sums).T
  a, b = x + ax, y + by
  return ProbeThroughQ(k, a, b, a + ea, b + fb, y, t, s, c, z)


def move_along(
  state: LRAState, v: jax.Array, h: jax.Array, seen: ProbeThroughQ, d_step: Any, step: Any, of_u: Any
) -> LRAState:
  """d ← d − μ_d (h ⊙ Ph − v ⊙ P⁻¹v) ⊙ d, and either

  U ← U − μ [a (Vᵀa)ᵀ − b (Vᵀb)ᵀ] K, or V ← V − μ (I + V Uᵀ) [a (Uᵀa)ᵀ − b (Uᵀb)ᵀ] = V − μ [e sᵀ − y cᵀ].

  Neither d nor the rows of U and V move where an entry was not seen lately. ``d_step``: μ_d, scalar or (n,);
  ``step``: μ of the factor that moves; ``of_u``: whether that is U.
  """
  idle = count_idle(state.idle, h != 0)
  d = state.d - d_step * zero_unseen(h * seen.e * state.d - v * seen.f / state.d, idle) * state.d
  va, vb = seen.k @ seen.t, seen.k @ seen.z
  zero = jnp.zeros_like(va)
  by_u = jnp.stack([jnp.concatenate([seen.k.T @ va, zero]), jnp.concatenate([-(seen.k.T @ vb), zero])])
  by_v = jnp.stack([jnp.concatenate([zero, seen.s]), jnp.concatenate([zero, -seen.c])])
  first, second = (step * jnp.where(of_u, by_u[i], by_v[i]) for i in range(2))
  left, right = (zero_unseen(jnp.where(of_u, x, y), idle) for x, y in ((seen.a, seen.e), (seen.b, seen.y)))
  w = state.w - left[:, None] * first[None] - right[:, None] * second[None]
  return state_of(w, d, state.lipschitz, idle)


def move_low_rank(
  state: LRAState, v: jax.Array, h: jax.Array, of_u: jax.Array, *, step_size: Any, memory: float = 0.9
) -> LRAState:
  """One fit: moves d, and U where ``of_u``, otherwise V; each step is divided by its L."""
  if state.w.size == 0:
    return _move_diagonal(state, v, h, step_size, memory)
  seen = probe_through_q(state, v, h)
  norm, gram = jnp.linalg.norm, blocks(state.gram)
  length = lambda i, x: jnp.sqrt(jnp.maximum(x @ (gram[i, i] @ x), 0))  # of U x or V x
  va, vb = seen.k @ seen.t, seen.k @ seen.z
  a, b = norm(seen.a), norm(seen.b)
  of_d = jnp.max(jnp.abs(h * seen.e * state.d)) + jnp.max(jnp.abs(v * seen.f / state.d))
  measured = [of_d, a * length(1, va) + b * length(1, vb), a * length(0, seen.s) + b * length(0, seen.c)]
  step, lip = tracked_step(step_size, state.lipschitz, jnp.stack(measured), memory)
  new = move_along(state, v, h, seen, step[0], jnp.where(of_u, step[1], step[2]), of_u)
  taken = jnp.stack([jnp.array(True), jnp.asarray(of_u), ~jnp.asarray(of_u)])
  return new._replace(lipschitz=jnp.where(taken, lip, state.lipschitz))


def _move_diagonal(state: LRAState, v: jax.Array, h: jax.Array, step_size: Any, memory: float) -> LRAState:
  """The same for rank 0: d ← d − μ_d (h ⊙ Ph − v ⊙ P⁻¹v) ⊙ d."""
  idle = count_idle(state.idle, h != 0)
  hp, vp = h * (state.d**2 * h), zero_unseen(v * (v / state.d**2), idle)
  measured = jnp.max(jnp.abs(hp)) + jnp.max(jnp.abs(vp))
  step, lip = tracked_step(step_size, state.lipschitz[0], measured, memory)
  return state._replace(d=state.d - step * (hp - vp) * state.d, lipschitz=state.lipschitz.at[0].set(lip), idle=idle)


def product(state: LRAState, x: jax.Array) -> jax.Array:
  """P x = d ⊙ (I + V Uᵀ)(I + U Vᵀ)(d ⊙ x)."""
  a = state.d * x
  ua, va = products_with(state.w, a)
  return state.d * (a + jnp.matmul(state.w, jnp.concatenate([va, ua + blocks(state.gram)[0, 0] @ va])))


def root(state: LRAState, x: jax.Array, inverse: bool) -> jax.Array:
  """Qᵀx = d ⊙ (I + V Uᵀ) x, or its inverse, (I − V K⁻ᵀ Uᵀ)(x ⊘ d) with Kᵀ = I + UᵀV."""
  times_v = lambda c: jnp.matmul(state.w, jnp.concatenate([jnp.zeros_like(c), c]))
  if not inverse:
    return state.d * (x + times_v(products_with(state.w, x)[0]))
  y = x / state.d
  uv = blocks(state.gram)[0, 1]
  return y - times_v(jnp.linalg.solve(jnp.eye(len(uv), dtype=uv.dtype) + uv, products_with(state.w, y)[0]))


def lra(*, rank: int = 10, step_size: float = 0.1, init_scale: float | None = None, key: int = 0) -> Preconditioner:
  """P = QᵀQ with Q = (I + U Vᵀ) diag(d): a diagonal and a low rank, over all parameters as one vector.

  Memory: 2 rank + 1 copies of the parameters, which must be real. The diagonal fits the scales, the r directions both
  the largest and the smallest eigenvalues that remain. Newton probes make it exact, slowly, for H = diag + rank r; on
  gradients it whitens, v being drawn. One coin says whether U or V moves, another when to balance them.

  Args:
    rank: r, 0 ≤ r. Static (decides shapes).
    step_size, init_scale: see :func:`dpsgd_optax.kron`; the scale is that of d.
    key: of the initial U and V, normal and each of Frobenius norm √0.1: with U = V = 0 neither would ever move.

  Raises:
    ValueError: for a negative rank, a step size outside (0, 1], a scale that is not positive, complex parameters.

  Departures from psgd_torch 2.0: when whitening, v is not the damping noise but a draw of its own; U and V are balanced
  on one fit in ten in place of every one, which is 8 n r² of the 10 n r² + 28 n r flops of its fit.

  Source: arXiv:2402.04553 (LRA, "UVd"); the update and its balancing: psgd_torch 2.0.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> state = dpo.lra(rank=2).init({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    >>> state.buckets["16_float32"].w.shape
    (1, 16, 4)
  """
  check(lambda x: x >= 0, rank, "rank", "not negative", "0 is a diagonal preconditioner; 10 is usual.")
  check_step_size(step_size)
  check_init_scale(init_scale)

  def init(x: jax.Array) -> LRAState:
    check_real(x.dtype, "lra")
    u, v = jax.random.normal(jax.random.key(key), (2, x.size, rank), x.dtype)
    size = lambda m: jnp.sqrt(0.1 / jnp.maximum(jnp.sum(m * m), jnp.finfo(x.dtype).tiny))
    w = jnp.concatenate([size(u) * u, size(v) * v], 1)
    d = jnp.full(x.shape, 1.0 if init_scale is None else init_scale, x.dtype)
    return state_of(w, d, jnp.zeros(3, x.dtype), idle_counters(x.shape))

  def fit(state: LRAState, probe: Probe, *, key: jax.Array) -> LRAState:
    key, *coins = jax.random.split(key, 3)
    v, h = sampled(probe, key)
    scale = scale_before_fit(init_scale, state.lipschitz[0], v, h)
    state = state if scale is None else state._replace(d=state.d * scale)
    new = move_low_rank(state, v, h, jax.random.bernoulli(coins[0]), step_size=step_size)
    if rank == 0:
      return new
    return jax.lax.cond(jax.random.bernoulli(coins[1], 1 / BALANCED_EVERY), balanced, lambda state: state, new)

  return raveled(Preconditioner(init, fit, product, root=root))
