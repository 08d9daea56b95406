# SPDX-License-Identifier: Apache-2.0
"""The table of optimizers, and contestants: an optimizer with its options, as written on the command line.

dpsgd                                  with the options of the setting
dpsgd(average=0.5, judge_every=10)     the same with two of them changed
dpsgd(form=additive)                   a bare word is a name of `dpsgd_optax`
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

import dpsgd_optax as dpo
from benchmarks.hyperparameters import GROUPS, Options


class SpecError(ValueError):
  """A contestant that cannot be understood. The message says what to type."""


@dataclass(frozen=True)
class Method:
  """One row: the constructor and its fixed options.

  `newton`: it fits on Hessian-vector products, and the host chooses the steps of fitting and judging.
  `keyed`: it draws probes, from a key that is given by the seed of the run.
  """

  make: Callable[..., optax.GradientTransformation]
  options: Mapping[str, Any] = field(default_factory=dict)
  newton: bool = False
  keyed: bool = False


OPTIMIZERS = {
  "sgd": Method(optax.sgd),
  "momentum": Method(optax.sgd, {"momentum": 0.9, "nesterov": True}),
  "adam": Method(optax.adam),
  "muon": Method(optax.contrib.muon),
  "psgd": Method(dpo.dpsgd, {"average": None, "damping": None}, newton=True, keyed=True),
  "psgd_whiten": Method(dpo.psgd, keyed=True),
  "psgd+damping": Method(dpo.dpsgd, {"average": None}, newton=True, keyed=True),
  "psgd+averaging": Method(dpo.dpsgd, {"damping": None}, newton=True, keyed=True),
  "dpsgd": Method(dpo.dpsgd, newton=True, keyed=True),
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
    return self._option("every", 1) if self.method.newton else None

  @property
  def judge_period(self) -> int | None:
    """T2, or None if there is no Levenberg-Marquardt rule."""
    judged = self.method.newton and self._option("damping", 1.0) is not None
    return self._option("judge_every", 5) if judged else None

  def build(self, decay: float, steps_per_epoch: int, key: int) -> optax.GradientTransformationExtraArgs:
    """The transform, its learning rate multiplied by `decay` after every epoch.

    The initial learning rate is a number in the state: contestants that differ in nothing else share a compilation.
    """
    options = dict(self.method.options) | {name: value_of(option) for name, option in self.options.items()}
    if self.method.keyed:
      options["key"] = key
    initial = options.pop("learning_rate")
    make = self.method.make

    def decayed(initial: Any, decay: Any) -> optax.GradientTransformation:
      return make(initial * decay, **options)

    schedule = optax.exponential_decay(1.0, steps_per_epoch, decay, staircase=True)
    return optax.inject_hyperparams(decayed)(initial=initial, decay=schedule)

  def compilation(self) -> tuple[Any, ...]:
    """Equal for contestants that differ in their learning rate only."""
    return self.name, *sorted((name, repr(value)) for name, value in self.options.items() if name != "learning_rate")


def value_of(option: Any) -> Any:
  """The value of an option: text is a name of `dpsgd_optax`, or a call of one with literal arguments."""
  if not isinstance(option, str):
    return option
  node = ast.parse(option, mode="eval").body
  if isinstance(node, ast.Call):
    return value_of(ast.unparse(node.func))(*(ast.literal_eval(argument) for argument in node.args))
  if not isinstance(node, ast.Name) or not hasattr(dpo, node.id):
    raise SpecError(f"an option must be a number, None or a name of `dpsgd_optax`, got `{option}`.")
  return getattr(dpo, node.id)


def parse(text: str) -> tuple[str, Options]:
  """`name(option=value, ...)` -> the name and its options; values that are not literals stay text."""
  match = re.fullmatch(r"([\w+]+)(\(.*\))?", text.strip())
  if match is None or match[1] not in OPTIMIZERS:
    known = ", ".join([*OPTIMIZERS, *GROUPS])
    raise SpecError(f"`{text}` is no optimizer. Type one of {known}, or one with options: dpsgd(average=0.5).")
  complaint = SpecError(f"`{text}`: options are written as name=value, for example dpsgd(average=0.5).")
  try:
    call = ast.parse(f"f{match[2] or '()'}", mode="eval").body
  except SyntaxError:
    raise complaint from None
  if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
    raise complaint
  return match[1], {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}


def _literal(node: ast.expr) -> Any:
  try:
    return ast.literal_eval(node)
  except ValueError:
    return ast.unparse(node)


def split(text: str) -> list[str]:
  """Split at the commas outside parentheses; names of groups become their members."""
  parts, depth = [""], 0
  for character in text:
    depth += (character == "(") - (character == ")")
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  named = [part.strip() for part in parts if part.strip()]
  return [member for part in named for member in GROUPS.get(part, (part,))]


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
