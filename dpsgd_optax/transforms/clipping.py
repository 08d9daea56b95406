# SPDX-License-Identifier: Apache-2.0
"""Bounds: for a gradient where it enters, for a preconditioned gradient, for a step where it leaves.

Notation
  g, ‖g‖   the gradient of one matrix and its norm
  s        running mean of ‖g‖
  c        the largest ‖g‖ / s
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpsgd_optax._trees.arithmetic import leaves_apart, scalar_dtype, tiny
from dpsgd_optax._trees.by_shape import map_by_shape, safe_norm
from dpsgd_optax._trees.draws import pieces
from dpsgd_optax._trees.mesh import on_mesh
from dpsgd_optax.base import check, check_fraction, check_learning_rate, check_not_negative
from dpsgd_optax.transforms._control import scheduled

Matrices = Callable[[Any], tuple[list[jax.Array], list[np.ndarray], Callable[[list[jax.Array]], Any]]]
"""``Preconditioner.matrices``: what is clipped together, and what apart."""


def _over(function: Callable[..., jax.Array], parts: list[jax.Array], *rest: list[jax.Array]) -> list[jax.Array]:
  """Equal parts at once; on a mesh one by one, since stacking may mean sending them."""
  return (jax.tree.map if on_mesh() else map_by_shape)(function, parts, *rest)


def split_like(x: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
  """A vector of one number per matrix, cut as the parts are."""
  return pieces(x, [len(part) for part in parts])


def times(x: jax.Array, scales: jax.Array) -> jax.Array:
  """Each matrix of a part times its number."""
  return x * scales.astype(x.real.dtype).reshape(-1, *(1,) * (x.ndim - 1))


class ClipSpikesState(NamedTuple):
  """Attributes:
  sizes: (matrices,), float32 (float64 for such params), s of each; 0 before its first gradient that is not zero.
  clipped: (), int32, steps on which something was clipped.
  """

  sizes: jax.Array
  clipped: jax.Array


def clip_spikes(
  max_jump: float = 4.0, decay: float = 0.9, matrices: Matrices | None = None
) -> optax.GradientTransformationExtraArgs:
  """g ← g · min(1, c s / ‖g‖): a gradient that is suddenly much longer than those before it is shortened.

  It stands before momentum and fit, where a single huge gradient would be remembered for many steps. A lasting change
  of size is followed: s grows by a factor of at most 1 + (c − 1)(1 − decay) in a step, 1.3 with the defaults.

  Each matrix has an s of its own, so that a spike in one layer leaves the others as they are. The first gradient is
  never clipped; a zero gradient leaves s as it is; one whose length overflows becomes zero. One that is not finite
  stays so, to be skipped by what comes after.

  Args:
    max_jump: c > 1.
    decay: weight kept by the running mean s, in [0, 1).
    matrices: what counts as a matrix, ``Preconditioner.matrices``; None: every leaf.

  Raises:
    ValueError: for a ``max_jump`` of 1 or below, or a decay outside [0, 1).

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx = dpo.clip_spikes(max_jump=4.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for scale in (1.0, 1.0, 1000.0):
    ...   updates, state = tx.update(scale * jnp.array([0.6, 0.8]), state)
    >>> updates.round(3), int(state.clipped)
    (Array([2.4, 3.2], dtype=float32), 1)
  """
  hint = "It is the largest ratio of a gradient's norm to the running mean of the norms. Try 4, or None."
  check(lambda x: x > 1, max_jump, "max_jump", "above 1", hint)
  check_fraction(decay, "decay")
  cut = leaves_apart if matrices is None else matrices

  def init(params):
    dtype = scalar_dtype(params)
    counts = jax.eval_shape(lambda tree: cut(tree)[0], params)
    return ClipSpikesState(jnp.zeros(sum(x.shape[0] for x in counts), dtype), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, **extra):
    del params, extra
    parts, _, join = cut(updates)
    sizes, count = state.sizes, sum(map(len, parts))
    if count != len(sizes):
      raise ValueError(
        "the updates must have the leaves that the params had at `init`. "
        f"Matrices at `init`: {len(sizes)}; now: {count}. Call `init` again for other params."
      )
    if not parts:
      return updates, state
    known = sizes > 0
    # ratios are measured in units of s: no square of a usual gradient overflows, nor vanishes
    unit = jnp.where(known, 1 / jnp.where(known, sizes, 1), 1)

    def squares(x, unit):
      wide = jnp.promote_types(jnp.finfo(x.dtype).dtype, jnp.float32)
      scaled = jnp.abs(x).astype(wide) * unit.astype(wide).reshape(-1, *(1,) * (x.ndim - 1))
      return jnp.sum(scaled * scaled, axis=range(1, x.ndim)).astype(sizes.dtype)

    ratio = jnp.sqrt(jnp.concatenate(_over(squares, parts, split_like(unit, parts))))
    jumps = known & (ratio > max_jump)
    finite = jnp.isfinite(ratio)
    scale = jnp.where(jumps, jnp.where(finite, max_jump / jnp.where(jumps, ratio, 1), 0), 1)
    grown = jnp.where(known, sizes * (decay + (1 - decay) * jnp.minimum(ratio, max_jump)), ratio)
    kept = jnp.where((ratio > 0) & (finite | jumps), grown, sizes).astype(sizes.dtype)
    clipped = state.clipped + jnp.any(jumps).astype(jnp.int32)
    # the gradients are multiplied where they lie, since they need not be put together for it
    by_leaf = join([times(jnp.ones_like(x), a) for x, a in zip(parts, split_like(scale, parts), strict=True)])
    scaled = lambda g, a: g * a if jnp.size(g) else g
    return jax.tree.map(scaled, updates, by_leaf), ClipSpikesState(kept, clipped)

  return optax.GradientTransformationExtraArgs(init, update)


LARGEST_ENTRY = 10  # times the largest root mean square


def clip_matrices(max_rms: Any, matrices: Matrices | None = None) -> optax.GradientTransformation:
  """Every matrix scaled so that its root mean square is at most ``max_rms``, its entries cut to 10 times that before.

  A whitened gradient has a huge entry where P grew on tiny gradients before. Uncut it would be all that is left of its
  matrix after the scaling. ``matrices`` is as in :func:`clip_spikes`.
  """

  def cut(x):
    if not jnp.iscomplexobj(x):
      return jnp.clip(x, -LARGEST_ENTRY * max_rms, LARGEST_ENTRY * max_rms)
    size, largest = jnp.abs(x), LARGEST_ENTRY * max_rms
    return x * jnp.where(size > largest, largest / jnp.where(size > largest, size, 1), 1).astype(size.dtype)

  def update(updates, params):
    del params
    parts, sizes, join = (leaves_apart if matrices is None else matrices)(updates)
    if not parts:
      return updates
    parts = [cut(x) for x in parts]
    dtype = scalar_dtype(updates)
    squares = lambda x: jnp.sum(jnp.real(x * jnp.conj(x)).astype(dtype), axis=range(1, x.ndim))
    # all matrices in one array: as scalars each would be a kernel to compile
    rms = jnp.sqrt(jnp.concatenate(_over(squares, parts)) / np.maximum(np.concatenate(sizes), 1).astype(dtype))
    scales = 1 / jnp.maximum(1, rms / max_rms)
    return join([times(x, a) for x, a in zip(parts, split_like(scales, parts), strict=True)])

  return optax.stateless(update)


class ClippedLearningRateState(NamedTuple):
  """Attributes:
  count: (), int32.
  rate: (), float32 (float64 for such params), the learning rate of the last step after clipping.
  """

  count: jax.Array
  rate: jax.Array


def clipped_learning_rate(
  learning_rate: optax.ScalarOrSchedule, max_norm: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """updates ← −a · updates with a = learning_rate · min(max_norm / ‖updates‖, 1): DPSGD's Eq. 48.

  As ``optax.clip_by_global_norm`` and ``optax.scale_by_learning_rate`` in a chain, but a stands in the state, as
  ``rate``, from which ``newton_model`` predicts the reduction of the step really taken.

  Args:
    learning_rate: number or schedule.
    max_norm: the largest ‖updates‖₂ over all leaves before the learning rate; None: 0.1 · √(number of elements), the
      paper's; ``jnp.inf``: no clipping.

  Raises:
    ValueError: for a negative learning rate or ``max_norm``.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.clipped_learning_rate(0.5, max_norm=1.0)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> updates, float(optax.tree.get(state, "rate"))
    (Array([-0.3, -0.4], dtype=float32), 0.10000000149011612)
  """
  check_learning_rate(learning_rate)
  check_not_negative(max_norm, "max_norm", "It bounds ‖updates‖₂. Use `jnp.inf` for no bound.")

  def init(params):
    return ClippedLearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), scalar_dtype(params)))

  def update(updates, state, params=None, **extra):
    del params, extra
    bound = 0.1 * math.sqrt(optax.tree.size(updates)) if max_norm is None else max_norm
    norm = safe_norm(updates)
    shortened = jnp.where(norm > bound, bound / jnp.maximum(norm, tiny(norm)), 1)
    a = jnp.asarray(scheduled(learning_rate, state.count), norm.dtype) * shortened
    scaled = jax.tree.map(lambda x: (-a * x).astype(x.dtype), updates)
    return scaled, ClippedLearningRateState(optax.safe_increment(state.count), a.astype(state.rate.dtype))

  return optax.GradientTransformationExtraArgs(init, update)
