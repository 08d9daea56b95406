# SPDX-License-Identifier: Apache-2.0
"""Execute the notebooks and keep what they show: `make notebooks`, or `python notebooks/execute.py 3 8` for some.

Each `N_name.py` is the source of `N_name.ipynb`, which is made from it, run from its first cell to its last, and
written with its outputs. The metadata of the .ipynb keep the SHA-256 of the source, the versions and the seconds, so that a
test can tell whether the outputs are those of the source (tests/docs/test_notebooks.py). A cell that fails is an error,
and nothing is written then.
"""

import base64
import hashlib
import io
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
PACKAGES = ("dpsgd_optax", "jax", "optax", "flax", "numpy", "matplotlib")
TIMEOUT = 600  # seconds of a cell


def stamp(source: str, seconds: float) -> dict[str, object]:
  """What the metadata say of the outputs."""
  versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
  return {"source": hashlib.sha256(source.encode()).hexdigest(), "versions": versions, "seconds": round(seconds)}


def small(picture: str) -> str:
  """A PNG with a palette of 256 colours, base64 as the notebook has it: a third of the bytes."""
  image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
  out = io.BytesIO()
  image.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
  return base64.b64encode(out.getvalue()).decode()


def merged(outputs: list) -> list:
  """The outputs of a cell, for a reader: printed lines as one text, small pictures, no `<Legend at 0x7f…>`."""
  kept: list = []
  for output in outputs:
    data = output.get("data", {})
    if "image/png" in data:
      data["image/png"] = small(data["image/png"])
    if output.output_type == "execute_result" and " at 0x" in data.get("text/plain", ""):
      continue
    if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
      kept[-1].text += output.text
    else:
      kept.append(output)
  return kept


def executed(path: Path) -> nbformat.NotebookNode:
  """The notebook of a source, with outputs."""
  source = path.read_text()
  book = jupytext.reads(source, fmt="py:percent")
  begin = time.perf_counter()
  NotebookClient(book, timeout=TIMEOUT, resources={"metadata": {"path": str(path.parent)}}).execute()
  seconds = time.perf_counter() - begin
  for number, cell in enumerate(book.cells):
    cell.id, cell.metadata = f"cell-{number}", {}  # times of day would differ from run to run
    if cell.cell_type == "code":
      cell.outputs = merged(cell.outputs)
  kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
  book.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": kernel}
  book.metadata["outputs"] = stamp(source, seconds)
  return book


def main(names: list[str]) -> None:
  for path in sorted(FOLDER.glob("[0-9]*.py")):
    if not names or path.name.split("_")[0] in names:
      book = executed(path)
      text = nbformat.writes(book, version=4)
      path.with_suffix(".ipynb").write_text(text if text.endswith("\n") else text + "\n")
      print(f"{path.stem}: {book.metadata['outputs']['seconds']} s, {len(text.encode()) // 1000} KB", flush=True)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the committed pictures are those of a CPU
  main(sys.argv[1:])
