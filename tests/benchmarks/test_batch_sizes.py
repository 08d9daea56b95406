# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks batch_sizes`: three networks, tuned alike; what the committed measurement says."""

import json

import jax
import pytest

from benchmarks.hyperparameters import RESULTS
from benchmarks.problems.table import build
from benchmarks.studies import batch_sizes

KEPT = RESULTS / "batch_sizes.json"


def test_the_dense_network_has_no_statistics_without_batch_norm():
  plain, normal = (build(f"digits_bn(norm={norm}, model=mlp)", None, False) for norm in ("none", "batch"))
  shapes = [jax.eval_shape(problem.init, jax.random.key(0)) for problem in (plain, normal)]
  assert [sorted(x) for x in shapes] == [["params"], ["batch_stats", "params"]]
  assert shapes[0]["params"]["Affine_0"]["kernel"].shape == (64, 128)


@pytest.mark.full
def test_the_best_rate_of_the_tuning_seed_is_run(monkeypatch):
  monkeypatch.setattr(batch_sizes, "EPOCHS", {128: 1})
  monkeypatch.setattr(batch_sizes, "RATES", (1e-6, 0.1))
  cell = batch_sizes.compare("none", "bnp", 128, (1, 2), train_size=300)
  assert cell["learning_rate"] == 0.1
  assert len(cell["train_loss"]) == 2
  assert max(cell["train_loss"]) < cell["trials"]["1e-06"]


def test_bnp_ends_below_the_plain_network_at_every_batch_size():
  for size, cells in json.loads(KEPT.read_text())["batch_sizes"].items():
    assert sorted(cells["BNP"]["train_loss"])[2] < sorted(cells["plain"]["train_loss"])[2], size
