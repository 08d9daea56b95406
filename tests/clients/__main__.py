# SPDX-License-Identifier: Apache-2.0
"""The table as Markdown: `python -m tests.clients [words of a client …]`.

✓ works; a number: refused, for the reason below; ✗ fails.
"""

import sys
import time
import warnings

from benchmarks.engine.progress import say
from benchmarks.engine.report import Table
from tests.clients.cells import CLIENTS, Broken, ask, cells, versions
from tests.clients.columns import OPTIMIZERS


def result(client: str, optimizer: str) -> str:
  begin = time.monotonic()
  try:
    found = ask(client, optimizer)
  except Broken as error:
    found = f"FAILS: {error}"
  except Exception as error:
    found = f"FAILS: {type(error).__name__}: {error}"
  said = found[:300] if found.startswith("FAILS") else found.split(";")[0]
  say(f"  {client}: {optimizer}: {said} ({time.monotonic() - begin:.1f} s)")
  return found


def table(results: dict[tuple[str, str], str], absent: list[str]) -> Table:
  reasons = list(dict.fromkeys(r for r in results.values() if r != "works" and not r.startswith("FAILS")))

  def mark(found: str | None) -> str:
    if found is None:
      return ""
    return "✓" if found == "works" else "✗" if found.startswith("FAILS") else f"({reasons.index(found) + 1})"

  clients = dict.fromkeys(client for client, _ in results)
  rows = [(client, *(mark(results.get((client, optimizer))) for optimizer in OPTIMIZERS)) for client in clients]
  failed = sum(r.startswith("FAILS") for r in results.values())
  works = list(results.values()).count("works")
  notes = (
    f"{len(results)} cells: {works} work, {len(results) - works - failed} are refused and say why, {failed} fail. "
    "An empty cell makes no sense: no network, or one that `capture` cannot look into; or it is that of the row above.",
    *(f"({i}) {reason}." for i, reason in enumerate(reasons, 1)),
    ", ".join(f"{package} {number}" for package, number in versions().items()) + ".",
    *([f"Not installed: {', '.join(absent)}."] if absent else []),
  )
  return Table("Loops of other packages", ("client", *OPTIMIZERS), rows, notes)


def main() -> int:
  warnings.simplefilter("ignore")
  asked = [c for c in CLIENTS if not sys.argv[1:] or any(word in c for word in sys.argv[1:])]
  absent = sorted({CLIENTS[c].package for c in asked if not CLIENTS[c].installed()})
  results = {cell: result(*cell) for cell in cells() if cell[0] in asked and CLIENTS[cell[0]].installed()}
  say(table(results, absent).markdown())
  return int(any(r.startswith("FAILS") for r in results.values()))


sys.exit(main())
