# SPDX-License-Identifier: Apache-2.0
"""The table of `tests.clients.cells`, cell by cell: `make test-clients`."""

import pytest

from tests.clients.cells import CLIENTS, Client, ask, cells, falls
from tests.clients.columns import BROKEN

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


def installed(client: str) -> Client:
  if not CLIENTS[client].installed():
    pytest.skip(f"{CLIENTS[client].package} is not installed")
  return CLIENTS[client]


@pytest.mark.parametrize(("client", "optimizer"), cells())
def test_an_optimizer_works_in_the_loop_of_another_package_or_says_what_to_type(client, optimizer):
  installed(client)
  ask(client, optimizer)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_loop_whose_optimizer_does_nothing_does_not_count_as_working(client):
  assert not falls(installed(client).run(BROKEN))
