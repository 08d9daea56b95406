# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 penalties: as a term of the updates, or as a proximal map that ends the step.

Notation and places as in `dpsgd_optax.penalties`, and
  q    where the step without a penalty ends, q = θ − a · updates
  c    the level of a penalty, a λ in the units of its variables
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.paths import is_hole
from dpsgd_optax.penalties.penalty import add, is_one, penalty, seen
from dpsgd_optax.transforms._control import static_arguments

Mask = Any | Callable[[Any], Any] | None


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

  ``shrink(x, c)`` is the prox of one number in the Euclidean metric. The metric of a diagonal P turns c into
  c P^exponent. ``in_z(P, q, levels)`` is the prox for ``power=1`` and any P with a root.
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

    power=None  S_aλ(q)                     P not looked at: behind an adaptive method it is L1 in neither variable
    power=s     S_c(q), c = aλ P^(1−s/2)    diagonal P
    power=1     R S_aλ(R⁻¹ q)               any P with a root; the exact zeros are those of z

  Args:
    strength, learning_rate: λ ≥ 0 and a, numbers or schedules.
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
    strength, learning_rate, mask: as for :func:`proximal_l1`.
    power: s; 0: L2 in θ, 1: in z (AdamW's, implicit); otherwise as for :func:`proximal_l1`.

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
