# SPDX-License-Identifier: Apache-2.0
"""Where observe, fit and apply meet: the one optax transformation behind every optimizer here."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._split import on_mesh, spec_of
from dpsgd_optax.base import (
  Curvature,
  Preconditioner,
  check_learning_rate,
  check_not_negative,
  check_period,
  same_structure,
)
from dpsgd_optax.fitted import Fitted

SMALL = 4096  # for the sum of fewer numbers XLA makes a kernel on a CPU, slow to compile; of more, it calls a library
FEW = 8  # so many kernels of equal shape compile sooner than the copy into one stack is worth
LARGE = 2**16  # numbers in a leaf whose copy takes longer, over a training, than its kernels take to compile


def by_shape(tree: Any) -> list[list[int]]:
  """The indices of the leaves of each shape and dtype; on a mesh also of each sharding, not to send them."""
  found: dict[Any, list[int]] = {}
  for i, (path, x) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
    found.setdefault((jnp.shape(x), jnp.result_type(x), spec_of(path)), []).append(i)
  return list(found.values())


def stacks(leaves: list[jax.Array]) -> list[jax.Array]:
  """The leaves, on one device many of equal shape, not LARGE, stacked: then they are one kernel to compile."""
  found = []
  for group in by_shape(leaves):
    members = [leaves[i] for i in group]
    together = len(members) > FEW and math.prod(jnp.shape(members[0])) < LARGE and not on_mesh()
    found += [jnp.stack(members)] if together else members
  return found


def map_by_shape(of_leaf: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
  """``jax.tree.map(of_leaf, tree)``, leaves of equal shape at once under ``vmap``.

  For what a preconditioner returns: its leaves are slices of one stack, which no copy is needed to put together again;
  one by one each slice would be a kernel of its own to compile, once in every such map.
  """
  leaves, treedef = jax.tree.flatten(tree)
  for group in by_shape(tree):
    if len(group) == 1:
      leaves[group[0]] = of_leaf(leaves[group[0]])
      continue
    done = jax.vmap(of_leaf)(jnp.stack([leaves[i] for i in group]))
    for i, x in zip(group, done, strict=True):
      leaves[i] = x
  return jax.tree.unflatten(treedef, leaves)


def all_finite(tree: Any) -> jax.Array:
  """True if no leaf holds a NaN or an infinity. Scalar bool.

  By the sum of x − x, which is 0 or NaN, and on a CPU faster than ``jnp.all(jnp.isfinite(x))`` to compile and to run.
  A maximum will not do: XLA's on a CPU loses a NaN in large arrays; for 0 · x it may write the zeros down.
  """
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and jnp.size(x)]
  little = lambda x: jnp.size(x) < SMALL and not on_mesh()
  parts = stacks([x for x in leaves if not little(x)])
  if side_by_side := [jnp.reshape(x, -1) for x in leaves if little(x)]:
    parts.append(jnp.concatenate(side_by_side))
  sums = [jnp.sum(x - x) for x in parts]
  return jnp.isfinite(sum(sums)) if sums else jnp.array(True)


def scalar_dtype(params: Any) -> Any:
  """The dtype of scalars that go with these params: float32, or float64 if any of them is that wide."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
  return jnp.result_type(jnp.float32, *(jnp.finfo(d).dtype for d in dtypes if jnp.issubdtype(d, jnp.inexact)))


def where(predicate: jax.Array, new: Any, old: Any) -> Any:
  """The tree ``new`` where the scalar ``predicate`` holds, otherwise ``old``."""
  return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), new, old)


def choose(predicate: bool | jax.Array, yes: Callable, no: Callable, *operands: Any) -> Any:
  """``lax.cond``, or a plain choice where the predicate is known: a Python bool, or any value outside ``jit``."""
  if not isinstance(predicate, jax.core.Tracer):
    return (yes if predicate else no)(*operands)
  return jax.lax.cond(predicate, yes, no, *operands)


def plain(apply: Callable, updates: Any, params: Any, **extra: Any) -> Any:
  """The default direction: P @ updates."""
  del params, extra
  return apply(updates)


