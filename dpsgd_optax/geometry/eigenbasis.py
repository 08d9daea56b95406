# SPDX-License-Identifier: Apache-2.0
"""Eigenbases of second moments, followed as the moments move: for one axis of a tensor, no trees, no keys.

Notation
  S        (d, d), the second moment along an axis, Hermitian
  Q        (d, d), its basis, QᴴQ = I; the columns by falling eigenvalue
  V        the second moment of the tensor in the bases of all its axes, entry by entry
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import tiny

Refresh = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(S, Q) -> (the new Q, order): where V of the old direction ``order[i]`` goes on as that of the new direction i."""


def eigenvectors(s: jax.Array) -> jax.Array:
  """The eigenvectors of S, (d, d), by falling eigenvalue."""
  return jnp.linalg.eigh(s)[1][:, ::-1]


def _product_and_order(s: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """S Q, and the columns of Q by falling diag(QᴴSQ). S is scaled to trace 1: nothing overflows, nothing vanishes."""
  product = jnp.matmul(s / (jnp.real(jnp.trace(s)) + tiny(jnp.real(s))), q)
  return product, jnp.argsort(-jnp.sum(jnp.real(jnp.conj(q) * product), 0))


def power_iteration(s: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Q ← qr(S Q), the columns sorted by diag(QᴴSQ) before: one step of the orthogonal iteration.

  By Householder's QR. Cholesky's, which is products and triangular solves only, has to be done twice to be orthonormal
  in float32, and the two take about three times the flops.
  """
  product, order = _product_and_order(s, q)
  return jnp.linalg.qr(product[:, order])[0], order


def exact(s: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Q ← the eigenvectors of S, on every refresh: the method without its approximation, at twice the cost."""
  return eigenvectors(s), _product_and_order(s, q)[1]


class Moments(NamedTuple):
  """Which second moments give the bases: S_i ← β S_i + (1 − β) ⟨x ⊙ w⟩_i.

  Attributes:
    name: its name.
    weights: V ↦ w, one vector for each axis, by which the squares along the *other* axes are weighed; None: w = 1.
  """

  name: str
  weights: Callable[[jax.Array], tuple[jax.Array, ...]] | None = None

  def __repr__(self) -> str:
    return f"dpsgd_optax.geometry.{self.name}"


def _kl_weights(v: jax.Array) -> tuple[jax.Array, ...]:
  """1/λ_i, with V ≈ λ_1 ⊗ λ_2 the nearest product: λ_i = mean over the other axis of V / λ_j, by turns, from λ_2 = 1.

  These are the eigenvalues of the coupled moments in their bases, read off V, with mean 1 for each axis: a scale
  changes no basis. A direction of none counts a millionth of the mean one.
  """
  if v.ndim < 2:
    return (jnp.ones_like(v),)

  def of_mean_one(x):
    x = x + (1e-6 * jnp.mean(x) + tiny(x))
    return x / jnp.mean(x)

  left = right = jnp.ones(())
  for _ in range(2):
    left = of_mean_one(jnp.mean(v / right, 1))
    right = of_mean_one(jnp.mean(v / left[:, None], 0))
  return 1 / left, 1 / right


shampoo = Moments("shampoo")
"""L = E GGᴴ, R = E GᴴG: arXiv:1802.09568."""

kl = Moments("kl", _kl_weights)
"""L = E G R⁻¹ Gᴴ / n, R = E Gᴴ L⁻¹ G / m: the Kronecker covariance nearest in the Kullback–Leibler divergence,
arXiv:2509.03378. Departure: the eigenvalues of R and L are read off V."""
