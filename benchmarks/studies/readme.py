# SPDX-License-Identifier: Apache-2.0
"""The figures of the README, of RESULTS.md and of the page on choosing, from the committed results and nothing else.

`python -m benchmarks readme` replaces what stands between the two markers; a test holds the files to it.

The README has one table, `headline`: a row for each file that HEADLINE names. RESULTS.md has all figures.
"""

import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from benchmarks.engine import analysis
from benchmarks.engine.analysis import Spread
from benchmarks.engine.records import Results, load
from benchmarks.engine.report import Table, claim_table, final_table, number, percent
from benchmarks.studies import batch_sizes, cost, defaults, gls, gpu, rl, robustness

README = Path(__file__).parents[2] / "README.md"
CHOOSING = README.parent / "notebooks" / "choosing.md"
RESULTS_PAGE = README.parent / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks readme` -->", "<!-- /figures -->"
DEMO, ABLATION, LENET = "demo", "ablation", "lenet-psgd"

HEADLINE = {  # file of results -> what was trained, in the order of the README
  DEMO: "handwritten digits, MLP (the demo)",
  "mnist-tuned": "MNIST, LeNet-5",
  "fashion_mnist-tuned": "Fashion-MNIST, LeNet-5",
  "charlm-tuned": "characters, transformer",
  "digits_bn-tuned": "digits, MLP with batch norm",
  "logistic-tuned": "logistic regression",
  "curves-tuned": "curves, deep autoencoder",
  "addition-tuned": "addition problem, RNN",
}
USUAL = ("sgd", "momentum", "adam", "adamw", "muon", "lbfgs")  # from optax: the controls
TYPED = {  # how a user of the library says what the benchmarks call by a word of theirs
  "psgd": "dpsgd, undamped",
  "psgd_whiten": "psgd",
  "psgd_newton": "psgd, Newton",
  "soap": "psgd, soap",
}
PAPER = {  # every race of the paper's setting with both of them
  "mnist-author": "MNIST",
  "fashion_mnist-author": "Fashion-MNIST",
  "addition-author": "the addition problem",
  "curves-author": "the autoencoder",
}


def _lowest(losses: dict[str, Spread], of: Iterable[str]) -> tuple[str, float]:
  """The label with the lowest median among some, and that median."""
  label = min(of, key=lambda name: losses[name].median)
  return label, losses[label].median


def _versus(found: Results, axis: str) -> tuple[str, str, str]:
  """The lowest of ours, the lowest of the usual ones, and how many times lower ours is; the lower one is bold."""
  losses, name = analysis.losses_at_equal(found, axis), {key: about["name"] for key, about in found.contestants.items()}
  usual = [label for label in losses if name[label] in USUAL]
  (ours, low), (theirs, control) = (_lowest(losses, of) for of in ([x for x in losses if x not in usual], usual))
  said = [f"{TYPED.get(name[label], name[label])} {number(loss)}" for label, loss in ((ours, low), (theirs, control))]
  said[low > control] = f"**{said[low > control]}**"
  factor = control / low
  return said[0], said[1], f"{factor:.0f}" if factor >= 10 else f"{factor:.2f}"


def headline(results: Path) -> str:
  """Markdown of the README's table: the best of this library beside the best of optax, by steps and by seconds."""
  rows, seeds = [], []
  for file, what in HEADLINE.items():
    found = load(results / f"{file}.json")
    rows.append((f"{what}: {found.plan.steps} steps", *_versus(found, "step"), *_versus(found, "seconds")))
    seeds.append(len(found.seeds()))
  header = ("problem", "here, equal steps", "optax, equal steps", "optax ÷ here")
  header += ("here, equal seconds", "optax, equal seconds", "optax ÷ here")
  table = Table("Training loss, the best of this library beside the best of optax", header, rows)
  gains = []
  for file, what in PAPER.items():
    found = load(results / f"{file}.json")
    ratios = analysis.ratios(found, "dpsgd", "seconds", analysis.psgd_targets(found))
    gains.append(f"{percent(analysis.spread(ratios))} on {what}")
  return "\n\n".join(
    (
      f"![Training loss of the demo](benchmarks/{results.name}/{DEMO}.png)",
      table.markdown(),
      f"The best of those that were raced; medians over {min(seeds)} to {max(seeds)} seeds on 2 CPU cores. The lower "
      'loss is bold; above 1 in "optax ÷ here" means lower here. Every optimizer had the same number of trials for its '
      "learning rate, on a seed that does not count. Equal seconds: when the fastest optimizer had finished its steps. "
      "`dpsgd, undamped` is the PSGD that the DPSGD paper starts from: `dpsgd` without damping and averaging.",
      "With the rates of the paper, change of the seconds until `dpsgd` is at the final training loss of its undamped "
      f"form (median and quartiles): {', '.join(gains)}.",
    )
  )


def figures(results: Path) -> str:
  """Markdown of all figures, the page RESULTS.md."""
  parts = ["## Who is lowest where", winners(results)]
  if claim := claim_table(_runs(results)):
    parts += ["## DPSGD beside PSGD", claim.markdown()]
  parts += ["## Races in full"]
  for name, picture in ((DEMO, True), (ABLATION, False), (LENET, False)):
    path = results / f"{name}.json"
    if path.exists():
      parts.append(final_table(load(path)).markdown())
      if picture:
        parts.append(f"![Training loss of the demo]({results.name}/{name}.png)")
  if (path := results / "defaults.json").exists():
    document = json.loads(path.read_text())
    parts += ["## Geometries"]
    parts += [defaults.table(question, document).markdown() for question in defaults.QUESTIONS if question in document]
  tables = {"gls": ("Layers", gls.summary), "batch_sizes": ("Batch sizes", batch_sizes.table)}
  for name, (title, table) in tables.items():
    if (path := results / f"{name}.json").exists():
      parts += [f"## {title}", table(json.loads(path.read_text())).markdown()]
  parts += ["## Reinforcement learning"]
  for path in sorted(results.glob("rl-*.json")):
    parts += [rl.table(path.stem.removeprefix("rl-"), json.loads(path.read_text())).markdown()]
    parts += [f"![Return against steps]({results.name}/{path.stem}.png)"]
  if (path := results / "robustness.json").exists():
    parts += ["## Bad gradients", robustness.table(json.loads(path.read_text())).markdown()]
  parts += ["## What a step costs"]
  parts += [cost.table(json.loads(path.read_text())).markdown() for path in sorted(results.glob("cost-*.json"))]
  if (path := results / "gpu.json").exists():
    parts += ["## On a GPU", *(table.markdown() for table in gpu.tables(json.loads(path.read_text())))]
  return "\n\n".join(parts)


def rates(results: Path) -> str:
  """Markdown of the learning rates that tuning chose: where to begin on a problem of one's own."""
  paths = sorted(results.glob("tune-*.json"))
  chosen = {path.stem.removeprefix("tune-"): json.loads(path.read_text())["chosen"] for path in paths}
  columns = ("adam", "adamw", "muon", "psgd_whiten", "soap", "psgd_newton", "psgd", "dpsgd")
  rows = [(problem, *(f"{found[x]:g}" if x in found else "" for x in columns)) for problem, found in chosen.items()]
  return Table("Learning rates that tuning chose", ("problem", *columns), rows).markdown()


def advice(results: Path) -> str:
  """Markdown of what the page on choosing goes by: who was lowest where, all tuned alike, and at which rates."""
  return "\n\n".join((winners(results, settings=("tuned",)), rates(results)))


def _runs(results: Path) -> list[Results]:
  return [load(path) for path in sorted(results.glob("*.json")) if path.stem.endswith(("-author", "-tuned", DEMO))]


def winners(results: Path, settings: tuple[str, ...] = ("author", "tuned")) -> str:
  """Markdown of who was lowest where, by steps and by seconds."""
  rows = []
  for found in _runs(results):
    if len(found.contestants) < 3 or found.plan.setting not in settings:  # a comparison of two has a table of its own
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


PAGES = {README: headline, RESULTS_PAGE: figures, CHOOSING: advice}


def updated(text: str, figures: str) -> str:
  """A page with its figures brought up to date."""
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def pages(results: Path) -> dict[Path, str]:
  """Each page with its figures."""
  return {path: updated(path.read_text(), of(results)) for path, of in PAGES.items()}


def run(args: Namespace) -> None:
  for path, text in pages(args.out).items():
    path.write_text(text)
