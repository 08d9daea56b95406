# SPDX-License-Identifier: Apache-2.0
"""Curves images, 28 x 28: a documented stand-in for CURVES (digs3pts_1.mat), which is not redistributable.

Like the original, each image shows one smooth curve through three random points:

    p0, p1, p2 ~ U(4, 24)^2                                            three points, in pixels
    c(t) = 2 (t - 1/2)(t - 1) p0 + 4 t (1 - t) p1 + 2 t (t - 1/2) p2   c(0), c(1/2), c(1) = p0, p1, p2
    ink(u) = sum_k |dc_k| exp(-||u - c(t_k)||^2 / 2 s^2)               a Gaussian pen of width s, 64 points
    pixel(u) = 1 - exp(-ink(u))                                        in [0, 1]: crossings saturate

A curve may leave the frame, as a pen leaves the paper.
"""

import numpy as np

SIDE = 28  # pixels
POINTS = 64  # samples of t in [0, 1]
PEN = 0.7  # s, the width of the pen, in pixels


def draw_curves(count: int, seed: int) -> np.ndarray:
  """`count` images as rows of 784 float32 pixels. The same seed draws the same images."""
  rng = np.random.default_rng(seed)
  return np.concatenate([_draw(rng, min(1000, count - start)) for start in range(0, count, 1000)])


def _draw(rng: np.random.Generator, count: int) -> np.ndarray:
  knots = rng.uniform(4, 24, (count, 3, 2)).astype(np.float32)
  t = np.linspace(0, 1, POINTS, dtype=np.float32)
  weights = np.stack([2 * (t - 0.5) * (t - 1), 4 * t * (1 - t), 2 * t * (t - 0.5)], -1)
  path = weights @ knots  # (count, POINTS, 2)
  length = np.linalg.norm(np.gradient(path, axis=1), axis=-1)  # |dc_k|, so that the ink per pixel is even
  pixels = np.arange(SIDE, dtype=np.float32)
  x, y = (np.exp(-((path[..., axis, None] - pixels) ** 2) / (2 * PEN**2)) for axis in (0, 1))
  ink = np.swapaxes(y, 1, 2) @ (x * length[..., None])
  return (1 - np.exp(-ink)).reshape(count, SIDE * SIDE).astype(np.float32)
