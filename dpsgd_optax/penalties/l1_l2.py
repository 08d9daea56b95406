# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 penalties whose gradient is added to the updates. Notation and places: `dpsgd_optax.penalties`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax.penalties.penalty import add, is_one, penalty, seen


def add_l1_penalty(strength: optax.ScalarOrSchedule, *, power: Any = None) -> optax.GradientTransformationExtraArgs:
  """updates ← updates + λ P^(1−s/2) sign(P^(−s/2) θ): the gradient step of λ‖P^(−s/2) θ‖₁, sign(0) = 0.

  ``power=None``: λ sign(θ), anywhere in a chain; before P it is L1 in θ. ``power=1``, only as ``after``: L1 in z, with
  the step λ R sign(R⁻¹θ), the counterpart of what AdamW is to L2. Zeros are not exact: see :func:`proximal_l1`.

  Args:
    strength: λ ≥ 0, number or schedule.
    power: s; None: P is not looked at. 1 works for every P with a root, other numbers where powers of P are known.

  Raises:
    ValueError: for a negative strength; at trace time, for a ``power`` outside of ``scale_by_preconditioner``, or one
      that the preconditioner does not have.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = optax.chain(dpo.penalties.add_l1_penalty(0.5), optax.sgd(1.0))
    >>> params = jnp.array([2.0, -3.0, 0.0])
    >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
    Array([-0.5,  0.5, -0. ], dtype=float32)
  """
  sign = lambda tree: jax.tree.map(jnp.sign, tree)

  def step(updates, params, strength, *, fitted=None, **extra):
    del extra
    if power is None:
      return add(updates, strength, sign(params))
    p = seen(fitted, f"add_l1_penalty(power={power})")
    if is_one(power):
      return add(updates, strength, p.root(sign(p.root(params, inverse=True))))
    return add(updates, strength, p.power(sign(p.power(params, -power / 2)), 1 - power / 2))

  return penalty("add_l1_penalty", step, strength=strength)


def add_l2_penalty(strength: optax.ScalarOrSchedule, *, power: Any) -> optax.GradientTransformationExtraArgs:
  """updates ← updates + λ P^(1−s) θ: the gradient step of λ/2 ‖P^(−s/2) θ‖², a family from L2 (s = 0) to AdamW (s = 1).

  For s = 1 this is ``optax.add_decayed_weights(λ)`` behind P, for s = 0 without momentum the same before P.
  Only as ``after``.

  Args:
    strength: λ ≥ 0, number or schedule.
    power: s. 0 and 1 work for every P, other numbers where powers of P are known (``second_moment``, ``diagonal``,
      ``kron``, ``damped_kron``, ``dense``; the last three pay an eigendecomposition of each factor).

  Raises:
    ValueError: as :func:`add_l1_penalty`.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> after = dpo.penalties.add_l2_penalty(0.1, power=0.5)
    >>> tx = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), after=after)
    >>> params = jnp.ones(2)
    >>> tx.update(jnp.array([1.0, 0.01]), tx.init(params), params)[0].round(3)  # 1 + 0.1 / sqrt(|g|)
    Array([1.1, 2. ], dtype=float32)
  """

  def step(updates, params, strength, *, fitted=None, **extra):
    del extra
    p = seen(fitted, f"add_l2_penalty(power={power})")
    return add(updates, strength, p.power(params, 1 - power))

  return penalty("add_l2_penalty", step, strength=strength)
