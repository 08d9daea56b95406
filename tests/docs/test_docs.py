# SPDX-License-Identifier: Apache-2.0
"""What the README and the page "Your loop" show is run, block after block, in one namespace, as a reader would."""

import importlib
import re
from pathlib import Path

import jax
import pytest

from benchmarks import hyperparameters
from benchmarks.studies import readme

README = Path(__file__).parents[2] / "README.md"
YOUR_LOOP = README.parent / "notebooks" / "your_loop.md"


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
