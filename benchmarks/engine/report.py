# SPDX-License-Identifier: Apache-2.0
"""Results as tables: on a terminal with rich, in a file or a pipe as Markdown."""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.engine import analysis
from benchmarks.engine.analysis import Spread
from benchmarks.engine.progress import say
from benchmarks.engine.records import Results, write


@dataclass(frozen=True)
class Table:
  """A title, a header, rows of text, and remarks below."""

  title: str
  header: tuple[str, ...]
  rows: list[tuple[str, ...]]
  notes: tuple[str, ...] = ()

  def markdown(self) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(self.header, *self.rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
      cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
      return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    body = "\n".join(line(row) for row in [self.header, rule, *self.rows])
    return "\n\n".join([f"**{self.title}**", body, *self.notes])

  def show(self) -> None:
    """To a terminal with rich, otherwise as Markdown."""
    if not sys.stdout.isatty():
      print(self.markdown(), end="\n\n", flush=True)
      return
    table = RichTable(
      title=escape(self.title), caption=escape("\n".join(self.notes)), title_justify="left", caption_justify="left"
    )
    for i, name in enumerate(self.header):
      table.add_column(name, justify="left" if i == 0 else "right")
    for i, row in enumerate(self.rows):
      table.add_row(*map(escape, row), style="bold" if i == 0 else None)
    Console().print(table)


def number(value: float | None) -> str:
  """Three significant digits; a dash for what is not finite, or None, as documents have it."""
  if value is None or not math.isfinite(value):
    return "–"
  if value == 0 or 0.01 <= abs(value) < 1000:
    return f"{value:.3g}"
  return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.2e}"


def publish(document: dict[str, Any], path: Path, *found: Table) -> None:
  """Show the tables of a study's document, and keep the document."""
  for table in found:
    table.show()
  write(document, path)
  say(f"wrote {path}")


def study(name: str, measure: Callable[[Namespace], dict[str, Any]], table: Callable[[dict[str, Any]], Table]) -> Any:
  """The `run` of a study that measures everything in one go: NAME.json, and the table of it."""

  def run(args: Namespace) -> None:
    document = measure(args)
    publish(document, args.out / f"{name}.json", table(document))

  return run


def quartiles(values: Iterable[float | None]) -> str:
  """Median [quartiles] of values as a document has them."""
  median, lower, upper = map(number, analysis.spread(values))
  return f"{median} [{lower}, {upper}]"


def between(spread: Spread) -> str:
  """Median [quartiles]; the median alone if the quartiles say no more."""
  median, lower, upper = map(number, spread)
  alone = spread.lower == spread.upper or not math.isfinite(spread.lower)
  return median if alone else f"{median} [{lower}, {upper}]"


def percent(spread: Spread) -> str:
  """Ratios as changes: 0.4 -> -60 %."""
  median, lower, upper = (f"{100 * (x - 1):+.0f} %" if math.isfinite(x) else "–" for x in spread)
  return median if spread.lower == spread.upper else f"{median} [{lower}, {upper}]"


