# SPDX-License-Identifier: Apache-2.0
"""GLS: gradient descent on the outputs of each layer. Notation as in `least_squares`."""

from typing import Any

import optax

from dpsgd_optax.base import check_fraction, check_learning_rate, check_not_negative
from dpsgd_optax.curvature.observers import layer_inputs
from dpsgd_optax.layers.step_length import Match, clip_output_change, rescaled_direction
from dpsgd_optax.optimizers._fallback import with_fallback
from dpsgd_optax.preconditioners._from_outputs import check_from_outputs, fitted_always, step_from_outputs
from dpsgd_optax.preconditioners._per_layer import per_layer
from dpsgd_optax.preconditioners.least_squares import least_squares_method
from dpsgd_optax.transforms._control import keep_dtype, static_arguments
from dpsgd_optax.transforms.precondition import scale_by_preconditioner


@static_arguments("match", "every", "fallback", "max_size", "layers")
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
  layers: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Layerwise generalized least squares: gradient descent on the outputs of each layer, solved for its weights.

  updates = −learning_rate · (P m + weight_decay · θ), P = (S + λI)⁻¹ of the inputs of each layer (``least_squares``),
  m the gradient or its running mean. ``update(grads, state, params, layer_inputs=inputs)``.

  First order, no second derivatives: what it adds to SGD is the least-squares solve. A learning rate of 1 is the full
  step, which solves a linear network of one layer with the loss ½‖z − y‖². Deep networks need less: start with 0.1, on
  small ones with 0.05, and raise it while the loss falls; 0.3 may diverge. The rate is for a sum over the outputs, with
  the ½: a mean over them shortens the step by as much, and without the ½ it is twice as long.

  Its weakness is a layer that is wider than what enters it, as in an autoencoder: its neurons move together, and change
  the outputs further on more than was asked for. ``max_output_change=0.1`` and ``output_damping=0.1`` together mend it
  best: on a deep autoencoder of the digits the largest rate rises from 0.05 to 0.2 (``python -m benchmarks gls``).

  Args:
    learning_rate: η, number or schedule.
    damping: λ ≥ 0 relative to the mean eigenvalue of S; 0.01 is faster and over-fits sooner.
    match: ``match_layers`` or ``match_total`` give P m the length of m, so that SGD's learning rates serve; None: not.
    max_output_change: largest relative change of a layer's outputs in one step (``clip_output_change``); None: any.
    b1: weight kept by the running mean of the gradients, before P; None: none.
    weight_decay: decoupled; None: none.
    every: period of the averages and factorizations of S; int or schedule. The older S, the shorter the steps that it
      bears: on digits the best rate is 0.8 with ``every=1`` and 0.1 with 5 (``python -m benchmarks gls``).
    fallback: complete transform, with its learning rate, of the leaves that are no layer (norm scales, embeddings, …);
      None: there are none, else an error names them.
    from_outputs: compute P g = P ÃᵀE as (P Ãᵀ) E from the recorded output gradients E, without the product that is g.
      With ``decay=None`` a step costs 1.2 to 1.4 steps of Adam on MLPs with batches of 128 (``python -m benchmarks
      gls``). Needs ``capture(loss, gradients=True)``, ``b1=None``, with ``decay=None`` ``every=1``, and no
      ``data_parallel``. What changes the gradient before it (clipping, say) is not seen. Static.
    decay, output_damping, max_size, layers: see :func:`dpsgd_optax.least_squares`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. ``levenberg_marquardt(gls(…))`` adapts λ.

  Raises:
    ValueError: for a negative learning rate or damping, a decay outside [0, 1); at ``init`` for leaves without layer or
      fallback, and for ``layers`` that hold none of them; at trace time as ``least_squares``.

  Source: arXiv:2201.12250 (FOOF), damped relative to the trace. It fits a note by E. Fagnou, whose GLS is unpublished.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) * 10.0 ** jnp.linspace(-1, 1, 8)
    >>> y = jnp.sin(x[:, :1])
    >>> def loss(p):
    ...   h = jnp.tanh(x @ p[0]["w"] + p[0]["b"])
    ...   return jnp.mean((h @ p[1]["w"] + p[1]["b"] - y) ** 2), [x, h]
    >>> layer = lambda i, *shape: {"w": 0.3 * jax.random.normal(jax.random.key(i), shape), "b": jnp.zeros(shape[1])}
    >>> params, tx = [layer(1, 8, 16), layer(2, 16, 1)], dpo.gls(0.2)
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
  method = least_squares_method(decay=decay, output_damping=output_damping, max_size=max_size)
  direction = None
  if from_outputs:
    check_from_outputs(b1, every, decay)
    direction = step_from_outputs(method, layers)
  if match is not None:
    direction = rescaled_direction(match, layers, direction)
  p, momentum = per_layer(method, layers), None if b1 is None else optax.ema(b1)
  options = dict(every=every, damping=damping, momentum=momentum, direction=direction)
  parts = [scale_by_preconditioner(p, layer_inputs(), **options)]
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay)))
  parts.append(keep_dtype(optax.scale_by_learning_rate(learning_rate)))
  if max_output_change is not None:
    parts.append(clip_output_change(max_output_change, layers=layers))
  core = optax.chain(*parts)
  if from_outputs and decay is None:
    core = fitted_always(core)
  return with_fallback(core, fallback, layers, vectors=True)
