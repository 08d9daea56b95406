# SPDX-License-Identifier: Apache-2.0
"""DPSGD."""

from collections.abc import Callable

import jax
import optax

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Curvature, check_not_negative, check_period
from dpsgd_optax.curvature.observers import newton
from dpsgd_optax.geometry.moves import Geometry, Normalizer, quad, spectral
from dpsgd_optax.preconditioners.damped_kron import damped_kron
from dpsgd_optax.tikhonov import Average, Form, factored, undamped
from dpsgd_optax.transforms.clipping import clipped_learning_rate
from dpsgd_optax.transforms.injection import static_arguments
from dpsgd_optax.transforms.levenberg_marquardt import levenberg_marquardt
from dpsgd_optax.transforms.precondition import scale_by_preconditioner
from dpsgd_optax.transforms.reduction_models import newton_model


@static_arguments(
  "every",
  "key",
  "judge_every",
  "form",
  "geometry",
  "normalizer",
  "repeats",
  "curvature",
  "model",
  "max_size",
  "max_vector_size",
  "stacked",
  unless_given=("damping",),
)
def dpsgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  every: int | optax.Schedule = 1,
  average: float | Average | None = 0.7,
  eta: float = 1e-5,
  max_update_norm: float | None = None,
  key: int | jax.Array = 0,
  judge_every: int = 5,
  damping: float | None = 1.0,
  factor: float | None = None,
  max_damping: float | None = None,
  form: Form = factored,
  geometry: Geometry = quad,
  normalizer: Normalizer = spectral,
  step_size: float = 0.1,
  repeats: int = 1,
  curvature: Curvature | None = None,
  model: Callable = newton_model,
  reject: bool = False,
  max_size: float = 2048,
  max_vector_size: float | None = 1024,
  stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
  """Damped preconditioned SGD (not differentially private SGD): PSGD with damped, averaged Kronecker factors.

  Per step, for each weight matrix (names as in specs of the paper; T1 = ``every``, T2 = ``judge_every``):

    1. every T1 steps: V ~ N(0, I), HV; Q_L, Q_R move on (V, HV)                                (Eq. 49)
    2. Pbar ← β_t Pbar + (1 − β_t) QᵀQ,  β_t = min(t/(t+1), β)                                  (Eq. 47)
    3. U = (Pbar_L + √π c I) G (Pbar_R + c/√π I),  c = √(τ + η)                                 (Eq. 46)
    4. θ ← θ − a U,  a = α min(ν/‖U‖, 1)                                                        (Eq. 48)
    5. every T2 steps: M = a (1 − a/2) Σ⟨G, U⟩, and τ ← ω τ where J(θ) − J(θ′) > ¾ M, τ ← τ/ω where it is < ¼ M,
       kept in [η, τ_max]                                                                       (Eqs. 29 to 33)

  Here ω > 1: τ shrinks after a poor step. The paper has ω = (19/20)^T2 < 1, the rule of Levenberg and Marquardt, whose
  damping shortens the step; but more τ is a *longer* step, so that τ then climbs to its ceiling just where steps are
  poor, and stays there. In the setting of the paper this does no harm on LeNet-5 and digits, but on the addition RNN
  the target is reached on one seed of three, with the rule turned round on all of them; the README has the figures.
  ``factor=(19 / 20) ** judge_every`` is the paper's.

  Two dampings exist. This τ damps the *factors*: more of it makes the step longer and more gradient-like. (Damping the
  *curvature*, as ``levenberg_marquardt(psgd(…, curvature=newton()))`` does, makes it shorter.)

  ``update(grads, state, params, value=loss_value, value_fn=loss, hvp=hvp(loss, params))``. ``hvp`` may be left out: it
  is then made from ``value_fn``; ``value_fn`` may be left out: steps are then judged by the ``value`` of the next call.
  ``refresh`` and ``judge``: static overrides of T1 and T2 for a host loop (see ``training.host_cadence``). Under
  ``pmap`` and ``shard_map`` wrap the optimizer in :func:`dpsgd_optax.data_parallel`.

  Args:
    learning_rate: α, number or schedule.
    every: T1, the period of the fits.
    average: β, the largest weight of the old average, in [0, 1); None: no averaging; ``two_tap(new, old)``: the mix of
      the thesis.
    eta: η, added to τ under the root, and the least τ.
    max_update_norm: ν, the largest norm of U; None: 0.1 √N, N the number of parameters; ``jnp.inf``: no clipping.
    key: int or PRNG key of the probes.
    judge_every: T2, the period of the Levenberg-Marquardt rule.
    damping: τ_0; None: the factors are not damped, nothing is judged, and the optimizer is (averaged) PSGD.
    factor: ω; None: (20/19)^T2.
    max_damping: τ_max; None: τ_0. A larger one can run away: more τ is a longer step is a worse ratio is more τ.
    form: ``factored`` (Eq. 46) or ``additive`` (Eq. 36).
    geometry: how the factors move; the paper's is ``eq``.
    normalizer: ``spectral``; the paper's runs used ``max_abs`` with ``step_size=0.01``.
    step_size: μ of the factors, in (0, 1].
    repeats: moves per probe.
    curvature: what the factors are fitted on; None: ``newton()``. Static.
    model: predicted reduction: ``newton_model`` (the paper's, for the step really taken), ``half_slope``,
      ``quadratic_model``.
    reject: zero a judged step on which the loss rose, and turn τ down.
    max_size: a longer side of a matrix gets a diagonal factor. Static.
    max_vector_size: longer vectors get a diagonal factor; None: vectors take the plain gradient. Static.
    stacked: leaves that hold a stack of layers, see :func:`dpsgd_optax.per_leaf`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``damping`` (τ), ``ratio``, ``predicted``,
    ``actual``, ``rate`` (a), ``skipped`` and ``fits`` are read with ``optax.tree.get(state, name)``.

  Raises:
    ValueError: at construction, for any argument outside its range; at trace time, for missing extra arguments.

  Departure from the paper: ω, as said above. Departures from the author's code, each in favour of the paper: the ratio
  is signed and summed over all layers, with the model of the clipped step; τ cannot freeze at its floor or run away;
  the averages are what is applied; the step is clipped once.

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
    >>> bool(loss(params) < 1e-6), bool(optax.tree.get(state, "damping") < 1.0)
    (True, True)
  """
  check_period(judge_every, "judge_every")
  check_not_negative(damping, "damping", "It is τ_0. Try 1.0, or None for undamped factors.")
  p = damped_kron(
    average=average,
    eta=eta,
    form=undamped if damping is None else form,
    geometry=geometry,
    normalizer=normalizer,
    step_size=step_size,
    repeats=repeats,
    max_size=max_size,
    max_vector_size=max_vector_size,
    stacked=stacked,
  )
  inner = optax.chain(
    scale_by_preconditioner(p, newton() if curvature is None else curvature, every=every, key=key),
    clipped_learning_rate(learning_rate, max_update_norm),
  )
  if damping is None:
    return optax.with_extra_args_support(inner)
  omega = (20 / 19) ** judge_every if factor is None else factor
  return levenberg_marquardt(
    inner,
    damping=damping,
    factor=omega,
    bounds=(eta, damping if max_damping is None else max_damping),
    every=judge_every,
    model=model,
    reject=reject,
    reject_factor=(19 / 20) ** judge_every,
  )
