# SPDX-License-Identifier: Apache-2.0
"""Parity with the arrays of the reference code and of the canonical algorithm (tests/golden/dpsgd), in float64.

`maxabs`, `specnorm`, `nb_*`: produced by the author's functions; `paper_*`: by an independent numpy program.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.geometry.fit import fit_factors
from dpsgd_optax.geometry.linalg import balancing, sandwich, scaled
from dpsgd_optax.geometry.norms import norm_bound
from dpsgd_optax.preconditioners._factors import KronState
from tests.table import counted

GOLDEN = Path(__file__).parent / "dpsgd"
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SHAPES = ["s4x3", "s3x7", "s1x6", "s6x1", "s8x8", "s5x2", "s1x1"]
RULES = {"maxabs": dpo.geometry.max_abs, "specnorm": dpo.geometry.spectral}

pytestmark = pytest.mark.usefixtures("x64")


def load(name):
  return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def factor(q):
  """The reference stores a 1 x 1 factor as a matrix; here an axis of length 1 has a diagonal factor."""
  return jnp.asarray(q).reshape(1) if q.shape == (1, 1) else jnp.asarray(q)


def one_fit(q, v, h, normalizer, step_size):
  """Balance, then move: the order of the reference."""
  q = tuple(map(factor, q))
  q = scaled(q, balancing(q, normalizer.size))
  p = tuple(jnp.zeros_like(x) for x in q)  # eq does not look at p
  moved, _ = fit_factors(
    q, p, jnp.zeros(2), jnp.asarray(v), jnp.asarray(h), geometry=dpo.eq, normalizer=normalizer, step_size=step_size
  )
  return moved


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", ["eye", "rand"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_fit_equals_the_reference(shape, start, rule):
  z, case = load("kron_update"), f"{shape}_{start}"
  q = z[f"{case}_QL"], z[f"{case}_QR"]
  for step in ("0.01", "0.1"):
    new = one_fit(q, z[f"{case}_dX"], z[f"{case}_dG"], RULES[rule], float(step))
    for side, name in zip(new, ("QL", "QR"), strict=True):
      expected = z[f"{case}_{rule}_step{step}_{name}"]
      np.testing.assert_allclose(np.reshape(side, expected.shape), expected, **CLOSE)
  p = tuple(jnp.conj(factor(x)).T @ factor(x) if factor(x).ndim == 2 else factor(x) ** 2 for x in q)
  np.testing.assert_allclose(sandwich(p, jnp.asarray(z[f"{case}_G"])), z[f"{case}_pre"], **CLOSE)


def test_norm_bound_equals_the_reference_and_is_a_lower_bound():
  z = load("kron_update")
  for i in range(5):
    bound = norm_bound(jnp.asarray(z[f"nlb{i}_in"]))
    np.testing.assert_allclose(bound, z[f"nlb{i}_out"], **CLOSE)
    assert bound <= z[f"nlb{i}_true2norm"] * (1 + 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_400_fits_on_a_kronecker_hessian_reach_its_inverse(rule):
  z = load("kron_update")
  left, right = z["seq_HL"], z["seq_HR"]

  def body(q, inputs):
    v, step = inputs
    q = one_fit(q, v, left @ v @ right, RULES[rule], step)
    return q, q

  _, history = jax.lax.scan(body, (jnp.eye(4), jnp.eye(3)), (jnp.asarray(z["seq_V"]), jnp.asarray(z["seq_steps"])))
  # chaotic: a relative 1e-15 in the start grows to 1e-9 by step 99 and to 1e-2 by step 399, in numpy too
  for t, close in ((0, 1e-11), (9, 1e-11), (99, 1e-7)):
    for side, name in zip(history, ("QL", "QR"), strict=True):
      np.testing.assert_allclose(side[t], z[f"seq_{rule}_t{t}_{name}"], rtol=0, atol=close)
  p = [np.asarray(q[-1].T @ q[-1]) for q in history]
  error = np.linalg.norm(np.kron(*p) @ np.kron(left, right) - np.eye(12)) / np.sqrt(12)
  assert error < min(0.1, 2 * z[f"seq_{rule}_PH_relerr"])  # of two versions of XLA one ends a third above the other


def damped_state(p, params, q, damping):
  """A state of damped_kron with given factors, damped."""
  state = p.init(params)
  (name, bucket), *_ = state.buckets.items()
  q = tuple(factor(x)[None] for x in q)
  kron = KronState(q, tuple(jax.vmap(lambda x: x.T @ x if x.ndim == 2 else x**2)(x) for x in q), bucket.kron.lipschitz)
  means = jnp.stack([jnp.mean(jax.vmap(lambda x: jnp.diagonal(x) if x.ndim == 2 else x)(x)) for x in kron.p])[None]
  return p.advance(state._replace(buckets={name: bucket._replace(kron=kron, means=means)}), damping=damping)


@pytest.mark.parametrize("shape", ["s4x3", "s1x6", "s7x2", "s5x5"])
@pytest.mark.parametrize("form", ["absorbed", "additive"])
def test_damping_equals_eq_36_and_eq_46(shape, form):
  z = load("damping")
  p = dpo.damped_kron(
    average=None, eta=float(z["eta"]), form={"absorbed": dpo.tikhonov.factored, "additive": dpo.tikhonov.additive}[form]
  )
  g = jnp.asarray(z[f"{shape}_G"])
  for j, tau in enumerate(z["taus"]):
    state = damped_state(p, g, (z[f"{shape}_QL"], z[f"{shape}_QR"]), tau)
    np.testing.assert_allclose(p.apply(state, g), z[f"{shape}_tau{j}_paper_{form}_pre"], **CLOSE)


@pytest.mark.parametrize("average", ["recursive", "two_tap"])
def test_averages_equal_eq_47_and_the_notebooks_mix(average):
  z = load("ema")
  rule = dpo.tikhonov.recursive(float(z["beta_max"]))
  mean = memory = (jnp.zeros((4, 4)), jnp.zeros((3, 3)))
  for t in range(6):
    current = tuple(jnp.asarray(q[t].T @ q[t]) for q in (z["QL"], z["QR"]))
    if average == "two_tap":
      beta = z["paper_betas"][t]
      rule = dpo.tikhonov.two_tap(1 - beta, beta)
    mean, memory = rule.advance(jnp.asarray(t), mean, memory, current)
    name = {"recursive": "paper_recursive", "two_tap": "nb_undamped_2tap"}[average]
    np.testing.assert_allclose(mean[0], z[f"{name}_PL"][t], **CLOSE)
    np.testing.assert_allclose(mean[1], z[f"{name}_PR"][t], **CLOSE)


def test_the_damping_rule_equals_eq_33():
  z = load("lm")
  rule = {"factor": float(z["omega"]), "bounds": (float(z["tau_min"]), float(z["tau_max"]))}
  adapted = dpo.adapt_damping(jnp.asarray(z["tau"]), jnp.asarray(z["J0"] - z["J1"]), jnp.asarray(z["M"]), **rule)
  np.testing.assert_allclose(adapted, z["paper_tau"], **CLOSE)
  for predicted, expected in zip((0.0, -0.1), z["paper_tau_Mnonpos"], strict=True):
    np.testing.assert_allclose(dpo.adapt_damping(0.8, 0.5, predicted, **rule), expected, **CLOSE)
  assert dpo.adapt_damping(0.8, jnp.nan, 1.0, **rule) > 0.8


def quadratic(z, params):
  terms = [0.5 * jnp.vdot(w, z[f"HL{i}"] @ w @ z[f"HR{i}"]) - jnp.vdot(z[f"B{i}"], w) for i, w in enumerate(params)]
  return sum(terms) + 10.0


def perceptron(z, params):
  hidden = jnp.tanh(jnp.pad(z["X"], ((0, 0), (0, 1)), constant_values=1.0) @ params[0])
  out = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1.0) @ params[1]
  return jnp.mean((out - z["Y"]) ** 2)


PROBLEMS = {"quad": quadratic, "mlp": perceptron}


def replay(key, updates, params, *, recorded, hvp, **extra):
  """A curvature that takes its probe from the record."""
  del key, updates, params, extra
  return dpo.Probe(recorded, hvp(recorded))


def trajectory_program(problem, make):
  """(start, hyper) -> state and one step, compiled once for all runs that differ in numbers only."""

  @counted
  def counted_step(z, hyper, params, state, recorded):
    tx = make(hyper)
    loss = lambda p: PROBLEMS[problem](z, p)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
      grads, state, params, value=value, value_fn=loss, hvp=dpo.hvp(loss, params), recorded=recorded
    )
    return optax.apply_updates(params, updates), state, value

  step, traces = counted_step

  def run(z, hyper):
    data = {k: jnp.asarray(z[k]) for k in z if k[:2] in ("HL", "HR", "B0", "B1") or k in ("X", "Y")}
    params = [jnp.asarray(z[f"W{i}_init"]) for i in (0, 1)]
    state = make(hyper).init(params)
    for t in range(20):
      params, state, value = step(data, hyper, params, state, [jnp.asarray(z[f"V{i}"][t]) for i in (0, 1)])
      yield t, params, state, value
    assert len(traces) == 1

  return run


def check_parameters(z, t, params, name):
  for i, w in enumerate(params):
    expected = z[f"W{i}"][t + 1] if t < 19 else z[f"Wfin{i}"][0]
    np.testing.assert_allclose(w, expected, **CLOSE, err_msg=f"{name}, step {t}, weight {i}")


PAPER_RUNS = {
  ("absorbed", "specnorm", 1): ["absorbed", "absorbed_T1_3", "noavg_absorbed", "absorbed_lm_a2", "absorbed_lm_a4"],
  ("additive", "specnorm", 1): ["additive", "additive_lm_a2", "additive_lm_a4"],
  ("absorbed", "maxabs", 2): ["absorbed_maxabs_R2"],
}


def test_no_trajectory_is_left_out():
  stored = {path.stem for path in GOLDEN.glob("traj_*_paper_*.npz")}
  assert stored == {f"traj_{p}_paper_{run}" for p in PROBLEMS for runs in PAPER_RUNS.values() for run in runs}
  assert len(stored) == 18


@pytest.mark.parametrize("kind", PAPER_RUNS, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dpsgd_follows_the_canonical_trajectories(problem, kind):
  form, rule, repeats = kind

  def make(hyper):
    return dpo.dpsgd(
      hyper["alpha"],
      dpo.damped_kron(
        average=dpo.tikhonov.recursive(hyper["beta_max"], each_step=True),
        eta=hyper["eta"],
        step_size=hyper["precond_step"],
        form={"absorbed": dpo.tikhonov.factored, "additive": dpo.tikhonov.additive}[form],
        normalizer=RULES[rule],
        repeats=repeats,
        geometry=dpo.eq,
      ),
      replay,
      every=hyper["T1"],
      max_update_norm=hyper["nu"],
      judge_every=hyper["T2"],
      damping=hyper["tau0"],
      bounds=(hyper["eta"], hyper["tau_max"]),
      factor=hyper["omega"],
    )

  run = trajectory_program(problem, make)
  names = ("alpha", "beta_max", "eta", "nu", "tau0", "tau_max", "omega", "precond_step")
  for name in PAPER_RUNS[kind]:
    z = load(f"traj_{problem}_paper_{name}")
    assert int(z["n_inner"]) == repeats and str(z["normalizer"]) == rule
    hyper = {k: jnp.asarray(float(z[k])) for k in names} | {k: jnp.asarray(int(z[k])) for k in ("T1", "T2")}
    for t, params, state, value in run(z, hyper):
      np.testing.assert_allclose(value, z["J"][t], **CLOSE, err_msg=f"{name}, step {t}")
      np.testing.assert_allclose(optax.tree.get(state, "rate"), z["alpha_t"][t], **CLOSE)
      np.testing.assert_allclose(state.damping, z["tau_after"][t], **CLOSE)
      if np.isfinite(z["rho"][t]):
        np.testing.assert_allclose(state.ratio, z["rho"][t], **CLOSE)
      check_parameters(z, t, params, name)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_damping_and_averaging_dpsgd_is_the_authors_psgd(problem):
  z = load(f"traj_{problem}_nb_psgd")
  size = sum(z[f"W{i}_init"].size for i in (0, 1))

  def make(hyper):
    return dpo.dpsgd(
      hyper["alpha"],
      dpo.damped_kron(average=None, geometry=dpo.eq, normalizer=dpo.geometry.max_abs, step_size=0.01),
      replay,
      every=1,
      damping=None,
      max_update_norm=0.1 * size**0.5,
    )

  for t, params, _, value in trajectory_program(problem, make)(z, {"alpha": jnp.asarray(float(z["alpha"]))}):
    np.testing.assert_allclose(value, z["J"][t], **CLOSE)
    check_parameters(z, t, params, "nb_psgd")
