# SPDX-License-Identifier: Apache-2.0
"""The golden record of psgd_torch (tests/golden/psgd): how to read it, and how to compare with it.

Every file exists in float64 and in float32. The original drew its random numbers from a recorded stream; the pure inner
functions of the project take them as arguments.
"""

import functools
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "psgd"
TOLERANCE = {"f64": 1e-10, "f32": 1e-5}


@functools.cache
def load(name):
  with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as z:
    return {k: z[k] for k in z.files}


@functools.cache
def case_names(name):
  """The cases as they were counted when the record was taken."""
  return json.loads((FOLDER / "cases.json").read_text())[name]


@functools.cache
def _grouped(name):
  groups = {}
  for key, value in load(name).items():
    parts = key.split("/")
    for cut in range(1, len(parts)):
      groups.setdefault("/".join(parts[:cut]), {})["/".join(parts[cut:])] = value
  return groups


def case(name, prefix):
  """The arrays of one case, without its prefix, and its settings."""
  found = _grouped(name)[prefix]
  return found, json.loads(str(found["meta"])) if "meta" in found else {}


def draws(found, t):
  return [found[f"t{t}/draw{j}"] for j in range(len(found[f"t{t}/draw_kinds"]))]


def error(came, expected):
  """The largest deviation, relative to the largest entry."""
  expected = np.asarray(expected)
  if expected.size == 0:
    return 0.0
  return float(np.max(np.abs(np.asarray(came).reshape(expected.shape) - expected)) / np.max(np.abs(expected)))
