# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `make docs` builds the pages, the notebooks and the reference into build/docs."""

import inspect
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import dpsgd_optax
from dpsgd_optax import training

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
  """One page of the reference: the names at the top in the order of `__all__`, then those of each submodule."""
  lines = ["# Reference", "", "```{eval-rst}"]
  for module in (dpsgd_optax, *(getattr(dpsgd_optax, name) for name in dpsgd_optax.__all__), training):
    if not inspect.ismodule(module):
      continue
    if module is not dpsgd_optax:
      lines += ["```", "", f"## {module.__name__}", "", (module.__doc__ or "").splitlines()[0], "", "```{eval-rst}"]
    for name in module.__all__:
      value = getattr(module, name)
      if not inspect.ismodule(value):
        kind = "class" if isinstance(value, type) else "function" if inspect.isfunction(value) else "data"
        lines.append(f".. auto{kind}:: {module.__name__}.{name}")
  (pathlib.Path(app.srcdir) / "api.md").write_text("\n".join([*lines, "```", ""]))


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
