# SPDX-License-Identifier: Apache-2.0
"""Parity of the legacy Kronecker forms of psgd_torch (tests/golden/psgd): affine, the pairs, and its Kron.

v is what was recorded, or integrated out where the legacy code did so (`dropv`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.linalg import balancing, largest_entry, multiply, sandwich, scaled, square
from dpsgd_optax.geometry.moves import Normalizer, eq, lipschitz, spectral
from dpsgd_optax.geometry.structured import Arrow
from dpsgd_optax.preconditioners._factors import KronState, move_factors
from tests.golden.record import TOLERANCE, case, case_names, draws, error, load

PAIRS = [name for name in case_names("legacy") if name.startswith("kronpair/")]
AFFINE = [name for name in case_names("legacy") if name.startswith(("affine/", "affine_dropv/"))]
KRON = [name for name in case_names("legacy") if name.startswith("kron_legacy/")]
UPDATES = 5


def integrates(name):
  """True if the legacy code integrated v out: told to, and drew no v in its place."""
  found, _ = case("legacy_f64", name)
  return "dropv" in name and not any("randn" in kind for kind in found["t0/draw_kinds"])


@pytest.fixture(params=["f64", "f32"])
def precision(request):
  with jax.enable_x64(request.param == "f64"):
    yield request.param


def test_all_71_cases_are_here():
  assert (len(PAIRS), len(AFFINE), len(KRON)) == (7, 32, 32)
  assert sum(map(integrates, AFFINE + KRON)) == 24


def factor(stored):
  """The functional array formats: (d, d) dense, (1, d) scaling, (2, d) normalisation."""
  if stored.shape[0] == stored.shape[1]:
    return jnp.asarray(stored)
  return jnp.asarray(stored[0]) if len(stored) == 1 else Arrow(jnp.asarray(stored[0]), jnp.asarray(stored[1]))


def stored_like(q):
  return jnp.stack([q.diagonal, q.column]) if isinstance(q, Arrow) else q


@pytest.mark.parametrize("name", PAIRS)
def test_five_updates_of_pairs_equal_psgd_torch(name, precision):
  """scaling, normalisation (arrow-head) and dense factors in all recorded pairs, balanced at every update."""
  z, meta = case(f"legacy_{precision}", name)
  for t in range(UPDATES):
    q = tuple(factor(z["Q" + side + "_init"] if t == 0 else z[f"t{t - 1}/Q{side}"]) for side in "lr")
    v, h, g = (jnp.asarray(z[f"t{t}/{k}"]) for k in "vhg")
    state = KronState(q, tuple(map(square, q)), jnp.zeros(2, v.dtype))
    new = move_factors(state, v, h, geometry=eq, normalizer=spectral, step_size=meta["lr"])
    for came, side in zip(new.q, "lr", strict=True):
      assert error(stored_like(came), z[f"t{t}/Q{side}"]) <= TOLERANCE[precision]
    assert error(sandwich(new.p, g), z[f"t{t}/Pg"]) <= TOLERANCE[precision]


first = Normalizer(spectral.measure, 0.0, largest_entry)
second = Normalizer(lipschitz.measure, 0.0, largest_entry)


@pytest.mark.parametrize("name", AFFINE + KRON)
def test_five_updates_equal_legacy_psgd_torch(name, precision):
  """Both normalisers; only Kron's second-order one remembers L. One coin per update says whether to balance."""
  z, meta = case(f"legacy_{precision}", name)
  affine = name.startswith("affine")
  balances_late = affine and integrates(name)
  remembers = not affine and "/2nd/" in name
  normalizer = (second if "/2nd/" in name else first)._replace(memory=0.9 if remembers else 0.0)
  names = ["Ql", "Qr"] if affine else [k.removesuffix("_init") for k in sorted(z) if k.endswith("_init")]
  for t in range(UPDATES):
    q = tuple(jnp.atleast_1d(jnp.asarray(z[f"{k}_init" if t == 0 else f"t{t - 1}/{k}"])) for k in names)
    kinds = z[f"t{t}/draw_kinds"]
    drawn = dict(zip(kinds, draws(z, t), strict=True))  # one factor alone has no coin
    shape = np.shape(z[f"t{t}/h"]) or (1,)
    h = jnp.asarray(z[f"t{t}/h"]).reshape(shape)
    v = None
    if not integrates(name):
      v = jnp.asarray(drawn["randn_like"] if "dropv" in name else z[f"t{t}/v"]).reshape(shape)
    lip = jnp.zeros(len(q), h.dtype)
    if remembers and t:
      lip = jnp.stack([jnp.asarray(z[f"t{t - 1}/{k.replace('Q', 'L')}"]) for k in names])
    heads = drawn.get("rand", 1) < 0.01
    if heads and not balances_late:
      q = scaled(q, balancing(q))
    new, new_lip = fit_factors(
      q, tuple(map(square, q)), lip, v, h, geometry=eq, normalizer=normalizer, step_size=meta["lr"]
    )
    if heads and balances_late:
      new = scaled(new, balancing(new))
    for came, k in zip(new, names, strict=True):
      assert error(came, z[f"t{t}/{k}"]) <= TOLERANCE[precision], (t, k)
    if remembers:
      assert error(new_lip, [z[f"t{t}/{k.replace('Q', 'L')}"] for k in names]) <= TOLERANCE[precision]
    g = z[f"t{t}/g"] if f"t{t}/g" in z else z[f"t{t}/h"]
    assert (
      error(sandwich(tuple(map(square, new)), jnp.asarray(g).reshape(shape)), z[f"t{t}/Pg"]) <= TOLERANCE[precision]
    )


