# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers: chains of the parts, nothing new."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dpsgd_optax.base import (
  Curvature,
  Preconditioner,
  check,
  check_fraction,
  check_learning_rate,
  check_not_negative,
  check_period,
  forward_extra_args,
)
from dpsgd_optax.clipping import clip_matrices, clip_spikes
from dpsgd_optax.curvature import layer_inputs, newton, whitening
from dpsgd_optax.damping import levenberg_marquardt, newton_model
from dpsgd_optax.injection import static_arguments
from dpsgd_optax.layer_steps import Match, clip_output_change, matched_length
from dpsgd_optax.preconditioners._geometry import Geometry, Normalizer, quad, spectral
from dpsgd_optax.preconditioners._layers import from_outputs as through_outputs
from dpsgd_optax.preconditioners._layers import per_layer, with_fallback, without_embeddings
from dpsgd_optax.preconditioners._lift import Stacked
from dpsgd_optax.preconditioners.batch_norm import batch_norm, expected_scale
from dpsgd_optax.preconditioners.damped_kron import Average, Form, damped_kron, factored, undamped
from dpsgd_optax.preconditioners.kron import kron
from dpsgd_optax.preconditioners.least_squares import group as least_squares_group
from dpsgd_optax.transform import (
  annealed_probability,
  clipped_learning_rate,
  keep_dtype,
  plain,
  scale_by_preconditioner,
)


@static_arguments("preconditioner", "curvature", "every", "key", "mask")
def psgd(
  learning_rate: optax.ScalarOrSchedule,
  preconditioner: Preconditioner | None = None,
  curvature: Curvature | None = None,
  *,
  every: int | optax.Schedule | None = None,
  b1: float | None = None,
  weight_decay: float | None = None,
  damping: Any = 1e-9,
  key: int | jax.Array = 0,
  mask: Any = None,
  clip: float | optax.GradientTransformation | None = 2.0,
  max_jump: float | None = 4.0,
) -> optax.GradientTransformationExtraArgs:
  """Preconditioned SGD: any group, any criterion. With the defaults a drop-in for Adam that needs no extra argument.

  updates = −learning_rate · (clip(P m) + weight_decay · θ), m the gradient or its running mean, P fitted to gradients.

  The preconditioned gradient has entries of the order of 1, as Adam's has, so Adam's learning rate, or a third of it,
  is where to start. With ``newton()`` it is a Newton step, with rates of 0.02 to 0.1; each matrix is clipped to a root
  mean square of 2, which at 0.1 may still move every weight of a young ReLU network by 0.2 and stop it for good, as on
  LeNet-5 (benchmarks/results/lenet-trial.json).

  Args:
    learning_rate: number or schedule.
    preconditioner: ``kron()`` if None. Static.
    curvature: ``whitening()`` if None; ``newton()`` needs ``hvp=`` in ``update``. Static.
    every: fit on every ``every``-th step, or a schedule count → probability; None: ``annealed_probability()``, every
      step at first and one in 33 in the end. Static under ``optax.inject_hyperparams`` if it is a schedule. Of the
      schedules of ``python -m benchmarks defaults`` those that fit seldom from the start end higher at equal steps.
    b1: weight kept by the running mean of the gradients (debiased, as Adam's); P is fitted on the raw gradients.
      None: no momentum, and none in the state.
    weight_decay: decoupled, as in AdamW; None: none.
    damping: λ ≥ 0 of the curvature: P ≤ 1/λ.
    key: int or PRNG key of the probes. Static.
    mask: which leaves decay, as for ``optax.add_decayed_weights``. Static.
    clip: the largest root mean square of a preconditioned matrix (of each layer of a stack, of each block, if the
      preconditioner has such), whose entries are cut to 10 times that before; or an optax transform in its place, such
      as ``optax.clip_by_global_norm(1.0)``; None: no clipping.
    max_jump: a gradient longer than so many times the running mean of the lengths is shortened before momentum and fit
      see it (:func:`dpsgd_optax.clip_spikes`); None: never.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Every number may be a schedule or set while
    training by ``optax.inject_hyperparams(dpsgd_optax.psgd)(…)``.

  Raises:
    ValueError: for a negative learning rate, damping or weight decay, ``b1`` outside [0, 1), a ``clip`` that is not
      positive, or a ``max_jump`` of 1 or below.

  Source: arXiv:2402.04553, arXiv:2402.11858. The paper's own PSGD, as it is compared with DPSGD, is
  ``dpsgd(…, damping=None, average=None)``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss = lambda p: jnp.sum((p["w"] @ jnp.array([[1.0], [10.0]]) - 1.0) ** 2)
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> tx = dpo.psgd(learning_rate=1e-3, b1=0.9)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(300):
    ...   params, state = train_step(params, state)
    >>> bool(loss(params) < 1e-3)
    True
  """
  check_learning_rate(learning_rate)
  check_not_negative(weight_decay, "weight_decay", "Try 1e-4, or None.")
  check_fraction(b1, "b1")
  check(
    lambda x: x > 0, clip, "clip", "positive, an optax transform, or None", "The default is 2.0; None: no clipping."
  )
  p = kron() if preconditioner is None else preconditioner
  parts = [
    scale_by_preconditioner(
      p,
      whitening() if curvature is None else curvature,
      every=annealed_probability() if every is None else every,
      damping=damping,
      before=None if max_jump is None else clip_spikes(max_jump, matrices=p.matrices),
      momentum=None if b1 is None else optax.ema(b1),
      key=key,
    )
  ]
  if clip is not None:
    parts.append(forward_extra_args(clip) if hasattr(clip, "init") else clip_matrices(clip, p.matrices))
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay, mask)))
  return optax.with_extra_args_support(optax.chain(*parts, keep_dtype(optax.scale_by_learning_rate(learning_rate))))


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


