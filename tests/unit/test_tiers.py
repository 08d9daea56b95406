# SPDX-License-Identifier: Apache-2.0
"""The quick tier leaves no law and no row out."""

import collections

import pytest

from tests.conformance.rows import ROWS as OPTIMIZERS
from tests.table import PRECONDITIONERS
from tests.tiers import CASES, LAW, ROWS, cell, function, quick, spread, thinned


def test_each_promise_keeps_six_rows_and_each_row_six_promises():
  cells = [(f"law {i} promise", f"row {j}") for i in range(9) for j in range(40)] + [("alone ", "row 0")]
  kept = thinned(cells)
  laws, rows = (collections.Counter(x[k] for x in kept) for k in (0, 1))
  assert kept <= set(cells) and set(laws) == {law for law, _ in cells}
  assert min(rows.values()) == ROWS and all(n >= ROWS for law, n in laws.items() if law != "alone ")
  assert len(kept) < len(cells) * 0.75


def test_few_cases_all_run_and_of_many_some_at_both_ends_of_the_list():
  assert spread("few", 4) == set(range(4))
  many = spread("many", 100)
  assert len(many) == CASES and max(many) - min(many) > 50


def test_every_function_and_row_of_this_session_is_in_the_quick_tier(request):
  """Of what was collected: under `--tier quick` what is left, under `--tier full` what quick would leave."""
  items, rows = request.session.items, {*PRECONDITIONERS, *OPTIMIZERS}
  if len(items) < 1000:
    pytest.skip("only some of the tests were asked for")
  left = quick(items, rows)
  asked = {function(item) for item in items if item.get_closest_marker("full") is None}
  assert {function(item) for item in left} == asked
  cells = {cell(item, rows) for item in items if item.get_closest_marker("full") is None} - {None}
  kept = {cell(item, rows) for item in left} - {None}
  of_law, of_row = (collections.Counter(x[k] for x in kept) for k in (0, 1))
  had = (collections.Counter(x[k] for x in cells) for k in (0, 1))
  for found, all_of_it, least in zip((of_law, of_row), had, (LAW, ROWS), strict=True):
    assert [name for name, n in all_of_it.items() if found[name] < min(n, least)] == []
