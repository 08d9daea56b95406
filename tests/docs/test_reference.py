# SPDX-License-Identifier: Apache-2.0
"""The reference: every public name on one page, formulas as LaTeX, and the site without a warning."""

import collections
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpsgd_optax
from dpsgd_optax import training

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"


def load(name):
  spec = importlib.util.spec_from_file_location(name, NOTEBOOKS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


reference, formulas = load("_reference"), load("_formulas")


def test_every_public_name_stands_on_one_page():
  entries = [entry for page in reference.PAGES for entry in reference.entries(page)]
  at_top = collections.Counter(name.removeprefix("dpsgd_optax.") for name, _ in entries)
  names = {name for name in dpsgd_optax.__all__ if not inspect.ismodule(getattr(dpsgd_optax, name))}
  assert {name: at_top[name] for name in names} == dict.fromkeys(names, 1)
  submodules = {name for name in dpsgd_optax.__all__ if inspect.ismodule(getattr(dpsgd_optax, name))} | {"training"}
  assert submodules == {submodule for *_, submodule in reference.PAGES.values() if submodule}
  assert all(value is not None for _, value in entries) and len(training.__all__) > 3


def test_every_entry_has_a_summary():
  for page in reference.PAGES:
    for name, value in reference.entries(page):
      assert len(reference.summary(name, value)) > 20, name


@pytest.mark.parametrize(
  "plain, latex",
  [
    ("fitted, P → |H + λI|⁻¹.", r"fitted, :math:`P \to |H + \lambda I|^{-1}`."),
    ("u = √(gᵀ P g) of all", r":math:`u = \sqrt{g^\top P g}` of all"),
    ("with P = QᵀQ, a factor", r"with :math:`P = Q^\top Q`, a factor"),
    ("P → (E ggᵀ)^(−½) on gradients", r":math:`P \to (E gg^\top )^{-\tfrac12 }` on gradients"),
    ("nothing here is a formula: I am a sentence.", "nothing here is a formula: I am a sentence."),
    ("see ``a = b²`` and `c²`, or 91 % of it", "see ``a = b²`` and `c²`, or 91 % of it"),
    ("V̂ is debiased", r":math:`\hat{V}` is debiased"),
  ],
)
def test_formulas_are_found_in_sentences(plain, latex):
  squeeze = lambda text: re.sub(r" +", " ", text)
  assert squeeze(formulas.inline(plain)) == squeeze(latex)


def test_formulas_of_all_docstrings_are_whole():
  """Every brace is closed, no sign is left that LaTeX does not know, and there are many."""
  found = []
  for page in reference.PAGES:
    for name, value in reference.entries(page):
      lines = formulas.converted(reference.text_of(name, value).splitlines())
      found += [(name, text) for line in lines for text in re.findall(r":math:`([^`]*)`", line)]
  assert len(found) > 150
  for name, text in found:
    assert text.count("{") == text.count("}"), (name, text)
    assert not re.search(r"[^\x00-\x7f]", text), (name, text)
  assert {"dpsgd_optax.psgd", "dpsgd_optax.soap", "dpsgd_optax.kron", "dpsgd_optax.eq"} <= {name for name, _ in found}


@pytest.mark.full
def test_the_site_is_built_without_a_warning(tmp_path):
  """conf.py stops at a signature longer than six lines; a link that leads nowhere is a warning, and so an error."""
  for module in ("sphinx", "myst_nb", "sphinx_book_theme"):
    if importlib.util.find_spec(module) is None:
      pytest.skip(f"{module} is not installed: `pip install -e .[docs]`")
  command = [
    sys.executable,
    "-m",
    "sphinx",
    "-q",
    "-E",
    "-W",
    "--keep-going",
    "-d",
    str(tmp_path / "trees"),
    "-b",
    "html",
  ]
  built = subprocess.run(
    [*command, str(NOTEBOOKS), str(tmp_path / "site")],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "DOCS_OFFLINE": "1"},
    timeout=600,
  )
  assert built.returncode == 0, built.stderr
  page = (tmp_path / "site" / "reference" / "optimizers.html").read_text()
  assert "dpsgd_optax.psgd" in page and page.count('class="math') > 20 and "collections.abc" not in page
  assert (tmp_path / "site" / "searchindex.js").exists()
