# SPDX-License-Identifier: Apache-2.0
"""Observe → fit → apply, in one transformation: the middle of `psgd`, `dpsgd` and `sgd_ph`.

Notation
  P    the preconditioner, fitted while training goes on
  λ    the damping
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import select, separate
from dpsgd_optax._trees.by_shape import LARGE, all_finite, map_by_shape
from dpsgd_optax._trees.paths import same_structure
from dpsgd_optax.base import (
  Curvature,
  Preconditioner,
  check_automatic,
  check_not_negative,
  check_period,
  forward_extra_args,
)
from dpsgd_optax.transforms._control import (
  cast_like,
  check_state,
  choose,
  compiled_once,
  is_due,
  make_key,
  scheduled,
  static_arguments,
  step_keys,
)
from dpsgd_optax.transforms.fitted import Fitted


def annealed_probability(
  peak: float = 1.0, floor: float = 0.03, flat: int = 500, decay: float = 0.001
) -> optax.Schedule:
  """How often to fit: p(t) = max(floor, peak · exp(−decay · max(t − flat, 0))), a schedule for ``every``.

  Args:
    peak, floor: probabilities in [0, 1], of the first ``flat`` steps and in the end. With 0.03 one step in 33 fits.
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
  key: (2,), uint32 (more words for other generators), the raw data of a PRNG key; with the count it gives
    the keys of a step.
  debt: (), float32 in [0, 1), what the fit schedule has summed up since the last fit; 0 if ``every`` is an int.
  fits: (), int32, fits done.
  skipped: (), int32, steps skipped because the gradient, the preconditioned gradient or λ was not finite.
  momentum: state of the momentum.
  preconditioner: state of the preconditioner.
  after: state of the transform after P.
  dropped: (), int32, fits dropped because what was observed, or what it made of P, was not finite: the old P stays.
  before: state of the transform before the fit.
  """

  count: jax.Array
  key: jax.Array
  debt: jax.Array
  fits: jax.Array
  skipped: jax.Array
  momentum: Any
  preconditioner: Any
  after: Any = optax.EmptyState()
  dropped: jax.Array | None = None
  before: Any = optax.EmptyState()


def _first_state(key: jax.Array, momentum: Any, preconditioner: Any, after: Any, before: Any) -> Any:
  count, fits, skipped, dropped = (jnp.zeros((), jnp.int32) for _ in range(4))
  debt = jnp.zeros((), jnp.float32)
  states = momentum, preconditioner, after
  return ScaleByPreconditionerState(count, key, debt, fits, skipped, *states, dropped, before)


def _counts(state: ScaleByPreconditionerState, due: Any, sound: Any, usable: Any) -> dict[str, Any]:
  """The counters after a step on which a fit was ``due`` or not, was ``sound``, and left a ``usable`` update."""
  dropped = 0 if state.dropped is None else state.dropped  # a state of layout 1 has none
  return {
    "count": optax.safe_increment(state.count),
    "fits": state.fits + (due & sound).astype(jnp.int32),
    "skipped": state.skipped + (~usable).astype(jnp.int32),
    "dropped": dropped + (due & ~sound).astype(jnp.int32),
  }


def _fits_now(every: Any, state: ScaleByPreconditionerState) -> tuple[Any, jax.Array]:
  """Whether ``every`` plans a fit for this step, and the debt that is left."""
  if not callable(every):
    return state.count % every == 0, state.debt
  debt = state.debt + jnp.asarray(every(state.count), jnp.float32)
  due = debt >= 1
  return due, debt - due.astype(jnp.float32)


def _where(sound: jax.Array, new: Any, old: Any) -> Any:
  """The new arrays if they are sound, else the old ones.

  A branch copies at most what it takes, where a select reads both and writes a third; but of small arrays a branch
  makes two kernels, a select one.
  """
  pairs, treedef = list(zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)), jax.tree.structure(new)
  large = [pair for pair in pairs if jnp.size(pair[0]) >= LARGE]
  kept = iter(choose(sound, lambda x: [a for a, _ in x], lambda x: [b for _, b in x], large) if large else ())
  return treedef.unflatten([next(kept) if jnp.size(a) >= LARGE else jnp.where(sound, a, b) for a, b in pairs])


def _refitted(
  p: Preconditioner, due: Any, old: Any, observe: Callable, updates: Any, key: Any, damping: Any, check: bool
) -> tuple[Any, jax.Array]:
  """The state of P after this step, by ``fit`` where it is due or by ``advance``, and whether it is a new one.

  With ``check`` the old state stays where something is not finite. That is looked at here, in the branch, since it does
  not always show in the updates: P = 1/∞ makes them zero, on this step and on all that follow.
  """

  def checked(new, *parts):
    new = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, old)
    if not check:
      return new, jnp.array(True)
    sound = all_finite((damping, *parts))
    return _where(sound, new, old), sound

  def fit():
    seen, observation = observe()
    new = p.fit(old, observation, key=key, damping=damping)
    return checked(new, seen, new)

  def keep():
    if p.advance is None:
      return old, jnp.array(True)
    return checked(p.advance(old, damping=damping), updates)  # made of the old state and of the damping alone

  return choose(due, fit, keep)


def _skipped_if_not_finite(applied: Any, new: dict, old: ScaleByPreconditionerState, damping: Any) -> tuple:
  """The step and the states of the transforms; zeros and the old states where the step or λ is not finite.

  Of a gradient that is not finite P g is neither. A fit that was dropped says nothing against the step.
  """
  usable = all_finite((damping, applied))
  applied = map_by_shape(lambda x: jnp.where(usable, x, jnp.zeros_like(x)), applied)
  return applied, select(usable, new, {name: getattr(old, name) for name in new}), usable


@static_arguments("preconditioner", "curvature", "every", "momentum", "direction", "after", "before", "key")
def scale_by_preconditioner(
  preconditioner: Preconditioner,
  curvature: Curvature,
  *,
  every: int | optax.Schedule = 1,
  damping: Any = 0.0,
  momentum: optax.GradientTransformation | None = None,
  direction: Callable | None = None,
  after: optax.GradientTransformation | None = None,
  before: optax.GradientTransformation | None = None,
  key: int | jax.Array = 0,
  finite_check: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Observe → fit → apply: updates ← P @ updates, with P fitted to the curvature as training goes.

  One step: ``before`` acts on the gradient; P is fitted on what it returns; then ``momentum``, P (or ``direction``) and
  ``after`` act on it, in this order. A step that is skipped leaves the states of the three transforms as they were.

  All of them and the curvature receive the extra arguments of ``update``, and ignore those they do not know. The
  curvature also receives ``damping``, and ``fits``, their number so far; ``momentum``, ``direction`` and ``after``
  receive ``fitted``, P as it stands: a :class:`dpsgd_optax.transforms.fitted.Fitted`.

  Args:
    preconditioner: how P is shaped: ``kron()``, ``diagonal()``, ``damped_kron()`` or your own. Static.
    curvature: what P is fitted on: ``whitening()``, ``newton()``, ``hessian_diagonal()``, ``layer_inputs()``. Static.
    every: fit on every ``every``-th step, the first included; or a schedule count → probability, such as
      :func:`annealed_probability`: the fit runs when the running sum of the probabilities passes a whole number.
    damping: λ ≥ 0, number or schedule, given to ``fit``; what it means is the preconditioner's to say. The extra
      argument ``damping`` of ``update`` (set by ``levenberg_marquardt``) overrides it. None leaves the factors of
      ``damped_kron`` undamped; for the Lie groups it is 0.
    momentum: an optax transform between the fit and P. With ``momentum=optax.ema(β)`` P is fitted on raw gradients and
      applied to their average. ``optax.chain(optax.ema(β), scale_by_preconditioner(…))`` fits on the average too; then
      divide the learning rate by √((1+β)/(1−β)).
    direction: (apply, updates, params, **extra) → preconditioned updates; None: P is applied. It also receives
      ``count``, the number of the step. Static.
    after: an optax transform after P, for what must see both P and the step, such as ``dpsgd_optax.penalties``.
    before: an optax transform of the gradient that everything else sees, such as :func:`dpsgd_optax.clip_spikes`.
    key: int or PRNG key of the probes; lives in the state. Same key, same run.
    finite_check: drop and count a fit, skip and count a step, in which anything is not finite. False saves a pass over
      the updates.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Its ``update`` also takes

    - ``refresh``: whether to fit, in place of the count. A Python bool is known at trace time: then nothing runs under
      ``lax.cond``, where a convolution is much slower on the CPU.
    - ``accumulating``: whether what this call returns will be thrown away, so that nothing need be observed or fitted.
      Inside ``optax.MultiSteps(tx, k)`` type ``accumulating=opt_state.mini_step < k - 1``.

  Raises:
    ValueError: at construction for ``every`` below 1 or a negative ``damping``; at trace time for missing extra
      arguments, integer leaves, or updates whose leaves are not those of ``init``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> newton_step = dpo.scale_by_preconditioner(dpo.diagonal(init_scale=0.05), dpo.newton(), every=2)
    >>> tx = optax.chain(newton_step, optax.scale_by_learning_rate(0.5))
    >>> loss, params = lambda p: jnp.sum(jnp.array([1.0, 100.0]) * p**2), jnp.ones(2)
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
  given = (optax.identity() if tx is None else tx for tx in (momentum, after, before))
  momentum, after, before = map(forward_extra_args, given)
  p = compiled_once(preconditioner)
  key_data, generator = make_key(key)

  def init(params):
    check_automatic(params)
    inner = (tx.init(params) for tx in (momentum, preconditioner, after, before))
    return separate(_first_state(key_data(), *inner), params)

  def update(updates, state, params=None, *, refresh=None, accumulating=False, damping=damping, **extra):
    check_state(state, ScaleByPreconditionerState)
    check_automatic(updates)
    strength = scheduled(damping, state.count)
    probe_key, fit_key = step_keys(state.key, generator, state.count)
    planned, debt = _fits_now(every, state)
    due = is_due(planned, refresh, "refresh", accumulating)
    prepare = lambda: before.update(updates, state.before, params, **extra)
    gradient, prepared = prepare()
    same_structure(gradient, updates, "what `before` returns", "the updates")

    def observe():
      seen, _ = prepare()  # anew: what goes into a branch is written to memory on every step
      return seen, curvature(probe_key, seen, params, **{**extra, "damping": strength, "fits": state.fits})

    new, sound = _refitted(p, due, state.preconditioner, observe, updates, fit_key, strength, finite_check)
    fitted = Fitted(p, new, gradient)
    shown = {**extra, "fitted": fitted}
    averaged, moved = momentum.update(gradient, state.momentum, params, **shown)
    if direction is None:
      applied = p.apply(new, averaged)
    else:
      applied = direction(fitted.apply, averaged, params, **shown, count=state.count)
    same_structure(applied, updates, "what the direction returns", "the updates")
    applied, done = after.update(applied, state.after, params, **shown)
    states, usable = {"momentum": moved, "after": done, "before": prepared}, jnp.array(True)
    if finite_check:
      applied, states, usable = _skipped_if_not_finite(applied, states, state, strength)
    counts = _counts(state, jnp.asarray(due), sound, usable)
    new_state = state._replace(debt=debt, preconditioner=new, **states, **counts)
    return cast_like(applied, updates), new_state

  return optax.GradientTransformationExtraArgs(init, update)