def final_table(results: Results) -> Table:
  """Where each optimizer stands at the end, and what it cost, ordered by training loss at equal steps."""
  steps, seconds = (analysis.losses_at_equal(results, axis) for axis in ("step", "seconds"))
  step_ranks, second_ranks = analysis.ranks(steps), analysis.ranks(seconds)
  accurate = any("test_accuracy" in run.curves for run in results.runs)
  header = ("optimizer", "train loss", "rank", "at equal seconds", "rank", "test loss")
  header += ("test acc. %",) * accurate + ("s", "ms/step", "gradients", "state KiB", "compile s")

  def row(label: str) -> tuple[str, ...]:
    runs, about = results.of(label), results.contestants[label]

    def median(curve: str, scale: float = 1.0) -> str:
      return number(scale * analysis.spread([run.final(curve) for run in runs]).median)

    total = analysis.spread([run.final("seconds") for run in runs]).median
    cells = [label, between(steps[label]), str(step_ranks[label])]
    cells += [number(seconds[label].median), str(second_ranks[label]), median("test_loss")]
    cells += [median("test_accuracy", 100)] if accurate else []
    cells += [number(total), number(1000 * total / results.plan.steps), median("gradients")]
    return (*cells, f"{about['state_bytes'] / 1024:.0f}", f"{about['compile_seconds']:.1f}")

  plan, seeds = results.plan, results.seeds()
  title = f"{plan.problem}, {plan.setting} setting: {plan.steps} steps ({plan.epochs:g} epochs), {len(seeds)} seeds"
  notes = (
    f"Data: {plan.data}. Median [quartiles] over seeds; seconds are training only, compilation and evaluation "
    "excluded; gradients: a Hessian-vector product counts 1, an extra forward pass 1/3.",
    "At equal seconds: the training loss when the fastest optimizer has finished.",
  )
  return Table(title, header, [row(label) for label in sorted(step_ranks, key=step_ranks.__getitem__)], notes)


def target_table(results: Results, title: str, targets: dict[int, float]) -> Table:
  """Steps, seconds and gradient evaluations until the target, and the seconds beside PSGD's."""
  versus = "psgd" in results.contestants
  header = ("optimizer", "reached", "steps", "seconds", "gradients") + ("seconds vs PSGD", "steps vs PSGD") * versus
  table = []
  for label in results.contestants:
    found = {axis: analysis.to_target(results, label, axis, targets) for axis in ("step", "seconds", "gradients")}
    spreads = {axis: analysis.spread(list(values.values())) for axis, values in found.items()}
    reached = sum(math.isfinite(value) for value in found["step"].values())
    cells = [label, f"{reached}/{len(targets)}", *(between(spreads[axis]) for axis in found)]
    for axis in ("seconds", "step") if versus else ():
      cells.append(percent(analysis.spread(analysis.ratios(results, label, axis, targets))))
    table.append((spreads["seconds"].median, tuple(cells)))
  goal = between(analysis.spread(list(targets.values())))
  title = f"{results.plan.problem}, {results.plan.setting} setting: to {title}, {goal}"
  return Table(title, header, [cells for _, cells in sorted(table, key=lambda entry: entry[0])])


def tables(results: Results, targets: Iterable[float] = ()) -> list[Table]:
  """All tables of one document: the end, PSGD's final loss as the target, and the targets asked for."""
  if not results.seeds():
    return []
  found = [final_table(results)]
  if psgd := analysis.psgd_targets(results):
    found.append(target_table(results, "PSGD's final training loss", psgd))
  for target in targets:
    found.append(target_table(results, "the training loss", dict.fromkeys(results.seeds(), target)))
  return found


def claim_table(documents: list[Results]) -> Table | None:
  """The claim of the paper in one table: DPSGD against PSGD on every problem and setting, seed by seed."""
  rows = []
  for results in documents:
    targets = analysis.psgd_targets(results)
    for label, about in results.contestants.items():
      if not targets or about["name"] != "dpsgd":
        continue
      seconds, steps = (analysis.ratios(results, label, axis, targets) for axis in ("seconds", "step"))
      each = ", ".join(percent(Spread(ratio, ratio, ratio)) for ratio in seconds)
      plan = results.plan
      what = (plan.problem, plan.setting, label, str(plan.train_size), f"{plan.epochs:g}")
      rows.append((*what, *(percent(analysis.spread(ratios)) for ratios in (seconds, steps)), each))
  if not rows:
    return None
  header = ("problem", "setting", "optimizer", "samples", "epochs", "seconds", "steps", "seconds, by seed")
  notes = ("Median [quartiles] over seeds of the change against PSGD; –: the target was not reached.",)
  return Table("DPSGD against PSGD: seconds and steps to PSGD's final training loss", header, rows, notes)
