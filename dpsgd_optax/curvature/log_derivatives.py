# SPDX-License-Identifier: Apache-2.0
"""Stochastic reconfiguration: the log-derivatives of a wave function as the rows of a least-squares problem.

Notation
  ψ, p_i     the wave function; the weight of configuration i: |ψ|² / ⟨ψ|ψ⟩, or 1/n for samples drawn from it
  O, E       ∂ log ψ/∂θ (n, N) and the local energies (n,), both less their mean under p
  S, F       Re O† diag(p) O, the quantum geometric tensor, and Re O† p E, half the gradient of the energy

With the rows √(2p) O and r = √(2p) E, real and imaginary parts one after the other, Jᵀ r = 2F is the gradient of the
energy and Jᵀ J = 2S. The step −(2S + λI)⁻¹ 2F is that of stochastic reconfiguration with a diagonal shift of λ/2; with
fewer samples than parameters it is minSR (arXiv:2302.01941).

Source: Sorella, Phys. Rev. Lett. 80, 4558 (1998); with momentum arXiv:2401.10190 (SPRING).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.curvature._linearized import Coordinates, Linearized, real_rows
from dpsgd_optax.curvature._tangents import Block


class LogDerivatives:
  """Made by :func:`log_derivatives`. Attributes: params: θ if it is bound to it, else None."""

  def __init__(self, log_psi: Callable, samples: Any, energies: Any, weights: Any, params: Any = None):
    self._log_psi, self._samples, self._energies, self._weights = log_psi, samples, energies, weights
    self.params = params

  def at(self, params: Any) -> "LogDerivatives":
    """The same, bound to θ in full, for transforms inside ``optax.partition``."""
    return LogDerivatives(self._log_psi, self._samples, self._energies, self._weights, params)

  def linearize(self, block: Block) -> Linearized:
    """The rows for the parameters of the block; there is no loss away from θ."""
    to = Coordinates(block)
    count = jnp.shape(self._energies)[0]
    share = jnp.full(count, 1 / count, to.dtype) if self._weights is None else jnp.asarray(self._weights, to.dtype)
    root = jnp.sqrt(2 * share)
    both = lambda z: jnp.concatenate([jnp.real(z), jnp.imag(z)])
    centred = lambda z: root[:, None] * (z - share @ z)

    def stacked(leaves):
      z = jax.vmap(self._log_psi, (None, 0))(to.params(leaves), self._samples)
      return both((root * (z - share @ z)).astype(jnp.result_type(z, jnp.complex64)))

    def jacobian():
      of_one = lambda leaves, x: real_rows(self._log_psi(to.params(leaves), x) + 0j, 1)[0]
      found = to.concatenated(jax.vmap(jax.jacrev(of_one), (None, 0))(to.leaves, self._samples), 2)
      return jnp.concatenate([centred(found[:, 0]), centred(found[:, 1])])

    energies = jnp.asarray(self._energies)
    residual = both(root * (energies - share @ energies)).astype(to.dtype)
    z, push = jax.linearize(stacked, to.leaves)
    pull = lambda u: to.concatenated(jax.linear_transpose(push, to.leaves)(u.astype(z.dtype))[0])
    along = lambda s: push(to.split(s))
    return Linearized(residual, to.size, jacobian, None, along, pull, None, None, to.to_tree, to.to_vector)


def log_derivatives(log_psi: Callable[..., Any], samples: Any, energies: Any, weights: Any = None) -> LogDerivatives:
  """What :func:`dpsgd_optax.gauss_newton` takes as ``residual_fn`` to do stochastic reconfiguration.

  The gradient is that of the energy, 2F. Its size is in the learning rate: start with 0.01 to 0.1, in 1/energy. With
  ``value_fn`` (params ↦ energy: full summation, or fixed samples reweighted) λ follows the energy; without it λ stays.

  Args:
    log_psi: (params, one_configuration) → log ψ, a real or complex number.
    samples: configurations, samples as leading axis.
    energies: (n,), the local energies ⟨σ|H|ψ⟩ / ⟨σ|ψ⟩ at the params of the step, real or complex.
    weights: (n,), their probabilities, summing to 1; None: equal, for configurations drawn from |ψ|².

  Raises:
    ValueError: for energies or weights of another length than the samples.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> H = jnp.array([[0.0, -1.0], [-1.0, 0.0]])  # ground state (1, 1)/√2
    >>> spins, log_psi = jnp.array([-1.0, 1.0]), lambda p, x: p * x
    >>> def energy(p):
    ...   psi = jnp.exp(log_psi(p, spins))
    ...   return psi @ H @ psi / (psi @ psi)
    >>> p, tx = jnp.float32(0.7), dpo.gauss_newton(0.5, damping=0.01)
    >>> state = tx.init(p)
    >>> for _ in range(10):
    ...   psi = jnp.exp(log_psi(p, spins))
    ...   rows = dpo.log_derivatives(log_psi, spins, H @ psi / psi, psi**2 / (psi @ psi))
    ...   updates, state = tx.update(jax.grad(energy)(p), state, p, residual_fn=rows, value_fn=energy)
    ...   p = p + updates
    >>> bool(abs(energy(p) + 1) < 1e-5)
    True
  """
  count = jnp.shape(jax.tree.leaves(samples)[0])[:1]
  for name, x in (("energies", energies), ("weights", weights)):
    if x is not None and jnp.shape(x) != count:
      raise ValueError(
        f"`{name}` of `log_derivatives` must have one number for each of the samples, shape {count}, got "
        f"{jnp.shape(x)}. Pass the local energies before they are averaged."
      )
  return LogDerivatives(log_psi, samples, energies, weights)
