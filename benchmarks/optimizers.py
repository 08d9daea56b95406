# SPDX-License-Identifier: Apache-2.0
"""The table of optimizers, and contestants: an optimizer with its options, as written on the command line.

dpsgd                                  with the options of the setting
dpsgd(average=0.5, judge_every=10)     the same with two of them changed
dpsgd(form=additive)                   a bare word is a name of `dpsgd_optax`
psgd_newton(preconditioner=lra(rank=5))    so is the function of a call
momentum(clip=1.0)                     any optimizer: gradients clipped to a global norm of 1 before it
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

import dpsgd_optax as dpo
from benchmarks.curvature_step import gls_curvature
from benchmarks.engine import calls
from benchmarks.engine.calls import Options, SpecError
from benchmarks.hyperparameters import GROUPS
from dpsgd_optax import training

EXAMPLE = "dpsgd(average=0.5)"


@dataclass(frozen=True)
class Method:
  """One row: the constructor and its fixed options.

  `newton`: it fits on Hessian-vector products, and the host chooses the steps of fitting and judging.
  `keyed`: it draws probes, from a key that is given by the seed of the run.
  `layerwise`: it is shown what enters each linear layer, and the host chooses the steps of fitting.
  """

  make: Callable[..., optax.GradientTransformation]
  options: Mapping[str, Any] = field(default_factory=dict)
  newton: bool = False
  keyed: bool = False
  layerwise: bool = False


OPTIMIZERS = {
  "sgd": Method(optax.sgd),
  "momentum": Method(optax.sgd, {"momentum": 0.9, "nesterov": True}),
  "adam": Method(optax.adam),
  "adamw": Method(optax.adamw),
  "lbfgs": Method(optax.lbfgs, {"linesearch": None}),
  "muon": Method(optax.contrib.muon),
  "psgd": Method(dpo.dpsgd, {"average": None, "damping": None}, newton=True, keyed=True),
  "psgd_whiten": Method(dpo.psgd, keyed=True),
  "psgd_newton": Method(dpo.psgd, {"curvature": dpo.newton(), "every": 1}, newton=True, keyed=True),
  "psgd+damping": Method(dpo.dpsgd, {"average": None}, newton=True, keyed=True),
  "psgd+averaging": Method(dpo.dpsgd, {"damping": None}, newton=True, keyed=True),
  "dpsgd": Method(dpo.dpsgd, newton=True, keyed=True),
  "sgd_ph": Method(dpo.sgd_ph, {"where": training.is_norm_param}, newton=True, keyed=True),
  "sgd_ph_tau": Method(
    dpo.sgd_ph, {"where": training.is_norm_param, "tau": 0.1, "damping": 0.01}, newton=True, keyed=True
  ),
  "sgd_ph_released": Method(
    dpo.sgd_ph,
    {"where": training.is_norm_param, "probe": dpo.ones, "cycle": True, "signed": False},
    newton=True,
    keyed=True,
  ),
  "gls": Method(dpo.gls, layerwise=True),
  "gls_curvature": Method(gls_curvature, layerwise=True),
  "bnp": Method(dpo.bnp, layerwise=True),
}


@dataclass(frozen=True)
class Contestant:
  """An optimizer of the table with the options of this run; `label` is how the results call it."""

  label: str
  name: str
  options: Options

  @property
  def method(self) -> Method:
    return OPTIMIZERS[self.name]

  def _option(self, name: str, default: Any) -> Any:
    return (dict(self.method.options) | self.options).get(name, default)

  @property
  def fit_period(self) -> int | None:
    """T1, or None if the host does not choose the steps of fitting."""
    return self._option("every", 1) if self.method.newton or self.method.layerwise else None

  @property
  def judge_period(self) -> int | None:
    """T2, or None if there is no Levenberg-Marquardt rule."""
    judged = self.method.make is dpo.dpsgd and self._option("damping", 1.0) is not None
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
    value = lambda argument: value_of(calls.literal(argument))
    named = {str(keyword.arg): value(keyword.value) for keyword in node.keywords}
    return value_of(ast.unparse(node.func))(*map(value, node.args), **named)
  if not isinstance(node, ast.Name) or not hasattr(dpo, node.id):
    raise SpecError(f"an option must be a number, None or a name of `dpsgd_optax`, got `{option}`.")
  return getattr(dpo, node.id)


def parse(text: str) -> tuple[str, Options]:
  """`name(option=value, ...)` -> the name of an optimizer and its options."""
  if calls.name_of(text) not in OPTIMIZERS:
    known = ", ".join([*OPTIMIZERS, *GROUPS])
    raise SpecError(f"`{text}` is no optimizer. Type one of {known}, or one with options: {EXAMPLE}.")
  return calls.parse(text, EXAMPLE)


def split(text: str) -> list[str]:
  """Split at the commas outside parentheses; names of groups become their members."""
  return [member for part in calls.split(text) for member in GROUPS.get(part, (part,))]


def contestants(text: str, defaults: Mapping[str, Options], problem: str) -> list[Contestant]:
  """The contestants named in `text`, with the options of the setting under their own."""
  found = []
  for part in dict.fromkeys(split(text)):
    name, own = parse(part)
    options = dict(defaults.get(name, {})) | own
    if "learning_rate" not in options:
      raise SpecError(
        f"`{name}` has no learning rate on `{problem}` in this setting. Type {name}(learning_rate=0.1), or run "
        f"`python -m benchmarks tune {problem} --optimizers {name}`."
      )
    found.append(Contestant(part.replace(" ", ""), name, options))
  return found
