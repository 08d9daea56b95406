# SPDX-License-Identifier: Apache-2.0
"""Where the fits end: against inverses and roots of dense matrices."""

import functools

import numpy as np
import pytest
from scipy.linalg import block_diag

from tests.table import BATCH, DESCENDING, SIZE, draw, fit, flat, matrix, start, unflat

B = np.array([[2.0, 0.6], [0.6, 0.7]])
LEFT = np.array([[1.5, 0.4, 0.0], [0.4, 0.8, -0.3], [0.0, -0.3, 2.0]])
RIGHT = np.array([[1.2, -0.5], [-0.5, 0.6]])
DIAGONAL_ONLY = {  # which of B, LEFT, RIGHT
  "diagonal": (True, True, True),
  "lra rank 0": (True, True, True),
  "xmat": (True, True, True),
  "kron": (True, True, False),
  "scan": (True, False, True),
  "scaw": (True, False, True),
}
ARROW = np.array([[1.2, 0.0, 0.4], [0.0, 0.8, -0.3], [0.0, 0.0, 1.1]])  # P = QᵀQ of an arrow-head Q: H = AAᵀ
SLOW = ("dense eq", "dense gl", "lra")  # the rate of EQ falls with the conditioning of H, that of LRA with its rank
EXACT = [name for name in DESCENDING if name != "lra"]
INDEFINITE = [name for name in EXACT if name != "scan"]  # |H| of an indefinite H leaves diag + low rank, and AAᵀ


def x_shaped(h):
  """A diagonal H with half of the largest admissible entries on its anti-diagonal."""
  size = np.sqrt(np.abs(np.diag(h)))
  return h + 0.5 * np.diag(size * size[::-1])[:, ::-1]


def diagonal_plus_low_rank():
  u = np.random.default_rng(3).standard_normal((SIZE, 3))
  return np.diag(np.linspace(0.3, 1.5, SIZE)) + 0.3 * u @ u.T


def curvature(name, signs=1.0):
  """The matrix that the row can invert exactly: B on b, LEFT ⊗ RIGHT on w, diagonal where its factors are."""
  if name == "lra":
    return diagonal_plus_low_rank()
  diagonal = DIAGONAL_ONLY.get(name, (False, False, False))
  sides = (B, {"scan": ARROW @ ARROW.T, "blocked": block_diag(LEFT[:2, :2], LEFT[2, 2])}.get(name, LEFT), RIGHT)
  b, left, right = (np.diag(np.diag(m)) if d else m for m, d in zip(sides, diagonal, strict=True))
  if signs != 1.0:
    b, left = b @ np.diag([1.0, -1.0]), left - 1.4 * np.eye(3)
    b = (b + b.T) / 2
  h = block_diag(b, np.kron(left, right))
  return x_shaped(h) if name == "xmat" else h


def magnitude(h):
  values, vectors = np.linalg.eigh(h)
  return vectors * np.abs(values) @ vectors.T


def distance(p, h):
  """‖P H − I‖_F / √N of each experiment."""
  return np.linalg.norm(p @ h - np.eye(SIZE), axis=(1, 2)) / SIZE**0.5


@functools.cache
def probes(steps):
  return flat(draw(5, steps, BATCH)).astype(np.float64)


def annealed(steps, peak=0.3):
  return np.linspace(peak, 0.0, steps)


@pytest.mark.parametrize("name", DESCENDING)
def test_newton_fits_reach_the_damped_inverse_of_a_definite_hessian(name):
  """P → (H + λI)⁻¹, at constant step: the gradient of every single probe vanishes there.

  For LRA of rank r that is any H = diag + rank r, r = 3 here.
  """
  damped = curvature(name)
  # `spectral` always moves by the whole step, and λ is there a damping of the factors, not of the curvature
  factors = name.startswith("damped_kron")
  slow = name in SLOW
  lam, step_size, close = (0.0, annealed(1000), 0.01) if factors else (0.3, 0.3 if slow else 0.1, 1e-3)
  close = 0.05 if name == "lra" else close
  v = probes(4000 if slow else 1000)
  h = v @ (damped - lam * np.eye(SIZE))
  assert np.all(distance(matrix(name, start(name)), damped) > 0.2)
  p = matrix(name, fit(name, start(name), unflat(v), unflat(h), damping=lam, step_size=step_size))
  assert np.all(distance(p, damped) < close)


@pytest.mark.parametrize("name", INDEFINITE)
def test_newton_fits_reach_the_inverse_magnitude_of_an_indefinite_hessian(name):
  """P → |H|⁻¹, by a step that goes to 0: at constant step a floor remains."""
  h = curvature(name, signs=-1.0)
  assert np.linalg.eigvalsh(h)[0] < 0
  steps = 3000 if name.startswith("dense") else 1500
  v = probes(steps)
  p = matrix(name, fit(name, start(name), unflat(v), unflat(v @ h), step_size=annealed(steps)))
  assert np.median(distance(p, magnitude(h))) < 0.12


@pytest.mark.parametrize("name", EXACT)
def test_noise_in_the_products_damps_p(name):
  """h = Hv + ε, ε ⟂ v: P → (H² + E εεᵀ)^(−½), shorter than |H|⁻¹, and no damping was asked for."""
  root = curvature(name)  # E εεᵀ = (0.8 root)² commutes with H and has its structure
  h = 0.6 * root
  steps = 3000 if name.startswith("dense") else 1500
  v, noise = probes(2 * steps)[:steps], probes(2 * steps)[steps:]
  pairs = v @ h + noise @ (0.8 * root)
  p = matrix(name, fit(name, start(name), unflat(v), unflat(pairs), step_size=annealed(steps)))
  assert np.median(distance(p, root)) < 0.18


@pytest.mark.parametrize(("name", "integrated"), [*((name, False) for name in EXACT), ("kron", True)])
def test_fits_on_gradients_reach_the_inverse_root_of_their_covariance(name, integrated):
  """P → (E ggᵀ)^(−½), v sampled or integrated out."""
  root = curvature(name)
  steps = 1500
  g = probes(2 * steps)[steps:] @ root
  v = None if integrated else unflat(probes(steps))
  p = matrix(name, fit(name, start(name), v, unflat(g), step_size=annealed(steps)))
  assert np.median(distance(p, root)) < 0.18
