# SPDX-License-Identifier: Apache-2.0
"""What the README and the page "Your loop" show is run, block after block, in one namespace, as a reader would."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import hyperparameters
from benchmarks.studies import readme

README = Path(__file__).parents[2] / "README.md"
NOTEBOOKS = sorted((README.parent / "notebooks").glob("[0-9]*.py"))
YOUR_LOOP = README.parent / "notebooks" / "your_loop.md"
LONG = ("3", "5", "7")  # from one to two minutes each


def marks_of(number):
  """No notebook in the quick tier, and the long ones among the soaks."""
  return pytest.mark.slow if number in LONG else pytest.mark.full


def python_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, re.S)


def test_every_python_block_of_the_readme_runs():
  blocks = python_blocks(README.read_text())
  assert len(blocks) == 4  # the network, and one block for each of three ways to use an optimizer
  namespace = {}
  for block in blocks:
    exec(compile(block, "README.md", "exec"), namespace)
    if "train_step" in block and "def train_step(params" in block:
      params, state, first = namespace["train_step"](*(namespace[k] for k in ("params", "opt_state", "batch")))
      for _ in range(5):
        params, state, last = namespace["train_step"](params, state, namespace["batch"])
      assert last < first
  assert namespace["value"] > 0


@pytest.fixture
def quick_to_compile():
  """Compiling two dozen steps is what the page costs."""
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


def can_run(block):
  """False if the first line is "# needs: a, b" and one of these modules cannot be imported."""
  needed = re.match(r"# needs: (.*)\n", block)
  try:
    for name in needed[1].split(", ") if needed else ():
      importlib.import_module(name)
  except ImportError:
    return False
  return True


@pytest.mark.full
@pytest.mark.usefixtures("quick_to_compile")
def test_every_python_block_of_your_loop_runs(capsys):
  """And where it trains, the loss falls; the counters are what the comments beside them say."""
  namespace, trained = {}, 0
  for block in filter(can_run, python_blocks(YOUR_LOOP.read_text())):
    before = namespace.get("losses")
    exec(compile(block, YOUR_LOOP.name, "exec"), namespace)
    if namespace.get("losses") is not before:
      trained += 1
      assert namespace["losses"][-1] < namespace["losses"][0], block
  assert trained >= 16
  assert {"4", "{'clipped': 1, 'skipped': 1, 'dropped': 1}"} < set(capsys.readouterr().out.splitlines())


def test_every_section_of_your_loop_has_a_block_and_a_trap():
  _, *sections = YOUR_LOOP.read_text().split("\n## ")
  assert len(sections) == 18
  for section in sections:
    assert python_blocks(section) and section.count("**The trap.**") == 1, section.splitlines()[0]


def test_the_first_line_settles_the_name():
  first = README.read_text().splitlines()[0]
  assert "damped preconditioned" in first.replace("*", "") and "not differentially private" in first


def test_the_figures_are_those_of_the_committed_results():
  for path, text in readme.pages(hyperparameters.RESULTS).items():
    assert path.read_text() == text, f"{path.name}: type `python -m benchmarks readme`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_paired(path):
  """The .ipynb has the cells of the .py beside it, no outputs, and a badge."""
  cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
  assert not any(cell.get("outputs") for cell in cells)
  assert f"{path.stem}.ipynb" in "".join(cells[0]["source"])
  script = [line.strip("# \n") for line in path.read_text().splitlines()]
  for cell in cells:
    for line in "".join(cell["source"]).splitlines():
      assert line.strip("# ") in script, f"type `make notebooks`: {path.name} lacks {line!r}"


@pytest.mark.parametrize(
  "path",
  [pytest.param(path, marks=marks_of(path.name[0])) for path in NOTEBOOKS],
  ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path):
  """As a script, without Jupyter; `make notebooks` runs the .ipynb."""
  environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(README.parent)}
  subprocess.run([sys.executable, str(path)], cwd=path.parent, env=environment, check=True, timeout=900)
