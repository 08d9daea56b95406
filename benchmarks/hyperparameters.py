# SPDX-License-Identifier: Apache-2.0
"""Every number of the benchmarks: the author's settings, the learning-rate grids, and what was chosen from them.

Options are written as on the command line: numbers, or the text of a value of `dpsgd_optax` ("additive").
The author's values are those of his notebooks (usmanqadeer1/DPSGD): normaliser, factor step, learning rates, decay per
epoch, cadence, average. Form of the damping and rule of τ are those of `dpsgd` everywhere. He had the additive form on
fashion_mnist and addition, and the rule the other way round (factor=0.7738, 0.95 on mnist).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.arguments import RESULTS as RESULTS
from benchmarks.engine.calls import Options, file_name, name_of

ABLATION = ("psgd", "psgd+damping", "psgd+averaging", "dpsgd")  # damping and averaging, each off and on


@dataclass(frozen=True)
class Setting:
  """How a problem is trained: decay of every learning rate per epoch, layout of the biases, options by optimizer."""

  optimizers: dict[str, Options] = field(default_factory=dict)
  decay: float = 1.0
  folded: bool = False


SLOW_FACTORS: Options = {"geometry": "eq", "normalizer": "max_abs", "step_size": 0.01}  # in every notebook of his
CLASSIFICATION_DECAY = 0.01 ** (1 / 9)  # of the learning rate, per epoch, in his classification notebooks


def _author(sgd: float, adam: float, newton: float, decay: float = 1.0, **dpsgd: float | int | str | None) -> Setting:
  """One of his notebooks; the four ablation cells share the learning rate, T1 and the factor step."""
  shared: Options = {"learning_rate": newton, "every": 1, **SLOW_FACTORS}
  averaging: Options = {"average": dpsgd.pop("average")}
  return Setting(
    {
      "sgd": {"learning_rate": sgd},
      "adam": {"learning_rate": adam},
      "psgd": shared,
      "psgd+damping": shared | dpsgd,
      "psgd+averaging": shared | averaging,
      "dpsgd": shared | averaging | dpsgd,
    },
    decay,
    folded=True,
  )


AUTHOR = {
  **dict.fromkeys(
    ("curves", "addition", "mnist_autoencoder"), _author(0.1, 1e-3, 0.1, average=0.7, judge_every=5, eta=1e-5)
  ),
  "mnist": _author(0.1, 5e-3, 0.05, CLASSIFICATION_DECAY, average="two_tap(0.9, 0.1)", judge_every=1, eta=1e-5),
  "fashion_mnist": _author(0.1, 5e-3, 0.1, CLASSIFICATION_DECAY, average=0.7, judge_every=5, eta=1e-5),
  # Settings of the original PSGD code; its function is rosenbrock(pairs=True).
  "rosenbrock": Setting(
    {
      "psgd_newton": {"learning_rate": 1.0, "preconditioner": "dense(step_size=0.5)", "b1": 0.9},
      "adam": {"learning_rate": 0.02},
      "sgd": {"learning_rate": 1e-3},
    }
  ),
  "tensor_decomposition": Setting(
    {
      "psgd_newton": {"learning_rate": 0.2, "preconditioner": "kron(geometry=pro, step_size=0.1)"},
      "sgd": {"learning_rate": 1e-4},
    }
  ),
  "xor": Setting(
    {
      "psgd_whiten": {
        "learning_rate": 1e-3,
        "preconditioner": "kron(geometry=pro, step_size=0.1, init_scale=1.0)",
        "every": 1,
      },
      "adam": {"learning_rate": 1e-3, "clip": 1.0},
      "momentum": {"learning_rate": 0.1, "clip": 1.0},
    }
  ),
}

TARGETS = {"xor": (0.1,), "rosenbrock": (1e-6,), "tensor_decomposition": (1e-4,)}


def targets(problem: str) -> tuple[float, ...]:
  """Training losses that count as solved: the tables say when they were reached."""
  return TARGETS.get(name_of(problem), ())


# The setting `tuned`: every optimizer has the same number of trials.
SECOND_ORDER_GRID = (0.02, 0.05, 0.1, 0.2, 0.5)
ADAPTIVE_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRIDS = {
  "sgd": (0.03, 0.1, 0.3, 1.0, 3.0),
  "momentum": (0.01, 0.03, 0.1, 0.3, 1.0),
  "adam": ADAPTIVE_GRID,
  "adamw": ADAPTIVE_GRID,
  "lbfgs": (0.03, 0.1, 0.3, 0.6, 1.0),
  "muon": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
  "psgd": SECOND_ORDER_GRID,
  **dict.fromkeys(("psgd_whiten", "soap", "psgdax", "rollfast"), ADAPTIVE_GRID),
  **dict.fromkeys(
    ("psgd_newton", "soap_newton", "psgd+damping", "psgd+averaging", "dpsgd", "dpsgd_default"), SECOND_ORDER_GRID
  ),
  "gauss_newton": (0.1, 0.2, 0.5, 1.0, 1.5),
  **dict.fromkeys(("gls", "gls_curvature"), (0.05, 0.1, 0.2, 0.4, 0.8)),
  **dict.fromkeys(("bnp", "sgd_ph", "sgd_ph_tau", "sgd_ph_released"), (0.01, 0.03, 0.1, 0.3, 1.0)),
}
LAYERS = ("gls", "gls_curvature", "bnp", "sgd_ph", "sgd_ph_tau", "sgd_ph_released")  # they need (norm) layers
PARTICULAR = (*LAYERS, "gauss_newton", "psgdax", "rollfast", "dpsgd_default")  # residuals, a package, or raced apart


def tuned(problem: str) -> dict[str, float]:
  """The learning rates that `python -m benchmarks tune PROBLEM` chose: seed 0, lowest final training loss.

  They are read from where it wrote them, with all its trials: results/tune-PROBLEM.json; for a problem with options of
  which there is none, from that of the problem as it is. Empty without that file.
  """
  paths = [RESULTS / f"tune-{file_name(text)}.json" for text in (problem, name_of(problem))]
  path = next(filter(Path.exists, paths), None)
  return json.loads(path.read_text())["chosen"] if path else {}


GROUPS = {  # names for several contestants
  "all": tuple(name for name in GRIDS if name not in PARTICULAR),
  "demo": ("sgd", "momentum", "adam", "muon", "psgd", "psgd_whiten", "soap", "dpsgd"),
  "ablation": ABLATION,
  "betas": ("psgd+damping", *(f"dpsgd(average={beta})" for beta in (0.3, 0.5, 0.7, 0.9, 0.97))),
  "geometries": tuple(f"dpsgd(geometry={geometry})" for geometry in ("eq", "qeq", "quad", "pro")),
  "models": tuple(f"dpsgd(model={model})" for model in ("newton_model", "half_slope", "quadratic_model")),
}


def setting(name: str, problem: str) -> Setting:
  """The setting `author` or `tuned` of a problem. What it lacks must be given on the command line."""
  if name == "author":
    return AUTHOR.get(name_of(problem), Setting(folded=True))
  return Setting({optimizer: {"learning_rate": rate} for optimizer, rate in tuned(problem).items()})
