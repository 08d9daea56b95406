# SPDX-License-Identifier: Apache-2.0
"""Solutions of differential equations and a ground state, computed, each with a number that says how finely.

tests/benchmarks/test_science.py asks each of them for agreement with itself at half the fineness.
"""

import numpy as np

VISCOSITY = 0.01 / np.pi
DIFFUSION, REACTION = 1e-4, 5.0
RATES = (20.0, 2.0, 1.0, 0.5)  # absorption, to the periphery and back, elimination; per hour


def burgers(t: np.ndarray, x: np.ndarray, nodes: int = 200) -> np.ndarray:
  """u_t + u u_x = ν u_xx, u(0, x) = −sin πx, on [−1, 1]: Cole and Hopf's integral by Gauss-Hermite quadrature.

  u = −∫ sin(π(x−η)) f(x−η) e^{−η²/4νt} dη / ∫ f(x−η) e^{−η²/4νt} dη,  f(y) = exp(−cos(πy) / 2πν).
  """
  z, weights = np.polynomial.hermite.hermgauss(nodes)
  y = x[:, None] - 2 * np.sqrt(VISCOSITY * t)[:, None] * z
  f = weights * np.exp(-(np.cos(np.pi * y) + 1) / (2 * np.pi * VISCOSITY))
  return -np.sum(np.sin(np.pi * y) * f, 1) / np.sum(f, 1)


def allen_cahn(points: int = 2048, steps: int = 2000) -> np.ndarray:
  """u_t = 1e-4 u_xx + 5 (u − u³), u(0, x) = x² cos πx, periodic on [−1, 1): (21, points) at t = 0, 0.05, …, 1.

  Fourier series in space, the classical Runge-Kutta method in time.
  """
  x = -1 + 2 * np.arange(points) / points
  k = np.pi * np.fft.rfftfreq(points, 1 / points)
  rate = lambda u: DIFFUSION * np.fft.irfft(-(k**2) * np.fft.rfft(u), points) + REACTION * (u - u**3)
  u, h = x**2 * np.cos(np.pi * x), 1 / steps
  kept = [u]
  for i in range(steps):
    a = rate(u)
    b = rate(u + h / 2 * a)
    c = rate(u + h / 2 * b)
    u = u + h / 6 * (a + 2 * b + 2 * c + rate(u + h * c))
    if (i + 1) % (steps // 20) == 0:
      kept.append(u)
  return np.array(kept)


def pharmacokinetics() -> np.ndarray:
  """The matrix A of c' = A c: a dose in the gut goes to the blood, and between the blood and the tissue."""
  absorbed, out, back, eliminated = RATES
  return np.array([[-absorbed, 0, 0], [absorbed, -out - eliminated, back], [0, out, -back]])


def concentrations(t: np.ndarray) -> np.ndarray:
  """(len(t), 3): exp(tA) c₀ with c₀ = (1, 0, 0), by eigenvectors; the fastest rate is 50 times the slowest and more."""
  values, vectors = np.linalg.eig(pharmacokinetics())
  start = np.linalg.solve(vectors, np.array([1.0, 0, 0]))
  return np.real((np.exp(np.outer(t, values)) * start) @ vectors.T)


def spins(length: int) -> np.ndarray:
  """All configurations of a chain, (2^L, L), entries ±1; the first spin is the highest bit of the row number."""
  bits = (np.arange(2**length)[:, None] >> np.arange(length - 1, -1, -1)) & 1
  return 2.0 * bits - 1


def ising(length: int, field: float = 1.0) -> np.ndarray:
  """H = −Σ σᶻ_i σᶻ_{i+1} − field Σ σˣ_i on a ring, dense, (2^L, 2^L)."""
  s = spins(length)
  H = np.diag(-np.sum(s * np.roll(s, 1, 1), 1))
  rows = np.arange(2**length)
  for i in range(length):
    H[rows, rows ^ (1 << i)] -= field
  return H


def ising_energy(length: int, field: float = 1.0) -> float:
  """The lowest energy of it, by exact diagonalisation."""
  return float(np.linalg.eigvalsh(ising(length, field))[0])
