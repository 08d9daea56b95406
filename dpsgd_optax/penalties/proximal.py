# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 penalties by their proximal maps, in θ or in z. Notation and places: `dpsgd_optax.penalties`.

q    where the step without a penalty ends, q = θ − a · updates
c    the level of a penalty, a λ in the units of its variables
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.paths import is_hole
from dpsgd_optax.penalties.penalty import is_one, penalty, seen
from dpsgd_optax.transforms.injection import static_arguments

Mask = Any | Callable[[Any], Any] | None


def _levels(level: Any, q: Any, mask: Mask) -> Any:
  """For each leaf ``level`` as a scalar, 0 where the leaf is not penalised."""
  mask = mask(q) if callable(mask) else mask
  if mask is None:
    return jax.tree.map(lambda _: level, q)
  part = lambda chosen, leaves: leaves if is_hole(leaves) else jax.tree.map(lambda _: level * chosen, leaves)
  return jax.tree.map(part, mask, q)


def _proximal(
  name: str, shrink: Callable, exponent: Any, in_z: Callable, strength: Any, learning_rate: Any, power: Any, mask: Mask
) -> optax.GradientTransformationExtraArgs:
  """updates ← prox(q) − θ, so that θ + updates is the value of the prox to the last bit at 0.

  Args:
    name: of the constructor.
    shrink: (x, c) → the prox of one number in the Euclidean metric.
    exponent: for a diagonal P the metric turns c into c P^exponent.
    in_z: (P, q, levels) → the prox for ``power=1`` and any P with a root.
    strength: λ.
    learning_rate: a.
    power: s.
    mask: which leaves are penalised.
  """

  def prox(q, levels, fitted):
    if power is None:
      return jax.tree.map(shrink, q, levels)
    p = seen(fitted, f"{name}(power={power})")
    if p.diagonal is not None:
      full = jax.tree.map(lambda c, x: jnp.full(jnp.shape(x), c, jnp.abs(x).dtype), levels, q)
      return jax.tree.map(shrink, q, p.power(full, exponent))
    if is_one(power):
      return in_z(p, q, levels)
    raise ValueError(
      f"`{name}(power={power})` has a closed form only if P is diagonal, and this preconditioner is not. "
      "Type `power=1` (in the preconditioned variables, any P with a root), or use `second_moment()` or `diagonal()`."
    )

  def step(updates, params, strength, learning_rate, *, fitted=None, **extra):
    del extra
    q = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    return jax.tree.map(jnp.subtract, prox(q, _levels(learning_rate * strength, q, mask), fitted), params)

  return penalty(name, step, strength=strength, learning_rate=learning_rate)


@static_arguments("mask")
def proximal_l1(
  strength: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule, *, power: Any = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
  """θ ← the minimiser of ½‖R⁻¹(θ' − q)‖² + aλ‖P^(−s/2) θ'‖₁ over θ', with q = θ − a · updates. Exact zeros.

  It takes the place of ``optax.scale_by_learning_rate``, which the level of the threshold depends on, and must be the
  last transform. The closed forms:

    power=None  S_aλ(q)                 P not looked at: proximal gradient descent; behind an adaptive method, the
                                        look-alike of AdamW that is L1 in neither variable
    power=s     S_c(q), c = aλ P^(1−s/2)    diagonal P
    power=1     R S_aλ(R⁻¹ q)           any P with a root: in z the metric is Euclidean, so the thresholds separate.
                                        For diagonal P the same as the line above; else the exact zeros are those of z

  Args:
    strength: λ ≥ 0, number or schedule.
    learning_rate: a, number or schedule.
    power: s; 0: L1 in θ, 1: in z, the recommended one; None: P is not looked at. A number only as ``after``.
    mask: which leaves are penalised: a prefix tree of bools, or a function from params to one; None: all. (Under
      ``optax.masked`` the other leaves would miss the learning rate too.)

  Raises:
    ValueError: for a negative strength or learning rate; at trace time, for a ``power`` outside of
      ``scale_by_preconditioner``, or other than 1 for a P that is not diagonal.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> after = dpo.penalties.proximal_l1(0.25, learning_rate=0.5, power=1)
    >>> tx = dpo.scale_by_preconditioner(dpo.second_moment(), dpo.whitening(), after=after)
    >>> params = jnp.array([1.0, 0.5625])
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
    >>> bool(jnp.allclose(params + updates, jnp.array([0.375, 0.0]), atol=1e-5))
    True
  """
  threshold = lambda x, c: jnp.sign(x) * jnp.maximum(jnp.abs(x) - c, 0)
  in_z = lambda p, q, levels: p.root(jax.tree.map(threshold, p.root(q, inverse=True), levels))
  exponent = None if power is None else 1 - power / 2
  return _proximal("proximal_l1", threshold, exponent, in_z, strength, learning_rate, power, mask)


@static_arguments("mask")
def proximal_l2(
  strength: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule, *, power: Any = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
  """θ ← the minimiser of ½‖R⁻¹(θ' − q)‖² + aλ/2 ‖P^(−s/2) θ'‖² over θ', with q = θ − a · updates.

  (I + aλ P^(1−s))⁻¹ q: the implicit form of decay, stable for every a λ. As :func:`proximal_l1`, it takes the place of
  ``optax.scale_by_learning_rate``. ``power=1`` is q / (1 + aλ) for every P, ``None`` the same without a P.

  Args:
    strength: λ ≥ 0, number or schedule.
    learning_rate: a, number or schedule.
    power: s; 0: L2 in θ, 1: in z (AdamW's, implicit); otherwise as for :func:`proximal_l1`.
    mask: which leaves are penalised, as for :func:`proximal_l1`.

  Raises:
    ValueError: as :func:`proximal_l1`.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx, params = dpo.penalties.proximal_l2(1.0, learning_rate=0.25), jnp.array([1.0, 2.0])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    >>> params + updates
    Array([0.8, 1.6], dtype=float32)
  """
  shrink = lambda x, c: x / (1 + c)
  in_z = lambda p, q, levels: jax.tree.map(shrink, q, levels)
  exponent = None if power is None else 1 - power
  return _proximal("proximal_l2", shrink, exponent, in_z, strength, learning_rate, power, mask)
