# SPDX-License-Identifier: Apache-2.0
"""Batch normalization as a preconditioner: the gradient is normalized in place of the activations.

Notation
  h       input row of a layer, (d,), with mean μ and variance σ² by feature; a = Wᵀh + b
  G, G_b  gradient of W (d, k) and of b (k,)
  N       examples in the batch
  ρ       decay of the running statistics
  ε₁, ε₂  relative and absolute damping: σ̃² = σ² + ε₁ max_j σ_j² + ε₂
  q²      what is left of the size of the normalized inputs: 1/q² makes one learning rate serve all layers

With U = [[1, −μᵀ], [0, I]] on [b; W] and D = diag(1, 1/σ̃), the normalized extended inputs are [1, h] U D, so that
P = (1/q²) U D² Uᵀ is the squared change of variables of a normalized layer.

Source: Lange, Helfrich, Ye, arXiv:2108.01110, JMLR 23(72).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import mean_over_replicas, replica_axis
from dpsgd_optax.base import Preconditioner, check_fraction, check_not_negative
from dpsgd_optax.layers.find import Layer, without_embeddings
from dpsgd_optax.layers.moments import feature_moments
from dpsgd_optax.layers.record import LayerRecord, extent
from dpsgd_optax.preconditioners._per_layer import LayerMethod, per_layer, running_weight


class BatchNormState(NamedTuple):
  """Of one matrix [W; b]."""

  count: jax.Array  # (), int32, fits
  mean: jax.Array  # (d,), μ, in units of the inputs
  variance: jax.Array  # (d,), σ², in their squares; of a layer without bias the mean square E[h²]
  scale: jax.Array  # (), q²
  added: jax.Array  # (), ε₂


def expected_scale(width: int, examples: int, positions: int) -> float:
  """q² = max(d/N, positions): the order of the largest eigenvalue of the normalized second moment.

  A random N×d matrix of unit entries has its largest singular value below √N + √d. In a convolution the rows of one
  example add up over the output positions; the paper's own constant there is not known to us.
  """
  return max(width / examples, float(positions))


def batch_norm(
  *,
  decay: float = 0.9,
  relative_damping: float = 1e-2,
  q2: float | Callable[[int, int, int], float] = expected_scale,
  debias: bool = True,
  within_batch: bool = False,
  average_calls: bool = False,
  layers: Any = None,
) -> Preconditioner:
  """P = (1/q²) U D² Uᵀ on each layer, kernel and bias together: BNP. Memory: two vectors (inputs of a layer) each.

    G  ← (G − μ ⊗ G_b) / (q² σ̃²)          G_b ← G_b / q² − μᵀ G  (with the new G)

  With constant μ and σ this is the gradient step of the batch-normalized network, mapped back. The batch may have any
  size, one example included, since μ and σ² are running statistics. A layer without bias is not centred:
  G ← G / (q² σ̃²), with E[h²] for σ². A convolution has its statistics by channel, over batch and space. Embeddings,
  norm scales and other leaves that are no layer keep their updates. Until the first fit P = I.

  The damping λ of ``fit`` is ε₂, in squared units of the inputs.

  Args:
    decay: ρ, weight kept of the old statistics, in [0, 1); the paper's constant is 0.99 without ``debias``.
    relative_damping: ε₁ ≥ 0, relative to the largest variance of the layer: it lets in a condition number of 1/ε₁.
    q2: q², a number, or a function (d, N, output positions) → number of static sizes; 1 is the plain batch-norm step.
    debias: True: the statistics are plain means at first, and forget their start; False: they start at μ = 0 and
      σ² = 1 as in the paper, and the first 1/(1 − ρ) steps see little of the data. Static.
    within_batch: True: σ² averages the variances within each batch, as in the paper, zero for a batch of one. False:
      the variance about the running mean, which includes what differs between batches. Static.
    average_calls: accept layers that are called several times, with the mean of their statistics. Static.
    layers: see :func:`dpsgd_optax.least_squares`.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` for ``layer_inputs()``.

  Raises:
    ValueError: at construction, for a decay outside [0, 1) or a negative damping; at trace time, as for
      ``least_squares``, and for a shared layer.

  Source: arXiv:2108.01110, §3 (dense), §4 (convolutions).

  Example:
    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.scale_by_preconditioner(dpo.batch_norm(relative_damping=0.0), dpo.layer_inputs())
    >>> params = {"w": jnp.zeros((1, 1)), "b": jnp.zeros(1)}
    >>> x = jnp.array([[2.0], [6.0]])  # μ = 4, σ² = 4
    >>> grads = {"w": jnp.array([[8.0]]), "b": jnp.array([1.0])}
    >>> updates, _ = tx.update(grads, tx.init(params), params, layer_inputs={"w": x})
    >>> updates["w"].round(4), updates["b"].round(4)  # (8 − 4·1) / 4, 1 − 4·1
    (Array([[1.]], dtype=float32), Array([-3.], dtype=float32))
  """
  check_fraction(decay, "decay")
  check_not_negative(relative_damping, "relative_damping", "It is ε₁ of σ² + ε₁ max σ² + ε₂. Try 1e-2, or 0.")
  check_not_negative(None if callable(q2) else q2, "q2", "It divides the step. Try 1.")

  def init(layer: Layer) -> BatchNormState:
    mean, zero = jnp.zeros(layer.width, layer.dtype), jnp.zeros((), layer.dtype)
    return BatchNormState(jnp.zeros((), jnp.int32), mean, mean + 1, zero + 1, zero)

  def observe(layer: Layer, record: LayerRecord) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(μ, σ², q²) of one batch."""
    size = extent(record, layer.stack)
    if size.calls > 1 and not average_calls:
      raise ValueError(
        f"the layer {layer.name!r} is called {size.calls} times, and one normalization does not fit all of its "
        "calls. Type `average_calls=True` for the mean of their statistics."
      )
    mean, variance = feature_moments(record, layer.stack)
    if layer.bias is None:
      variance = variance + mean**2
    if replica_axis() is not None:
      own, mean = mean, mean_over_replicas(mean)
      variance = mean_over_replicas(variance if layer.bias is None else variance + (own - mean) ** 2)
    q = q2(layer.width, size.examples, size.positions) if callable(q2) else q2
    scale = jnp.broadcast_to(jnp.asarray(q, layer.dtype), layer.matrices)
    return mean.astype(layer.dtype), variance.astype(layer.dtype), scale

  def fit(layer: Layer, state: BatchNormState, seen: tuple, *, damping) -> BatchNormState:
    """μ ← μ + w (μ_B − μ), σ² ← (1 − w)(σ² + w (μ_B − μ)²) + w σ_B², w = (1 − ρ) or, debiased, (1 − ρ)/(1 − ρᵗ)."""
    w = running_weight(decay, state.count, layer.dtype) if debias else jnp.asarray(1 - decay, layer.dtype)
    mean, variance, scale = seen
    moved = mean - state.mean
    spread = 0 if within_batch or layer.bias is None else w * moved**2
    variance = (1 - w) * (state.variance + spread) + w * variance
    added = jnp.asarray(damping, layer.dtype)
    return BatchNormState(state.count + 1, state.mean + w * moved, variance, scale, added)

  def apply(layer: Layer, state: BatchNormState, x: jax.Array) -> jax.Array:
    variance = state.variance + relative_damping * jnp.max(state.variance) + state.added
    variance = jnp.where(variance > 0, variance, 1)  # of a constant input the centred gradient is zero, and stays it
    divisor = (state.scale * variance).astype(x.dtype)[:, None]
    if layer.bias is None:
      done = x / divisor
    else:
      g, bias = x[:-1], x[-1:]
      g = (g - state.mean[:, None] * bias) / divisor
      done = jnp.concatenate([g, bias / state.scale - state.mean[None] @ g])
    return jnp.where(state.count > 0, done, x)

  return per_layer(LayerMethod(init, observe, fit, apply), without_embeddings(layers))