def annealed_probability(
  peak: float = 1.0, floor: float = 0.03, flat: int = 500, decay: float = 0.001
) -> optax.Schedule:
  """How often to fit: always for the first steps, then ever more rarely.

  p(t) = max(floor, peak · exp(−decay · max(t − flat, 0))), a schedule for ``every``: the fit runs on the steps on which
  the running sum of p passes a whole number, so that the long-run rate is exact and no coin is tossed.

  Args:
    peak: probability during the first ``flat`` steps, in [0, 1].
    floor: probability in the end, in [0, 1]. With 0.03 one step in 33 fits.
    flat: steps before the decay begins.
    decay: rate of the decay, per step. The default falls from 1 to 0.03 in 3500 steps.

  Example:
    >>> import dpsgd_optax as dpo
    >>> p = dpo.annealed_probability()
    >>> [round(float(p(t)), 3) for t in (0, 500, 1500, 10_000)]
    [1.0, 1.0, 0.368, 0.03]
  """
  for name, value in (("peak", peak), ("floor", floor)):
    if not 0 <= value <= 1:
      raise ValueError(f"`{name}` must be a probability in [0, 1], got {value!r}.")

  def schedule(count):
    late = jnp.maximum(jnp.asarray(count, jnp.float32) - flat, 0.0)
    return jnp.maximum(floor, peak * jnp.exp(-decay * late))

  return schedule


class ScaleByPreconditionerState(NamedTuple):
  """Attributes:
  count: (), int32, calls of ``update``.
  key: a typed PRNG key, split on every step.
  debt: (), float32 in [0, 1), what the fit schedule has summed up since the last fit; 0 if ``every`` is an int.
  fits: (), int32, fits done.
  skipped: (), int32, steps skipped because something in gradient, observation or factors was not finite.
  momentum: state of the momentum.
  preconditioner: state of the preconditioner.
  after: state of the transform after P.
  """

  count: jax.Array
  key: jax.Array
  debt: jax.Array
  fits: jax.Array
  skipped: jax.Array
  momentum: Any
  preconditioner: Any
  after: Any = optax.EmptyState()


def make_key(key: int | jax.Array) -> jax.Array:
  """A typed key from an int, or from a key of either kind."""
  if isinstance(key, int):
    return jax.random.key(key)
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return key
  if key.ndim == 0:
    return jax.random.key(key)
  return jax.random.wrap_key_data(key)


