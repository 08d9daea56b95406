# SPDX-License-Identifier: Apache-2.0
"""Where observe, fit and apply meet: the one optax transformation behind every optimizer here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import select, separate
from dpsgd_optax._trees.by_shape import all_finite, map_by_shape
from dpsgd_optax._trees.paths import same_structure
from dpsgd_optax.base import (
  Curvature,
  Preconditioner,
  check_automatic,
  check_not_negative,
  check_period,
  forward_extra_args,
)
from dpsgd_optax.transforms._control import _is_typed, both, check_choice, choose, compiled_once, make_key
from dpsgd_optax.transforms.fitted import Fitted
from dpsgd_optax.transforms.injection import static_arguments


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
  key: (2,), uint32 (more words for other generators), the raw data of a PRNG key, which is split on every step.
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


def _today(state: Any) -> ScaleByPreconditionerState:
  """A state of layout 1, with no ``dropped``, as one of today's. Its typed key is used, and stays one."""
  if not isinstance(state, ScaleByPreconditionerState):
    raise ValueError(
      f"`update` needs the state that `init` of the same transform returned, a ScaleByPreconditionerState, got "
      f"{type(state).__name__}. Inside a wrapper (`optax.MultiSteps`, `optax.chain`) call `update` of the wrapper."
    )
  return state._replace(dropped=jnp.zeros((), jnp.int32) if state.dropped is None else state.dropped)


