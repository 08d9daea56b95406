# SPDX-License-Identifier: Apache-2.0
"""One picture per document: loss against steps and seconds, and what Levenberg-Marquardt did."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # after the choice of the backend
import numpy as np
from matplotlib.axes import Axes

from benchmarks.engine.records import Results

STYLE = Path(__file__).with_name("plots.mplstyle")
COLOURS = {
  "dpsgd": "#c1121f",
  "psgd": "#1d3557",
  "psgd+damping": "#f4845f",
  "psgd+averaging": "#9d4edd",
  "psgd_whiten": "#457b9d",
  "whitening kron": "#457b9d",
  "psgd of the papers": "#8d99ae",
  "default dpsgd": "#f08080",
  "soap": "#588157",
  "adam": "#2a9d8f",
  "muon": "#e9a820",
  "momentum": "#6c757d",
  "sgd": "#adb5bd",
}


def colours(labels: list[str]) -> dict[str, str]:
  """The colours of the table; variants such as dpsgd(average=0.5) get shades of their own."""
  others = [label for label in labels if label not in COLOURS]
  shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, max(1, len(others))))
  return COLOURS | {label: matplotlib.colors.to_hex(shade) for label, shade in zip(others, shades, strict=False)}


def _curves(results: Results, label: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
  """x (points,), the median over seeds, and y (seeds, points); runs that broke off count as far as they went."""
  runs = [run for run in results.of(label) if y in run.curves]
  if not runs:
    return None
  length = max(len(run.curves[y]) for run in runs)
  filled = lambda curve: curve + [np.nan] * (length - len(curve))
  at, values = (np.array([filled(run.curves[name]) for run in runs], float) for name in (x, y))
  return np.nanmedian(at, 0), values


def draw(axes: Axes, results: Results, x: str, y: str) -> None:
  """Median line and quartile band of every contestant that has the curve."""
  palette = colours(list(results.contestants))
  for label in results.contestants:
    if (found := _curves(results, label, x, y)) is None:
      continue
    at, values = found
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # columns without a number stay without one
      lower, median, upper = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
    front = 3 if label == "dpsgd" else 2
    axes.plot(at, median, color=palette[label], lw=2.0 if front == 3 else 1.3, label=label, zorder=front)
    axes.fill_between(at, lower, upper, color=palette[label], alpha=0.15, lw=0)


@contextmanager
def panels(path: Path, rows: int, columns: int, height: float, title: str = "") -> Iterator[Any]:
  """A grid of axes to draw in; then one legend for all of them, and the picture is written."""
  with plt.style.context(STYLE):
    figure, grid = plt.subplots(
      rows, columns, figsize=(5.5 * columns + (columns == 1) * 1.5, height * rows), squeeze=False, layout="constrained"
    )
    yield grid
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    if title:
      figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def plot(results: Results, path: Path) -> None:
  """Two panels, and two more if a contestant adapts its damping."""
  plan = results.plan
  shown = [("step", "train_loss", "training loss"), (plan.clock, "train_loss", "training loss")]
  if plan.seconds is None and any("damping" in run.curves for run in results.runs):
    shown += [("step", "damping", "damping"), ("step", "ratio", "reduction: actual / predicted")]
  names = {"step": "steps", "seconds": "seconds of training", "cpu_seconds": "CPU seconds of training"}
  what = f"{plan.setting} setting" if plan.seconds is None else f"{plan.seconds:g} s each"
  title = f"{plan.problem}, {what}: median and quartiles of {len(results.seeds())} seeds"
  with panels(path, len(shown) // 2, 2, 3.5, title) as grid:
    for axes, (x, y, title) in zip(grid.flat, shown, strict=True):
      draw(axes, results, x, y)
      axes.set(xlabel=names[x], title=title, yscale="linear" if y == "ratio" else "log")
      if (x == "step") == (plan.seconds is not None):
        axes.set_xscale("log")  # costs per step differ by an order of magnitude
      if y == "ratio":
        axes.axhspan(0.25, 0.75, color="0.9", zorder=0)
        axes.set_ylim(*np.clip(axes.get_ylim(), -1, 3))