@static_arguments("q2", "every", "fallback", "axis_name", "layers")
def bnp(
  learning_rate: optax.ScalarOrSchedule,
  *,
  decay: float = 0.9,
  damping: Any = 1e-3,
  relative_damping: float = 1e-2,
  q2: float | Callable[[int, int, int], float] = expected_scale,
  b1: float | None = None,
  weight_decay: float | None = None,
  every: int | optax.Schedule = 1,
  fallback: optax.GradientTransformation | None = None,
  debias: bool = True,
  within_batch: bool = False,
  average_calls: bool = False,
  axis_name: Any = None,
  layers: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Batch-normalization preconditioning: SGD whose gradients are normalized as batch norm would normalize activations.

  updates = −learning_rate · (momentum(P g) + weight_decay · θ), P = ``batch_norm(…)`` of each layer's inputs.

  For networks without batch normalization, at any batch size. ``update(grads, state, params, layer_inputs=inputs)``.
  Other base optimizers: ``optax.chain(scale_by_preconditioner(batch_norm(), layer_inputs()), optax.adam(1e-3))``, and
  likewise with ``psgd(…)`` after it.

  Args:
    learning_rate: number or schedule.
    decay: ρ of the running statistics, in [0, 1).
    damping: ε₂ ≥ 0, added to the variances, in squared units of the inputs.
    relative_damping: ε₁ ≥ 0, in units of the largest variance of the layer.
    q2: q², a number or a function (inputs, batch size, output positions) → number; 1 is the plain batch-norm step.
    b1: momentum after P (heavy ball, as ``optax.sgd``'s); None: none.
    weight_decay: decoupled; None: none.
    every: period of the statistics, int or schedule.
    fallback: complete transform of the leaves that are no layer; None: they take the plain gradient, like the rest
      with momentum, decay and learning rate. A matrix that is no layer then is an error.
    debias, within_batch, average_calls, axis_name, layers: see :func:`dpsgd_optax.batch_norm`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for a negative learning rate or damping, a decay outside [0, 1); at trace time as ``batch_norm``.

  Source: arXiv:2108.01110. Its constants, as far as we know them, are ``decay=0.99, damping=1e-4, debias=False,
  within_batch=True``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> x = jnp.array([[100.0, 1.0], [101.0, 2.0], [102.0, 1.0]])  # far from zero: hard for SGD
    >>> y = jnp.array([[1.0], [2.0], [3.0]])
    >>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2) / 2
    >>> params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
    >>> tx = dpo.bnp(1.0, relative_damping=0.0, damping=0.0)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params, layer_inputs={"w": x})
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(10):
    ...   params, state = train_step(params, state)
    >>> bool(loss(params) < 1e-6)
    True
  """
  check_learning_rate(learning_rate)
  check_not_negative(damping, "damping", "It is ε₂ of σ² + ε₁ max σ² + ε₂. Try 1e-3.")
  check_not_negative(weight_decay, "weight_decay", "Try 1e-4, or None.")
  check_fraction(b1, "b1")
  p = batch_norm(
    decay=decay,
    relative_damping=relative_damping,
    q2=q2,
    debias=debias,
    within_batch=within_batch,
    average_calls=average_calls,
    axis_name=axis_name,
    layers=layers,
  )
  parts = [scale_by_preconditioner(p, layer_inputs(), every=every, damping=damping)]
  if b1 is not None:
    parts.append(keep_dtype(optax.trace(b1)))
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay)))
  tx = optax.chain(*parts, keep_dtype(optax.scale_by_learning_rate(learning_rate)))
  return with_fallback(tx, fallback, without_embeddings(layers), vectors=False)


@static_arguments("match", "every", "fallback", "max_size", "axis_name", "layers")
def gls(
  learning_rate: optax.ScalarOrSchedule,
  *,
  decay: float | None = 0.95,
  damping: Any = 0.1,
  match: Match | None = None,
  max_output_change: float | None = None,
  output_damping: float | None = None,
  b1: float | None = None,
  weight_decay: float | None = None,
  every: int | optax.Schedule = 1,
  fallback: optax.GradientTransformation | None = None,
  from_outputs: bool = False,
  max_size: float = 8192,
  axis_name: Any = None,
  layers: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Layerwise generalized least squares: gradient descent on the outputs of each layer, solved for its weights.

  updates = −learning_rate · (P m + weight_decay · θ), P = (S + λI)⁻¹ of the inputs of each layer (``least_squares``),
  m the gradient or its running mean. ``update(grads, state, params, layer_inputs=inputs)``.

  First order, no second derivatives: what it adds to SGD is the least-squares solve. A learning rate of 1 is the full
  step, which for a linear network of one layer with squared loss solves the problem; 0.1 to 0.4 is where to start for
  deep ones. A mean over output elements in the loss makes the step smaller by as much: use the sum, or a larger rate.

  Its weakness is a layer that is wider than what enters it, as in an autoencoder: its neurons move together, and the
  outputs further on change more than was asked for. ``max_output_change=0.1`` and ``output_damping=0.1`` together mend
  it best; the first costs a product, the second needs ``capture(loss, gradients=True)``. On a deep autoencoder of the
  digits the plain form takes a rate of 0.05 at most, and with them one of 0.2 (``python -m benchmarks gls``).

  Args:
    learning_rate: η, number or schedule.
    decay: weight kept of the old second moments, in [0, 1); None: of this batch only (see ``least_squares`` for the
      dual form).
    damping: λ ≥ 0 relative to the mean eigenvalue of S; 0.01 is faster and over-fits sooner.
    match: ``match_layers`` or ``match_total``: rescale P m to the length of m, so that the learning rate means what it
      does for SGD; None: not.
    max_output_change: largest relative change of the outputs of a layer in one step (``clip_output_change``); None:
      any.
    output_damping: ρ of the output side (``least_squares``); None: no output side.
    b1: weight kept by the running mean of the gradients, before P; None: none.
    weight_decay: decoupled; None: none.
    every: S is averaged and factorized on every ``every``-th step; int or schedule. The older S, the shorter the steps
      that it bears: on digits the best rate is 0.8 with ``every=1`` and 0.1 with 5 (``python -m benchmarks gls``).
    fallback: complete transform, with its learning rate, of the leaves that are no layer (norm scales, embeddings, …);
      None: there are none, else an error names them.
    from_outputs: compute P g = P ÃᵀE as (P Ãᵀ) E from the recorded output gradients E. The product that makes g is then
      left out, and a step with ``decay=None`` costs 1.2 to 1.4 steps of Adam on MLPs with batches of 128
      (``python -m benchmarks gls``). Needs ``capture(loss, gradients=True)``, ``b1=None``, with ``decay=None``
      ``every=1``, no ``axis_name`` and no ``data_parallel``, and nothing before it that changes the gradient (clipping,
      say), which would not be seen. Static.
    max_size, axis_name, layers: see :func:`dpsgd_optax.least_squares`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``levenberg_marquardt(gls(…))`` adapts λ.

  Raises:
    ValueError: for a negative learning rate or damping, a decay outside [0, 1); at ``init`` for leaves without layer or
      fallback; at trace time as ``least_squares``.

  Source: named after a note by E. Fagnou, whose rule is not published; defined here as the method that fits its
  description, arXiv:2201.12250 (FOOF) with damping relative to the trace.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) * 10.0 ** jnp.linspace(-1, 1, 8)
    >>> y = jnp.sin(x[:, :1])
    >>> def loss(p):
    ...   h = jnp.tanh(x @ p[0]["w"] + p[0]["b"])
    ...   return jnp.mean((h @ p[1]["w"] + p[1]["b"] - y) ** 2), [x, h]
    >>> keys = jax.random.split(jax.random.key(1))
    >>> shapes = [(8, 16), (16, 1)]
    >>> params = [{"w": 0.3 * jax.random.normal(k, s), "b": jnp.zeros(s[1])} for k, s in zip(keys, shapes)]
    >>> tx = dpo.gls(0.3)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   (value, inputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
    ...   updates, state = tx.update(grads, state, params, layer_inputs=inputs)
    ...   return optax.apply_updates(params, updates), state, value
    >>> for _ in range(100):
    ...   params, state, value = train_step(params, state)
    >>> bool(value < 0.05)
    True
  """
  check_learning_rate(learning_rate)
  check_not_negative(damping, "damping", "It is relative to the mean eigenvalue of the inputs' second moment. Try 0.1.")
  check_not_negative(weight_decay, "weight_decay", "Try 1e-4, or None.")
  check_fraction(b1, "b1")
  if from_outputs and (b1 is not None or axis_name is not None or (decay is None and every != 1)):
    raise ValueError(
      f"`from_outputs` makes the step from the output gradients of this batch, got b1={b1}, every={every}, "
      f"axis_name={axis_name}: there is no averaged gradient to precondition, with `decay=None` no older fit to use, "
      "and no sum over devices. Type `b1=None` (and put `optax.trace` after it), `every=1`, `axis_name=None`."
    )
  group = least_squares_group(decay=decay, output_damping=output_damping, max_size=max_size, axis_name=axis_name)
  direction = through_outputs(group, layers) if from_outputs else plain
  parts = [
    scale_by_preconditioner(
      per_layer(group, layers),
      layer_inputs(),
      every=every,
      damping=damping,
      momentum=None if b1 is None else optax.ema(b1),
      direction=direction if match is None else matched_length(match, layers, direction),
    )
  ]
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay)))
  parts.append(keep_dtype(optax.scale_by_learning_rate(learning_rate)))
  if max_output_change is not None:
    parts.append(clip_output_change(max_output_change, layers=layers))
  core = optax.chain(*parts)
  if from_outputs and decay is None:
    core = _fitted_always(core)
  return with_fallback(core, fallback, layers, vectors=True)


def _fitted_always(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """``tx`` whose every step fits, whatever ``refresh`` says, in no ``lax.cond``."""

  def update(updates, state, params=None, *, refresh=None, **extra):
    del refresh
    return tx.update(updates, state, params, refresh=True, **extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)
