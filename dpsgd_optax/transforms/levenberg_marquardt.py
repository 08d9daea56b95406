# SPDX-License-Identifier: Apache-2.0
"""Levenberg-Marquardt: judge a step by the loss, and choose the next damping λ from the verdict.

Notation
  θ, s    params and the step really taken, learning rate and clipping included
  g, H    gradient and Hessian at θ
  M       predicted reduction of the loss;  actual = loss(θ) − loss(θ + s), on the same batch
  λ       the damping;  ω the factor by which it shrinks

The ratio is signed (an increase of the loss is a failure) and never divided out: actual ≥ threshold · M is compared.

Sources: Levenberg (1944), Marquardt (1963); thresholds and ω of arXiv:1503.05671 §6.5; DPSGD Eqs. 29 to 33.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import scalar_dtype, select, separate
from dpsgd_optax._trees.paths import has_holes, stepped
from dpsgd_optax.base import check, check_not_negative, check_period, forward_extra_args, is_static
from dpsgd_optax.curvature._loss_errors import check_scalar
from dpsgd_optax.curvature.products import hvp as hessian_product
from dpsgd_optax.transforms._control import both, check_choice, choose
from dpsgd_optax.transforms.injection import injected, static_arguments
from dpsgd_optax.transforms.reduction_models import half_slope


def adapt_damping(
  damping: jax.typing.ArrayLike,
  actual: jax.typing.ArrayLike,
  predicted: jax.typing.ArrayLike,
  *,
  factor: jax.typing.ArrayLike = 19 / 20,
  thresholds: tuple[float, float] = (0.25, 0.75),
  bounds: tuple[Any, Any] = (1e-10, 1e10),
) -> jax.Array:
  """The rule, DPSGD Eq. 33: shrink λ after a step as good as predicted, grow it after a bad one, then clip it.

  λ ← ω λ    if M > 0 and actual > hi · M
  λ ← λ / ω  unless M > 0 and actual ≥ lo · M     (NaN counts as bad)
  λ ← clip(λ, bounds)

  Args:
    damping: λ, scalar.
    actual: loss(θ) − loss(θ + s), scalar; positive if the loss fell.
    predicted: M, scalar.
    factor: ω.
    thresholds: (lo, hi).
    bounds: smallest and largest λ.

  Example:
    >>> import dpsgd_optax as dpo
    >>> [round(float(dpo.adapt_damping(1.0, actual, 1.0)), 3) for actual in (0.9, 0.5, 0.1)]
    [0.95, 1.0, 1.053]
  """
  low, high = thresholds
  damping, actual, predicted = jnp.asarray(damping), jnp.asarray(actual), jnp.asarray(predicted)
  good = (predicted > 0) & (actual > high * predicted)
  bad = ~((predicted > 0) & (actual >= low * predicted))
  moved = jnp.where(good, damping * factor, jnp.where(bad, damping / factor, damping))
  return jnp.clip(moved, bounds[0], bounds[1])


class LevenbergMarquardtState(NamedTuple):
  """Attributes:
  count: (), int32, calls of ``update``.
  damping: (), float32 (here and below; float64 for such params), λ of the next step.
  ratio: (), float32, actual / predicted of the last judged step; 0 before the first.
  actual: (), float32, reduction of the loss on the last judged step.
  predicted: (), float32, what the model said; 0 before the first.
  previous: (), float32, the loss at the last step to be judged by looking back; the largest number if none waits.
  rejected: (), int32, steps zeroed: the loss was not finite, or it rose and ``reject`` is set.
  inner: state of the wrapped transform.
  """

  count: jax.Array
  damping: jax.Array
  ratio: jax.Array
  actual: jax.Array
  predicted: jax.Array
  previous: jax.Array
  rejected: jax.Array
  inner: Any


class InjectedLevenbergMarquardtState(NamedTuple):
  """The same, for a ``damping`` that ``optax.inject_hyperparams`` holds: that one bears the name in the state.

  Attributes:
  current_damping: (), float32, λ of the next step.
  """

  count: jax.Array
  current_damping: jax.Array
  ratio: jax.Array
  actual: jax.Array
  predicted: jax.Array
  previous: jax.Array
  rejected: jax.Array
  inner: Any


ROUNDING = 10  # reductions of so many units in the last place of the loss say nothing


def nobody(dtype: Any) -> jax.Array:
  """In the place of a loss: none is waiting. A finite number, for wrappers that multiply a state by zero."""
  return jnp.full((), jnp.finfo(dtype).max, dtype)


def _rate(state: Any) -> Any:
  found = optax.tree.get_all_with_path(state, "rate")
  return found[0][1] if len(found) == 1 else None


@static_arguments("inner", "every", "model", unless_given=("damping",))
def levenberg_marquardt(
  inner: optax.GradientTransformation,
  *,
  damping: float = 1.0,
  factor: float = 19 / 20,
  thresholds: tuple[float, float] = (0.25, 0.75),
  bounds: tuple[float, float] = (1e-10, 1e10),
  every: int = 1,
  model: Callable = half_slope,
  reject: bool = False,
  reject_factor: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps any transform, hands it λ as ``damping=``, and adapts λ by comparing the loss with a model of it.

  It stands outermost, so that the step it judges is the step taken.

  *Look-ahead* (``value_fn`` given): on every ``every``-th step the loss is computed once more at θ + s, on the same
  batch. ``value`` saves the loss at θ. *Look-back* (only ``value`` given): the step is judged on the next call, by
  that call's ``value``; free, but the batch differs. Either way step t uses a λ known before it.

  A step whose predicted and actual reductions are both below the rounding of the loss is not judged, as happens at a
  minimum and with a λ that is much too large. λ then draws back to its initial value if it was above, so that it cannot
  lock itself there.

  Inside ``optax.partition`` or ``optax.masked`` the loss takes more parameters than the transform is shown: they are
  those at which ``hvp=dpo.hvp(loss, params)`` was taken. With a product of your own and ``value`` it looks back.

  Which way is safe depends on what λ damps. Of the *curvature* (every group: fit on Hv + λv), more λ is a shorter
  step. Of the *factors* (``damped_kron``), more λ is a longer, more gradient-like step; ``dpsgd`` therefore bounds λ
  by its initial value and turns it down on a rejected step.

  Args:
    inner: any optax transform, ``optax.MultiSteps`` included; one that ignores ``damping`` is judged all the same.
    damping: the initial λ.
    factor: ω > 0, per judged step. Above 1 it turns the rule round (λ grows after a good step), which is the safe
      way where more λ is a longer step.
    thresholds: (lo, hi) of the ratio.
    bounds: λ stays between them.
    every: judge every ``every``-th step.
    model: (grads, step, hvp, *, rate) → predicted reduction: ``half_slope``, ``newton_model``, ``quadratic_model``.
    reject: zero a judged step on which the loss rose (look-ahead only), and multiply λ by ``reject_factor``.
    reject_factor: None: 1 / factor.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``update`` also takes ``judge``: True or False
    chooses at trace time whether the step is judged, in place of the count; and ``accumulating``, as
    :func:`dpsgd_optax.scale_by_preconditioner` does. λ, ratio, actual and predicted are fields of the state:
    ``optax.tree.get(opt_state, "ratio")``. λ is ``damping``, or ``current_damping`` where ``damping`` itself is
    injected by ``optax.inject_hyperparams``.

  Raises:
    ValueError: at construction for a factor that is not positive, bad thresholds or bounds, ``every`` below 1; at trace
      time if neither ``value`` nor ``value_fn`` came, ``params`` is missing for ``value_fn``, or has holes and nothing
      tells the parameters that stand there.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.levenberg_marquardt(optax.sgd(0.1))
    >>> loss, params = lambda p: jnp.sum(p**2), jnp.ones(2)
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    >>> round(float(optax.tree.get(state, "ratio")), 3), round(float(optax.tree.get(state, "damping")), 3)
    (1.8, 0.95)
  """
  check_period(every, "every")
  check(lambda x: x > 0, factor, "factor", "positive", "λ is multiplied by it after a good step. Try 19/20.")
  check_not_negative(damping, "damping", "It is the initial λ. Try 1.0.")
  for pair, name, example in ((thresholds, "thresholds", "(0.25, 0.75)"), (bounds, "bounds", "(1e-10, 1e10)")):
    if all(map(is_static, pair)) and not pair[0] <= pair[1]:
      raise ValueError(f"`{name}` must be (low, high) with low ≤ high, got {pair}. Try {example}.")
  rule = {"factor": factor, "thresholds": thresholds, "bounds": bounds}
  inner = forward_extra_args(inner)
  State = InjectedLevenbergMarquardtState if injected() and not is_static(damping) else LevenbergMarquardtState
  initial = damping

  def init(params):
    dtype = scalar_dtype(params)
    zero = lambda dtype: jnp.zeros((), dtype)
    # λ is copied, for the number may be an array of the caller's
    start = jnp.array(initial, dtype)
    ratio, actual, predicted, previous = zero(dtype), zero(dtype), zero(dtype), nobody(dtype)
    count, rejected = zero(jnp.int32), zero(jnp.int32)
    return separate(State(count, start, ratio, actual, predicted, previous, rejected, inner.init(params)), params)

  def verdict(record, before, actual, predicted):
    """λ, ratio, actual and predicted after one judged step; a step of length zero says nothing."""
    least = ROUNDING * float(jnp.finfo(actual.dtype).eps) * jnp.abs(before).astype(actual.dtype)
    lost_in_rounding = (jnp.abs(actual) <= least) & (jnp.abs(predicted) <= least)
    known = predicted != 0
    judged = known & ~lost_in_rounding
    ratio = actual / jnp.where(judged, predicted, 1)
    old = record[0]
    adapted = adapt_damping(old, actual, predicted, **rule).astype(old.dtype)
    shrunk = (old * jnp.minimum(factor, 1 / jnp.asarray(factor, old.dtype))).astype(old.dtype)
    back = jnp.where(old > initial, jnp.maximum(shrunk, jnp.asarray(initial, old.dtype)), old)
    unjudged = (jnp.where(known, back, old), *record[1:])
    return select(judged, (adapted, ratio, actual, predicted), unjudged)

  def loss_at(value_fn, params, hvp, value):
    """step ↦ loss(θ + step), with θ in full; None if only looking back is left."""
    whole = getattr(hvp, "params", None)
    if whole is None or jax.tree.structure(whole) == jax.tree.structure(params):
      whole = params  # else they are a part of the whole, or the arrays of a model
    if not has_holes(whole):
      return lambda step: check_scalar(value_fn(whole if step is None else stepped(whole, step)))
    if value is None:
      raise ValueError(
        "`value_fn` takes all parameters, but here, inside `optax.partition` or `optax.masked`, `params` has holes. "
        "Pass `hvp=dpo.hvp(loss, params)`, made of the whole params, or put `levenberg_marquardt` (for `dpsgd`: "
        "`dpsgd(…, damping=None)` inside it) around the partition, or pass `value=loss_value` alone."
      )
    return None

  def update(
    updates,
    state,
    params=None,
    *,
    value=None,
    value_fn=None,
    hvp=None,
    judge=None,
    accumulating=False,
    damping=None,
    **extra,
  ):
    del damping  # this wrapper's to choose
    _check_state(state)
    check_choice(judge, "judge")
    if value is None and value_fn is None:
      raise ValueError(
        "`levenberg_marquardt` judges steps by the loss, but `update` received neither `value` nor `value_fn`. "
        "Pass `value=loss_value, value_fn=loss` (loss: params ↦ scalar), or only `value=loss_value` to judge a step by "
        "the loss of the next. Loops that are not yours and pass neither take `psgd(lr)`, or "
        "`dpsgd(lr, damping=None, curvature=whitening())`. Flax's own TrainState drops them: use "
        "`dpsgd_optax.training.TrainState`, with `apply_gradients(grads=grads, extra_args=dict(value=…, value_fn=…))`."
      )
    if value_fn is not None and params is None:
      raise ValueError("`value_fn` is evaluated at `params`, got None. Pass `params` to `update`.")
    due = (state.count + 1) % every == 0 if judge is None else judge
    due = both(due, not accumulating if isinstance(accumulating, bool) else ~accumulating)
    finite = jnp.array(True) if value is None else jnp.all(jnp.isfinite(value))
    loss = None if value_fn is None else loss_at(value_fn, params, hvp, value)
    product = hvp
    if product is None and loss is not None:
      product = hessian_product(value_fn, params)

    record = state[1:5]
    dtype = record[0].dtype
    if loss is None:  # look back at the step that waits for its verdict
      waiting = (jnp.abs(state.previous) < nobody(dtype)) & finite
      judged = verdict(record, state.previous, (state.previous - value).astype(dtype), state.predicted)
      record = select(waiting, judged, record)

    passed = {k: v for k, v in {"value": value, "value_fn": value_fn, "hvp": hvp}.items() if v is not None}
    passed |= {} if accumulating is False else {"accumulating": accumulating}
    step, moved = inner.update(updates, state.inner, params, damping=record[0], **passed, **extra)
    predict = lambda: jnp.asarray(model(updates, step, product, rate=_rate(moved)), dtype)

    previous, stop = state.previous, jnp.array(False)
    if loss is None:
      none = nobody(dtype)
      look = lambda: (jnp.asarray(value, dtype), predict())
      previous, predicted = choose(due, look, lambda: (none, record[3]))
      record = (*record[:3], predicted)
    else:

      def look():
        before = jnp.asarray(loss(None) if value is None else value, dtype)
        after = jnp.asarray(loss(step), dtype)
        actual = before - after
        lost = ~jnp.isfinite(after) | ((actual < 0) if reject else False)
        back = 1 / factor if reject_factor is None else reject_factor
        turned = jnp.clip(record[0] * back, *bounds).astype(dtype)
        new = verdict(record, before, actual, predict())
        new = (jnp.where(lost & reject, turned, new[0]), *new[1:])
        return select(
          jnp.isfinite(before), new, record
        ), lost  # a loss that was lost before the step says nothing of it

      record, stop = choose(due, look, lambda: (record, stop))

    # a loss that is not finite leaves the inner state as it was; a rejected step does not, its gradient was sound
    moved = select(finite, moved, state.inner)
    taken = finite & ~stop
    step = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), step)
    rejected = state.rejected + (~taken).astype(jnp.int32)
    return step, type(state)(optax.safe_increment(state.count), *record, previous, rejected, moved)

  return optax.GradientTransformationExtraArgs(init, update)


def _check_state(state: Any) -> None:
  if not isinstance(state, LevenbergMarquardtState | InjectedLevenbergMarquardtState):
    raise ValueError(
      f"`update` needs the state that `init` of the same transform returned, a LevenbergMarquardtState, got "
      f"{type(state).__name__}. Inside a wrapper (`optax.MultiSteps`, `optax.chain`) call `update` of the wrapper."
    )
