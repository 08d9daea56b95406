# SPDX-License-Identifier: Apache-2.0
"""A wrapper that judges each step by the loss and chooses the next damping. Notation as in `damping_rule`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import scalar_dtype, select, separate
from dpsgd_optax._trees.paths import has_holes, stepped
from dpsgd_optax.base import forward_extra_args, is_static
from dpsgd_optax.curvature._loss_errors import check_scalar
from dpsgd_optax.curvature.observers import given_product
from dpsgd_optax.transforms._control import check_state, choose, injected, is_due, static_arguments
from dpsgd_optax.transforms.damping_rule import Record, Rule, check_rule, look_ahead, look_back, no_loss
from dpsgd_optax.transforms.reduction_models import half_slope


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


# The same, for a `damping` that `optax.inject_hyperparams` holds: its own state has a field of the name `damping`.
InjectedLevenbergMarquardtState = namedtuple(
  "InjectedLevenbergMarquardtState", ["count", "current_damping", *LevenbergMarquardtState._fields[2:]]
)


def _loss_at(value_fn: Callable | None, params: Any, hvp: Any, value: Any) -> Callable | None:
  """step ↦ loss(θ + step), None ↦ loss(θ), with θ in full; None if only looking back is left."""
  if value_fn is None:
    return None
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


def _remembered(record: Record, due: Any, value: Any, predict: Callable) -> tuple[Record, jax.Array]:
  """For looking back: the record with the predicted reduction, and the loss, of a step that the next call judges."""
  dtype = record.damping.dtype
  remember = lambda: (jnp.asarray(value, dtype), predict())
  previous, predicted = choose(due, remember, lambda: (no_loss(dtype), record.predicted))
  return record._replace(predicted=predicted), previous


def _first_state(kind: Any, damping: Any, params: Any, inner: Any) -> Any:
  dtype = scalar_dtype(params)
  ratio, actual, predicted = (jnp.zeros((), dtype) for _ in range(3))
  count, rejected = (jnp.zeros((), jnp.int32) for _ in range(2))
  start = jnp.array(damping, dtype)  # a copy, for it may be an array of the caller's
  return separate(kind(count, start, ratio, actual, predicted, no_loss(dtype), rejected, inner), params)


def _check_losses(value: Any, value_fn: Any, params: Any) -> None:
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


def _rate(state: Any) -> Any:
  """The learning rate after clipping, if just one state of the inner transform tells it."""
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

  It stands outermost, so that the step it judges is the step taken. Step t uses a λ chosen before it.

  *Look-ahead* (``value_fn`` given): on every ``every``-th step the loss is computed once more, at θ + s, on the same
  batch; without ``value`` also at θ. *Look-back* (only ``value`` given): the step is judged on the next call, by that
  call's ``value``. This is free, but the batch differs.

  A step whose predicted and actual reductions are both below the rounding of the loss is not judged. That happens at a
  minimum, and with a λ that is much too large. A λ above its initial value then shrinks towards it, not to stay there.

  Inside ``optax.partition`` or ``optax.masked`` the loss takes more parameters than the transform is shown. It finds
  them in ``hvp=dpo.hvp(loss, params)``, made outside; with a product of your own and ``value`` it looks back.

  Where λ damps the *curvature* (every group: fit on Hv + λv), more of it is a shorter step. Where it damps the factors
  (``damped_kron``), more of it is a longer, more gradient-like step. ``dpsgd`` therefore turns the rule round.

  Args:
    inner: any optax transform, ``optax.MultiSteps`` included; one that ignores ``damping`` is judged all the same.
    damping: the initial λ.
    factor: ω > 0, for each judged step. Above 1 it turns the rule round: λ grows after a good step.
    thresholds: (lo, hi), a step is poor below lo · M and good above hi · M.
    bounds: the smallest and the largest λ.
    every: judge every ``every``-th step.
    model: (grads, step, hvp, *, rate) → M: ``half_slope``, ``newton_model``, ``quadratic_model``. Static.
    reject: zero a judged step on which the loss rose (look-ahead only), and multiply λ by ``reject_factor``.
    reject_factor: None: 1 / factor.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Its ``update`` also takes ``judge``, whether to
    judge the step, in place of the count; and ``accumulating``, as :func:`dpsgd_optax.scale_by_preconditioner`. λ is
    read as ``optax.tree.get(opt_state, "damping")``, or ``"current_damping"`` where ``optax.inject_hyperparams`` holds
    ``damping`` itself; ``ratio``, ``actual``, ``predicted`` and ``rejected`` likewise.

  Raises:
    ValueError: at construction for a factor that is not positive, thresholds or bounds out of order, ``every`` below 1;
      at trace time if ``value`` and ``value_fn`` are missing, or the ``params`` that ``value_fn`` needs, in whole.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.levenberg_marquardt(optax.sgd(0.1))
    >>> loss, params = lambda p: jnp.sum(p**2), jnp.ones(2)
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    >>> round(float(optax.tree.get(state, "ratio")), 3), round(float(optax.tree.get(state, "damping")), 3)
    (1.8, 0.95)
  """
  rule = Rule(damping, factor, thresholds, bounds, reject, reject_factor)
  check_rule(rule, every)
  inner = forward_extra_args(inner)
  State = InjectedLevenbergMarquardtState if injected() and not is_static(damping) else LevenbergMarquardtState

  def init(params):
    return _first_state(State, rule.initial, params, inner.init(params))

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
    check_state(state, LevenbergMarquardtState, InjectedLevenbergMarquardtState)
    _check_losses(value, value_fn, params)
    due = is_due((state.count + 1) % every == 0, judge, "judge", accumulating)
    finite = jnp.array(True) if value is None else jnp.all(jnp.isfinite(value))
    loss = _loss_at(value_fn, params, hvp, value)
    record = Record(*state[1:5])
    if loss is None:
      record = look_back(rule, record, state.previous, value, finite)

    given = {"value": value, "value_fn": value_fn, "hvp": hvp}
    extra |= {name: x for name, x in given.items() if x is not None}
    extra |= {} if accumulating is False else {"accumulating": accumulating}
    step, moved = inner.update(updates, state.inner, params, damping=record.damping, **extra)

    known = hvp is not None or loss is not None
    product = given_product("levenberg_marquardt", params, hvp, value_fn, value) if known else None
    predict = lambda: jnp.asarray(model(updates, step, product, rate=_rate(moved)), record.damping.dtype)
    previous, stop = state.previous, jnp.array(False)
    if loss is None:
      record, previous = _remembered(record, due, value, predict)
    else:
      look = lambda: look_ahead(rule, record, loss, value, step, predict)
      record, stop = choose(due, look, lambda: (record, stop))

    # a loss that is not finite leaves the inner state as it was; a rejected step does not, its gradient was sound
    moved = select(finite, moved, state.inner)
    taken = finite & ~stop
    step = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), step)
    rejected = state.rejected + (~taken).astype(jnp.int32)
    return step, type(state)(optax.safe_increment(state.count), *record, previous, rejected, moved)

  return optax.GradientTransformationExtraArgs(init, update)
