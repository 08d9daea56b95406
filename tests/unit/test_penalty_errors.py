# SPDX-License-Identifier: Apache-2.0
"""What the penalties say to wrong use."""

import jax
import optax
import pytest

import dpsgd_optax as dpo
from tests.table import PARAMS
from tests.unit.test_regularization import MASK, loss


def scaled(preconditioner, **around):
  return dpo.scale_by_preconditioner(preconditioner, dpo.whitening(), **around)


def refused(tx, **extra):
  return lambda: jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra))


bare = dpo.kron()._replace(power=None)

BAD = {
  "strength": (lambda: dpo.penalties.add_l1_penalty(-1.0), "strength", "-1.0", "Try"),
  "l2 strength": (lambda: dpo.penalties.add_l2_penalty(-1.0, power=1), "strength", "-1.0"),
  "gradient strength": (lambda: dpo.add_gradient_norm_penalty(-0.5), "strength", "-0.5"),
  "direction strength": (lambda: dpo.gradient_norm(-0.5), "strength", "-0.5"),
  "radius": (lambda: dpo.penalties.sharpness_aware(-0.05), "radius", "-0.05"),
  "proximal rate": (lambda: dpo.penalties.proximal_l1(0.1, -0.1), "learning_rate", "-0.1"),
  "decay": (lambda: dpo.second_moment(1.0), "decay", "[0, 1)"),
  "eps": (lambda: dpo.second_moment(eps=-1e-8), "eps", "-1e-08"),
  "outside": (refused(dpo.penalties.add_l1_penalty(0.1, power=1)), "`add_l1_penalty(power=1)`", "fitted", "after=…"),
  "outside, prox": (refused(dpo.penalties.proximal_l2(0.1, 0.1, power=0)), "proximal_l2", "after=…"),
  "outside, gradient": (
    refused(dpo.add_gradient_norm_penalty(0.1, preconditioned=True), hvp=lambda v: v),
    "preconditioned=True",
    "momentum=…",
  ),
  "no hvp": (refused(dpo.add_gradient_norm_penalty(0.1)), "`hvp`", "hvp=hvp(loss, params)"),
  "no hvp, direction": (
    refused(scaled(dpo.second_moment(), direction=dpo.gradient_norm(0.1))),
    "`gradient_norm`",
    "hvp=hvp(loss, params)",
  ),
  "no value_fn": (refused(dpo.penalties.sharpness_aware(0.1)), "value_fn=loss"),
  "masked loss": (
    refused(optax.masked(dpo.penalties.sharpness_aware(0.1), MASK), value_fn=loss),
    "masked",
    "add_gradient_norm_penalty",
  ),
  "no params": (
    lambda: dpo.penalties.add_l1_penalty(0.1).update(PARAMS, dpo.penalties.add_l1_penalty(0.1).init(PARAMS)),
    "params",
    "None",
    "update(grads, state, params)",
  ),
  "prox of a dense P": (
    refused(scaled(dpo.kron(), after=dpo.penalties.proximal_l1(0.1, 0.1, power=0))),
    "power=0",
    "diagonal",
    "power=1",
  ),
  "no power": (
    refused(scaled(dpo.lra(), after=dpo.penalties.add_l2_penalty(0.1, power=0.5))),
    "0.5",
    "power=1",
    "kron",
  ),
  "no root": (refused(scaled(bare, after=dpo.penalties.add_l1_penalty(0.1, power=1))), "root", "second_moment"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_the_argument_what_came_and_what_to_type(name):
  call, *words = BAD[name]
  with pytest.raises(ValueError) as error:
    call()
  missing = [word for word in words if word not in str(error.value)]
  assert not missing, f"{missing} not in: {error.value}"
