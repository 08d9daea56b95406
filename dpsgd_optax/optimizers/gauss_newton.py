# SPDX-License-Identifier: Apache-2.0
"""A Gauss-Newton step that is solved. Notation as in `solvers`, and

g, η, ν   the gradient Jᵀ r;  the learning rate;  the momentum
s₋        the last step that was taken, as a vector
M         the predicted reduction of the loss
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax import solvers
from dpsgd_optax._trees.arithmetic import check_floating, scalar_dtype, select, separate, working_dtype
from dpsgd_optax._trees.by_shape import all_finite
from dpsgd_optax._trees.paths import has_holes, stepped
from dpsgd_optax.base import check_automatic, check_fraction, check_learning_rate, check_period
from dpsgd_optax.curvature._linearized import Linearized, over_replicas
from dpsgd_optax.curvature._loss_errors import check_scalar
from dpsgd_optax.curvature._tangents import block_of
from dpsgd_optax.curvature.residuals import as_residuals
from dpsgd_optax.optimizers._damped_search import Options, agrees, taken_step
from dpsgd_optax.transforms._control import cast_like, check_state, make_key, scheduled, static_arguments, step_keys
from dpsgd_optax.transforms.damping_rule import Record, Rule, check_rule


class GaussNewtonState(NamedTuple):
  """Attributes:
  count: (), int32, calls of ``update``.
  damping: (), float32 (here and below; float64 for such params), λ of the next step.
  ratio: (), float32, actual / predicted of the last trial that was judged; 0 before the first.
  actual, predicted: (), float32, reduction of the loss on it, and M.
  trials: (), int32, steps that were tried; more than ``count`` where some had to be tried again with more damping.
  rejected: (), int32, steps zeroed, because every trial raised the loss.
  skipped: (), int32, steps zeroed, because the residuals, their Jacobian or the gradient were not finite.
  mismatched: (), int32, steps zeroed, because the gradient was not that of the residuals.
  momentum: s₋ like the params, float32 at least; () without momentum.
  solver: state of the solver.
  key: (2,), uint32.
  """

  count: jax.Array
  damping: jax.Array
  ratio: jax.Array
  actual: jax.Array
  predicted: jax.Array
  trials: jax.Array
  rejected: jax.Array
  skipped: jax.Array
  mismatched: jax.Array
  momentum: Any
  solver: Any
  key: jax.Array


def _chosen(solver: Any, given: Linearized, max_bytes: float) -> Any:
  """The solver, by shape if none is given; an error if its matrices would be too large."""
  n, size, item = given.rows, given.size, given.residual.dtype.itemsize
  chosen = solver or (solvers.rows() if n <= size else solvers.columns())
  if (needed := chosen.bytes(n, size, item)) > max_bytes:
    offers = [solvers.columns(max(1, min(n, size) // 4)), solvers.conjugate_gradients()]
    others = [f"`solver=dpo.solvers.{x.name}` ({x.bytes(n, size, item):.3g} bytes)" for x in offers]
    raise ValueError(
      f"`gauss_newton` with `{chosen.name}` needs {needed:.3g} bytes for the Jacobian of {n} residuals by {size} "
      f"parameters and its products, more than max_bytes={max_bytes:.3g}. Type {' or '.join(others)}, take fewer "
      "samples a step, or raise `max_bytes`."
    )
  return chosen


def _linearized(residual_fn: Any, updates: Any, params: Any, value_fn: Any) -> Linearized:
  if residual_fn is None:
    raise ValueError(
      "`gauss_newton` solves for the residuals, but `update` received no `residual_fn`. Pass "
      "`residual_fn=dpo.residuals((fn, *arrays))`, with `fn(params, *one_sample)`, or a function params ↦ r. If the "
      "loss is no sum over residuals, use `psgd(lr)` or `dpsgd(lr)`."
    )
  system = as_residuals(residual_fn)
  whole = getattr(system, "params", None)
  whole = params if whole is None else whole
  if whole is None:
    raise ValueError("`gauss_newton` linearizes at `params`, got None. Pass `params` to `update`.")
  if has_holes(whole):
    raise ValueError(
      "`gauss_newton` linearizes at all params, but here, inside `optax.partition` or `optax.masked`, they have holes. "
      "Pass `residual_fn=residuals.at(params)`, made outside, of the whole params."
    )
  given = system.linearize(block_of("gauss_newton", whole, updates))
  if given.loss is None and value_fn is not None:
    moved = lambda s: whole if s is None else stepped(whole, given.to_tree(s))
    given = given._replace(loss=lambda s: check_scalar(value_fn(moved(s))))
  return over_replicas(given)


def _check_agrees(agrees: Any, sound: Any) -> None:
  """Outside ``jit`` a mistake is an error; inside it is counted."""
  if not isinstance(agrees, jax.core.Tracer) and not isinstance(sound, jax.core.Tracer) and sound and not agrees:
    raise ValueError(
      "the gradient given to `gauss_newton` is not that of ½ Σ r²: they differ by more than a tenth. The weights "
      "belong into the residuals (1/√m for a mean over m samples, √2 if the loss has no ½), and nothing may change the "
      "gradient before. Type `loss = residuals.loss`."
    )


def _record(state: GaussNewtonState, rule: Rule, damping: Any, adapt: bool) -> tuple[Record, bool]:
  """λ of this step with what the last one said of it, and whether the loss is to judge it."""
  if damping is None and not adapt:
    damping = scheduled(rule.initial, state.count)
  here = state.damping if damping is None else jnp.asarray(damping, state.damping.dtype)
  return Record(here, state.ratio, state.actual, state.predicted), damping is None and adapt


def _first_state(damping: Any, params: Any, remembers: bool, solver: Any, key: jax.Array) -> GaussNewtonState:
  dtype = scalar_dtype(params)
  first = jnp.array(scheduled(damping, jnp.zeros((), jnp.int32)), dtype)
  ratio, actual, predicted = (jnp.zeros((), dtype) for _ in range(3))
  count, trials, rejected, skipped, mismatched = (jnp.zeros((), jnp.int32) for _ in range(5))
  wide = lambda x: jnp.zeros(jnp.shape(x), working_dtype(jnp.result_type(x)))
  last = jax.tree.map(wide, params) if remembers else ()
  numbers = count, first, ratio, actual, predicted, trials, rejected, skipped, mismatched
  return GaussNewtonState(*numbers, last, solver, key)


def _counts(state: GaussNewtonState, sound: Any, same: Any, lost: Any, tried: Any) -> dict[str, Any]:
  """The counters after a step that was ``sound`` or not, of the ``same`` loss, and ``lost`` on every trial."""
  return {
    "trials": state.trials + tried,
    "rejected": state.rejected + (sound & same & lost).astype(jnp.int32),
    "skipped": state.skipped + (~sound).astype(jnp.int32),
    "mismatched": state.mismatched + (sound & ~same).astype(jnp.int32),
  }


@static_arguments("solver", "acceleration", "tries", "adapt", "reject", "thresholds", "bounds", "max_bytes", "key")
def gauss_newton(
  learning_rate: optax.ScalarOrSchedule = 1.0,
  *,
  damping: Any = 1e-2,
  momentum: float | None = None,
  solver: solvers.Solver | None = None,
  acceleration: bool = True,
  adapt: bool = True,
  tries: int = 4,
  factor: float = 1 / 3,
  reject: bool = True,
  reject_factor: float | None = 4.0,
  thresholds: tuple[float, float] = (0.25, 0.75),
  bounds: tuple[float, float] = (1e-15, 1e10),
  max_bytes: float = 2**33,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """Gauss-Newton with a step that is solved, for losses ½ Σ r² and convex losses of outputs (:func:`residuals`).

  updates = −η (Jᵀ J + λI)⁻¹ Jᵀ r, with a λ that follows Levenberg and Marquardt. For small networks, whole data and
  no noise, where the last digits count: physics-informed networks, regression, neural quantum states.

  ``update(grads, state, params, residual_fn=residuals)``. The step comes from r, which keeps digits that the gradient
  has lost at a small λ; the gradient is compared with Jᵀ r, and a step where they differ is zeroed and counted
  (outside ``jit``: an error). The loss is that of the residuals, so that neither ``value`` nor ``value_fn`` is needed.

  A step on which the loss rises is tried again with more damping, without a new Jacobian: a trial costs one
  factorization and one pass of the loss. The model of the reduction, −⟨r, J s⟩ − ½‖J s‖², is exact.

  *Acceleration.* The residuals are followed along s to second order: a = −½ (Jᵀ J + λI)⁻¹ Jᵀ ∂²r(s, s) is added to the
  step, and a step with 2‖a‖ > 0.75 ‖s‖ counts as rejected. One more pass and solve, which pays
  where the residuals bend, as on physics-informed networks. Needs residuals with two forward-mode derivatives.

  Args:
    learning_rate: η, number or schedule. 1 is the full step.
    damping: λ, in loss / parameter²: the first one if ``adapt``, else a number or a schedule. The extra argument
      ``damping`` of ``update``, as :func:`dpsgd_optax.levenberg_marquardt` gives it, takes its place, and switches
      ``adapt`` off.
    momentum: ν in [0, 1), SPRING: s = argmin ‖J s + r‖² + λ ‖s − ν s₋‖², s₋ the last step. None: 0, and no state.
    solver: ``solvers.rows()``, ``columns()``, ``conjugate_gradients()``; None: rows for no more residuals than
      parameters, else columns. Static.
    acceleration: whether to follow the residuals to second order. Static.
    adapt: whether λ follows the loss; if not, each step is taken. Static.
    tries: the most trials of a step. Static.
    factor, reject, reject_factor, thresholds, bounds: as for :func:`dpsgd_optax.levenberg_marquardt`. With mini-batches
      the same batch judges.
    max_bytes: the most memory that the matrices may need; known from shapes, before anything is computed.
    key: of the probes of ``conjugate_gradients``.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``damping``, ``ratio``, ``trials``, ``rejected``,
    ``skipped`` and ``mismatched`` are read with ``optax.tree.get(state, name)``.

  Raises:
    ValueError: at construction for arguments outside their range; at trace time if ``residual_fn`` or ``params`` is
      missing, for residuals that are no floating-point array, and for matrices above ``max_bytes``.

  Source: Levenberg (1944), Marquardt (1963). Momentum: arXiv:2401.10190 (SPRING), for PINNs arXiv:2505.12149.
  Acceleration: Transtrum and Sethna, arXiv:1201.5885, Eqs. 4 to 7. Kernel form ``rows``: arXiv:2302.01941 (minSR).

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> x = jnp.linspace(0.0, 1.0, 20)
    >>> fit = dpo.residuals((lambda p, x, y: p["a"] * jnp.exp(p["b"] * x) - y, x, 2.0 * jnp.exp(-3.0 * x)))
    >>> params, tx = {"a": jnp.float32(1.0), "b": jnp.float32(0.0)}, dpo.gauss_newton()
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   value, grads = jax.value_and_grad(fit.loss)(params)
    ...   updates, state = tx.update(grads, state, params, residual_fn=fit)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(15):
    ...   params, state = train_step(params, state)
    >>> round(float(params["a"]), 4), round(float(params["b"]), 4)
    (2.0, -3.0)
  """
  check_learning_rate(learning_rate)
  check_fraction(momentum, "momentum")
  check_period(tries, "tries")
  rule = Rule(damping, factor, thresholds, bounds, reject, reject_factor)
  check_rule(rule, 1)
  if adapt and callable(damping):
    raise ValueError(
      "`damping` of `gauss_newton` is a schedule, but λ follows the loss. Type `adapt=False`, or a number."
    )
  key_data, generator = make_key(key)

  def init(params):
    check_automatic(params)
    check_floating(params)
    inner = () if solver is None else solver.init(params)
    return separate(_first_state(rule.initial, params, momentum is not None, inner, key_data()), params)

  def update(updates, state, params=None, *, residual_fn=None, value_fn=None, damping=None, **extra):
    del extra
    check_state(state, GaussNewtonState)
    check_automatic(updates)
    given = _linearized(residual_fn, updates, params, value_fn)
    if not given.size:
      return updates, state
    probe_key, _ = step_keys(state.key, generator, state.count)
    record, judged = _record(state, rule, damping, adapt and given.loss is not None)
    given, factorize, inner, scale = _chosen(solver, given, max_bytes).prepare(
      given, state.solver, record.damping, probe_key
    )
    sound = jnp.isfinite(scale) & all_finite((updates, given.residual, record.damping))
    same = agrees(updates, given, scale)
    _check_agrees(same, sound)
    nu = 0.0 if momentum is None else momentum
    options = Options(rule, judged, acceleration, tries, scheduled(learning_rate, state.count), nu)
    last = None if momentum is None else given.to_vector(state.momentum)
    step, new, lost, tried = taken_step(options, given, factorize, record, last, sound & same)
    taken = sound & same & ~lost
    moved = given.to_tree(jnp.where(taken, step, 0))
    kept = _counts(state, sound, same, lost, tried) | (new._asdict() if judged else {})
    if momentum is not None:
      kept["momentum"] = select(taken, cast_like(moved, state.momentum), state.momentum)
    inner = select(sound & all_finite(inner), inner, state.solver)
    count = optax.safe_increment(state.count)
    return cast_like(moved, updates), state._replace(count=count, solver=inner, **kept)

  return optax.GradientTransformationExtraArgs(init, update)
