# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. A test that compares float64 arrays asks for ``x64``; the others run as users do, in float32."""

import jax
import numpy as np
import pytest


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng():
  return np.random.default_rng(0)
