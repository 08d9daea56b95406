# SPDX-License-Identifier: Apache-2.0
"""The reference, one page for each room of the house: which public names stand on which page.

A test holds it to `__all__`: every public name stands on one page.
"""

import ast
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import dpsgd_optax
from dpsgd_optax import training

# page -> its title, what it is for, the names at the top of the package, and the submodule whose names follow
PAGES: dict[str, tuple[str, str, str, Any]] = {
  "optimizers": (
    "Optimizers",
    "Ready made: each is a chain of the parts below, and takes a learning rate first.",
    "psgd dpsgd gauss_newton gls bnp sgd_ph",
    None,
  ),
  "curvature": (
    "Curvature: observe",
    "What a preconditioner is fitted on, and the products that it is made of.",
    "whitening newton hessian_diagonal layer_inputs residuals log_derivatives hvp ggnvp hvp_finite_difference "
    "value_and_grad_and_hvp value_and_grad_then_hvp value_and_grad_then_ggnvp",
    None,
  ),
  "probes": ("Probes", "How the diagonal of the Hessian is asked for.", "", "probes"),
  "layers": ("Layers", "What enters a layer, recorded from unchanged models.", "LayerRecord capture is_vector irls_fit", "layers"),
  "preconditioners": (
    "Preconditioners: fit and apply",
    "The structure of P. Pass one to `psgd` or `scale_by_preconditioner`, or write your own.",
    "kron soap damped_kron affine scan scaw diagonal dense lra xmat blocked diagonal_newton second_moment least_squares "
    "batch_norm Preconditioner Probe per_leaf raveled",
    None,
  ),
  "geometry": ("Geometry", "How a factor moves in a fit, and what its step is divided by.", "eq qep qeq quad pro", "geometry"),
  "tikhonov": ("Tikhonov", "How the factors of `damped_kron` are damped and averaged.", "", "tikhonov"),
  "solvers": ("Solvers", "How `gauss_newton` solves for its step.", "", "solvers"),
  "transforms": (
    "Transforms: the step",
    "Parts for `optax.chain`: preconditioning, damping that follows the loss, clipping.",
    "scale_by_preconditioner annealed_probability levenberg_marquardt adapt_damping half_slope newton_model "
    "quadratic_model trust_region clip_spikes clipped_learning_rate",
    None,
  ),
  "penalties": (
    "Penalties",
    "Regularization in original and in preconditioned variables.",
    "add_gradient_norm_penalty gradient_norm",
    "penalties",
  ),
  "sharding": ("Many devices", "Averages over replicas, and preconditioners divided over a mesh.", "data_parallel sharded partition_specs", None),
  "diagnostics": ("Diagnostics", "Looking in: what to log, memory, checkpoints.", "report diagonality state_bytes", "diagnostics"),
  "training": ("Training with Flax", "Imported by name: `from dpsgd_optax import training`.", "", "training"),
}  # fmt: skip


def names_of(module: Any) -> list[str]:
  """The public names of a submodule."""
  if hasattr(module, "__all__"):
    return list(module.__all__)
  here = lambda value: getattr(value, "__module__", None) == module.__name__
  return [name for name, value in vars(module).items() if not name.startswith("_") and here(value)]


def entries(page: str) -> list[tuple[str, Any]]:
  """(full name, value) of each entry of a page; what stands at the top already does not stand in its submodule again."""
  _, _, top, submodule = PAGES[page]
  found = [(f"dpsgd_optax.{name}", getattr(dpsgd_optax, name)) for name in top.split()]
  if submodule:
    module = training if submodule == "training" else getattr(dpsgd_optax, submodule)
    for name in names_of(module):
      value = getattr(module, name)
      if not inspect.ismodule(value) and not any(value is other for _, other in found):
        found.append((f"dpsgd_optax.{submodule}.{name}", value))
  return found


@functools.cache
def _values_of(module: str) -> dict[str, str]:
  """name -> the string below its assignment, in the source of a module."""
  body = ast.parse(inspect.getsource(sys.modules[module])).body
  found = {}
  for above, below in zip(body, body[1:], strict=False):
    if isinstance(above, ast.Assign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
      found[above.targets[0].id] = inspect.cleandoc(str(below.value.value))
  return found


def is_value(value: Any) -> bool:
  return not (isinstance(value, type) or inspect.isfunction(value))


def text_of(name: str, value: Any) -> str:
  """The docstring; that of a value is the string below its assignment."""
  if not is_value(value):
    return inspect.getdoc(value) or ""
  own = name.split(".")[-1]
  modules = [key for key in sys.modules if key.startswith("dpsgd_optax.")]
  return next((text for key in modules if (text := _values_of(key).get(own))), "")


def summary(name: str, value: Any) -> str:
  """The first sentence of the docstring."""
  first = " ".join(line.strip() for line in text_of(name, value).split("\n\n")[0].splitlines())
  return "" if first.startswith("Attributes:") else re.split(r"(?<!Eq)\.\s", first + " ")[0].rstrip(". ") + "."


def write(folder: Path, convert: Any = lambda text: text) -> None:
  """The pages, as reStructuredText, and their index."""
  folder.mkdir(exist_ok=True)
  index = ["Reference", "=========", "", "A step is observe → fit → apply; the pages follow that order.", ""]
  for page, (title, about, _, submodule) in PAGES.items():
    index += [f":doc:`{page}`", f"  {about.replace('`', '``')}", ""]
    lines = [title, "=" * len(title), "", about.replace("`", "``"), ""]
    if submodule:
      lines += [f".. module:: dpsgd_optax.{submodule}", ""]
    lines += [".. list-table::", "   :class: summaries", ""]
    for name, value in entries(page):
      lines += [f"   * - :obj:`{name.split('.')[-1]} <{name}>`", f"     - {convert(summary(name, value))}"]
    lines += [""]
    for name, value in entries(page):
      if is_value(value):
        lines += [f".. py:data:: {name}", "", *(f"   {convert(x)}" for x in text_of(name, value).split("\n\n")), ""]
      else:
        lines += [f".. auto{'class' if isinstance(value, type) else 'function'}:: {name}", ""]
    (folder / f"{page}.rst").write_text("\n".join(lines))
  index += [".. toctree::", "   :hidden:", "", *(f"   {page}" for page in PAGES), ""]
  (folder / "index.rst").write_text("\n".join(index))
