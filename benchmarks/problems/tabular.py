# SPDX-License-Identifier: Apache-2.0
"""Regression sets, standardised by their training part: scikit-learn's diabetes, which needs no file, and five more.

The four of the UCI repository in the layout of Hernandez-Lobato and Adams (2015), with the first of their 20 splits.
"""

import csv

import numpy as np

from benchmarks.problems.data import Arrays, given_folder, obtain

PARTS = ("data.txt", "index_train_0.txt", "index_test_0.txt")  # the target is the last column
HOUSING = "california_housing/housing.csv"
NAMES = ("diabetes", "california", "concrete", "energy", "kin8nm", "power_plant")


def regression(name: str, data_dir: str | None) -> Arrays:
  """x (n, d), y (n, 1), both with mean 0 and variance 1 over the training part."""
  if name == "diabetes":
    table, test, note = *diabetes(), "diabetes: scikit-learn's load_diabetes, every tenth sample held out"
  elif name == "california":
    table, test, note = *california(data_dir), "california: housing.csv, incomplete rows left out, every tenth held out"
  else:
    table, test, note = *uci(name.replace("_", "-"), data_dir), f"{name}: UCI, the first of the published splits"
  mean, deviation = table[~test].mean(0), table[~test].std(0)
  scaled = ((table - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
  train, held_out = ({"x": scaled[rows, :-1], "y": scaled[rows, -1:]} for rows in (~test, test))
  return Arrays(train, held_out, f"{note}; standardised")


def every_tenth(rows: int) -> np.ndarray:
  return np.arange(rows) % 10 == 9


def diabetes() -> tuple[np.ndarray, np.ndarray]:
  """442 patients, 10 features; and which rows are for testing."""
  from sklearn.datasets import load_diabetes

  x, y = load_diabetes(return_X_y=True)
  return np.column_stack([x, y]), every_tenth(len(x))


def california(data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
  """20433 block groups, 8 numbers and 5 kinds of place as zeros and ones."""
  path = obtain(HOUSING, given_folder(data_dir))
  rows = [row for row in csv.DictReader(path.read_text().splitlines()) if all(row.values())]
  places = sorted({row["ocean_proximity"] for row in rows})
  numbers = [name for name in rows[0] if name not in ("ocean_proximity", "median_house_value")]
  table = [
    [float(row[name]) for name in numbers]
    + [float(row["ocean_proximity"] == place) for place in places]
    + [float(row["median_house_value"])]
    for row in rows
  ]
  return np.array(table), every_tenth(len(table))


def uci(name: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
  """The table, and which rows the published split holds out."""
  folder = given_folder(data_dir)
  table, train, test = (np.loadtxt(obtain(f"uci/{name}/data/{part}", folder)) for part in PARTS)
  held_out = np.zeros(len(table), bool)
  held_out[test.astype(int)] = True
  assert len(train) + held_out.sum() == len(table)
  return table, held_out
