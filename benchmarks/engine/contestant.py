# SPDX-License-Identifier: Apache-2.0
"""A contestant: an optimizer with its options, and what the runner has to know of it to give it its steps."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

import dpsgd_optax as dpo
from benchmarks.engine.calls import Options, SpecError, literal

ROOMS = (dpo, dpo.geometry, dpo.tikhonov, dpo.probes, dpo.layers)  # where the bare words of options are looked up


@dataclass(frozen=True)
class Method:
  """One row of the table of optimizers: the constructor and its fixed options.

  `newton`: it fits on Hessian-vector products, and the host chooses the steps of fitting.
  `keyed`: it draws probes, from a key that is given by the seed of the run.
  `judged`: its damping follows a Levenberg-Marquardt rule, and the host chooses the steps of judging.
  `solved`: it takes the residuals of the problem, which must be a sum over some.
  `layerwise`: it is shown what enters each linear layer, and the host chooses the steps of fitting.
  """

  make: Callable[..., optax.GradientTransformation]
  options: Mapping[str, Any] = field(default_factory=dict)
  newton: bool = False
  judged: bool = False
  keyed: bool = False
  layerwise: bool = False
  solved: bool = False


@dataclass(frozen=True)
class Contestant:
  """An optimizer of the table with the options of this run; `label` is how the results call it."""

  label: str
  name: str
  options: Options
  method: Method

  def _option(self, name: str, default: Any) -> Any:
    return (dict(self.method.options) | self.options).get(name, default)

  @property
  def fit_period(self) -> int | None:
    """T1, or None if the host does not choose the steps of fitting."""
    return self._option("every", 1) if self.method.newton or self.method.layerwise else None

  @property
  def judge_period(self) -> int | None:
    """T2, or None if there is no Levenberg-Marquardt rule."""
    judged = self.method.judged and self._option("damping", 1.0) is not None
    return self._option("judge_every", 5) if judged else None

  @property
  def records(self) -> str | None:
    """What of each layer it is shown: its "inputs", its output "gradients" too, or None."""
    if not self.method.layerwise:
      return None
    from_gradients = self._option("from_outputs", False) or self._option("output_damping", None) is not None
    return "gradients" if from_gradients else "inputs"

  def build(
    self, decay: float, steps_per_epoch: int, key: int, layers: Any = None
  ) -> optax.GradientTransformationExtraArgs:
    """The transform, its learning rate multiplied by `decay` after every epoch; `layers`: shapes of the records.

    The initial learning rate is a number in the state: contestants that differ in nothing else share a compilation.
    """
    options = dict(self.method.options) | {name: value_of(option) for name, option in self.options.items()}
    if self.method.keyed:
      options["key"] = key
    if self.method.layerwise:
      options["layers"] = layers
    initial, clip = options.pop("learning_rate"), options.pop("clip", None)
    make = self.method.make

    def decayed(initial: Any, decay: Any) -> optax.GradientTransformation:
      tx = make(initial * decay, **options)
      return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)

    schedule = optax.exponential_decay(1.0, steps_per_epoch, decay, staircase=True)
    return optax.inject_hyperparams(decayed)(initial=initial, decay=schedule)

  def compilation(self) -> tuple[Any, ...]:
    """Equal for contestants that differ in their learning rate only."""
    return self.name, *sorted((name, repr(value)) for name, value in self.options.items() if name != "learning_rate")


def value_of(option: Any) -> Any:
  """The value of an option: text is a literal, a name of `dpsgd_optax`, or a call of one."""
  if not isinstance(option, str):
    return option
  node = ast.parse(option, mode="eval").body
  if isinstance(node, ast.Call):
    value = lambda argument: value_of(literal(argument))
    named = {str(keyword.arg): value(keyword.value) for keyword in node.keywords}
    return value_of(ast.unparse(node.func))(*map(value, node.args), **named)
  found = [getattr(room, node.id) for room in ROOMS if isinstance(node, ast.Name) and hasattr(room, node.id)]
  if not found:
    raise SpecError(f"an option must be a number, None or a name of `dpsgd_optax`, got `{option}`.")
  return found[0]
