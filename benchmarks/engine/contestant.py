# SPDX-License-Identifier: Apache-2.0
"""A contestant: an optimizer with its options, and what the runner has to know of it to give it its steps."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import dpsgd_optax as dpo
from benchmarks.engine.calls import Options, SpecError, choice, literal

FOREVER = 1e9  # steps
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

  @property
  def iterates(self) -> float | None:
    """Weight kept by the running mean of the parameters that is evaluated in their place; None: no mean."""
    return self.options.get("iterates")

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
    self, decay: float, steps_per_epoch: int, key: int, layers: Any = None, total: float = FOREVER
  ) -> optax.GradientTransformationExtraArgs:
    """The transform, its learning rate multiplied by `decay` after every epoch; `layers`: shapes of the records.

    Options of every method: `clip` the global norm of the gradients, `schedule="linear"` for a rate that falls to zero
    over `total` steps, `iterates=0.95` for a running mean of the parameters.

    The learning rate, whether it falls, and `total` are numbers in the state: contestants that differ in nothing else
    share a compilation, and a run that ends by the clock says on its way how many steps it will have.
    """
    own = dict(self.options)
    initial, clip, iterates = own.pop("learning_rate"), own.pop("clip", None), own.pop("iterates", None)
    falls = choice(own.pop("schedule", "constant"), "schedule", {"constant": 0.0, "linear": 1.0})
    options = dict(self.method.options) | {name: value_of(option) for name, option in own.items()}
    if self.method.keyed:
      options["key"] = key
    if self.method.layerwise:
      options["layers"] = layers
    make = self.method.make

    def decayed(initial: Any, decay: Any, count: Any, total: Any, falls: Any) -> optax.GradientTransformation:
      left = jnp.maximum(0.0, 1 - falls * count / total)
      tx = make(initial * decay * left, **options)
      return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)

    schedule = optax.exponential_decay(1.0, steps_per_epoch, decay, staircase=True)
    injected = optax.inject_hyperparams(decayed)
    tx = injected(initial=initial, decay=schedule, count=lambda count: count, total=float(total), falls=falls)
    return tx if iterates is None else with_mean(tx, iterates)

  def compilation(self) -> tuple[Any, ...]:
    """Equal for contestants that differ in their learning rate, its schedule, or the period the host keeps, only."""
    apart = {"learning_rate", "schedule"} | ({"every"} if self.fit_period is not None else set())
    return self.name, *sorted((name, repr(value)) for name, value in self.options.items() if name not in apart)


class MeanState(NamedTuple):
  """The state of the optimizer, and of the running mean of the parameters."""

  inner: Any
  iterates: optax.EmaState


def with_mean(tx: optax.GradientTransformation, weight: float) -> optax.GradientTransformationExtraArgs:
  """The same steps, and beside them the running mean of the parameters, by `optax.ema`."""
  inner, mean = optax.with_extra_args_support(tx), optax.ema(weight)

  def init(params: Any) -> MeanState:
    return MeanState(inner.init(params), mean.init(params))

  def update(updates: Any, state: MeanState, params: Any = None, **extra: Any) -> tuple[Any, MeanState]:
    updates, new = inner.update(updates, state.inner, params, **extra)
    _, average = mean.update(optax.apply_updates(params, updates), state.iterates)
    return updates, MeanState(new, average)

  return optax.GradientTransformationExtraArgs(init, update)


def mean_of(state: MeanState, weight: float) -> Any:
  """The mean itself, without the bias of its start at zero."""
  return optax.tree.bias_correction(state.iterates.ema, weight, state.iterates.count)


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
