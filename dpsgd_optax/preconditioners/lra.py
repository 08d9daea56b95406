# SPDX-License-Identifier: Apache-2.0
"""Low-rank approximation: Q = (I + U Vᵀ) diag(d), one vector for all parameters.

Notation
  n, r     number of parameters, rank
  w        (n, 2r), the columns of U, then those of V
  K        I + VᵀU, (r, r): (I + UVᵀ)⁻¹ = I − U K⁻¹ Vᵀ (Woodbury)
  x, y     d ⊙ h and v ⊘ d
  a, b     Qh = x + U t with t = Vᵀx;  Q⁻ᵀv = y − V c with Kᵀc = Uᵀy
  e, f     Ph ⊘ d = a + V s with s = Uᵀa = Uᵀx + UᵀU t;  d ⊙ P⁻¹v = b − U z with K z = Vᵀb

What is needed of U and V beside these vectors are inner products. Those of their columns, wᵀw, are kept, so that P g
reads w twice, and a fit four times: for the inner products with x and y, for a, b, e, f, to move it, and for the
new wᵀw.

Source: arXiv:2402.04553 (LRA, "UVd"); the update and its balancing: psgd_torch 2.0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny
from dpsgd_optax.base import Preconditioner, Probe, check, check_real, check_step_size
from dpsgd_optax.geometry.fit import first_gain, tracked
from dpsgd_optax.geometry.seen import in_use, unseen, waited
from dpsgd_optax.preconditioners._damped import sampled
from dpsgd_optax.preconditioners._lift import raveled

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


class Look(NamedTuple):
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


def joined(w: jax.Array, d: jax.Array, lipschitz: jax.Array, idle: Any = (), precision: Any = None) -> LRAState:
  """The state with the inner products of the columns of ``w``."""
  return LRAState(w, jnp.matmul(w.T, w, precision=precision), d, lipschitz, idle)


def blocks(gram: jax.Array) -> jax.Array:
  """(2, 2, r, r): [[UᵀU, UᵀV], [VᵀU, VᵀV]]."""
  rank = len(gram) // 2
  return gram.reshape(2, rank, 2, rank).swapaxes(1, 2)


def halves(inner: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Uᵀx and Vᵀx of wᵀx."""
  rank = len(inner) // 2
  return inner[:rank], inner[rank:]


def balancing(alpha: jax.Array, beta: jax.Array) -> jax.Array:
  """(2, r, r), symmetric: what to multiply U and V by, so that UᵀU and VᵀV draw near; UVᵀ changes by O(ε⁴) only."""
  traces = jnp.trace(alpha), jnp.trace(beta)
  rho = (traces[0] / traces[1]) ** 0.25
  alpha, beta = alpha / rho**2, beta * rho**2
  tilt = 0.1 * (alpha - beta) / (jnp.trace(alpha) + jnp.trace(beta))
  eye, half = jnp.eye(len(alpha), dtype=alpha.dtype), tilt @ tilt / 2
  return jnp.stack([(eye - tilt + half) / rho, (eye + tilt + half) * rho])


def balanced(state: LRAState, precision: Any = None) -> LRAState:
  """The same Q, up to O(ε⁴), from factors whose UᵀU and VᵀV are nearer to each other."""
  gram = blocks(state.gram)
  mix = jax.scipy.linalg.block_diag(*balancing(gram[0, 0], gram[1, 1]))
  return state._replace(w=jnp.matmul(state.w, mix, precision=precision), gram=mix @ state.gram @ mix)


def look(state: LRAState, v: jax.Array, h: jax.Array, *, precision: Any = None) -> Look:
  """Everything that depends on w, in two passes over it."""
  x, y = state.d * h, v / state.d
  (uu, _), (vu, vv) = blocks(state.gram)
  k = jnp.eye(len(vu), dtype=vu.dtype) + vu
  (ux, vx), (uy, vy) = map(halves, jnp.matmul(jnp.stack([x, y]), state.w, precision=precision))
  lu = jax.scipy.linalg.lu_factor(k)
  t, c = vx, jax.scipy.linalg.lu_solve(lu, uy, trans=1)
  s = ux + uu @ t
  z = jax.scipy.linalg.lu_solve(lu, vy - vv @ c)
  # the weights of the columns of U and of V in a − x, b − y, e − a, f − b
  zero = jnp.zeros_like(t)
  sums = jnp.concatenate([jnp.stack([t, zero, zero, -z], 1), jnp.stack([zero, -c, s, zero], 1)])
  ax, by, ea, fb = jnp.matmul(state.w, sums, precision=precision).T
  a, b = x + ax, y + by
  return Look(k, a, b, a + ea, b + fb, y, t, s, c, z)


