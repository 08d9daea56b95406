# SPDX-License-Identifier: Apache-2.0
"""Parity with psgd_torch 2.0 (tests/golden/psgd), in float64: every update from the stored state, with its own draws.

Order of the draws of one update: the damping noise ξ; for each dense factor 32 rows for the norm of T1 + T2 and, where
the geometry rotates, 32 rows for the norm of the skew part; the coin, below 0.01 if the factors are balanced then.
"""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.preconditioners._geometry import fit_factors
from dpsgd_optax.preconditioners._linalg import balance, norm_bound, norm_estimate, procrustes_step, square
from dpsgd_optax.preconditioners.kron import sandwich

GOLDEN = Path(__file__).parent / "golden" / "psgd"
GEOMETRIES = {"EQ": dpo.eq, "QEQ": dpo.qeq, "QUAD": dpo.quad, "Q0.5EQ1.5": dpo.pro}
CRITERIA = ["newton", "whiten"]
LAYOUTS = {
  "scalar": 1,
  "vec_diag": 1,
  "vec_dense": 1,
  "mat_diag_diag": 2,
  "mat_default": 2,
  "mat_dense_dense": 2,
  "mat_complex": 2,
  "ten_default": 3,
  "ten_mixed": 3,
}
UPDATES = 5

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def load(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
    return {k: z[k] for k in z.files}


def replayed_update(geometry, q, lip, v, x, draws, *, step_size, damping, integrated):
  """One update of psgd_torch: damp, fit, and balance if the coin says so."""
  noise, *blocks, coin = draws
  blocks = iter(blocks)
  h = x + (damping + np.finfo(np.float64).eps * np.abs(x)) * noise
  if v is None and not integrated:
    v = noise  # psgd_torch uses one draw for both
  rotates = geometry is dpo.pro
  norms, skew_norms = [], []
  for factor in q:
    norms.append(functools.partial(norm_estimate, block=next(blocks)) if factor.ndim == 2 else None)
    if factor.ndim == 2 and rotates:
      skew_norms.append(functools.partial(norm_estimate, block=next(blocks), skew=True))
  assert next(blocks, None) is None
  if rotates:
    left = iter(skew_norms)
    geometry = geometry._replace(move=lambda q, e: procrustes_step(q - e @ q, next(left)))
  q, lip = fit_factors(
    q,
    tuple(square(f) for f in q),
    lip,
    None if v is None else jnp.asarray(v),
    jnp.asarray(h),
    geometry=geometry,
    normalizer=dpo.lipschitz,
    step_size=step_size,
    norms=norms,
  )
  return (balance(q) if coin < 0.01 else q), lip


def error(came, expected):
  return float(np.max(np.abs(np.asarray(came).reshape(expected.shape) - expected)) / np.max(np.abs(expected)))


def test_all_72_cases_are_here():
  cases = {k.rsplit("/", 1)[0] for k in load("kron_f64") if k.endswith("/meta")}
  assert cases == {f"{c}/{g}/{layout}" for c in CRITERIA for g in GEOMETRIES for layout in LAYOUTS}
  assert len(cases) == 72


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_updates_equal_psgd_torch(layout, criterion, geometry):
  case, k = f"{criterion}/{geometry}/{layout}", LAYOUTS[layout]
  z = {name.removeprefix(f"{case}/"): value for name, value in load("kron_f64").items() if name.startswith(f"{case}/")}
  meta = json.loads(str(z["meta"]))
  shape = tuple(d for d in meta["shape"] if d > 1) or (1,)
  stored = lambda t: [z[f"Q{i}_init" if t < 0 else f"t{t}/Q{i}"] for i in range(k)]
  worst, balanced = 0.0, 0
  for t in range(UPDATES):
    q = tuple(jnp.atleast_1d(jnp.asarray(f)) for f in stored(t - 1))
    lip = jnp.zeros(k) if t == 0 else jnp.stack([jnp.asarray(z[f"t{t - 1}/L{i}"]) for i in range(k)])
    draws = [z[f"t{t}/draw{j}"] for j in range(len(z[f"t{t}/draw_kinds"]))]
    draws[0], g = draws[0].reshape(shape), z[f"t{t}/g"].reshape(shape)
    v, x = (None, g) if criterion == "whiten" else (z[f"t{t}/v"].reshape(shape), z[f"t{t}/h"].reshape(shape))
    q, lip = replayed_update(
      GEOMETRIES[geometry],
      q,
      lip,
      v,
      x,
      draws,
      step_size=meta["lr"],
      damping=meta["damping"],
      integrated=geometry != "EQ",
    )
    pairs = [*zip(q, stored(t), strict=True), (sandwich(tuple(map(square, q)), jnp.asarray(g)), z[f"t{t}/Pg"])]
    pairs += [(lip[i], z[f"t{t}/L{i}"]) for i in range(k)]
    worst = max(worst, *(error(came, expected) for came, expected in pairs))
    balanced += bool(draws[-1] < 0.01)
  assert balanced >= 1  # the record forces one
  assert worst <= 1e-10


@pytest.mark.parametrize("kind", ["spd", "skh"])
def test_norm_estimate_equals_psgd_torch_and_is_a_lower_bound(kind):
  """max ‖V_i A²‖ over 32 rows, two half steps of the power iteration each."""
  z = load("helpers_f64")
  names = [k.removesuffix("/A") for k in z if k.startswith(f"norm_{kind}/") and k.endswith("/A")]
  assert len(names) == 4
  for name in names:
    estimate = norm_estimate(jnp.asarray(z[f"{name}/A"]), jnp.asarray(z[f"{name}/draw0"]), skew=kind == "skh")
    np.testing.assert_allclose(estimate, z[f"{name}/out"], rtol=1e-10, atol=1e-300)
    assert estimate <= z[f"{name}/true"] * (1 + 1e-10) + 1e-300


def test_norm_bound_equals_the_legacy_bound_on_square_matrices():
  """Within √2 of ‖A‖, from below."""
  z = load("helpers_f64")
  square_ones = [k.removesuffix("/A") for k in z if k.startswith("norm_legacy/") and k.endswith("/A")]
  square_ones = [name for name in square_ones if len(set(z[f"{name}/A"].shape)) == 1]
  assert square_ones
  for name in square_ones:
    bound = norm_bound(jnp.asarray(z[f"{name}/A"]))
    np.testing.assert_allclose(bound, z[f"{name}/out"], rtol=1e-10)
    assert bound <= z[f"{name}/true"] * (1 + 1e-10) <= 2**0.5 * bound


def test_procrustes_step_equals_psgd_torch():
  """Q ← Q + a (RQ + a/2 R²Q)."""
  z = load("helpers_f64")
  names = [k.removesuffix("/Q_in") for k in z if k.startswith("procrustes_step2/") and k.endswith("/Q_in")]
  assert len(names) == 6
  for name in names:
    norm = functools.partial(norm_estimate, block=jnp.asarray(z[f"{name}/draw0"]), skew=True)
    assert error(procrustes_step(jnp.asarray(z[f"{name}/Q_in"]), norm), z[f"{name}/Q_out"]) <= 1e-10