CONVERGED = [name for name in load("convergence_f64") if name.startswith("kronpair/")]
STEPS, SEEDS, CHECKPOINTS = 3000, 5, (100, 300, 1000, 3000)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONVERGED)
def test_pairs_reach_the_criterion_of_psgd_torch(name):
  """tr(PH² + P⁻¹) / (2 tr |H|) ≥ 1 under H = H_l ⊗ H_r, from P = I, at a step from 0.1 to 0.

  The recorded curvatures are not at hand: medians of the excess over 1 are compared, on H as far from I as theirs were.
  """
  recorded = np.median(load("convergence_f64")[name], 0)
  rng, kinds = np.random.default_rng(0), name.split("/")[1].split("_")
  spd = lambda d: (lambda basis: basis * np.exp(rng.uniform(*np.log([0.1, 5]), d)) @ basis.T)(
    np.linalg.qr(rng.standard_normal((d, d)))[0]
  )
  value = lambda p, h: (np.trace(p @ h @ h) + np.trace(np.linalg.inv(p))) / (2 * np.trace(h))
  found = sorted(([spd(4), spd(6)] for _ in range(40)), key=lambda h: abs(value(np.eye(24), np.kron(*h)) - recorded[0]))
  sides = [np.stack(h) for h in zip(*found[:SEEDS], strict=True)]
  identity = {"dense": jnp.eye, "scale": jnp.ones, "norm": lambda d: Arrow(jnp.ones(d), jnp.zeros(d))}

  def run(left, right, v):
    q = tuple(identity[kind](d) for kind, d in zip(kinds, (4, 6), strict=True))
    state = KronState(q, tuple(map(square, q)), jnp.zeros(2))

    def step(state, inputs):
      v, size = inputs
      new = move_factors(state, v, left @ v @ right, geometry=eq, normalizer=spectral, step_size=size)
      return new, [multiply(jnp.eye(d), factor, 0) for d, factor in zip((4, 6), new.p, strict=True)]

    matrices = jax.lax.scan(step, state, (v, jnp.linspace(0.1, 0, STEPS)))[1]
    return [m[np.array(CHECKPOINTS) - 1] for m in matrices]

  p = jax.device_get(jax.jit(jax.vmap(run))(*sides, rng.standard_normal((SEEDS, STEPS, 4, 6))))
  kron = lambda pair, *at: np.kron(pair[0][at], pair[1][at])
  for k, expected in enumerate(recorded[1:]):
    values = [value(kron(p, seed, k), kron(sides, seed)) for seed in range(SEEDS)]
    assert np.median(values) - 1 <= 3 * max(expected - 1, 1e-3)