def moved(
  state: LRAState, v: jax.Array, h: jax.Array, seen: Look, d_step: Any, step: Any, of_u: Any, precision: Any = None
) -> LRAState:
  """d ← d − μ_d (h ⊙ Ph − v ⊙ P⁻¹v) ⊙ d, and either

  U ← U − μ [a (Vᵀa)ᵀ − b (Vᵀb)ᵀ] K, or V ← V − μ (I + V Uᵀ) [a (Uᵀa)ᵀ − b (Uᵀb)ᵀ] = V − μ [e sᵀ − y cᵀ].

  Args:
    state: before.
    v: (n,) probe vector.
    h: (n,) its product, damped.
    seen: by :func:`look`.
    d_step: μ_d, scalar or (n,).
    step: μ of the factor that moves, scalar.
    of_u: whether U moves, scalar.
    precision: of wᵀw.
  """
  idle, kept = noticed(state.idle, h)  # neither d nor the rows of U and V move where an entry is not in use
  d = state.d - d_step * kept(h * seen.e * state.d - v * seen.f / state.d) * state.d
  va, vb = seen.k @ seen.t, seen.k @ seen.z
  zero = jnp.zeros_like(va)
  by_u = jnp.stack([jnp.concatenate([seen.k.T @ va, zero]), jnp.concatenate([-(seen.k.T @ vb), zero])])
  by_v = jnp.stack([jnp.concatenate([zero, seen.s]), jnp.concatenate([zero, -seen.c])])
  first, second = (step * jnp.where(of_u, by_u[i], by_v[i]) for i in range(2))
  left, right = (kept(jnp.where(of_u, x, y)) for x, y in ((seen.a, seen.e), (seen.b, seen.y)))
  moved = state.w - left[:, None] * first[None] - right[:, None] * second[None]
  return joined(moved, d, state.lipschitz, idle, precision)


def noticed(idle: Any, h: jax.Array) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
  """The counters after this fit, and x ↦ x, zero where an entry takes no part."""
  idle = jax.tree.map(lambda x: waited(x, h != 0), idle)
  return idle, lambda x: functools.reduce(lambda x, at: jnp.where(in_use(at), x, 0), jax.tree.leaves(idle), x)


def refit(
  state: LRAState,
  v: jax.Array,
  h: jax.Array,
  of_u: jax.Array,
  *,
  step_size: Any,
  memory: float = 0.9,
  precision: Any = None,
) -> LRAState:
  """One fit: look, and move d and one of U and V; each step is divided by its L."""
  if state.w.size == 0:
    idle, kept = noticed(state.idle, h)
    hp, vp = h * (state.d**2 * h), kept(v * (v / state.d**2))
    lip = tracked(state.lipschitz[0], jnp.max(jnp.abs(hp)) + jnp.max(jnp.abs(vp)), memory)
    d = state.d - step_size / (lip + tiny(lip)) * (hp - vp) * state.d
    return state._replace(d=d, lipschitz=state.lipschitz.at[0].set(lip), idle=idle)
  seen = look(state, v, h, precision=precision)
  norm, gram = jnp.linalg.norm, blocks(state.gram)
  length = lambda i, x: jnp.sqrt(jnp.maximum(x @ (gram[i, i] @ x), 0))  # of U x or V x
  va, vb = seen.k @ seen.t, seen.k @ seen.z
  a, b = norm(seen.a), norm(seen.b)
  measured = jnp.stack(
    [
      jnp.max(jnp.abs(h * seen.e * state.d)) + jnp.max(jnp.abs(v * seen.f / state.d)),
      a * length(1, va) + b * length(1, vb),
      a * length(0, seen.s) + b * length(0, seen.c),
    ]
  )
  lip = tracked(state.lipschitz, measured, memory)
  step = step_size / (lip + tiny(lip))
  new = moved(state, v, h, seen, step[0], jnp.where(of_u, step[1], step[2]), of_u, precision)
  taken = jnp.stack([jnp.array(True), jnp.asarray(of_u), ~jnp.asarray(of_u)])
  return new._replace(lipschitz=jnp.where(taken, lip, state.lipschitz))


