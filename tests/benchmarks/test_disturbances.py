# SPDX-License-Identifier: Apache-2.0
"""The robustness benchmark: what it calls recovered, one short run, and what the committed measurement shows."""

import numpy as np
import pytest

import dpsgd_optax as dpo
from benchmarks.studies import robustness


def test_recovered_is_the_last_time_out_of_the_band_in_any_seed():
  calm, late = [1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 1.0, 1.0]
  assert robustness.recovered(np.array([calm, calm])) == 0
  assert robustness.recovered(np.array([calm, late])) == 2
  assert robustness.recovered(np.array([calm, [1.0, 1.0, 1.0, 3.0]])) is None


def test_ratios_count_the_worse_leaf_and_nothing_is_hidden_by_zero_or_nan():
  twin = np.array([[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
  came = np.array([[[0.25, 2.0], [0.0, 1.0], [np.nan, 1.0]]])
  np.testing.assert_array_equal(robustness.ratios(came, twin), [[4.0, np.inf, np.inf]])


@pytest.mark.full
def test_a_short_run_survives_all_disturbances():
  row = robustness.measure_one(dpo.diagonal, dpo.whitening, disturbed=60, after=60, seeds=1)
  assert row["finite"] and row["nan"]["skipped"] == 1 and row["nan"]["largest_at_nan"] == 0
  assert row["zeros"]["smallest_first"] > 0 and row["outlier"]["largest"] <= 2.001
  assert row["bf16"]["median_ratio"] < 1.05
