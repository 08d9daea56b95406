# SPDX-License-Identifier: Apache-2.0
"""Parity of Kron with psgd_torch 2.0 and with its legacy code: every update from the stored state, with its own draws.

Order of the draws of one update of 2.0: the damping noise ξ; for each dense factor 32 rows for the norm of T1 + T2 and,
where the geometry rotates, 32 rows for the norm of each skew part; the coin, below 0.01 if the factors are balanced
(QEP has no coin: it balances before every update).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.linalg import balancing, sandwich, scaled
from dpsgd_optax.geometry.norms import norm_bound, procrustes_step, procrustes_step_3
from tests.golden.record import TOLERANCE, case, draws, error, load
from tests.golden.reference_norms import norm_estimate

GEOMETRIES = {
  "EQ": dpo.eq,
  "QEP": dpo.qep,
  "QEQ": dpo.qeq,
  "Q0.5EQ1.5": dpo.pro,
  "QUAD": dpo.quad,
  "QUAD4P": dpo.geometry.quad4p,
  "PRO4P": dpo.geometry.pro4p,
}
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
CASES = [f"{c}/{g}/{layout}" for c in CRITERIA for g in GEOMETRIES for layout in LAYOUTS]
UPDATES = 5


def replayed(geometry, dense, blocks):
  """The geometry and the norms that use the recorded rows instead of the deterministic bound.

  The rows come in the order in which psgd_torch drew them. PRO4P draws as often as it rotates, which the record of that
  update tells: the rows of one factor are those of its width, and the first of them is for T1 + T2.
  """
  norms, skews, left = [], [], list(blocks)
  for i, width in enumerate(dense):
    if width is None:
      norms.append(None)
      continue
    norms.append(functools.partial(norm_estimate, block=left.pop(0)))
    rotations = []
    if geometry is dpo.pro:
      rotations = [left.pop(0)]
    elif geometry is dpo.geometry.pro4p:
      later = sum(w is not None for w in dense[i + 1 :])
      while left and left[0].shape[1] == width and not (later and _belongs_to_the_next(left, dense[i + 1 :], width)):
        rotations.append(left.pop(0))
    skews.append(rotations)
  assert not left
  moves = iter(skews)
  if geometry is dpo.pro:
    rotate = lambda q: procrustes_step(q, functools.partial(norm_estimate, block=next(moves)[0], skew=True))
    geometry = geometry._replace(move=lambda q, e, mu: rotate(q - mu * (e @ q)))
  if geometry is dpo.geometry.pro4p:
    geometry = geometry._replace(move=lambda q, e, mu: _rotate_often(q - mu * (e @ q), next(moves)))
  return geometry, norms


def _belongs_to_the_next(left, dense, width):
  """True if the next factor has the same width and only its own norm estimate is left for it."""
  return dense[0] == width and len(left) == 1


def _rotate_often(q, blocks):
  for rows in blocks:
    q = procrustes_step_3(q, functools.partial(norm_estimate, block=rows, skew=True))
  return q


def replayed_update(geometry, q, lip, v, x, record, *, step_size, damping, integrated, precision):
  """One update of psgd_torch: damp, fit, and balance if the coin says so."""
  noise, *blocks = record
  coin = None
  if geometry is not dpo.qep:
    *blocks, coin = blocks
  h = x + (damping + np.finfo(precision).eps * np.abs(x)) * noise
  if v is None and not integrated:
    v = noise  # psgd_torch uses one draw for both
  replayed_geometry, norms = replayed(geometry, [len(f) if f.ndim == 2 else None for f in q], blocks)
  if coin is None:
    q = scaled(q, balancing(q))
  estimates, second_order = iter(norms), dpo.geometry.lipschitz.measure
  measure = lambda t1, t2, e, norm: second_order(t1, t2, e, next(estimates))
  q, lip = fit_factors(
    q,
    tuple(geometry.factor_of_p(f) for f in q),
    lip,
    None if v is None else jnp.asarray(v),
    jnp.asarray(h),
    geometry=replayed_geometry,
    normalizer=dpo.geometry.lipschitz._replace(measure=measure),
    step_size=step_size,
  )
  return (scaled(q, balancing(q)) if coin is not None and coin < 0.01 else q), lip


def worst_error(name, precision):
  """Over all updates, factors, L and Pg of a case, each update from the stored state."""
  criterion, which, layout = name.split("/")
  geometry, k = GEOMETRIES[which], LAYOUTS[layout]
  z, meta = case(f"kron_{precision}", name)
  shape = tuple(d for d in meta["shape"] if d > 1) or (1,)
  stored = lambda t: [z[f"Q{i}_init" if t < 0 else f"t{t}/Q{i}"] for i in range(k)]
  dtype = np.float64 if precision == "f64" else np.float32
  worst, balanced = 0.0, 0
  for t in range(UPDATES):
    q = tuple(jnp.atleast_1d(jnp.asarray(f)) for f in stored(t - 1))
    lip = jnp.zeros(k, dtype) if t == 0 else jnp.stack([jnp.asarray(z[f"t{t - 1}/L{i}"]) for i in range(k)])
    record, g = draws(z, t), z[f"t{t}/g"].reshape(shape)
    record[0] = record[0].reshape(shape)
    v, x = (None, g) if criterion == "whiten" else (z[f"t{t}/v"].reshape(shape), z[f"t{t}/h"].reshape(shape))
    settings = dict(step_size=meta["lr"], damping=dtype(meta["damping"]), integrated=which != "EQ", precision=dtype)
    q, lip = replayed_update(geometry, q, lip, v, x, record, **settings)
    p = tuple(geometry.factor_of_p(f) for f in q)
    pairs = [*zip(q, stored(t), strict=True), (sandwich(p, jnp.asarray(g)), z[f"t{t}/Pg"])]
    pairs += [(lip[i], z[f"t{t}/L{i}"]) for i in range(k)]
    worst = max(worst, *(error(came, expected) for came, expected in pairs))
    balanced += which == "QEP" or bool(record[-1] < 0.01)
  assert balanced >= 1  # the record forces one
  return worst


def test_all_126_cases_are_here():
  """7 geometries × 2 criteria × 9 layouts, in both precisions."""
  for precision in TOLERANCE:
    assert {k.rsplit("/", 1)[0] for k in load(f"kron_{precision}") if k.endswith("/meta")} == set(CASES)
  assert len(CASES) == 126


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_psgd_torch(name):
  assert worst_error(name, "f64") <= TOLERANCE["f64"]


@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_psgd_torch_in_float32(name):
  """PRO4P and Q0.5EQ1.5 divide the rounding of a nearly symmetric matrix by its own norm."""
  assert worst_error(name, "f32") <= (1e-3 if "PRO4P" in name else TOLERANCE["f32"])


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["f64", "f32"])
def precision(request):
  with jax.enable_x64(request.param == "f64"):
    yield request.param


def members(z, prefix, last):
  return sorted(k.removesuffix(f"/{last}") for k in z if k.startswith(prefix) and k.endswith(f"/{last}"))


@pytest.mark.parametrize("kind", ["spd", "skh"])
def test_norm_estimate_equals_psgd_torch_and_is_a_lower_bound(kind, precision):
  """max ‖V_i A²‖ over 32 rows, two half steps of the power iteration each."""
  z = load(f"helpers_{precision}")
  names = members(z, f"norm_{kind}/", "A")
  assert len(names) == 4
  for name in names:
    estimate = norm_estimate(jnp.asarray(z[f"{name}/A"]), jnp.asarray(z[f"{name}/draw0"]), skew=kind == "skh")
    tolerance = TOLERANCE[precision]
    np.testing.assert_allclose(estimate, z[f"{name}/out"], rtol=tolerance, atol=1e-30)
    assert estimate <= z[f"{name}/true"] * (1 + tolerance) + 1e-30


def test_norm_bound_equals_the_legacy_bound_on_square_matrices(precision):
  """Within √2 of ‖A‖, from below. Of the four recorded matrices two are square, as all of ours are."""
  z = load(f"helpers_{precision}")
  square_ones = [name for name in members(z, "norm_legacy/", "A") if len(set(z[f"{name}/A"].shape)) == 1]
  assert square_ones
  for name in square_ones:
    bound = norm_bound(jnp.asarray(z[f"{name}/A"]))
    np.testing.assert_allclose(bound, z[f"{name}/out"], rtol=TOLERANCE[precision])
    assert bound <= z[f"{name}/true"] * (1 + TOLERANCE[precision]) <= 2**0.5 * bound * (1 + 1e-5)


def test_procrustes_steps_equal_psgd_torch(precision):
  """Q ← Q + a (RQ + a/2 R²Q), and its third-order form."""
  z = load(f"helpers_{precision}")
  for order, count in ((2, 6), (3, 6)):
    names = members(z, f"procrustes_step{order}/", "Q_in")
    assert len(names) == count
    for name in names:
      norm = functools.partial(norm_estimate, block=jnp.asarray(z[f"{name}/draw0"]), skew=True)
      came = {2: procrustes_step, 3: procrustes_step_3}[order](jnp.asarray(z[f"{name}/Q_in"]), norm)
      assert error(came, z[f"{name}/Q_out"]) <= TOLERANCE[precision]
