# SPDX-License-Identifier: Apache-2.0
"""DPSGD: damped, averaged Kronecker factors, their damping chosen by Levenberg and Marquardt's rule."""

from collections.abc import Callable

import jax
import optax

from dpsgd_optax.base import Curvature, Preconditioner, check_not_negative, check_period, is_static
from dpsgd_optax.curvature.observers import newton
from dpsgd_optax.preconditioners.damped_kron import damped_kron
from dpsgd_optax.transforms._control import static_arguments
from dpsgd_optax.transforms.clipping import clipped_learning_rate
from dpsgd_optax.transforms.levenberg_marquardt import levenberg_marquardt
from dpsgd_optax.transforms.precondition import scale_by_preconditioner
from dpsgd_optax.transforms.reduction_models import newton_model


@static_arguments(
  "preconditioner", "curvature", "every", "key", "judge_every", "bounds", "model", unless_given=("damping",)
)
def dpsgd(
  learning_rate: optax.ScalarOrSchedule,
  preconditioner: Preconditioner | None = None,
  curvature: Curvature | None = None,
  *,
  every: int | optax.Schedule = 5,
  max_update_norm: float | None = None,
  key: int | jax.Array = 0,
  judge_every: int = 5,
  damping: float | None = 1.0,
  factor: float | None = None,
  bounds: tuple[float, float] | None = None,
  model: Callable = newton_model,
  reject: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Damped preconditioned SGD (not differentially private SGD): PSGD with damped, averaged Kronecker factors.

  Per step, for each weight matrix (names as in the paper; T1 = ``every``, T2 = ``judge_every``):

    1. every T1 steps: V ~ N(0, I), HV; Q_L, Q_R move on (V, HV)                                (Eq. 49)
    2. Pbar ← β_t Pbar + (1 − β_t) QᵀQ,  β_t = min(t/(t+1), β)                                  (Eq. 47)
    3. U = (Pbar_L + √π c I) G (Pbar_R + c/√π I),  c = √(τ + η)                                 (Eq. 46)
    4. θ ← θ − a U,  a = α min(ν/‖U‖, 1)                                                        (Eq. 48)
    5. every T2 steps: M = a (1 − a/2) Σ⟨G, U⟩, and τ ← ω τ where J(θ) − J(θ′) > ¾ M, τ ← τ/ω where it is < ¼ M,
       kept in [η, τ_max]                                                                       (Eqs. 29 to 33)

  τ damps the *factors*: more of it makes the step longer and more gradient-like. (Damping the *curvature*, as
  ``levenberg_marquardt(psgd(…, curvature=newton()))`` does, makes it shorter.) So ω > 1 here: a poor step lowers τ.
  The paper has ω = (19/20)^T2 < 1, type ``factor=(19 / 20) ** judge_every``. A poor step then raises τ, which lengthens
  the next one, until τ stands at its ceiling; on the addition RNN this misses the target on some seeds (RESULTS.md).

  ``update(grads, state, params, value=loss_value, value_fn=loss, hvp=hvp(loss, params))``. Without ``hvp`` the product
  is made from ``value_fn``; without ``value_fn`` a step is judged by the ``value`` of the next call. ``refresh`` and
  ``judge`` override T1 and T2 from a host loop (see ``training.host_cadence``). Under ``pmap`` and ``shard_map`` wrap
  the optimizer in :func:`dpsgd_optax.data_parallel`.

  Args:
    learning_rate: α, number or schedule.
    preconditioner: None: :func:`dpsgd_optax.damped_kron`, whose arguments say how the factors move, are averaged (β),
      damped (η, Eq. 36 or 46) and laid out. Static.
    curvature: what the factors are fitted on; ``newton()`` if None. Static.
    every, key: T1, and the key of the probes: see :func:`dpsgd_optax.scale_by_preconditioner`. The paper fits on every
      step; on every fifth the same time has room for twice the steps (``python -m benchmarks clock digits``). A
      schedule such as :func:`dpsgd_optax.annealed_probability` fits often at first and rarely in the end.
    max_update_norm: ν, the largest norm of U, as ``max_norm`` of :func:`dpsgd_optax.clipped_learning_rate`.
    judge_every: T2, the period of the Levenberg-Marquardt rule.
    damping: τ_0; None: the factors are not damped, nothing is judged, and the optimizer is (averaged) PSGD.
    factor: ω; None: (20/19)^T2.
    bounds: the least and the largest τ; None: 1e-5, which is η, and τ_0. With ``factor`` < 1 a larger ceiling can run
      away: more damping lengthens the step, which worsens the ratio, which raises the damping.
    model, reject: see :func:`dpsgd_optax.levenberg_marquardt`; a rejected step turns τ down.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``damping`` (τ), ``ratio``, ``predicted``,
    ``actual``, ``rate`` (a), ``skipped`` and ``fits`` are read with ``optax.tree.get(state, name)``.

  Raises:
    ValueError: at construction, for any argument outside its range; at trace time, for missing extra arguments.

  Departures from the paper: ω, as said above; the defaults of T1, β and the step of the factors, which are those of the
  paper with ``dpsgd(α, damped_kron(average=0.7, step_size=0.1), every=1)``. Departures from the author's code, in
  favour of the paper: the ratio is signed and summed over all layers, with the model of the clipped step; τ cannot
  freeze at its floor or run away; the averages are what is applied; the step is clipped once.

  Source: M. U. Qadeer, Damped Preconditioned Stochastic Gradient Descent (code: usmanqadeer1/DPSGD, DPSGD_2).

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss = lambda p: jnp.mean((p["w"] @ jnp.array([[0.1], [1.0]]) - 1.0) ** 2)
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> tx = dpo.dpsgd(learning_rate=0.2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   value, grads = jax.value_and_grad(loss)(params)
    ...   updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(100):
    ...   params, state = train_step(params, state)
    >>> bool(loss(params) < 1e-6), bool(optax.tree.get(state, "damping") <= 1.0)
    (True, True)
  """
  check_period(judge_every, "judge_every")
  check_not_negative(damping, "damping", "It is τ_0. Try 1.0, or None for undamped factors.")
  inner = optax.chain(
    scale_by_preconditioner(
      damped_kron() if preconditioner is None else preconditioner,
      newton() if curvature is None else curvature,
      every=every,
      damping=None,
      key=key,
    ),
    clipped_learning_rate(learning_rate, max_update_norm),
  )
  if damping is None:
    return inner
  least = min(1e-5, damping) if is_static(damping) else 1e-5
  return levenberg_marquardt(
    inner,
    damping=damping,
    factor=(20 / 19) ** judge_every if factor is None else factor,
    bounds=(least, damping) if bounds is None else bounds,
    every=judge_every,
    model=model,
    reject=reject,
    reject_factor=(19 / 20) ** judge_every,
  )
