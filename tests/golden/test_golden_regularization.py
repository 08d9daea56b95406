# SPDX-License-Identifier: Apache-2.0
"""Every way of regularising under a preconditioner against the formulas of the change of variables, ten steps each.

The arrays are a float64 reference in NumPy on L = ½(p − c)ᵀA(p − c), κ(A) = 356; every run with the fixed P was
asserted there to be literal gradient descent in z = P⁻¹p.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo

FILE = np.load(Path(__file__).parent / "regularization" / "ye_regularisation_f64.npz")
META = json.loads(str(FILE["meta"]))
LR, L2, L1, GR, RHO = (META[k] for k in ("lr", "lam_l2", "lam_l1", "lam_gr", "sam_rho"))
TOLERANCE = dict(rtol=1e-12, atol=1e-12)

decay, l1, gradient, sam = (
  optax.add_decayed_weights,
  dpo.penalties.add_l1_penalty,
  dpo.add_gradient_norm_penalty,
  dpo.penalties.sharpness_aware,
)
step = optax.scale_by_learning_rate


def adam(*between, before=(), after=None, behind=None):
  """Adam as a preconditioner, with penalties before the fit, between fit and momentum, within sight of P, behind it."""
  inside = dpo.scale_by_preconditioner(
    dpo.second_moment(META["b2"], META["eps"]),
    dpo.whitening(),
    momentum=optax.chain(*between, optax.ema(META["b1"])),
    after=after,
  )
  return optax.chain(*before, inside, *([step(LR)] if behind is None else behind))


ADAM = {
  "none": lambda: adam(),
  "l2_orig_stats": lambda: adam(before=[decay(L2)]),
  "l2_orig_nostats": lambda: adam(decay(L2)),
  "l2_intr": lambda: adam(behind=[decay(L2), step(LR)]),
  "l2_intr_prox": lambda: adam(after=dpo.penalties.proximal_l2(L2, LR, power=1), behind=[]),
  "l2_orig_prox": lambda: adam(after=dpo.penalties.proximal_l2(L2, LR, power=0), behind=[]),
  "l1_orig_stats": lambda: adam(before=[l1(L1)]),
  "l1_orig_nostats": lambda: adam(l1(L1)),
  "l1_intr": lambda: adam(after=l1(L1, power=1)),
  "l1_intr_prox": lambda: adam(after=dpo.penalties.proximal_l1(L1, LR, power=1), behind=[]),
  "l1_orig_prox": lambda: adam(after=dpo.penalties.proximal_l1(L1, LR, power=0), behind=[]),
  "l1_decoupled": lambda: adam(behind=[l1(L1), step(LR)]),
  "l1_decoupled_prox": lambda: adam(behind=[dpo.penalties.proximal_l1(L1, LR)]),
  "gr_orig": lambda: adam(gradient(GR)),
  "gr_intr": lambda: adam(gradient(GR, preconditioned=True)),
  "gr_orig_fd": lambda: adam(gradient(GR)),
  "gr_intr_fd": lambda: adam(gradient(GR, preconditioned=True)),
  "sam_orig": lambda: adam(sam(RHO)),
  "sam_intr": lambda: adam(sam(RHO, preconditioned=True)),
}


def fixed(**around):
  """P of the file, not symmetric: M = P Pᵀ is applied, P is its root."""
  root = FILE["fixed/P"]
  inverse = np.linalg.inv(root)
  p = dpo.Preconditioner(
    init=lambda params: jnp.zeros(()),
    fit=lambda state, probe, *, key, damping: state,
    apply=lambda state, x: root @ (root.T @ x),
    root=lambda state, x, back: (inverse if back else root) @ x,
  )
  return dpo.scale_by_preconditioner(p, dpo.whitening(), **around)


RATE = float(FILE["fixed/lr"])
FIXED = {
  "none": lambda: optax.chain(fixed(), step(RATE)),
  "l2_orig": lambda: optax.chain(decay(L2), fixed(), step(RATE)),
  "l2_intr": lambda: optax.chain(fixed(), decay(L2), step(RATE)),
  "l1_orig": lambda: optax.chain(l1(L1), fixed(), step(RATE)),
  "l1_intr": lambda: optax.chain(fixed(after=l1(L1, power=1)), step(RATE)),
  "gr_orig": lambda: optax.chain(gradient(GR), fixed(), step(RATE)),
  "gr_intr": lambda: optax.chain(fixed(direction=dpo.gradient_norm(GR)), step(RATE)),
}


def loss(p):
  error = p - FILE["c"]
  return error @ FILE["A"] @ error / 2


def run(tx, product=dpo.hvp, start=FILE["p0"], steps=10):
  """The iterates (steps + 1, 6)."""

  def body(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params, hvp=product(loss, params), value_fn=loss)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  start = jnp.asarray(start)
  _, iterates = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))((start, tx.init(start)))
  return np.concatenate([start[None], iterates])


def by_difference(loss, params):
  return dpo.hvp_finite_difference(loss, params, epsilon=META["fd_eps"])


@pytest.mark.parametrize("variant", ADAM)
def test_regularised_adam_follows_the_reference(x64, variant):
  product = by_difference if variant.endswith("fd") else dpo.hvp
  np.testing.assert_allclose(run(ADAM[variant](), product), FILE[f"adam/{variant}/p"], **TOLERANCE)


@pytest.mark.parametrize("variant", FIXED)
def test_a_fixed_preconditioner_is_gradient_descent_in_z(x64, variant):
  np.testing.assert_allclose(run(FIXED[variant]()), FILE[f"fixed/{variant}/p"], **TOLERANCE)


def test_every_variant_of_the_file_is_tested():
  names = {tuple(key.split("/")[:2]) for key in FILE.files if key.endswith("/p")}
  assert names == {("adam", v) for v in ADAM} | {("fixed", v) for v in FIXED}


OPTAX = {
  "none": lambda: optax.adam(LR, META["b1"], META["b2"], META["eps"]),
  "l2_intr": lambda: optax.adamw(LR, META["b1"], META["b2"], META["eps"], weight_decay=L2),
  "l2_orig_stats": lambda: optax.chain(decay(L2), optax.adam(LR, META["b1"], META["b2"], META["eps"])),
}


@pytest.mark.parametrize("variant", OPTAX)
def test_the_variants_that_optax_has_are_the_same_to_the_last_bits(x64, variant):
  np.testing.assert_allclose(run(ADAM[variant]()), run(OPTAX[variant]()), rtol=4e-16, atol=4e-16)
