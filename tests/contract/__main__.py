# SPDX-License-Identifier: Apache-2.0
"""Promises of optax × our optimizers: every cell of `tests.conformance.promises` asked, printed and counted.

`python -m tests.contract [FILE]` writes benchmarks/results/conformance.json, or the file.

A cell is "holds", a reason why it cannot hold (its error was provoked and read), or a failure.
"""

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine.arguments import RESULTS
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, publish
from tests.conformance import promises


def measure() -> dict[str, Any]:
  """The document: one entry per cell, and the counts."""
  cells, begin = [], time.monotonic()
  for promise, name in promises.cells():
    try:
      result = promises.ask(promise, name)
    except Exception as error:
      result = f"FAILS: {type(error).__name__}: {error}"[:300]
      say(f"  {name}: {promise}: {result}")
    cells.append({"promise": promise, "optimizer": name, "result": result})
  results = [cell["result"] for cell in cells]
  failed = sum(result.startswith("FAILS") for result in results)
  counts = {"cells": len(results), "hold": results.count("holds"), "fail": failed}
  counts["cannot hold, with reason"] = counts["cells"] - counts["hold"] - failed
  return {"environment": environment(), "seconds": time.monotonic() - begin, "counts": counts, "cells": cells}


def table(document: dict[str, Any]) -> Table:
  """One line per promise; ✓ holds, a letter for a reason below, ✗ fails."""
  cells = {(cell["promise"], cell["optimizer"]): cell["result"] for cell in document["cells"]}
  promises, optimizers = (
    list(dict.fromkeys(cell[key] for cell in document["cells"])) for key in ("promise", "optimizer")
  )
  reasons = list(dict.fromkeys(r for r in cells.values() if r != "holds" and not r.startswith("FAILS")))
  letters = {reason: f"({i})" for i, reason in enumerate(reasons, 1)}

  def mark(result: str | None) -> str:
    if result is None:
      return ""
    return "✓" if result == "holds" else letters.get(result, "✗")

  rows = [(promise, *(mark(cells.get((promise, name))) for name in optimizers)) for promise in promises]
  counts = document["counts"]
  notes = (
    f"{counts['cells']} cells: {counts['hold']} hold, {counts['cannot hold, with reason']} cannot and say why, "
    f"{counts['fail']} fail. An empty cell: a single transform is not asked to train.",
    *(f"{letter} {reason}." for reason, letter in letters.items()),
  )
  return Table("Promises of optax", ("promise", *optimizers), rows, notes)


if __name__ == "__main__":
  document = measure()
  publish(document, Path(sys.argv[1]) if sys.argv[1:] else RESULTS / "conformance.json", table(document))
