# SPDX-License-Identifier: Apache-2.0
"""How fast the fits converge, against psgd_torch on problems of the same distribution (tests/golden/psgd).

The draws of the record were not kept, so medians over seeds are compared: ours must not be more than three times the
recorded error at any checkpoint. Below FALLING an error loses orders of magnitude from one checkpoint to the next, and
only the end is compared: where psgd_torch reached rounding, so do we. Some fits converge or not depending on H, so of
many H those are taken that are as far from the identity as the recorded ones were. All in float64.

  ‖P T − I‖_F / √n      dense: T = (H² + σ²I)^½, n = 10; whitening: T = C of g = C z, n = 8; lra: n = 20; xmat: n = 10
  mean ‖P G − V‖ / ‖V‖  kron: G = H_1 V H_2, 5 × 7, over 20 fresh pairs
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

import dpsgd_optax as dpo
from dpsgd_optax.base import Probe
from dpsgd_optax.geometry.moves import lipschitz
from dpsgd_optax.preconditioners import _damped, lra, xmat
from dpsgd_optax.preconditioners._factors import Layout, factor_kind, kron_of_array
from dpsgd_optax.preconditioners.dense import DenseState, move_dense
from tests.golden.record import load
from tests.golden.test_golden_kron import GEOMETRIES

SEEDS, FALLING = 7, 1e-3
BY_CONDITION = ("EQ", "QEP", "legacyGL")  # their rate falls with the smallest eigenvalue, another in each draw
SLOWER = {  # not within a factor of three
  "dense_newton/illcond/noise0.0/const0.5/QEP": "0.32 where three recorded seeds had 0.09; equal at the end",
  "dense_newton/illcond/noise0.0/lin0.5to0/PRO4P": "our bound of the skew norm is less tight: shorter rotations",
  "kron/diag_diag/newton/lin0.5to0/EQ": "the rate falls with the smallest eigenvalue, another in each draw",
}
RECORD = load("convergence_f64")
QUICK = ("Q0.5EQ1.5", "QEQ", "r0", "r3", "lr0.1", "lr0.5")

pytestmark = pytest.mark.usefixtures("x64")


def cases(prefix):
  """The recorded cases; those that say little more than others only run with the slow tests."""
  names = [k for k in RECORD if k.startswith(prefix) and not k.endswith("checkpoints")]
  marks = {k: [pytest.mark.xfail(reason=why)] for k, why in SLOWER.items()}
  marks |= {k: [*marks.get(k, []), pytest.mark.slow] for k in names if k.rsplit("/", 1)[1] not in QUICK}
  return [pytest.param(k, marks=marks.get(k, ())) for k in names]


def schedule(name, steps):
  part = next(p for p in name.split("/") if p.startswith(("const", "lin")))
  return np.full(steps, 0.5) if part.startswith("const") else np.linspace(0.5, 0, steps)


def spectrum(rng, n, kind):
  """SPD: log-uniform in [0.1, 5]; indefinite: with alternating signs; ill-conditioned: from 1e-3 to 1."""
  if kind == "illcond":
    return np.logspace(-3, 0, n)
  values = np.exp(rng.uniform(np.log(0.1), np.log(5), n))
  return values * (-1.0) ** np.arange(n) if kind == "indef" else values


def symmetric(rng, n, kind="spd"):
  basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
  return (basis * spectrum(rng, n, kind)) @ basis.T


def alike(name, candidates, distance):
  """The SEEDS candidates whose distance from the identity is nearest to that of the recorded problems."""
  wanted = np.median(RECORD[name][:, 0])
  found = [candidates() for _ in range(60)]
  return sorted(found, key=lambda h: abs(distance(h) - wanted))[:SEEDS]


def from_identity(h):
  """‖H − I‖_F / √n: the error of P = I."""
  return np.linalg.norm(h - np.eye(len(h))) / len(h) ** 0.5


def medians(errors, family):
  """(seeds, steps) -> the median at each checkpoint."""
  return np.median(np.asarray(errors)[:, RECORD[f"{family}/checkpoints"]], 0)


def assert_not_slower(name, came):
  recorded = np.median(RECORD[name], 0)
  falling = 0.05 if name.endswith(BY_CONDITION) else FALLING
  assert np.all(came <= 3 * np.maximum(recorded, falling)), f"{came} against {recorded}"
  if recorded[-1] < 1e-12 and falling == FALLING:
    assert came[-1] < 1e-9


def curve(update, error, state, *draws):
  """The error before the first and after every update."""

  def step(state, now):
    state = update(state, *now)
    return state, error(state)

  return jnp.concatenate([error(state)[None], jax.lax.scan(step, state, draws)[1]])


@functools.cache
def dense_curves(which):
  geometry = dpo.geometry.gl if which == "legacyGL" else GEOMETRIES[which]

  def one(v, h, sizes, target):
    eye = jnp.eye(len(target))
    state = DenseState(eye, eye if geometry.keeps_inverse else (), jnp.zeros(1))
    p_of = lambda q: q if geometry.fits_p else q.T @ q
    error = lambda s: jnp.linalg.norm(p_of(s.q) @ target - eye) / len(target) ** 0.5
    update = lambda s, v, h, size: move_dense(s, v, h, geometry=geometry, step_size=size, low_rank=True)
    return curve(update, error, state, v, h, sizes)

  return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)))


@pytest.mark.parametrize("name", cases("dense_newton"))
def test_dense_newton_fits_converge_as_recorded(name):
  _, kind, noise, _, which = name.split("/")
  rng, steps, sigma = np.random.default_rng(0), 2000, float(noise.removeprefix("noise"))
  root = lambda m: np.real(sqrtm(m @ m + sigma**2 * np.eye(10)))
  h = np.stack(alike(name, lambda: symmetric(rng, 10, kind), lambda m: from_identity(root(m))))
  v = rng.standard_normal((SEEDS, steps, 10))
  product = v @ h + sigma * rng.standard_normal(v.shape)
  target = np.stack(list(map(root, h)))
  came = medians(dense_curves(which)(v, product, schedule(name, steps), target), "dense_newton")
  assert_not_slower(name, came)
  if kind == "spd" and not sigma and which in ("QEQ", "QUAD", "Q0.5EQ1.5"):
    assert came[-1] <= 1e-10


@pytest.mark.parametrize("name", cases("dense_whiten"))
def test_dense_whitening_fits_converge_as_recorded(name):
  """One vector with one dense factor: Kron, v integrated out except for EQ."""
  rng, steps, n = np.random.default_rng(0), 2000, 8
  c = np.stack(alike(name, lambda: symmetric(rng, n), from_identity))
  z = rng.standard_normal((SEEDS, steps, n))
  layout = Layout((n,), (factor_kind(True),))
  run = kron_curves(layout, name.rsplit("/", 1)[1], True, True)
  assert_not_slower(name, medians(run(z, z @ c, schedule(name, steps), c, c), "dense_whiten"))


@functools.cache
def kron_curves(layout, which, whiten, vector=False):
  def one(v, h, sizes, target, fresh):
    def error(s):
      if vector:
        p = jax.vmap(lambda e: apply(s, e))(jnp.eye(len(target)))
        return jnp.linalg.norm(p @ target - jnp.eye(len(target))) / len(target) ** 0.5
      applied = jax.vmap(lambda g: apply(s, g))(fresh)
      norm = lambda x: jnp.sqrt(jnp.sum(x * x, (1, 2)))
      return jnp.mean(norm(applied - target) / norm(target))

    def made(size):
      options = dict(geometry=GEOMETRIES[which], normalizer=lipschitz, step_size=size)
      return kron_of_array(lambda shape: layout, init_scale=1.0, **options)

    apply = made(0.1).apply
    key = jax.random.key(0)

    def update(s, v, h, size, key):
      probe = Probe(None if whiten else v, h)
      if GEOMETRIES[which].samples:
        probe = _damped.sampled(probe, key)
      return made(size).fit(s, probe, key=key)

    return curve(update, error, made(0.1).init(v[0]), v, h, sizes, jax.random.split(key, len(sizes)))

  return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0, 0)))


@pytest.mark.parametrize("name", cases("kron/"))
def test_kron_fits_converge_as_recorded(name):
  _, sides, criterion, _, which = name.split("/")
  rng, steps = np.random.default_rng(0), 2000
  dense = [side == "dense" for side in sides.split("_")]
  one = lambda d, full: symmetric(rng, d) if full else np.diag(spectrum(rng, d, "spd"))
  pairs = lambda: (one(5, dense[0]), one(7, dense[1]))
  hs = list(map(np.stack, zip(*alike(name, pairs, lambda h: from_identity(np.kron(*h))), strict=True)))
  through = lambda x: hs[0][:, None] @ x @ hs[1][:, None]
  v, target = rng.standard_normal((SEEDS, steps, 5, 7)), rng.standard_normal((SEEDS, 20, 5, 7))
  run = kron_curves(Layout((5, 7), tuple(map(factor_kind, dense))), which, criterion == "whiten")
  came = medians(run(v, through(v), schedule(name, steps), target, through(target)), "kron")
  assert_not_slower(name, came)


@functools.cache
def vector_curves(method, rank=0):
  def one(v, h, sizes, coins, target, key):
    n = len(target)
    eye = jnp.eye(n)
    if method == "lra":
      w = jax.random.normal(key, (2, n, rank))
      w = w * jnp.sqrt(0.1 / jnp.maximum(jnp.sum(w * w, (1, 2), keepdims=True), 1e-30))
      state = lra.state_of(jnp.concatenate([*w], 1), jnp.ones(n), jnp.zeros(3))
      keep = lambda s: s
      balance = lra.balanced if rank else keep

      def update(s, v, h, size, coin):
        s = jax.lax.cond(coin % 0.1 < 0.1 / lra.BALANCED_EVERY, balance, keep, s)
        return lra.move_low_rank(s, v, h, coin < 0.5, step_size=size)

      product = lra.product
    else:
      state = xmat.XMatState(jnp.ones(n), jnp.zeros(n), jnp.zeros(()))
      update = lambda s, v, h, size, coin: xmat.move_x(s, v, h, step_size=size, memory=0.0)  # as recorded
      product = xmat.product
    error = lambda s: jnp.linalg.norm(jax.vmap(lambda e: product(s, e))(eye) @ target - eye) / n**0.5
    return curve(update, error, state, v, h, sizes, coins)

  return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0, 0, 0)))


@pytest.mark.parametrize("name", cases("lra"))
def test_lra_fits_converge_as_recorded(name):
  """H = diag(0.3 … 1.5) + UUᵀ, U of the rank that is fitted; Newton at 0.2, whitening from 0.1 to 0."""
  _, criterion, rank = name.split("/")
  rng, steps, n, rank = np.random.default_rng(0), 6000, 20, int(rank[1:])
  hessian = lambda u: np.diag(np.linspace(0.3, 1.5, n)) + u @ u.T
  h = np.stack(alike(name, lambda: hessian(rng.standard_normal((n, rank))), from_identity))
  v, z = rng.standard_normal((2, SEEDS, steps, n))
  sizes = np.full(steps, 0.2) if criterion == "newton" else np.linspace(0.1, 0, steps)
  products = (v if criterion == "newton" else z) @ h
  keys = jax.random.split(jax.random.key(0), SEEDS)
  run = vector_curves("lra", rank)
  assert_not_slower(name, medians(run(v, products, sizes, rng.random((SEEDS, steps)) < 0.5, h, keys), "lra"))


@pytest.mark.parametrize("name", cases("xmat"))
def test_xmat_fits_converge_as_recorded(name):
  """H an X-matrix, its 2 × 2 blocks with eigenvalues in [0.5, 2], of both signs where it is indefinite."""
  _, kind, size = name.split("/")
  rng, steps, n = np.random.default_rng(0), 3000, 10

  def hessian():
    h = np.zeros((n, n))
    for i in range(n // 2):
      c, s = np.cos(angle := rng.uniform(0, np.pi)), np.sin(angle)
      values = rng.uniform(0.5, 2, 2) * ([1, -1] if kind == "indef" else [1, 1])
      h[np.ix_([i, n - 1 - i], [i, n - 1 - i])] = np.array([[c, -s], [s, c]]) * values @ np.array([[c, s], [-s, c]])
    return h

  magnitude = lambda h: np.real(sqrtm(h @ h))
  h = np.stack(alike(name, hessian, lambda h: from_identity(magnitude(h))))
  v = rng.standard_normal((SEEDS, steps, n))
  target = np.stack(list(map(magnitude, h)))
  keys, coins = jax.random.split(jax.random.key(0), SEEDS), np.zeros((SEEDS, steps), bool)
  run = vector_curves("xmat")
  came = medians(run(v, v @ h, np.full(steps, float(size[2:])), coins, target, keys), "xmat")
  assert_not_slower(name, came)