def _split(key: jax.Array, generator: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The next key, of the kind of this one, and two to draw from."""
  typed = key if _is_typed(key) else jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32), impl=generator)
  following, *drawn = jax.random.split(typed, 3)
  return following if _is_typed(key) else jax.random.key_data(following), *drawn


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

  One step: ``before`` acts on the gradient, P is fitted on what it returns; ``momentum``, P (by way of ``direction``)
  and ``after`` then act in this order. The last three see P: ``momentum`` and ``after`` as the extra argument
  ``fitted``, a :class:`dpsgd_optax.transforms.fitted.Fitted`. A step that is skipped leaves all their states as they
  were.

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
      None leaves the factors of ``damped_kron`` undamped; for the Lie groups it is 0.
    momentum: an optax transform between the gradient and P: ``momentum=optax.ema(0.9)`` fits on raw gradients and
      preconditions their average; ``optax.chain(optax.ema(0.9), scale_by_preconditioner(…))`` fits on the average.
      None: none. If the fit is on the average, divide the learning rate by √((1+β)/(1−β)).
    direction: (apply, updates, params, **extra) → preconditioned updates; None applies P. Extra arguments are
      those of ``update``, ``fitted`` and ``count``, the number of the step. Static.
    after: an optax transform after P, for what must see both P and the step: penalties in preconditioned variables,
      and the learning rate where they are proximal (see :func:`dpsgd_optax.penalties.proximal_l1`). None: none.
    before: an optax transform of the gradient that everything else sees, such as :func:`dpsgd_optax.clip_spikes`. None:
      none.
    key: int or PRNG key of the probes; lives in the state. Same key, same run.
    finite_check: drop and count a fit of which anything is not finite, and skip and count a step whose gradient or
      preconditioned gradient is not. False saves a pass over the updates.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``update`` also takes ``refresh``: True or False
    chooses at trace time whether to fit, in place of the count, so that nothing runs under ``lax.cond`` (a
    convolution there is 5 to 20 times slower on the CPU); a traced bool serves as the predicate. And it takes
    ``accumulating``: True says that what this call returns will be thrown away, as ``optax.MultiSteps(tx, k)`` does on
    all steps but the k-th, so that nothing is observed or fitted: type ``accumulating=opt_state.mini_step < k - 1``.

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
  momentum = forward_extra_args(optax.identity() if momentum is None else momentum)
  after = forward_extra_args(optax.identity() if after is None else after)
  before = forward_extra_args(optax.identity() if before is None else before)
  fit, advance = compiled_once(preconditioner.fit), preconditioner.advance and compiled_once(preconditioner.advance)
  shown = preconditioner._replace(apply=compiled_once(preconditioner.apply))
  key_data, generator = make_key(key)

  def init(params):
    check_automatic(params)
    zero = lambda dtype: jnp.zeros((), dtype)
    state = ScaleByPreconditionerState(
      count=zero(jnp.int32),
      key=key_data(),
      debt=zero(jnp.float32),
      fits=zero(jnp.int32),
      skipped=zero(jnp.int32),
      momentum=momentum.init(params),
      preconditioner=preconditioner.init(params),
      after=after.init(params),
      dropped=zero(jnp.int32),
      before=before.init(params),
    )
    return separate(state, params)

  def schedule(state):
    if callable(every):
      debt = state.debt + jnp.asarray(every(state.count), jnp.float32)
      due = debt >= 1
      return due, debt - due.astype(jnp.float32)
    return state.count % every == 0, state.debt

  def update(updates, state, params=None, *, refresh=None, accumulating=False, damping=damping, **extra):
    state = _today(state)
    check_automatic(updates)
    check_choice(refresh, "refresh")
    strength = damping(state.count) if callable(damping) else damping
    next_key, probe_key, fit_key = _split(state.key, generator)
    due, debt = schedule(state)
    due = due if refresh is None else refresh
    due = both(due, not accumulating if isinstance(accumulating, bool) else ~accumulating)
    old = state.preconditioner
    prepare = lambda: before.update(updates, state.before, params, **extra)
    gradient, prepared = prepare()
    same_structure(gradient, updates, "what `before` returns", "the updates")

    def checked(new, *parts):
      """The new state, or the old where one of the parts is not finite; in the branch that makes it, not in every step.

      In the updates alone a failure does not always show: P = 1/∞ makes them zero, and would do so for ever.
      """
      new = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, old)
      if not finite_check:
        return new, jnp.array(True)
      sound = all_finite((strength, *parts))
      # a branch copies at most what it takes; a select would read both states and write a third
      return choose(sound, lambda new, old: new, lambda new, old: old, new, old), sound

    def refit():
      seen, _ = prepare()  # anew: what goes into a branch is written to memory on every step
      observation = curvature(probe_key, seen, params, **{**extra, "damping": strength, "fits": state.fits})
      new = fit(old, observation, key=fit_key, damping=strength)
      return checked(new, seen, new)

    def keep():
      if advance is None:
        return old, jnp.array(True)
      return checked(advance(old, damping=strength), updates)  # made of the old state and of the damping alone

    new, sound = choose(due, refit, keep)
    fitted = Fitted(shown, new, gradient)
    seen = {**extra, "fitted": fitted}
    averaged, moved = momentum.update(gradient, state.momentum, params, **seen)
    if direction is None:
      applied = fitted.apply(averaged)
    else:
      applied = direction(fitted.apply, averaged, params, **seen, count=state.count)
    same_structure(applied, updates, "what the direction returns", "the updates")
    applied, done = after.update(applied, state.after, params, **seen)
    usable = jnp.array(True)
    if finite_check:
      # of a gradient that is not finite P g is neither; a fit that was dropped says nothing against the step
      usable = all_finite((strength, applied))
      applied = map_by_shape(lambda x: jnp.where(usable, x, jnp.zeros_like(x)), applied)
      moved, done, prepared = select(usable, (moved, done, prepared), (state.momentum, state.after, state.before))
    applied = jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), applied, updates)
    due = jnp.asarray(due)
    return applied, ScaleByPreconditionerState(
      count=optax.safe_increment(state.count),
      key=next_key,
      debt=debt,
      fits=state.fits + (due & sound).astype(jnp.int32),
      skipped=state.skipped + (~usable).astype(jnp.int32),
      momentum=moved,
      preconditioner=new,
      after=done,
      dropped=state.dropped + (due & ~sound).astype(jnp.int32),
      before=prepared,
    )

  return optax.GradientTransformationExtraArgs(init, update)
