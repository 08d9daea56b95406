# SPDX-License-Identifier: Apache-2.0
"""GLS."""

from typing import Any

import optax

from dpsgd_optax.base import check_fraction, check_learning_rate, check_not_negative
from dpsgd_optax.curvature.observers import layer_inputs
from dpsgd_optax.layers.step_length import Match, clip_output_change, matched_length
from dpsgd_optax.optimizers._fallback import with_fallback
from dpsgd_optax.optimizers.bnp import _fitted_always
from dpsgd_optax.preconditioners._from_outputs import from_outputs as through_outputs
from dpsgd_optax.preconditioners._per_layer import per_layer
from dpsgd_optax.preconditioners.least_squares import group as least_squares_group
from dpsgd_optax.transforms._control import keep_dtype, static_arguments
from dpsgd_optax.transforms.precondition import scale_by_preconditioner


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
  direction = through_outputs(group, layers) if from_outputs else None
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
