# SPDX-License-Identifier: Apache-2.0
"""The table of `tests.conformance.promises`, cell by cell."""

import pytest

from tests.conformance import promises

CELLS = [
  pytest.param(promise, name, id=f"{promise}-{name}", marks=[pytest.mark.slow] if promise in promises.SLOW else [])
  for promise, name in promises.cells()
]


@pytest.mark.parametrize(("promise", "name"), CELLS)
def test_every_optimizer_keeps_every_promise_of_optax_or_the_table_says_why_not(promise, name):
  promises.ask(promise, name)


def test_no_excuse_is_idle():
  """Each one is about a cell; `ask` has asserted that its error comes."""
  for excuse in promises.EXCUSES:
    assert any(excuse.covers(*cell) for cell in promises.cells()), excuse.reason
