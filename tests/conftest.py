# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. A test that compares float64 arrays asks for ``x64``; the others run as users do, in float32."""

import jax
import numpy as np
import pytest

collect_ignore_glob = ["clients/with_*.py"]
"""Loops that import packages that need not be installed: the cell that asks for one imports it."""


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng():
  return np.random.default_rng(0)
