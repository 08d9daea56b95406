# SPDX-License-Identifier: Apache-2.0
"""Loops of other packages × optimizers, one row and one column each. A cell works, or is refused with a message.

A loop takes an `Optimizer` and returns its losses, positive numbers that are near zero at the end. It works if the last
of them are below half of the first, which `BROKEN` does not reach. Where a loop hands on less than an optimizer needs,
the table says what the message says: a person who reads it knows what to type.
"""

import importlib
import importlib.util
import itertools
import re
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from tests.clients.columns import OPTIMIZERS, Optimizer


class Refusal(NamedTuple):
  """Attributes:
  says: the message, as a regular expression.
  reason: why, in the table.
  """

  says: str
  reason: str


class Client(NamedTuple):
  """Attributes:
  loop: module and function.
  package: what has to be installed, by the name of its distribution.
  refuses: by the name of the optimizer.
  skips: optimizers that make no sense here.
  x64: whether the package turns on float64.
  """

  loop: str
  package: str
  refuses: Mapping[str, Refusal] = MappingProxyType({})
  skips: frozenset[str] = frozenset()
  x64: bool = False

  def installed(self) -> bool:
    return importlib.util.find_spec(IMPORTED_AS.get(self.package, self.package)) is not None

  def run(self, optimizer: Optimizer) -> np.ndarray:
    module, function = self.loop.split(":")
    loop = getattr(importlib.import_module(f"tests.clients.{module}"), function)
    with jax.enable_x64(self.x64):  # the import of NetKet sets it for the whole process
      return np.array([float(x) for x in loop(optimizer)])


IMPORTED_AS = {"dm-haiku": "haiku", "orbax-checkpoint": "orbax"}
LAYERED = frozenset({"gls", "bnp"})
WITHOUT_PRODUCT = frozenset({"psgd whitening", "dpsgd whitening"})

NEWTON = Refusal(
  r"`newton\(\)`.*no `hvp`.*`hvp=hvp\(loss, params\)`.*`dpsgd\(lr, curvature=whitening\(\)\)`.*`psgd\(lr\)`",
  "the loop hands on no `hvp`; the message names what needs none: `psgd(lr)`, and `dpsgd(lr, curvature=whitening())` "
  "where the loop hands on `value`",
)
DIAGONAL = Refusal(r"`hessian_diagonal\(\)`.*no `hvp`.*`hvp=hvp\(loss, params\)`", "the loop hands on no `hvp`")
JUDGED = Refusal(r"neither `value` nor `value_fn`.*`value=loss_value", "the loop hands on no `value`")
INPUTS = Refusal(r"no `layer_inputs`.*`capture\(loss\)`.*`layer_inputs=inputs`", "the loop hands on no `layer_inputs`")
OWN_STATE = Refusal(
  r"`dpsgd_optax\.training\.TrainState`.*`apply_gradients\(grads=grads, extra_args=dict\(",
  "Flax's own TrainState drops extra arguments; the message names ours",
)
FORWARD_MODE = Refusal(
  r"`hvp=(dpo\.)?hvp_finite_difference\(loss, params\)`",
  "the default adjoint of `diffeqsolve` has no forward mode; the message names `hvp_finite_difference`, the next row",
)

GRADIENTS_ONLY = {
  "psgd newton": NEWTON,
  "dpsgd": JUDGED,
  "dpsgd whitening": JUDGED,
  "gls": INPUTS,
  "bnp": INPUTS,
  "sgd_ph": DIAGONAL,
}
VALUE_ONLY = {"psgd newton": NEWTON, "dpsgd": NEWTON, "sgd_ph": DIAGONAL}
UNLAYERED_GRADIENTS_ONLY = {name: GRADIENTS_ONLY[name] for name in GRADIENTS_ONLY if name not in LAYERED}