def scale_by_preconditioner(
  preconditioner: Preconditioner,
  curvature: Curvature,
  *,
  every: int | optax.Schedule = 1,
  damping: Any = 0.0,
  momentum: optax.GradientTransformation | None = None,
  direction: Callable = plain,
  after: optax.GradientTransformation | None = None,
  key: int | jax.Array = 0,
  finite_check: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Observe → fit → apply: updates ← P @ updates, with P fitted to the curvature as training goes.

  One step: P is fitted on the gradient; ``momentum``, P (by way of ``direction``) and ``after`` then act in this order.
  The last three see P: ``momentum`` and ``after`` as the extra argument ``fitted``, a :class:`dpsgd_optax.Fitted`.

  Fitting comes before applying, so that a step already profits from what it observed. Every extra argument of
  ``update`` is handed to the curvature, with ``damping`` and ``fits``, the number of fits so far; those it does not
  know it ignores.

  Args:
    preconditioner: how P is shaped: ``kron()``, ``diagonal()``, ``damped_kron()`` or your own. Static.
    curvature: what it is fitted on: ``whitening()`` or ``newton()``. Static.
    every: fit on every ``every``-th step, the first included; or a schedule count → probability: the fit runs when the
      running sum of the probabilities passes a whole number (exact long-run rate, see ``annealed_probability``).
    damping: λ ≥ 0, number or schedule, given to ``fit``; what it means is the preconditioner's to say. The extra
      argument ``damping`` of ``update`` (set by ``levenberg_marquardt``) overrides it.
    momentum: an optax transform between the gradient and P: ``momentum=optax.ema(0.9)`` fits on raw gradients and
      preconditions their average; ``optax.chain(optax.ema(0.9), scale_by_preconditioner(…))`` fits on the average.
      None: none. If the fit is on the average, divide the learning rate by √((1+β)/(1−β)).
    direction: (apply, updates, params, **extra) → preconditioned updates; the default applies P. Extra arguments are
      those of ``update``, ``fitted`` and ``count``, the number of the step. Static.
    after: an optax transform after P, for what must see both P and the step: penalties in preconditioned variables,
      and the learning rate where they are proximal (see :func:`dpsgd_optax.proximal_l1`). None: none.
    key: int or PRNG key of the probes; lives in the state. Same key, same run.
    finite_check: skip and count a step on which anything is not finite. False saves a pass over the updates.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``update`` also takes ``refresh``: True or False
    chooses at trace time whether to fit, in place of the count, so that nothing runs under ``lax.cond`` (a
    convolution there is 5 to 20 times slower on the CPU); a traced bool serves as the predicate.

  Raises:
    ValueError: at construction for ``every`` below 1 or a negative ``damping``; at trace time for missing extra
      arguments, integer leaves, or updates whose leaves are not those of ``init``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = optax.chain(
    ...   dpo.scale_by_preconditioner(dpo.diagonal(init_scale=0.05), dpo.newton(), every=2),
    ...   optax.scale_by_learning_rate(0.5),
    ... )
    >>> loss = lambda p: jnp.sum(jnp.array([1.0, 100.0]) * p**2)
    >>> params = jnp.ones(2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params, hvp=dpo.hvp(loss, params))
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...   params, state = train_step(params, state)
    >>> int(optax.tree.get(state, "fits")), bool(loss(params) < 1e-6)
    (100, True)
  """
  if not callable(every):
    check_period(every, "every")
  check_not_negative(damping, "damping", "It is λ ≥ 0. Try 0.")
  momentum = optax.identity() if momentum is None else momentum
  momentum = optax.with_extra_args_support(momentum)
  after = optax.with_extra_args_support(optax.identity() if after is None else after)

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return ScaleByPreconditionerState(
      zero,
      make_key(key),
      jnp.zeros((), jnp.float32),
      zero,
      zero,
      momentum.init(params),
      preconditioner.init(params),
      after.init(params),
    )

  def schedule(state):
    if callable(every):
      debt = state.debt + jnp.asarray(every(state.count), jnp.float32)
      due = debt >= 1
      return due, debt - due
    return state.count % every == 0, state.debt

  def update(updates, state, params=None, *, refresh=None, damping=damping, **extra):
    strength = damping(state.count) if callable(damping) else damping
    next_key, probe_key, fit_key = jax.random.split(state.key, 3)
    due, debt = schedule(state)
    due = due if refresh is None else refresh
    old = state.preconditioner

    def checked(new, *parts):
      """The new state, or the old where one of the parts is not finite; in the branch that makes it, not in every step.

      In the updates alone a failure does not always show: P = 1/∞ makes them zero, and would do so for ever.
      """
      new = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, old)
      if not finite_check:
        return new, jnp.array(True)
      sound = all_finite((strength, updates, *parts))
      # a branch copies at most what it takes; a select would read both states and write a third
      return choose(sound, lambda new, old: new, lambda new, old: old, new, old), sound

    def refit():
      observation = curvature(probe_key, updates, params, **{**extra, "damping": strength, "fits": state.fits})
      new = preconditioner.fit(old, observation, key=fit_key, damping=strength)
      return checked(new, new)

    def keep():
      if preconditioner.advance is None:
        return old, all_finite(strength) if finite_check else jnp.array(True)
      return checked(preconditioner.advance(old, damping=strength))  # made of the old state and of the damping alone

    new, sound = choose(due, refit, keep)
    fitted = Fitted(preconditioner, new, updates)
    seen = {**extra, "fitted": fitted}
    averaged, moved = momentum.update(updates, state.momentum, params, **seen)
    applied = direction(fitted.apply, averaged, params, **{**seen, "count": state.count})
    same_structure(applied, updates, "what the direction returns", "the updates")
    applied, done = after.update(applied, state.after, params, **seen)
    usable = sound
    if finite_check:
      usable = sound & all_finite(applied)
      applied = map_by_shape(lambda x: jnp.where(usable, x, jnp.zeros_like(x)), applied)
      moved, done = where(usable, (moved, done), (state.momentum, state.after))
    applied = jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), applied, updates)
    return applied, ScaleByPreconditionerState(
      optax.safe_increment(state.count),
      next_key,
      debt,
      state.fits + (jnp.asarray(due) & sound).astype(jnp.int32),
      state.skipped + (~usable).astype(jnp.int32),
      moved,
      new,
      done,
    )

  return optax.GradientTransformationExtraArgs(init, update)


class ClippedLearningRateState(NamedTuple):
  """Attributes:
  count: (), int32.
  rate: (), float32 (float64 for such params), the learning rate of the last step after clipping.
  """

  count: jax.Array
  rate: jax.Array


def safe_norm(tree: Any) -> jax.Array:
  """‖tree‖₂ in float32 at least, scaled so that it neither overflows nor vanishes before its time."""
  leaves = [x for x in jax.tree.leaves(tree) if math.prod(jnp.shape(x)) > 0]
  if not leaves:
    return jnp.zeros(())
  leaves = stacks(leaves)
  top = jnp.max(
    jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.promote_types(jnp.abs(x).dtype, jnp.float32)) for x in leaves])
  )
  safe = jnp.where(top > 0, top, 1)
  return safe * jnp.sqrt(sum(jnp.sum(jnp.abs(x / safe) ** 2) for x in leaves))


def clipped_learning_rate(
  learning_rate: optax.ScalarOrSchedule, max_norm: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """updates ← −a · updates with a = learning_rate · min(max_norm / ‖updates‖, 1): DPSGD's Eq. 48, in one place.

  The same step as ``optax.chain(optax.clip_by_global_norm(max_norm), optax.scale_by_learning_rate(…))``; what this
  adds is ``rate`` = a in the state, which ``newton_model`` needs to predict the reduction of the step really taken.

  Args:
    learning_rate: number or schedule.
    max_norm: the largest ‖updates‖₂ over all leaves before the learning rate; None: 0.1 · √(number of elements), the
      paper's; ``jnp.inf``: no clipping.

  Raises:
    ValueError: for a negative learning rate or a ``max_norm`` that is not positive.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.clipped_learning_rate(0.5, max_norm=1.0)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> updates, float(optax.tree.get(state, "rate"))
    (Array([-0.3, -0.4], dtype=float32), 0.10000000149011612)
  """
  check_learning_rate(learning_rate)
  if max_norm is not None:
    check_not_negative(max_norm, "max_norm", "It bounds ‖updates‖₂. Use `jnp.inf` for no bound.")

  def init(params):
    return ClippedLearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), scalar_dtype(params)))

  def update(updates, state, params=None, **extra):
    del params, extra
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    size = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(updates))
    bound = 0.1 * math.sqrt(size) if max_norm is None else max_norm
    norm = safe_norm(updates)
    a = jnp.asarray(rate, norm.dtype) * jnp.where(
      norm > bound, bound / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny), 1
    )
    scaled = jax.tree.map(lambda x: (-a * x).astype(x.dtype), updates)
    return scaled, ClippedLearningRateState(optax.safe_increment(state.count), a.astype(state.rate.dtype))

  return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
  """Bytes of the optimizer state for these params, by ``jax.eval_shape``: nothing is allocated.

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> dpo.state_bytes(optax.adam(1e-3), jnp.zeros(1000))
    8004
  """
  shapes = jax.eval_shape(tx.init, params)
  data = lambda x: jax.eval_shape(jax.random.key_data, x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in map(data, jax.tree.leaves(shapes)))
