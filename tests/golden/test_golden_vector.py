# SPDX-License-Identifier: Apache-2.0
"""Parity of `lra` and `xmat` with psgd_torch 2.0 and its legacy code (tests/golden/psgd)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpsgd_optax.preconditioners import lra, xmat
from tests.golden.record import TOLERANCE, case, case_names, draws, error

LRA = [f"{criterion}/r{rank}" for criterion in ("newton", "whiten") for rank in (0, 1, 3)]
XMAT = [f"xmat/{order}/n{n}" for order in ("1st", "2nd") for n in (6, 7)]
UVD = ["uvd/1st", "uvd/2nd"]


@pytest.fixture(params=["f64", "f32"])
def precision(request):
  with jax.enable_x64(request.param == "f64"):
    yield request.param


def columns(u, v):
  return jnp.concatenate([jnp.asarray(u), jnp.asarray(v)], 1)


def test_all_cases_are_here():
  assert set(LRA) == set(case_names("lra"))
  assert set(XMAT + UVD) == {name for name in case_names("legacy") if name.startswith(("xmat", "uvd"))}


@pytest.mark.parametrize("name", LRA)
def test_six_updates_of_lra_equal_psgd_torch(name, precision):
  """Rank 0, 1, 3; when whitening, psgd_torch takes the damping noise for v."""
  z, meta = case(f"lra_{precision}", name)
  state = lra.state_of(
    columns(z["U_init"], z["V_init"]), jnp.asarray(z["d_init"][:, 0]), jnp.zeros(3, z["d_init"].dtype)
  )

  @jax.jit
  def update(state, *probe):
    first = lra.balanced(state) if state.w.size else state
    return lra.move_low_rank(first, *probe, step_size=meta["lr"])

  for t in range(meta["steps"]):
    noise, *coin = draws(z, t)
    x = (z[f"t{t}/g"] if name.startswith("whiten") else z[f"t{t}/h"])[:, 0]
    v = (noise if name.startswith("whiten") else z[f"t{t}/v"])[:, 0]
    h = x + (x.dtype.type(meta["damping"]) + np.finfo(x.dtype).eps * np.abs(x)) * noise[:, 0]
    state = update(state, v, h, jnp.asarray(not coin or coin[0] < 0.5))
    assert error(state.d, z[f"t{t}/d"]) <= TOLERANCE[precision]
    assert error(state.w, columns(z[f"t{t}/U"], z[f"t{t}/V"])) <= TOLERANCE[precision]
    if state.w.size:
      assert error(state.lipschitz, [z[f"t{t}/L{k}"] for k in ("d", "U", "V")]) <= TOLERANCE[precision]
    assert error(lra.product(state, z[f"t{t}/g"][:, 0]), z[f"t{t}/Pg"]) <= TOLERANCE[precision]


@pytest.mark.parametrize("name", UVD)
def test_legacy_updates_equal_psgd_torch(name, precision):
  """The legacy code: other normalisers, no memory, and a coin for balancing by ρ = √(‖U‖/‖V‖)."""
  z, meta = case(f"legacy_{precision}", name)
  state = lra.state_of(
    columns(z["U_init"], z["V_init"]), jnp.asarray(z["d_init"][:, 0]), jnp.zeros(3, z["d_init"].dtype)
  )
  for t in range(meta["steps"]):
    v, h, g = (z[f"t{t}/{k}"][:, 0] for k in "vhg")
    balance, coin = draws(z, t)
    if balance < 0.01:
      u, w = jnp.split(state.w, 2, 1)
      rho = jnp.sqrt(jnp.linalg.norm(u) / jnp.linalg.norm(w))
      state = lra.state_of(columns(u / rho, w * rho), *state[2:])
    seen, of_u = lra.probe_through_q(state, v, h), bool(coin < 0.5)
    ph, pv = state.d * seen.e, seen.f / state.d
    other = jnp.split(state.w, 2, 1)[1 if of_u else 0]
    back = lambda x, other=other: other @ (other.T @ x)
    a, b = back(seen.a), back(seen.b)
    if "1st" in name:
      d_step = 1 / jnp.max(jnp.abs(ph * h - v * pv))
      square = jnp.sum(seen.a**2) * (a @ a) + jnp.sum(seen.b**2) * (b @ b) - 2 * (seen.a @ seen.b) * (a @ b)
      step = 1 / jnp.sqrt(jnp.abs(square))
    else:
      d_step = jnp.min(1 / jnp.sqrt(ph**2 + v**2) / jnp.sqrt(h**2 + pv**2))
      step = 1 / (jnp.linalg.norm(seen.a) * jnp.linalg.norm(a) + jnp.linalg.norm(seen.b) * jnp.linalg.norm(b))
    state = lra.move_along(state, v, h, seen, meta["lr"] * d_step, meta["lr"] * step, of_u)
    assert error(state.d, z[f"t{t}/d"]) <= TOLERANCE[precision]
    assert error(state.w, columns(z[f"t{t}/U"], z[f"t{t}/V"])) <= TOLERANCE[precision]
    assert error(lra.product(state, g), z[f"t{t}/Pg"]) <= TOLERANCE[precision]


def first_order(e_a, e_b, tt, ss):
  """The legacy normaliser "1st"."""
  del tt, ss
  return jnp.maximum(jnp.max(jnp.abs(e_a)), jnp.max(jnp.abs(e_b)))


@pytest.mark.parametrize("name", XMAT)
def test_five_updates_of_xmat_equal_psgd_torch(name, precision):
  """Even and odd n; both normalisers, without memory."""
  z, meta = case(f"legacy_{precision}", name)
  state = xmat.XMatState(jnp.asarray(z["a_init"]), jnp.asarray(z["b_init"]), jnp.zeros((), z["a_init"].dtype))
  measure = first_order if "1st" in name else xmat.second_order
  for t in range(meta["steps"]):
    v, h, g = (z[f"t{t}/{k}"] for k in "vhg")
    state = xmat.move_x(state, v, h, step_size=meta["lr"], measure=measure, memory=0.0)
    assert error(state.a, z[f"t{t}/a"]) <= TOLERANCE[precision]
    assert error(state.b, z[f"t{t}/b"]) <= TOLERANCE[precision]
    assert error(xmat.product(state, g), z[f"t{t}/Pg"]) <= TOLERANCE[precision]
