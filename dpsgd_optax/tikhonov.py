# SPDX-License-Identifier: Apache-2.0
"""How DPSGD damps a Kronecker product, and how it averages the factors.

Notation: that of `damped_kron`, [paper] included, and
  π        (tr Pbar_L / m) / (tr Pbar_R / n), the ratio of the mean eigenvalues
  β_t      the weight of the old average at fit t
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax.base import check_fraction, check_not_negative

__all__ = ["Average", "Form", "additive", "factored", "recursive", "two_tap"]

Form = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""(mean eigenvalue of Pbar_L, of Pbar_R, c) -> (shift of Pbar_L, of Pbar_R, multiple of G): the damped factors."""


def factored(left: jax.Array, right: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U = (Pbar_L + sqrt(π) c I) G (Pbar_R + c/sqrt(π) I), [paper] Eq. 46; π as in Eq. 41 and arXiv:1503.05671.

  π makes the two cross terms equal in trace. Departure: the reference's notebooks take the root of τ twice in places.
  """
  root = jnp.sqrt(left / right)
  return root * c, c / root, jnp.zeros_like(c)


def additive(left: jax.Array, right: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U = Pbar_L G Pbar_R + c G, [paper] Eq. 36."""
  del left, right
  return jnp.zeros_like(c), jnp.zeros_like(c), c


class Average(NamedTuple):
  """A weighted average of the factors over time.

  Attributes:
    advance: (count, average, memory, current) -> (average, memory), each a tuple of factors; memory may be None.
    remembers: True if the average needs a memory beside itself.
    each_step: True if it moves on on every step, False if on every fit. P must then be kept beside its average.
  """

  advance: Callable
  remembers: bool
  each_step: bool = False


def recursive(decay, each_step: bool = False) -> Average:
  """Pbar_t = β_t Pbar_{t−1} + (1 − β_t) P_t with β_t = min(t/(t+1), decay), t = 0, 1, …: [paper] Eq. 47.

  The plain mean until t/(t+1) reaches ``decay``; the zero initial value has no weight.

  t counts fits. Departure: in the paper it counts steps, ``each_step=True``. Where a fit is due on every k-th step,
  P stays between two of them, and of the older ones β^k is left (0.7¹⁰ = 0.03): the average is undone. With a fit on
  every step the two are the same.

  Args:
    decay: β_max, in [0, 1).
    each_step: whether t counts steps.

  Raises:
    ValueError: for a decay outside [0, 1).

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> mean = (jnp.zeros(()),)
    >>> for t, p in enumerate((1.0, 3.0, 5.0)):
    ...   mean, _ = dpo.tikhonov.recursive(0.5).advance(jnp.array(t), mean, None, (jnp.array(p),))
    >>> float(mean[0])
    3.5
  """
  check_fraction(decay, "average")

  def advance(count, average, memory, current):
    t = count.astype(current[0].real.dtype)
    beta = jnp.minimum(t / (t + 1), decay)
    mixed = tuple((beta * a + (1 - beta) * p).astype(p.dtype) for a, p in zip(average, current, strict=True))
    return mixed, memory

  return Average(advance, False, each_step)


def two_tap(new: float, old: float) -> Average:
  """Pbar_t = new · P_t + old · P_{t−1}, as in Qadeer's thesis and its stored runs; P is I before the first fit.

  Its weights, by the size of the first gradient: O(1): old 0.2 to 0.7 and new = 1 − old; O(0.1): new = 1 and
  old = b/(1 − b), b 0.3 to 0.35; O(0.01): the same with b 0.7 to 0.9.
  """
  check_not_negative(new, "new", "It is the weight of the current factors.")
  check_not_negative(old, "old", "It is the weight of the previous factors.")

  def advance(count, average, memory, current):
    del count, average
    return tuple(new * p + old * m for p, m in zip(current, memory, strict=True)), current

  return Average(advance, True, True)
