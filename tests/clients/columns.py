# SPDX-License-Identifier: Apache-2.0
"""The optimizers, one column each, as a loop of somebody else meets them: a constructor, and what `update` needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dpsgd_optax as dpo


class Optimizer(NamedTuple):
  """Attributes:
  make: constructor; takes `layers` and `where` of those that look at the network, and ignores them otherwise.
  needs: the extra arguments of `update`.
  """

  make: Callable[..., optax.GradientTransformation]
  needs: frozenset[str] = frozenset()

  def extras(
    self, loss: Callable, params: Any, value: Any, product: Callable = dpo.hvp, **known: Any
  ) -> dict[str, Any]:
    """What a loop of one's own hands to `update` beside the gradient.

    `dpsgd` makes its product from `value_fn` unless it is given one: here, where that is another than `hvp`.
    """
    offers = {
      "value": lambda: value,
      "value_fn": lambda: loss,
      "hvp": lambda: product(loss, params),
      "layer_inputs": lambda: dpo.capture(loss)(params)[2],
      **{name: lambda x=x: x for name, x in known.items()},
    }
    needs = self.needs | ({"hvp"} if "value_fn" in self.needs and product is not dpo.hvp else set())
    return {name: offers[name]() for name in needs}


def ignoring(tx: Callable[[], optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
  return lambda layers=None, where=None: tx()


OPTIMIZERS: dict[str, Optimizer] = {
  "adam": Optimizer(ignoring(lambda: optax.adam(1e-2))),
  "psgd whitening": Optimizer(ignoring(lambda: dpo.psgd(1e-2, b1=0.9))),
  "psgd newton": Optimizer(ignoring(lambda: dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=2)), frozenset({"hvp"})),
  "dpsgd": Optimizer(ignoring(lambda: dpo.dpsgd(0.1)), frozenset({"value", "value_fn"})),
  "dpsgd whitening": Optimizer(ignoring(lambda: dpo.dpsgd(0.1, curvature=dpo.whitening())), frozenset({"value"})),
  "gls": Optimizer(
    lambda layers=None, where=None: dpo.gls(0.1, fallback=optax.adam(1e-2), layers=layers), frozenset({"layer_inputs"})
  ),
  "bnp": Optimizer(
    lambda layers=None, where=None: dpo.bnp(0.1, fallback=optax.adam(1e-2), layers=layers), frozenset({"layer_inputs"})
  ),
  "sgd_ph": Optimizer(
    lambda layers=None, where=None: dpo.sgd_ph(0.03, dpo.is_vector if where is None else where), frozenset({"hvp"})
  ),
}
"""adam is the control. `curvature=whitening()` is what `dpsgd` advises where there is a loss value and nothing else."""

BROKEN = Optimizer(ignoring(lambda: optax.with_extra_args_support(optax.set_to_zero())))
"""An optimizer with which no loss falls: what it reaches must not count as working."""


def regression() -> tuple[jax.Array, jax.Array]:
  """64 rows of 4 numbers, and a smooth function of them."""
  x = jax.random.normal(jax.random.key(0), (64, 4))
  return x, jnp.sin(x.sum(-1, keepdims=True))


def squares(prediction: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.mean((prediction - target) ** 2)
