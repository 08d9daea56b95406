# SPDX-License-Identifier: Apache-2.0
"""Who trains: the table of optimizers, and contestants, which are optimizers with options as typed on the command line.

dpsgd                                  with the options of the setting
dpsgd(average=0.5, judge_every=10)     the same with two of them changed
dpsgd(form=additive)                   a bare word is a name of `dpsgd_optax`
psgd_newton(preconditioner=lra(rank=5))    so is the function of a call
momentum(clip=1.0)                     any optimizer: gradients clipped to a global norm of 1 before it

`prepare` brings together what a run needs: the problem, the plan and the contestants. `Races` gives `tune_then_race`
its races on one problem.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpsgd_optax as dpo
from benchmarks import rivals
from benchmarks.engine import calls
from benchmarks.engine.arguments import PLAN
from benchmarks.engine.calls import Options, SpecError
from benchmarks.engine.contestant import Contestant, Method
from benchmarks.engine.problem import Problem, limit
from benchmarks.engine.records import Plan, Results, Run
from benchmarks.engine.runner import Racer, make_plan
from benchmarks.engine.session import run
from benchmarks.hyperparameters import GROUPS
from benchmarks.hyperparameters import setting as setting_of
from benchmarks.problems.table import build
from dpsgd_optax import training

EXAMPLE = "dpsgd(average=0.5)"


def dpsgd(learning_rate: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
  """`dpo.dpsgd`, its options and those of `damped_kron` side by side, as they are typed: dpsgd(average=0.5)."""
  factors = {name: options.pop(name) for name in inspect.signature(dpo.damped_kron).parameters if name in options}
  return dpo.dpsgd(learning_rate, dpo.damped_kron(**factors), **options)


def gls_curvature(learning_rate: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
  """`gls`, its step D of each layer shortened to what the curvature along it allows: D / max(1, c).

  c = D'HD / (rate (-g'D)). A reference for the study `gls`, at one Hessian-vector product per layer and step. With
  U = -D / rate this is U'HU / g'U, the curvature of the loss in the outputs of the layer along the change asked for. It
  is a Rayleigh quotient: one step of the power iteration that would give the largest curvature.
  """
  inner = dpo.gls(learning_rate, **options)

  def update(updates, state, params=None, *, value_fn, **extra):
    steps, state = inner.update(updates, state, params, value_fn=value_fn, **extra)
    paths, treedef = jax.tree_util.tree_flatten_with_path(steps)
    layers = [path[:-1] for path, _ in paths]
    leaves, gradient, product = [x for _, x in paths], jax.tree.leaves(updates), dpo.hvp(value_fn, params)
    for layer in dict.fromkeys(layers):
      mine = [x if where == layer else jnp.zeros_like(x) for where, x in zip(layers, leaves, strict=True)]
      image = jax.tree.leaves(product(jax.tree.unflatten(treedef, mine)))
      curvature, slope = optax.tree.vdot(mine, image), -learning_rate * optax.tree.vdot(mine, gradient)
      scale = 1 / jnp.maximum(1, curvature / jnp.where(slope > 0, slope, jnp.inf))
      leaves = [x * scale if where == layer else x for where, x in zip(layers, leaves, strict=True)]
    return jax.tree.unflatten(treedef, leaves), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def rival(package: str) -> Callable[..., optax.GradientTransformation]:
  """Kron of another package, with its geometry as an option: psgdax(geometry=quad)."""

  def make(learning_rate: Any, geometry: Any = dpo.pro, key: int = 0) -> optax.GradientTransformation:
    name = next((name for name in rivals.MODES if getattr(dpo, name) is geometry), None)
    if name is None:
      raise SpecError(f"`geometry` of {package} must be one of {', '.join(rivals.MODES)}.")
    return rivals.kron(package, name, learning_rate, key=key)

  return make


PAPER: Options = {"every": 1, "step_size": 0.1, "average": 0.7}  # a fit on every step, and what goes with it
EVERY = inspect.signature(dpo.dpsgd).parameters["every"].default
SOAP: Options = {"preconditioner": dpo.soap(), "b1": 0.95, "every": 1}
NORM: Options = {"where": training.is_norm_param}
OPTIMIZERS = {
  "sgd": Method(optax.sgd),
  "momentum": Method(optax.sgd, {"momentum": 0.9, "nesterov": True}),
  "adam": Method(optax.adam),
  "adamw": Method(optax.adamw),
  "lbfgs": Method(optax.lbfgs, {"linesearch": None}),
  "muon": Method(optax.contrib.muon),
  "psgd": Method(dpsgd, PAPER | {"average": None, "damping": None}, newton=True, keyed=True),
  "psgd_whiten": Method(dpo.psgd, keyed=True),
  "psgd_newton": Method(dpo.psgd, {"curvature": dpo.newton(), "every": 1}, newton=True, keyed=True),
  "soap": Method(dpo.psgd, SOAP, keyed=True),
  "soap_newton": Method(
    dpo.psgd, SOAP | {"preconditioner": dpo.soap(factored=True), "curvature": dpo.newton()}, newton=True, keyed=True
  ),
  "psgd+damping": Method(dpsgd, PAPER | {"average": None}, newton=True, judged=True, keyed=True),
  "psgd+averaging": Method(dpsgd, PAPER | {"damping": None}, newton=True, keyed=True),
  "dpsgd": Method(dpsgd, PAPER, newton=True, judged=True, keyed=True),
  "dpsgd_default": Method(dpsgd, {"every": EVERY}, newton=True, judged=True, keyed=True),
  "sgd_ph": Method(dpo.sgd_ph, NORM, newton=True, keyed=True),
  "sgd_ph_tau": Method(dpo.sgd_ph, NORM | {"tau": 0.1, "damping": 0.01}, newton=True, keyed=True),
  "sgd_ph_released": Method(
    dpo.sgd_ph, NORM | {"probe": dpo.probes.ones, "cycle": True, "signed": False}, newton=True, keyed=True
  ),
  "gauss_newton": Method(dpo.gauss_newton, solved=True),
  "gls": Method(dpo.gls, layerwise=True),
  "gls_curvature": Method(gls_curvature, layerwise=True),
  "bnp": Method(dpo.bnp, layerwise=True),
  **{package: Method(rival(package), keyed=True) for package in rivals.PACKAGES},
}

GEOMETRIES = ("pro", "qeq", "qep", "quad", "eq", "quad4p", "pro4p")
PRECONDITIONERS: dict[str, Callable[[], dpo.Preconditioner]] = {
  "diagonal": dpo.diagonal,
  "kron, some diagonal": partial(dpo.kron, geometry=dpo.quad),
  **{f"kron {name}": partial(dpo.kron, geometry=getattr(dpo.geometry, name), max_skew=jnp.inf) for name in GEOMETRIES},
  "kron bfloat16 state": partial(dpo.kron, geometry=dpo.quad, state_dtype=jnp.bfloat16),
  "affine": partial(dpo.affine, max_skew=jnp.inf),
  "scan": dpo.scan,
  "scaw": dpo.scaw,
  "dense": dpo.dense,
  "dense eq": partial(dpo.dense, geometry=dpo.eq),
  "dense gl": partial(dpo.dense, geometry=dpo.geometry.gl),
  "lra": dpo.lra,
  "xmat": dpo.xmat,
  "damped_kron": dpo.damped_kron,
  "soap": dpo.soap,
}


def parse(text: str) -> tuple[str, Options]:
  """`name(option=value, ...)` -> the name of an optimizer and its options."""
  if (name := calls.name_of(text)) not in OPTIMIZERS:
    message = calls.unknown("optimizer", name, [*OPTIMIZERS, *GROUPS])
    raise SpecError(f"{message} Options are written behind the name: {EXAMPLE}.")
  return calls.parse(text, EXAMPLE)


def split(text: str) -> list[str]:
  """Split at the commas outside parentheses; names of groups become their members."""
  return [member for part in calls.split(text) for member in GROUPS.get(part, (part,))]


def contestant(label: str, name: str, options: Options) -> Contestant:
  """The optimizer of this name in the table, with options."""
  return Contestant(label, name, options, OPTIMIZERS[name])


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
    found.append(contestant(part.replace(" ", ""), name, options))
  return found


def typed(name: str, options: Options, rate: float) -> str:
  """An optimizer as it is written on the command line."""
  return f"{name}({','.join(f'{key}={value}' for key, value in (options | {'learning_rate': rate}).items())})"


def prepare(name: str, setting: str, optimizers: str, **options: Any) -> tuple[Problem, Plan, list[Contestant]]:
  """The problem, the plan and the contestants.

  The options are those of `arguments.PLAN`. What is None or left out comes from the setting or from the problem.
  """
  if unknown := options.keys() - PLAN.keys():
    raise TypeError(f"`prepare` needs options out of {', '.join(PLAN)}, got {', '.join(unknown)}.")
  asked, chosen = dict.fromkeys(PLAN) | options, setting_of(setting, name)
  folded, decay = (getattr(chosen, of) if asked[of] is None else asked[of] for of in ("folded", "decay"))
  ready = [optimizer for optimizer, options in chosen.optimizers.items() if "learning_rate" in options]
  found = contestants(optimizers or ",".join(ready or chosen.optimizers), chosen.optimizers, name)
  problem = limit(build(name, asked["data_dir"], folded), asked["train_size"], asked["test_size"])
  problem = replace(problem, batch_size=asked["batch_size"] or problem.batch_size)
  epochs, evaluations = asked["epochs"] or problem.epochs, asked["evaluations"] or problem.evaluations
  if problem.residuals is None and (wrong := [x.label for x in found if x.method.solved]):
    raise SpecError(f"{', '.join(wrong)} needs residuals, which `{name}` has not. Problems that have them: poisson, ….")
  by_clock = {"seconds": asked["seconds"], "clock": asked["clock"] or "seconds"}
  return problem, make_plan(problem, setting, epochs, decay, folded, evaluations, **by_clock), found


@dataclass
class Races:
  """Races on one problem, whose results stay in memory: what `tune_then_race` plays."""

  problem: str  # as it is typed on the command line
  typed: Callable[[str, float], str]  # (contestant, learning rate) -> the optimizer as it is typed there
  options: dict[str, Any]  # of `prepare`
  last: Results | None = None  # the results of the latest race
  compiled: dict[Any, Racer] = field(default_factory=dict)  # a contestant is compiled once for all races

  def __call__(self, entries: Sequence[tuple[str, float]], seeds: Sequence[int]) -> dict[tuple[str, float], list[Run]]:
    """The runs of each (contestant, learning rate), all of them side by side."""
    labels = {entry: self.typed(*entry).replace(" ", "") for entry in entries}
    built, plan, entered = prepare(self.problem, "tuned", ",".join(labels.values()), **self.options)
    with TemporaryDirectory() as folder:
      self.last = run(built, plan, entered, seeds, Path(folder) / "race.json", known=self.compiled)
    return {entry: self.last.of(label) for entry, label in labels.items()}
