# SPDX-License-Identifier: Apache-2.0
"""The example scripts: they learn, and stopped and started again they end where they would have ended."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks" / "examples"


@pytest.mark.full
@pytest.mark.parametrize("name", ["linen_digits", "nnx_digits"])
def test_an_example_learns_and_goes_on_after_a_stop(name, tmp_path):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  whole = example.train(tmp_path / "whole", 3)
  assert example.accuracy(whole) > 0.93
  example.train(tmp_path / "parts", 2)
  parts = example.train(tmp_path / "parts", 3)
  leaves = lambda run: jax.tree.leaves(example.as_arrays(run) if name == "nnx_digits" else run.params)
  for a, b in zip(leaves(whole), leaves(parts), strict=True):
    np.testing.assert_array_equal(a, b)
