# SPDX-License-Identifier: Apache-2.0
"""Which tests run when: `--tier quick` (the default), `full`, `slow` or `clients`.

quick     everything that a change can break, in minutes. It leaves out what is marked `full`, and thins the tables: of
          each promise of `tests.conformance` six rows of the table of optimizers, of each other law or contract (a test
          function) three, so chosen that each row keeps six; of other functions of many cases five, evenly spread.
full      every case of everything but the soaks and the clients.
slow      the soaks, marked `slow`: convergence on real problems, races, eight virtual devices.
clients   loops of other packages, marked `clients`.

A law that is broken for one row alone may pass the quick tier; `make test-full` and CI run them all.
"""

import collections
import zlib
from collections.abc import Iterable

import pytest

ROWS = 6  # of each promise in the quick tier, and promises and laws of each row
LAW = 3  # rows of each other law
CASES = 5  # of a function with more than MANY cases that are no rows
MANY = 6
ELSEWHERE = ("slow", "clients")  # markers that are tiers of their own


def thinned(cells: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
  """Some of the cells (law, row): ROWS or LAW for each law and ROWS for each row, or all that it has.

  Each law takes the rows that were taken least so far, beginning where its own name says, so that a new law or row
  moves few of the others.
  """
  rows_of: dict[str, list[str]] = collections.defaultdict(list)
  for law, row in dict.fromkeys(cells):
    rows_of[law].append(row)
  taken: collections.Counter = collections.Counter()
  kept: set[tuple[str, str]] = set()
  for law, rows in rows_of.items():
    start = zlib.crc32(law.encode()) % len(rows)
    for row in sorted(rows[start:] + rows[:start], key=taken.__getitem__)[: LAW if law.endswith(" ") else ROWS]:
      kept.add((law, row))
      taken[row] += 1
  for law, rows in rows_of.items():
    for row in rows:
      if taken[row] < ROWS and (law, row) not in kept:
        kept.add((law, row))
        taken[row] += 1
  return kept


def spread(name: str, count: int) -> set[int]:
  """The numbers of CASES of ``count`` cases, evenly spread; all of them where they are few."""
  if count <= MANY:
    return set(range(count))
  start = zlib.crc32(name.encode()) % count
  return {(start + i * count // CASES) % count for i in range(CASES)}


def cell(item: pytest.Item, rows: set[str]) -> tuple[str, str] | None:
  """(law, row) of a test of the table. A law is a test function, with the promise that it asks for behind a blank."""
  params = getattr(getattr(item, "callspec", None), "params", {})
  row = next((value for value in params.values() if isinstance(value, str) and value in rows), None)
  return None if row is None else (f"{function(item)} {params.get('promise', '')}", row)


def function(item: pytest.Item) -> str:
  return item.nodeid.split("[")[0]


def quick(items: list[pytest.Item], rows: set[str]) -> list[pytest.Item]:
  """The items of the quick tier."""
  items = [item for item in items if item.get_closest_marker("full") is None]
  kept = thinned(found for item in items if (found := cell(item, rows)))
  others: dict[str, list[pytest.Item]] = collections.defaultdict(list)
  for item in items:
    if cell(item, rows) is None:
      others[function(item)].append(item)
  alone = {id(found[i]) for name, found in others.items() for i in spread(name, len(found))}
  return [item for item in items if cell(item, rows) in kept or id(item) in alone]


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--tier", choices=("quick", "full", *ELSEWHERE), default="quick", help="see tests/tiers.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  from tests.conformance.rows import ROWS as OPTIMIZERS
  from tests.table import PRECONDITIONERS

  tier, rows = config.getoption("tier"), {*PRECONDITIONERS, *OPTIMIZERS}
  own = lambda item: next((name for name in ELSEWHERE if item.get_closest_marker(name)), "full")
  chosen = [item for item in items if own(item) == ("full" if tier == "quick" else tier)]
  named = any("::" in argument for argument in config.args)  # who names a test wants all of its cases
  if tier == "quick" and not named:
    chosen = quick(chosen, rows)
  left = {id(item) for item in chosen}
  config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
  items[:] = chosen
  for item in items:
    if (found := cell(item, rows)) and config.pluginmanager.hasplugin("xdist"):
      item.add_marker(pytest.mark.xdist_group(found[1]))  # a worker compiles a row once: `--dist loadgroup`


def pytest_report_header(config: pytest.Config) -> str:
  return f"tier: {config.getoption('tier')} (tests/tiers.py says what it leaves out)"