def product(state: LRAState, x: jax.Array, precision: Any = None) -> jax.Array:
  """P x = d ⊙ (I + V Uᵀ)(I + U Vᵀ)(d ⊙ x)."""
  times = lambda m, y: jnp.matmul(m, y, precision=precision)
  a = state.d * x
  ua, va = halves(times(a, state.w))
  return state.d * (a + times(state.w, jnp.concatenate([va, ua + blocks(state.gram)[0, 0] @ va])))


def root(state: LRAState, x: jax.Array, inverse: bool, precision: Any = None) -> jax.Array:
  """Qᵀx = d ⊙ (I + V Uᵀ) x, or its inverse, (I − V K⁻ᵀ Uᵀ)(x ⊘ d) with Kᵀ = I + UᵀV."""
  times = lambda m, y: jnp.matmul(m, y, precision=precision)
  by_v = lambda c: times(state.w, jnp.concatenate([jnp.zeros_like(c), c]))
  if not inverse:
    return state.d * (x + by_v(halves(times(x, state.w))[0]))
  y = x / state.d
  uv = blocks(state.gram)[0, 1]
  return y - by_v(jnp.linalg.solve(jnp.eye(len(uv), dtype=uv.dtype) + uv, halves(times(y, state.w))[0]))


def lra(
  *,
  rank: int = 10,
  step_size: float = 0.1,
  init_scale: float | None = None,
  key: int = 0,
  precision: Any = None,
) -> Preconditioner:
  """P = QᵀQ with Q = (I + U Vᵀ) diag(d): a diagonal and a low rank, over all parameters as one vector.

  Memory: 2 rank + 1 copies of the parameters. The diagonal fits the scales, the r directions both the largest and the
  smallest eigenvalues that remain. Fitted on Newton probes it is exact for H = diag + rank r (slowly), and rank 0 is
  the diagonal group; on gradients it whitens, v being sampled. U and V take turns by the toss of a coin, and
  another coin balances them on one fit in ten.

  Args:
    rank: r, 0 ≤ r. Static (decides shapes).
    step_size: of the fit, in (0, 1].
    init_scale: the initial d; None: from the first probe that is not zero.
    key: of the initial U and V, normal and each of Frobenius norm √0.1: with U = V = 0 neither would ever move.
    precision: of the products with U and V, as ``jax.lax.Precision``.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` of the whole tree as one vector.

  Raises:
    ValueError: for a negative rank, a step size outside (0, 1], a scale that is not positive.

  Departures from psgd_torch 2.0: when whitening, v is not the damping noise but a draw of its own; U and V are balanced
  on one fit in ten in place of every one (its older version: one in a hundred): it is 8 n r² of the 10 n r² + 28 n r
  flops of its fit.

  Source: arXiv:2402.04553.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> state = dpo.lra(rank=2).init({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    >>> state.buckets["16_float32"].w.shape
    (1, 16, 4)
  """
  check(lambda x: x >= 0, rank, "rank", "not negative", "0 is a diagonal preconditioner; 10 is usual.")
  check_step_size(step_size)
  check(lambda x: x > 0, init_scale, "init_scale", "positive or None", "None sets it from the first probe.")

  def init(x: jax.Array) -> LRAState:
    check_real(x.dtype, "lra")
    u, v = jax.random.normal(jax.random.key(key), (2, x.size, rank), x.dtype)
    size = lambda m: jnp.sqrt(0.1 / jnp.maximum(jnp.sum(m * m), jnp.finfo(x.dtype).tiny))
    w = jnp.concatenate([size(u) * u, size(v) * v], 1)
    d = jnp.full(x.shape, 1.0 if init_scale is None else init_scale, x.dtype)
    return joined(w, d, jnp.zeros(3, x.dtype), unseen(x.shape), precision)

  def fit(state: LRAState, probe: Probe, *, key: jax.Array) -> LRAState:
    key, *coins = jax.random.split(key, 3)
    v, h = sampled(probe, key)
    if init_scale is None:
      state = state._replace(d=state.d * first_gain(state.lipschitz[0], v, h))
    new = refit(state, v, h, jax.random.bernoulli(coins[0]), step_size=step_size, precision=precision)
    if rank == 0:
      return new
    balance = lambda state: balanced(state, precision)
    return jax.lax.cond(jax.random.bernoulli(coins[1], 1 / BALANCED_EVERY), balance, lambda state: state, new)

  return raveled(
    Preconditioner(
      init,
      fit,
      lambda state, x: product(state, x, precision),
      root=lambda state, x, inverse: root(state, x, inverse, precision),
    )
  )
