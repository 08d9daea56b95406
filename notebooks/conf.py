# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `make docs` builds the pages, the notebooks and the reference into build/docs."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import dpsgd_optax

project = "dpsgd_optax"
author = "The dpsgd_optax developers"
release = dpsgd_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "*.py"]
nb_execution_mode = "off"  # `make notebooks` executes them, and the pictures are in its output
autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "signature"
html_theme = "alabaster"
html_theme_options = {"page_width": "1080px"}


def pages(app):
  """One page of the reference, a section for each group of names, so that no public name can be left out."""
  groups = {
    "Optimizers": ("dpsgd", "psgd", "sgd_ph", "bnp", "gls"),
    "Preconditioners": (
      "kron affine scan scaw dense diagonal xmat lra damped_kron diagonal_newton second_moment least_squares batch_norm"
    ).split(),
    "Curvatures and products": (
      "whitening newton hessian_diagonal layer_inputs hvp ggnvp hvp_finite_difference value_and_grad_and_hvp"
    ).split(),
  }
  named = {name for names in groups.values() for name in names}
  rest = [name for name in dpsgd_optax.__all__ if name not in named and not name.startswith("_")]
  callables = [name for name in rest if callable(getattr(dpsgd_optax, name))]
  groups["Everything else"] = callables
  lines = ["# Reference", ""]
  for title, names in groups.items():
    lines += [f"## {title}", "", "```{eval-rst}"]
    lines += [f".. autofunction:: dpsgd_optax.{name}" for name in names if not isinstance(getattr(dpsgd_optax, name), type)]
    lines += [f".. autoclass:: dpsgd_optax.{name}" for name in names if isinstance(getattr(dpsgd_optax, name), type)]
    lines += ["```", ""]
  values = [name for name in rest if name not in callables]
  lines += ["## Values", "", ", ".join(f"`{name}`" for name in values), ""]
  lines += ["## Flax", "", "```{eval-rst}", ".. automodule:: dpsgd_optax.training", "   :members:", "```", ""]
  (pathlib.Path(app.srcdir) / "api.md").write_text("\n".join(lines))


def plain_text(app, what, name, obj, options, lines):
  """Docstrings are plain text: |h| is no substitution, and *args no emphasis."""
  for i, line in enumerate(lines):
    if not line.lstrip().startswith((">>>", "...")):
      parts = re.split(r"(``.*?``|`.*?`)", line)
      parts[::2] = [re.sub(r"(?<!\*)\*(?!\*)|\*\*(?=\w+[,)])|\|", r"\\\g<0>", part) for part in parts[::2]]
      lines[i] = "".join(parts)


def setup(app):
  app.connect("builder-inited", pages)
  app.connect("autodoc-process-docstring", plain_text, priority=100)  # before napoleon
