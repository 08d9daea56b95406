# SPDX-License-Identifier: Apache-2.0
"""Choose learning rates: the same number of trials for every optimizer, one seed that the results do not use."""

import json
from pathlib import Path
from typing import Any

from benchmarks.engine.records import Results, rounded
from benchmarks.engine.report import Table, number
from benchmarks.hyperparameters import GRIDS

Trials = dict[str, dict[float, float]]  # optimizer -> learning rate -> final training loss


def grid_of(optimizers: list[str]) -> str:
  """All trials as contestants: adam(learning_rate=0.001), ..."""
  return ",".join(f"{name}(learning_rate={rate!r})" for name in optimizers for rate in GRIDS[name])


def trials(results: Results) -> Trials:
  """What each learning rate led to; infinite if training broke off."""
  found: Trials = {}
  for label, about in results.contestants.items():
    (run,) = results.of(label)
    found.setdefault(about["name"], {})[about["options"]["learning_rate"]] = run.final()
  return found


def best(losses: dict[float, float]) -> float:
  """The learning rate of the lowest final training loss."""
  return min(losses, key=losses.__getitem__)


def trial_table(problem: str, found: Trials) -> Table:
  """All trials, the best one starred; a best one at the edge of the grid is pointed out."""
  rows, edges = [], []
  for name, losses in found.items():
    chosen = best(losses)
    cells = [f"{rate:g}: {number(loss)}{' *' if rate == chosen else ''}" for rate, loss in losses.items()]
    rows.append((name, *cells))
    if chosen in (min(losses), max(losses)):
      edges.append(name)
  notes = (f"At the edge of the grid: {', '.join(edges)}.",) if edges else ()
  width = max(len(row) for row in rows)
  padded = [row + ("",) * (width - len(row)) for row in rows]
  header = ("optimizer", *(f"trial {i}" for i in range(1, width)))
  return Table(f"{problem}: final training loss by learning rate, seed 0", header, padded, notes)


def save_trials(results: Results, path: Path) -> dict[str, float]:
  """Write trials and choices; return the choices."""
  found = trials(results)
  chosen = {name: best(losses) for name, losses in found.items()}
  document: dict[str, Any] = {
    "plan": vars(results.plan),
    "environment": results.sessions[-1]["environment"],
    "trials": {name: {f"{rate:g}": loss for rate, loss in losses.items()} for name, losses in found.items()},
    "chosen": chosen,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rounded(document), indent=1) + "\n")
  return chosen
