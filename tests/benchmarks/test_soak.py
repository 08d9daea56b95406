# SPDX-License-Identifier: Apache-2.0
"""The soak: what it looks at, and that every preconditioner comes through it."""

import numpy as np
import pytest

import dpsgd_optax as dpo
from benchmarks.optimizers import PRECONDITIONERS
from benchmarks.studies import soak


@pytest.mark.parametrize("newton", [False, True])
def test_the_ideal_diagonal_is_that_of_the_explicit_matrix(newton):
  root, u = (np.asarray(x, np.float64) for x in soak.curvature(1234.0, 5))
  h = np.diag(root) @ (np.eye(5) + 0.5 * np.outer(u, u)) @ np.diag(root)
  wanted = np.diag(np.linalg.inv(h)) if newton else 1 / root
  np.testing.assert_allclose(soak.expected(1234.0, newton, 5), wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("spoilt", "sound"),
  [({}, True), ({"finite": False}, False), ({"asymmetry": 1e-3}, False), ({"definite": -1e-3}, False)]
  + [({"frozen": 3}, False), ({"asymmetry": np.nan}, False)],
)
def test_the_verdict(spoilt, sound):
  row = {"finite": True, "asymmetry": 1e-6, "definite": 1e-5, "frozen": 0}
  assert soak.sound({**row, **spoilt}) == sound


def test_a_matrix_with_a_dead_entry_is_seen():
  p = np.diag([1.0, 2.0])
  assert soak.look(p, np.ones(2), np.array([1.1, 2.1]))["moved"]
  found = soak.look(p, np.ones(2), np.array([1.0, 2.1]))
  assert not found["moved"] and found["definite"] == 0.5 and found["ratio"] == (1, 2)
  assert soak.longest([True, True, False, True]) == 2


def test_a_short_soak_of_the_smallest_group():
  rows = soak.measure_one(dpo.diagonal, True, 2 * soak.EVERY)
  assert [row["dtype"] for row in rows] == ["float32", "bfloat16"] and all(map(soak.sound, rows))
  assert all(row["looks"] == 2 for row in rows)


LEAVES_THE_CONE = pytest.mark.xfail(
  reason="`pro4p` moves P itself, and on Newton products it becomes indefinite", strict=True
)
CASES = [
  pytest.param(name, newton, marks=[LEAVES_THE_CONE] if newton and name == "kron pro4p" else [])
  for name in PRECONDITIONERS
  for newton in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "newton"), CASES)
def test_a_hundred_thousand_fits_leave_every_preconditioner_sound(name, newton):
  for row in soak.measure_one(PRECONDITIONERS[name], newton):
    assert soak.sound(row), row
