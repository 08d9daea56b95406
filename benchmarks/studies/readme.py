# SPDX-License-Identifier: Apache-2.0
"""The figures of the README and of the page on choosing, written from the committed results and from nothing else.

`python -m benchmarks readme` replaces what stands between the two markers; a test holds both files to it.
"""

import json
from argparse import Namespace
from pathlib import Path

from benchmarks.engine import analysis
from benchmarks.engine.records import Results, load
from benchmarks.engine.report import Table, claim_table, final_table, number
from benchmarks.studies import batch_sizes, cost, defaults, gls, gpu, rl, robustness

README = Path(__file__).parents[2] / "README.md"
CHOOSING = README.parent / "notebooks" / "choosing.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks readme` -->", "<!-- /figures -->"
HOW = (
  "`author` is the setting of the paper's notebooks (normaliser, factor step, learning rates, decay, cadence), "
  "`tuned` gives every optimizer the same number of trials. The target is PSGD's final training loss of the same "
  "seed, PSGD being the same code without damping and averaging."
)
DEMO, ABLATION, LENET = "demo", "ablation", "lenet-psgd"


def figures(results: Path) -> str:
  """Markdown of everything the README quotes."""
  parts = ["## Measured", f"All on 2 shared CPU cores, from the JSON under `benchmarks/{results.name}/`; {HOW}"]
  if claim := claim_table(_runs(results)):
    parts += [claim.markdown()]
  for name, picture in ((DEMO, True), (ABLATION, False)):
    path = results / f"{name}.json"
    if path.exists():
      parts.append(final_table(load(path)).markdown())
      if picture:
        parts.append(f"![Training loss of the demo](benchmarks/{results.name}/{name}.png)")
  for path in sorted(results.glob("cost-*.json")):
    parts.append(cost.table(json.loads(path.read_text())).markdown())
  if (path := results / "gpu.json").exists():
    parts += [table.markdown() for table in gpu.tables(json.loads(path.read_text()))]
  return "\n\n".join(parts)


def advice(results: Path) -> str:
  """Markdown of what the page on choosing goes by: who won where, defaults, and comparisons of one kind each."""
  parts = [winners(results)]
  if (path := results / "defaults.json").exists():
    document = json.loads(path.read_text())
    parts += [defaults.table(question, document).markdown() for question in defaults.QUESTIONS if question in document]
  if (path := results / f"{LENET}.json").exists():
    parts.append(final_table(load(path)).markdown())
  for path in sorted(results.glob("rl-*.json")):
    name = path.stem.removeprefix("rl-")
    parts += [rl.table(name, json.loads(path.read_text())).markdown()]
    parts += [f"![Return against steps](../benchmarks/{results.name}/{path.stem}.png)"]
  tables = {"gls": gls.summary, "batch_sizes": batch_sizes.table, "robustness": robustness.table}
  for name, table in tables.items():
    if (path := results / f"{name}.json").exists():
      parts.append(table(json.loads(path.read_text())).markdown())
  return "\n\n".join(parts)


def _runs(results: Path) -> list[Results]:
  return [load(path) for path in sorted(results.glob("*.json")) if path.stem.endswith(("-author", "-tuned", DEMO))]


def winners(results: Path) -> str:
  """Markdown of who was lowest where, by steps and by seconds."""
  rows = []
  for found in _runs(results):
    if len(found.contestants) < 3:  # a comparison of two is in the README
      continue
    cells = []
    for axis in ("step", "seconds"):
      losses = analysis.losses_at_equal(found, axis)
      best = min(losses, key=lambda label: losses[label].median)
      cells += [best, number(losses[best].median)]
    rows.append((found.plan.problem, found.plan.setting, str(found.plan.steps), str(len(found.contestants)), *cells))
  header = ("problem", "setting", "steps", "optimizers")
  header += ("lowest at equal steps", "loss", "lowest at equal seconds", "loss")
  return Table("Lowest training loss (median over seeds)", header, rows).markdown()


def updated(text: str, figures: str) -> str:
  """A page with its figures brought up to date."""
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def pages(results: Path) -> dict[Path, str]:
  """Each page with its figures."""
  return {path: updated(path.read_text(), of(results)) for path, of in ((README, figures), (CHOOSING, advice))}


def run(args: Namespace) -> None:
  for path, text in pages(args.out).items():
    path.write_text(text)
