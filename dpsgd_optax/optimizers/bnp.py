# SPDX-License-Identifier: Apache-2.0
"""BNP: gradient descent preconditioned as batch normalization would. Notation as in `batch_norm`."""

from collections.abc import Callable
from typing import Any

import optax

from dpsgd_optax.base import check_fraction, check_learning_rate, check_not_negative
from dpsgd_optax.curvature.observers import layer_inputs
from dpsgd_optax.layers.find import without_embeddings
from dpsgd_optax.optimizers._fallback import with_fallback
from dpsgd_optax.preconditioners.batch_norm import batch_norm, expected_scale
from dpsgd_optax.transforms._control import keep_dtype, static_arguments
from dpsgd_optax.transforms.precondition import scale_by_preconditioner


@static_arguments("q2", "every", "fallback", "layers")
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
  layers: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Batch-normalization preconditioning: SGD whose gradients are normalized as batch norm would normalize activations.

  updates = −learning_rate · (momentum(P g) + weight_decay · θ), P = ``batch_norm(…)`` of each layer's inputs.

  For networks without batch normalization, at any batch size. ``update(grads, state, params, layer_inputs=inputs)``.
  Before another optimizer: ``optax.chain(scale_by_preconditioner(batch_norm(), layer_inputs()), optax.adam(1e-3))``.

  Args:
    learning_rate: number or schedule.
    damping: ε₂ ≥ 0, added to the variances, in squared units of the inputs.
    b1: momentum after P (heavy ball, as ``optax.sgd``'s); None: none.
    weight_decay: decoupled; None: none.
    every: period of the statistics, int or schedule.
    fallback: complete transform of the leaves that are no layer; None: vectors take the plain gradient, with momentum,
      decay and learning rate; a matrix that is no layer is an error.
    decay, relative_damping, q2, debias, within_batch, average_calls, layers: see :func:`dpsgd_optax.batch_norm`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: for a negative learning rate or damping, a decay outside [0, 1); at ``init`` as :func:`dpsgd_optax.gls`;
      at trace time as ``batch_norm``.

  Source: arXiv:2108.01110; as far as we know with ``decay=0.99, damping=1e-4, debias=False, within_batch=True``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> x, y = jnp.array([[100.0, 1.0], [101.0, 2.0], [102.0, 1.0]]), jnp.array([[1.0], [2.0], [3.0]])
    >>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2) / 2  # x is far from zero: hard for SGD
    >>> tx, params = dpo.bnp(1.0, relative_damping=0.0, damping=0.0), {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
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
  options = dict(debias=debias, within_batch=within_batch, average_calls=average_calls, layers=layers)
  p = batch_norm(decay=decay, relative_damping=relative_damping, q2=q2, **options)
  parts = [scale_by_preconditioner(p, layer_inputs(), every=every, damping=damping)]
  if b1 is not None:
    parts.append(keep_dtype(optax.trace(b1)))
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay)))
  tx = optax.chain(*parts, keep_dtype(optax.scale_by_learning_rate(learning_rate)))
  return with_fallback(tx, fallback, without_embeddings(layers), vectors=False)
