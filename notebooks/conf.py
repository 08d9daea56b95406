# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `make docs` builds the pages, the notebooks and the reference into build/docs."""

import os
import pathlib
import re
import sys
import tomllib
import urllib.request

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import _formulas
import _reference

import dpsgd_optax

project = "dpsgd_optax"
author = "The dpsgd_optax developers"
release = dpsgd_optax.__version__
repository = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build", "*.py"]
nb_execution_mode = "off"  # they are committed as they were executed
myst_heading_anchors = 3
napoleon_use_ivar = True
suppress_warnings = ["misc.highlighting_failure"]
autodoc_typehints = "none"  # what an argument may be is said beside it, under its name
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_display_short_literal_types = True
html_theme = "sphinx_book_theme"
html_title = "dpsgd_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
  "repository_url": repository,
  "use_repository_button": True,
  "use_issues_button": True,
  "path_to_docs": "notebooks",
  "show_toc_level": 2,
}
SIGNATURE = 6 * 54  # characters: six lines of a window of 1200 px, where 54 stand between the two side bars


def _reachable(address):
  if os.environ.get("DOCS_OFFLINE"):  # the test of this build says the same with a network and without
    return False
  try:
    with urllib.request.urlopen(f"{address}/objects.inv", timeout=3) as answer:
      return answer.status == 200
  except OSError:
    return False


# Without a network names of the other libraries stay plain text, and the build goes on.
INVENTORIES = {
  "python": "https://docs.python.org/3",
  "jax": "https://docs.jax.dev/en/latest",
  "optax": "https://optax.readthedocs.io/en/latest",
  "flax": "https://flax.readthedocs.io/en/latest",
}
intersphinx_mapping = {name: (address, None) for name, address in INVENTORIES.items() if _reachable(address)}
intersphinx_timeout = 10


def plain_text(app, what, name, obj, options, lines):
  """Docstrings are plain text: formulas become LaTeX; |h| is no substitution, and *args no emphasis."""
  if lines and lines[0] == "Attributes:":
    lines[1:] = [f"  {line}" for line in lines[1:]]
  lines[:] = _formulas.converted(lines)
  for i, line in enumerate(lines):
    if not line.lstrip().startswith((">>>", "...")):
      lines[i] = "| " + escaped(line[2:]) if line.startswith("| ") else escaped(line)


def escaped(line):
  """Bars, underscores and stars are themselves, but *one word* or more between two stars is emphasis."""
  kept = r"(``.*?``|`.*?`|\\ |(?<![\w*(,\[])\*\w[^*()`]*\w\*(?![\w*])|\*\*\w[^*]*[\w.]\*\*)"
  parts = re.split(kept, line)
  parts[::2] = [re.sub(r"\*|\||(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
  return "".join(parts)


def short_signature(app, what, name, obj, options, signature, annotation):
  """A signature that would be a wall is an error: shorten its defaults."""
  if signature and len(name) + len(signature) > SIGNATURE:
    raise ValueError(f"the signature of {name} has {len(signature)} characters, and {SIGNATURE} fit into six lines")


def pages(app):
  _reference.write(pathlib.Path(app.srcdir) / "reference", lambda text: escaped(_formulas.inline(text)))


def one_site(app, docname, source):
  """On the site RESULTS.md is a page of its own; in the repository the pages link to the file."""
  source[0] = source[0].replace("../benchmarks/RESULTS.md", "results.md")
  for page in ("claims", "science"):  # in the index once they are written
    if docname == "index" and not (HERE / f"{page}.md").exists():
      source[0] = source[0].replace(f"\n{page}\n", "\n")


def setup(app):
  app.connect("source-read", one_site)
  app.connect("builder-inited", pages)
  app.connect("autodoc-process-docstring", plain_text, priority=100)  # before napoleon
  app.connect("autodoc-process-signature", short_signature)
