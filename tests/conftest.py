# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures, the compilation cache and the tiers. A test that compares float64 arrays asks for ``x64``."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

# Compiling is what the tests cost, so programs are kept from run to run, all of them, however small: a step of `dpsgd`
# compiles in five seconds and is read in 0.2. The programs that tests start find the folder in their environment.
CACHE = {
  "jax_compilation_cache_dir": str(Path(__file__).parents[1] / ".jax_cache"),
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in CACHE.items():
  if option.upper() not in os.environ:
    os.environ[option.upper()] = str(value)
    jax.config.update(option, value)

pytest_plugins = ["tests.tiers"]
collect_ignore_glob = ["clients/with_*.py"]
"""Loops that import packages that need not be installed: the cell that asks for one imports it."""


@pytest.fixture(autouse=True)
def precision_is_left_alone():
  """A problem in float64 switches it on for the whole process: not for the tests after it."""
  before = jax.config.jax_enable_x64
  yield
  if jax.config.jax_enable_x64 != before:
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng():
  return np.random.default_rng(0)
