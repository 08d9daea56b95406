# SPDX-License-Identifier: Apache-2.0
"""The README's figures, written from the committed results and from nothing else.

`python -m benchmarks readme` replaces what stands between the two markers; a test holds README.md to it.
"""

import json
from pathlib import Path

from benchmarks import cost, peers, robustness
from benchmarks.records import load
from benchmarks.report import claim_table, final_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks readme` -->", "<!-- /figures -->"
DEMO, ABLATION = "demo", "ablation"


def figures(results: Path) -> str:
  """Markdown of everything the README quotes."""
  parts = ["## Measured", f"All on 2 shared CPU cores, from the JSON under `benchmarks/{results.name}/`; {_how()}"]
  documents = [load(path) for path in sorted(results.glob("*.json")) if path.stem.endswith(("-author", "-tuned", DEMO))]
  if claim := claim_table(documents):
    parts += [claim.markdown()]
  for name, picture in ((DEMO, True), (ABLATION, False)):
    path = results / f"{name}.json"
    if path.exists():
      parts.append(final_table(load(path)).markdown())
      if picture:
        parts.append(f"![Training loss of the demo](benchmarks/{results.name}/{name}.png)")
  for path in sorted(results.glob("cost-*.json")):
    document = json.loads(path.read_text())
    parts.append((peers if "workload" in document else cost).table(document).markdown())
  if (path := results / "robustness.json").exists():
    parts.append(robustness.table(json.loads(path.read_text())).markdown())
  return "\n\n".join(parts)


def _how() -> str:
  return (
    "`author` is the setting of the paper's notebooks (normaliser, factor step, learning rates, decay, cadence), "
    "`tuned` gives every optimizer the same number of trials. The target is PSGD's final training loss of the same "
    "seed, PSGD being the same code without damping and averaging."
  )


def updated(text: str, results: Path) -> str:
  """The README with its figures brought up to date."""
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  return f"{before}{BEGIN}\n\n{figures(results)}\n\n{END}{after}"


def write(results: Path, path: Path = README) -> None:
  path.write_text(updated(path.read_text(), results))
