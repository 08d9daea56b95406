# SPDX-License-Identifier: Apache-2.0
"""The figures of the README, of RESULTS.md and of the page on choosing, from the committed results and nothing else.

`python -m benchmarks readme` replaces what stands between the two markers; a test holds the files to it.

The README has one table, `headline`: a row for each file that HEADLINE names. RESULTS.md has all figures.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine import analysis
from benchmarks.engine.analysis import Spread
from benchmarks.engine.records import Results, load
from benchmarks.engine.report import Table, between, claim_table, final_table, number, percent
from benchmarks.studies import batch_sizes, clock, cost, defaults, gls, gpu, rl, robustness, science

README = Path(__file__).parents[2] / "README.md"
CHOOSING = README.parent / "notebooks" / "choosing.md"
RESULTS_PAGE = README.parent / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks readme` -->", "<!-- /figures -->"
DEMO, ABLATION, LENET = "demo", "ablation", "lenet-psgd"

HEADLINE = {  # file of results -> what was trained, in the order of the README
  "clock-digits": "handwritten digits, MLP",
  "clock-mnist": "MNIST, LeNet-5",
  "clock-fashion_mnist": "Fashion-MNIST, LeNet-5",
  "clock-addition": "addition problem, RNN",
  "clock-curves": "curves, deep autoencoder",
  "clock-charlm": "characters, transformer",
}
SCIENCE = {
  "poisson": "Poisson's equation, PINN",
  "burgers": "Burgers' equation, PINN",
  "waves-bits-32": "regression to many frequencies, float32",
  "tfim": "ground state of a spin chain",
}
USUAL = ("adam", "muon", "momentum", "lbfgs", "optimistix BFGS", "optimistix LM", "nlls-gram")  # of other packages
LAYERS = ("gls", "bnp")  # they fit the training data alone: their test losses say so
TYPED = {  # how a user of the library says what the benchmarks call by a word of theirs
  "whitening kron": "psgd",
  "newton kron": "psgd, Newton",
  "soap": "psgd, soap",
  "soap newton": "psgd, soap, Newton",
  "psgd": "dpsgd, undamped",
  "psgd+damping": "dpsgd, not averaged",
  "psgd+averaging": "dpsgd, not damped",
}
PAPER = {  # every race of the paper's setting with both of them
  "mnist-author": "MNIST",
  "fashion_mnist-author": "Fashion-MNIST",
  "addition-author": "the addition problem",
  "curves-author": "the autoencoder",
}


def _row(what: str, ends: dict[str, Spread]) -> tuple[str, ...]:
  """One problem; the lowest of all is bold."""
  default, other = next(iter(clock.DEFAULT)), lambda label: label in USUAL
  ours = min((label for label in ends if not other(label) and label not in (clock.PAPER, default)), key=_median(ends))
  theirs = min(filter(other, ends), key=_median(ends))
  cells = [f"`{TYPED.get(ours, ours)}` {between(ends[ours])}", f"{theirs} {between(ends[theirs])}"]
  first = ends[ours].median > ends[theirs].median
  cells[first] = f"**{cells[first]}**"
  return (what, *cells, *(between(ends[label]) if label in ends else "" for label in (default, clock.PAPER)))


def _median(ends: dict[str, Spread]) -> Callable[[str], float]:
  return lambda label: ends[label].median


def headline(results: Path) -> str:
  """Markdown of the README's table: our lowest, optax's or another package's, DPSGD as it comes, its paper's PSGD."""
  rows, seeds = [], set()
  for file, what in HEADLINE.items():
    if (path := results / f"{file}.json").exists():
      found = load(path)
      ends = {label: analysis.spread(clock.losses(found, label)) for label in found.contestants if label not in LAYERS}
      rows.append(_row(f"{what}: training loss, {found.plan.seconds:g} s", ends))
      seeds.add(len(found.seeds()))
  for name, what in SCIENCE.items():
    if (path := results / f"science-{name}.json").exists():
      document = json.loads(path.read_text())
      raced = {label: runs for label, runs in document["runs"].items() if runs["seeds"]}
      ends = {label: analysis.spread(science.ends(runs).tolist()) for label, runs in raced.items()}
      rows.append(_row(f"{what}: relative error, {document['seconds']:g} s", ends))
      seeds |= {len(runs["seeds"]) for runs in raced.values()}
  header = ("problem, CPU seconds", "lowest of ours", "lowest of the others", "`dpsgd(0.1)`", "PSGD of the papers")
  table = Table("Where they stand when the time is over", header, rows)
  gains = []
  for file, what in PAPER.items():
    found = load(results / f"{file}.json")
    ratios = analysis.ratios(found, "dpsgd", "seconds", analysis.psgd_targets(found))
    gains.append(f"{percent(analysis.spread(ratios))} on {what}")
  return "\n\n".join(
    (
      f"![Training loss of the demo](benchmarks/{results.name}/{DEMO}.png)",
      table.markdown(),
      f"Median [quartiles] over {min(seeds)} to {max(seeds)} seeds; the lower of the two is bold. Everyone had as many "
      "trials on another seed: ten over rate, period of fits, schedule, mean of the iterates and clipping, or in the "
      "last four rows three to five over the rate. `dpsgd(0.1)` had none; of PSGD as in its papers, a fit on every "
      "step, the rate alone was tuned. All contestants: [science](notebooks/science.md), and with the controls of "
      "DPSGD [by the clock](benchmarks/RESULTS.md#by-the-clock).",
      "With the rates of the paper, change of the seconds until `dpsgd` is at the final training loss of its undamped "
      f"form (median and quartiles): {', '.join(gains)}.",
    )
  )


def figures(results: Path) -> str:
  """Markdown of all figures, the page RESULTS.md."""
  parts = ["## By the clock"]
  for path in sorted(results.glob("clock-*.json")):
    parts += [clock.table(load(path)).markdown(), f"![Training loss]({results.name}/{path.stem}.png)"]
  parts += ["## Who is lowest where", winners(results)]
  if claim := claim_table(_runs(results)):
    parts += ["## DPSGD beside PSGD", claim.markdown()]
  parts += ["## Races in full"]
  if (path := results / f"{DEMO}.json").exists():
    parts += [clock.table(load(path)).markdown(), f"![Training loss of the demo]({results.name}/{DEMO}.png)"]
  for name in (ABLATION, LENET):
    if (path := results / f"{name}.json").exists():
      parts.append(final_table(load(path)).markdown())
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
  return [load(path) for path in sorted(results.glob("*.json")) if path.stem.endswith(("-author", "-tuned"))]


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
