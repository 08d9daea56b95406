# SPDX-License-Identifier: Apache-2.0
"""What `--save` keeps of a run for the analyses: one .npz for each contestant and seed, in OUT/NAME-saved/.

variables/PATH   the final variables
correct          (points of the curve, evaluated training samples): whether each was classified rightly; classifiers
train_logits     of the same samples, at the end
test_logits      of the evaluated test samples
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.engine.calls import SpecError, file_name
from benchmarks.engine.problem import Problem
from benchmarks.engine.runner import EVALUATED_SAMPLES, Lane, chunks

PREFIX = "variables"


def paths_of(tree: Any) -> list[str]:
  """A name for each leaf."""
  key = lambda part: str(getattr(part, "key", getattr(part, "idx", part)))
  return ["/".join([PREFIX, *map(key, path)]) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


class Keeper:
  """Looks at every point of every curve of one seed, and writes the files at the end."""

  def __init__(self, problem: Problem, folder: Path, seed: int):
    self.problem, self.folder, self.seed = problem, folder, seed
    self.logits = None if problem.outputs is None else jax.jit(problem.outputs)
    self.correct: dict[str, list[np.ndarray]] = {}
    self.variables: dict[str, Any] = {}

  def outputs(self, variables: Any, x: np.ndarray) -> np.ndarray:
    """Logits of the samples that are evaluated."""
    assert self.logits is not None
    return np.concatenate([self.logits(variables, part["x"]) for part in chunks({"x": x}, EVALUATED_SAMPLES)])

  def see(self, lane: Lane) -> None:
    """Looks at one point of a curve. It copies the variables, since the next step donates them."""
    label = lane.racer.contestant.label
    self.variables[label] = jax.device_get(lane.variables)
    if self.logits is not None:
      train = self.problem.arrays.train
      found = self.outputs(lane.variables, train["x"]).argmax(-1) == train["y"][:EVALUATED_SAMPLES]
      self.correct.setdefault(label, []).append(found)

  def write(self) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    for label, variables in self.variables.items():
      arrays = dict(zip(paths_of(variables), map(np.asarray, jax.tree.leaves(variables)), strict=True))
      if self.logits is not None:
        arrays["correct"] = np.stack(self.correct[label])
        for split in ("train", "test"):
          arrays[f"{split}_logits"] = self.outputs(variables, getattr(self.problem.arrays, split)["x"])
      np.savez_compressed(self.folder / f"{file_name(label)}-seed{self.seed}.npz", **arrays)


@dataclass(frozen=True)
class Saved:
  """One run as it was kept."""

  label: str
  seed: int
  variables: Any
  arrays: dict[str, np.ndarray]


def load_saved(out: Path, name: str, problem: Problem, labels: Iterable[str], seeds: Iterable[int]) -> list[Saved]:
  """The runs of a document, with their variables in the structure of the problem's."""
  shapes = jax.eval_shape(problem.init, jax.random.key(0))
  found = []
  for label in labels:
    for seed in seeds:
      path = out / f"{name}-saved" / f"{file_name(label)}-seed{seed}.npz"
      if not path.exists():
        raise SpecError(f"{path} is missing: the run was not kept. Run it again with `--save`.")
      with np.load(path) as content:
        arrays = dict(content)
      leaves = [arrays.pop(path) for path in paths_of(shapes)]
      found.append(Saved(label, seed, jax.tree.unflatten(jax.tree.structure(shapes), leaves), arrays))
  return found
