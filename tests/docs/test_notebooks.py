# SPDX-License-Identifier: Apache-2.0
"""The notebooks: outputs that are those of their source, pictures, no errors; and that the sources still run."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpsgd_optax
from benchmarks import hyperparameters

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))
AGAIN = "type `make notebooks`"
SIZE, SECONDS = 400_000, 120  # what a notebook may weigh, and how long it may have run on two cores
PNG = b"\x89PNG\r\n\x1a\n"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def book(path):
  return json.loads(path.with_suffix(".ipynb").read_text())


def outputs(path):
  return [output for cell in book(path)["cells"] for output in cell.get("outputs", ())]


def cells_of_source(text):
  """(kind, text) of each cell of a script in the percent format."""
  _, *parts = re.split(r"^# %%", text, flags=re.M)
  for part in parts:
    head, _, body = part.partition("\n")
    markdown = "[markdown]" in head
    lines = [re.sub(r"^# ?", "", line) if markdown else line for line in body.strip().splitlines()]
    yield "markdown" if markdown else "code", "\n".join(lines).strip()


@each
def test_the_cells_are_those_of_the_source(path):
  cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in book(path)["cells"]]
  assert cells == list(cells_of_source(path.read_text())), AGAIN


@each
def test_the_outputs_are_those_of_the_source(path):
  """They were made from this very text, by versions that are told."""
  stamp = book(path)["metadata"]["outputs"]
  assert stamp["source"] == hashlib.sha256(path.read_bytes()).hexdigest(), AGAIN
  assert {"python", "jax", "optax", "flax", "dpsgd_optax"} <= stamp["versions"].keys()
  assert 0 < stamp["seconds"] <= SECONDS
  counts = [cell["execution_count"] for cell in book(path)["cells"] if cell["cell_type"] == "code"]
  assert counts == list(range(1, 1 + len(counts)))  # from the first cell to the last, once


@each
def test_there_are_pictures_and_no_errors(path):
  found = outputs(path)
  assert not [output for output in found if output["output_type"] == "error"]
  assert not [output for output in found if output.get("name") == "stderr"]
  pictures = [output["data"]["image/png"] for output in found if "image/png" in output.get("data", {})]
  assert pictures
  assert all(base64.b64decode("".join(picture)).startswith(PNG) for picture in pictures)
  assert path.with_suffix(".ipynb").stat().st_size <= SIZE


@each
def test_it_ends_with_what_to_remember_in_three_lines(path):
  kind, last = list(cells_of_source(path.read_text()))[-1]
  _, _, lines = last.partition("## What to remember\n")
  assert kind == "markdown" and [line[:2] for line in lines.split("\n") if line] == ["1.", "2.", "3."]


def test_every_notebook_begins_by_installing_what_is_missing():
  """The same cell in all of them, and no badge or address that leads nowhere."""
  first = {next(text for kind, text in cells_of_source(path.read_text()) if kind == "code") for path in NOTEBOOKS}
  assert len(first) == 1 and 'find_spec("dpsgd_optax") is None' in first.pop()
  assert not [path.name for path in NOTEBOOKS if "colab.research" in path.read_text() or "git+" in path.read_text()]
  assert len(NOTEBOOKS) >= 7


def test_the_installing_cell_installs_the_clone_that_the_notebook_lies_in(tmp_path, monkeypatch):
  """Where the package cannot be found pip is given the folder above; where it can, nothing is run."""
  cell = next(text for kind, text in cells_of_source(NOTEBOOKS[0].read_text()) if kind == "code")
  ran = []
  monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
  exec(cell, {})
  assert not ran
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  exec(cell, {})
  (command,) = ran
  assert command[:4] == [sys.executable, "-m", "pip", "install"]
  place, extra = command[-1].removesuffix("]").split("[")
  assert (FOLDER / place / "pyproject.toml").samefile(ROOT / "pyproject.toml") and extra == "bench"


def test_the_advice_on_the_rate_of_whitening_is_that_of_the_tuned_tables():
  """On every problem where both were tuned the best rate is Adam's or, one step of the grid lower, a third of it."""
  pairs = {}
  for path in hyperparameters.RESULTS.glob("tune-*.json"):
    chosen = json.loads(path.read_text())["chosen"]
    adam = chosen.get("adam", chosen.get("adamw"))
    if adam and "psgd_whiten" in chosen:
      pairs[path.stem] = round(chosen["psgd_whiten"] / adam, 2)
  assert len(pairs) >= 4
  assert set(pairs.values()) == {0.3, 1.0}, pairs
  assert "start with Adam's learning rate or a third" in " ".join(dpsgd_optax.psgd.__doc__.split())


@pytest.mark.slow
@each
def test_a_notebook_runs_from_its_first_cell_to_its_last(path):
  """As a script, without Jupyter; `make notebooks` runs the .ipynb and keeps its outputs."""
  environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, str(path)], cwd=path.parent, env=environment, check=True, timeout=900)