CLIENTS: dict[str, Client] = {
  "optax": Client("with_optax:plain", "optax"),
  "optax.MultiSteps": Client("with_optax:multi_steps", "optax"),
  "optax line search": Client("with_optax:line_search", "optax"),
  "optax.partition": Client("with_optax:partition", "optax"),
  "optax.contrib.sam": Client("with_optax:sam", "optax", GRADIENTS_ONLY),
  "optax.lookahead": Client("with_optax:lookahead", "optax", GRADIENTS_ONLY),
  "flax linen, its TrainState": Client("with_flax:own_train_state", "flax", dict.fromkeys(GRADIENTS_ONLY, OWN_STATE)),
  "flax linen, our TrainState": Client("with_flax:our_train_state", "flax"),
  "flax nnx.Optimizer": Client("with_flax:nnx_optimizer", "flax"),
  "flax nnx.Optimizer, split state": Client("with_flax:nnx_state", "flax"),
  "orbax": Client("with_orbax:resumed", "orbax-checkpoint"),
  "equinox": Client("with_equinox:filtered", "equinox"),
  "equinox, the model as params": Client("with_equinox:whole_model", "equinox"),
  "equinox, serialised": Client("with_equinox:serialised", "equinox"),
  "diffrax": Client(
    "with_diffrax:exact", "diffrax", dict.fromkeys(("psgd newton", "dpsgd", "sgd_ph"), FORWARD_MODE), LAYERED
  ),
  "diffrax, finite differences": Client("with_diffrax:finite_differences", "diffrax", skips=LAYERED | WITHOUT_PRODUCT),
  "dm-haiku": Client("with_haiku:train", "dm-haiku"),
  "optimistix": Client("with_optimistix:minimise", "optimistix", skips=LAYERED),
  "numpyro SVI": Client("with_numpyro:svi", "numpyro", VALUE_ONLY, LAYERED),
  "numpyro SVI, stable_update": Client("with_numpyro:stable_update", "numpyro", VALUE_ONLY, LAYERED),
  "blackjax meanfield_vi": Client("with_blackjax:meanfield", "blackjax", UNLAYERED_GRADIENTS_ONLY, LAYERED),
  "flowjax fit_to_data": Client("with_flowjax:maximum_likelihood", "flowjax", GRADIENTS_ONLY),
  "flowjax fit_to_key_based_loss": Client("with_flowjax:variational", "flowjax", GRADIENTS_ONLY),
  "jaxopt OptaxSolver": Client("with_jaxopt:solve", "jaxopt", GRADIENTS_ONLY),
  "jinns": Client("with_jinns:plain", "jinns", GRADIENTS_ONLY),
  "jinns, extra arguments": Client("with_jinns:extra_arguments", "jinns", skips=LAYERED),
  "netket VMC": Client("with_netket:real", "netket", GRADIENTS_ONLY, x64=True),
  "netket VMC, complex": Client("with_netket:complex_params", "netket", GRADIENTS_ONLY, x64=True),
}


class Broken(AssertionError):
  """A cell that is not what the table says."""


def cells() -> list[tuple[str, str]]:
  """(client, optimizer) of the whole table."""
  return [pair for pair in itertools.product(CLIENTS, OPTIMIZERS) if pair[1] not in CLIENTS[pair[0]].skips]


def falls(losses: np.ndarray) -> bool:
  return bool(np.all(np.isfinite(losses)) and np.mean(losses[1:][-4:]) < losses[0] / 2)


def ask(client: str, optimizer: str) -> str:
  """ "works", or the reason why it is refused; raises if the table is wrong."""
  row = CLIENTS[client]
  refusal = row.refuses.get(optimizer)
  if refusal is None:
    losses = row.run(OPTIMIZERS[optimizer])
    if not falls(losses):
      raise Broken(f"{optimizer} in {client}: from {losses[0]:.3g} to {losses[1:][-4:]}")
    return "works"
  try:
    row.run(OPTIMIZERS[optimizer])
  except ValueError as error:
    if re.search(refusal.says, str(error), re.DOTALL):
      return refusal.reason
    raise Broken(f"{optimizer} in {client}: another message than {refusal.says!r}: {error}") from error
  raise Broken(f"{optimizer} works in {client}: take its refusal out of the table")


def versions() -> dict[str, str]:
  """Of the installed packages of the table, and of what they stand on."""
  packages = dict.fromkeys(["jax", *(row.package for row in CLIENTS.values() if row.installed())])
  return {package: version(package) for package in packages}
