# SPDX-License-Identifier: Apache-2.0
"""Parity of `dense` with psgd_torch 2.0 and its legacy code (tests/golden/psgd): each update from the stored state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.geometry.moves import Normalizer, spectral, trace
from dpsgd_optax.geometry.norms import procrustes_step, procrustes_step_3
from dpsgd_optax.geometry.structured import LowRank
from dpsgd_optax.preconditioners.dense import DenseState, move_dense
from tests.golden.record import TOLERANCE, case, case_names, draws, error
from tests.golden.reference_norms import norm_estimate
from tests.golden.test_golden_kron import GEOMETRIES

CASES = [f"{g}/{hessian}" for g in GEOMETRIES for hessian in ("spd", "indef")]
LEGACY = [
  "newton/2nd/gl_keep_inv",
  "newton/1st/gl_keep_inv",
  "newton/2nd/triangular",
  "newton/1st/triangular",
  "dense_fn",
]


@pytest.fixture(params=["f64", "f32"])
def precision(request):
  with jax.enable_x64(request.param == "f64"):
    yield request.param


def with_rows(geometry, blocks):
  """The geometry with the rows that psgd_torch drew for the norms of the skew parts."""
  norms = [functools.partial(norm_estimate, block=jnp.asarray(rows), skew=True) for rows in blocks]
  if geometry is dpo.pro:
    return geometry._replace(move=lambda q, e, mu: procrustes_step(q - mu * (e @ q), norms[0]))
  if geometry is dpo.geometry.pro4p:
    return geometry._replace(move=lambda q, e, mu: functools.reduce(procrustes_step_3, norms, q - mu * (e @ q)))
  return geometry


def preconditioned(geometry, q, g):
  return q @ g if geometry.fits_p else q.T @ (q @ g)


def test_all_14_cases_are_here():
  assert set(CASES) == set(case_names("dense")) and len(CASES) == 14


@pytest.mark.parametrize("name", CASES)
def test_five_updates_equal_psgd_torch(name, precision):
  """7 geometries × {definite, indefinite}, n = 6, Newton pairs."""
  geometry = GEOMETRIES[name.split("/")[0]]
  z, meta = case(f"dense_{precision}", name)
  q, lip = jnp.asarray(z["Q_init"]), jnp.zeros(1, z["Q_init"].dtype)
  for t in range(meta["steps"]):
    v, h, g = (z[f"t{t}/{k}"][:, 0] for k in "vhg")
    noise, *blocks = draws(z, t)
    damped = h + (h.dtype.type(meta["damping"]) + np.finfo(h.dtype).eps * np.abs(h)) * noise[:, 0]
    new = move_dense(
      DenseState(q, (), lip), v, damped, geometry=with_rows(geometry, blocks), step_size=meta["lr"], low_rank=True
    )
    close = 1e-3 if geometry is dpo.geometry.pro4p and precision == "f32" else TOLERANCE[precision]
    assert error(new.q, z[f"t{t}/Q"]) <= close
    assert error(new.lipschitz[0], z[f"t{t}/L"]) <= close
    assert error(preconditioned(geometry, jnp.asarray(z[f"t{t}/Q"]), g), z[f"t{t}/Pg"]) <= TOLERANCE[precision]
    q, lip = jnp.asarray(z[f"t{t}/Q"]), jnp.asarray(z[f"t{t}/L"])[None]


def frobenius(t1, t2, e, norm):
  """‖aaᵀ − bbᵀ‖: the normaliser "1st" of the legacy general linear form."""
  del t1, t2, norm
  gram = e.x @ e.x.T
  return jnp.sqrt(jnp.abs(e.s @ (gram**2) @ e.s))


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_updates_equal_psgd_torch(name, precision):
  """GL with its inverse kept, and upper triangular, each with both normalisers; no memory in L."""
  z, meta = case(f"legacy_{precision}", name)
  first, general = "1st" in name or name == "dense_fn", "gl" in name
  geometry = dpo.geometry.gl if general else dpo.eq
  normalizer = trace._replace(memory=0.0)
  if first:
    normalizer = Normalizer(frobenius, 0.0, trace.size) if general else spectral
  q = jnp.asarray(z["Q_init"])
  inverse = jnp.linalg.inv(q) if general else ()
  for t in range(meta["steps"]):
    v, h, g = (z[f"t{t}/{k}"][:, 0] for k in "vhg")
    state = DenseState(q, inverse, jnp.zeros(1, q.dtype))
    low_rank = general or not first  # the norm of a triangle needs the matrix itself
    new = move_dense(state, v, h, geometry=geometry, step_size=meta["lr"], normalizer=normalizer, low_rank=low_rank)
    assert error(new.q, z[f"t{t}/Q"]) <= TOLERANCE[precision]
    assert error(preconditioned(geometry, new.q, g), z[f"t{t}/Pg"]) <= TOLERANCE[precision]
    q = jnp.asarray(z[f"t{t}/Q"])
    if general:
      assert error(new.inverse, z[f"t{t}/invQ"]) <= 10 * TOLERANCE[precision]
      inverse = jnp.asarray(z[f"t{t}/invQ"])


def test_low_rank_products_equal_those_of_the_matrix(rng):
  """e @ q, q @ e, their upper triangles, and q (I − e)⁻¹, against the matrix written out."""
  x, q = rng.standard_normal((3, 5)) + 1j * rng.standard_normal((3, 5)), rng.standard_normal((5, 5)) + 0j
  s = np.array([0.3, -0.2, 0.1])
  full = np.einsum("k,ki,kj->ij", s, x, x.conj())
  with jax.enable_x64(True):
    e, q_ = LowRank(jnp.asarray(x), jnp.asarray(s)), jnp.asarray(q)
    np.testing.assert_allclose(e @ q_, full @ q, atol=1e-12)
    np.testing.assert_allclose(q_ @ e, q @ full, atol=1e-12)
    np.testing.assert_allclose(LowRank(e.x, e.s, upper=True) @ q_, np.triu(full) @ q, atol=1e-12)
    np.testing.assert_allclose(e.divide_by_one_minus(q_), q @ np.linalg.inv(np.eye(5) - full), atol=1e-10)
    np.testing.assert_allclose((e * 0.5 - e * 3).trace(), -2.5 * np.trace(full).real, atol=1e-12)
