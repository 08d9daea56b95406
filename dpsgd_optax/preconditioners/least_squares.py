# SPDX-License-Identifier: Apache-2.0
"""Layerwise least squares: the gradient of each layer divided by the second moment of what enters it.

Notation
  x̃      [x, 1], an input row of a layer with a bias; x of one without; (d,)
  Ã       the rows of a batch, (R, d); n examples
  W̃       kernel and bias as a matrix [W; b], (d, k);  g its gradient
  E       neuron gradients, n · dloss/d(output): g = ÃᵀE / n
  S       second moment Ãᵀ Ã / n, averaged over batches
  C       second moment of the rows of E, averaged, with mean eigenvalue 1
  λ, ρ    damping relative to the mean eigenvalue tr S / d, and of C

The step D = −η (S + λI)⁻¹ g is the weight change whose effect on the outputs is nearest to a gradient step on the
outputs,
  D = argmin ‖ÃD + ηE‖² / n + λ ‖D‖²,
gradient descent on neurons (FOOF, arXiv:2201.12250), one sided K-FAC (arXiv:1503.05671), and the closed form of
LocoProp-S (arXiv:2106.06199) and ProxProp (arXiv:1706.04638). It is the method that fits what is known of Fagnou's GLS,
whose own rule is not published.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import replica_axis
from dpsgd_optax.base import Preconditioner, check, check_fraction, check_not_negative
from dpsgd_optax.geometry.triangular import lower_gram, triangular_inverse
from dpsgd_optax.layers.find import Layer
from dpsgd_optax.layers.matrix import gradients_out, rows_in
from dpsgd_optax.layers.moments import extended, feature_moments, frequencies, gram
from dpsgd_optax.layers.record import LayerRecord, extent
from dpsgd_optax.preconditioners._per_layer import Group, per_layer, running_weight


class LeastSquaresState(NamedTuple):
  """Attributes:
  count: (), int32, fits.
  moment: S, (d, d), or its diagonal (d,) where the layer is too wide; None in the dual form.
  rows: Ã/√n, (R, d), in the dual form; otherwise None.
  inverse: (S + λI)⁻¹, (d, d), or (ÃÃᵀ/n + λI)⁻¹, (R, R); of a diagonal S its diagonal, (d,). Before the first fit I.
  added: (), λ, in squared units of the inputs; before the first fit 1.
  outputs: C, (k, k), or None.
  output_inverse: (1 + ρ) (C + ρI)⁻¹, (k, k), or None.
  """

  count: jax.Array
  moment: jax.Array | None
  rows: jax.Array | None
  inverse: jax.Array
  added: jax.Array
  outputs: jax.Array | None
  output_inverse: jax.Array | None


class LayerMoments(NamedTuple):
  """What one batch says about one matrix: S, its diagonal, or the rows Ã/√n; and C up to its scale, or None."""

  inputs: jax.Array
  outputs: jax.Array | None


def least_squares(
  *,
  decay: float | None = 0.95,
  absolute_damping: float = 0.0,
  output_damping: float | None = None,
  max_size: float = 8192,
  axis_name: Any = None,
  layers: Any = None,
) -> Preconditioner:
  """P = (S + λI)⁻¹ on each layer, kernel and bias together. Memory: two d × d matrices for each layer with d inputs.

  With λ = 0 and η = 1 the step on a linear layer with squared loss ½‖z − y‖² (mean over examples) reaches the
  least-squares solution; as λ grows it becomes the gradient step, of length η/λ. It does not change under invertible
  affine maps of the layer's inputs (λ = 0). Until the first fit P = I. Leaves that are no layer keep their updates.

  A convolution is the dense layer of its patches, the positions of one example summed; shared weights add the moments
  of their calls; an embedding has a diagonal S, the frequencies of its entries (only with ``layers``).

  The damping of ``fit`` is relative: λ = damping · tr S / d + ``absolute_damping``. If the factorization of S + λI
  fails, the layer takes g / (λ + tr S / d).

  Args:
    decay: weight kept of the old S, in [0, 1); debiased. None: S of the batch alone; nothing is averaged, and where
      ``layers`` tells that the batch has fewer rows than the layer has inputs, the dual form is kept:
      P = (I − Ãᵀ(ÃÃᵀ + nλI)⁻¹Ã)/λ, of R × d numbers. It needs λ > 0 (relative 1e-2 or more in float32). Static if None.
    absolute_damping: ≥ 0, added to λ, in squared units of the inputs.
    output_damping: ρ; also divides by (C + ρI)/(1 + ρ) on the output side, which damps the directions in which the
      neurons of a wide layer move together. Small ρ: K-FAC; large ρ, or None: least squares. Needs output gradients,
      ``capture(loss, gradients=True)``.
    max_size: a layer with more inputs (bias included) keeps the diagonal of S only. Static.
    axis_name: of ``shard_map`` or ``pmap``: the moments are averaged over it. Under ``jit`` with sharded inputs they
      are global anyway, and it stays None.
    layers: tree of records, or of their shapes, from ``jax.eval_shape`` of the forward pass: which leaves are layers,
      and how many rows a batch has. None: layers are told by name and shape, which suffices unless they are stacked
      (``nn.scan``), grouped, or without bias and with several output axes. Static.

  Cost: a fit is one product of the rows, d²R, and a factorization with its inverse, 2d³; P g takes d²k. The dual form
  takes R²d, 2R³ and 2Rdk: with a batch smaller than d it is what makes a fit at every step affordable; otherwise
  ``every``. `python -m benchmarks gls` measures both beside Adam.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` for ``layer_inputs()``.

  Raises:
    ValueError: at construction, for a decay outside [0, 1) or negative damping; at trace time, for a layer without a
      record, a record without a layer, inputs of the wrong width, or missing output gradients.

  Source: arXiv:2201.12250 (FOOF), Eq. 5; convolutions as arXiv:1602.01407; output side as arXiv:1503.05671, with C
  normalized to trace k.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx = dpo.scale_by_preconditioner(dpo.least_squares(), dpo.layer_inputs())
    >>> x, y = jnp.array([[1.0, 2.0], [2.0, 0.0], [0.0, 1.0]]), jnp.array([[5.0], [2.0], [2.0]])
    >>> loss = lambda w: jnp.mean((x @ w - y) ** 2) / 2
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> grads = {"w": jax.grad(loss)(params["w"])}
    >>> updates, _ = tx.update(grads, tx.init(params), params, layer_inputs={"w": x})
    >>> -updates["w"].round(3).T  # one step of length 1 from zero: the solution
    Array([[1., 2.]], dtype=float32)
  """
  options = dict(absolute_damping=absolute_damping, output_damping=output_damping, max_size=max_size)
  return per_layer(group(decay=decay, axis_name=axis_name, **options), layers)


def group(
  *,
  decay: float | None,
  absolute_damping: float = 0.0,
  output_damping: float | None,
  max_size: float,
  axis_name: Any,
) -> Group:
  """P on one matrix [W; b]; the arguments are those of :func:`least_squares`."""
  check_fraction(decay, "decay")
  check_not_negative(absolute_damping, "absolute_damping", "It is added to S. Try 0.")
  check_not_negative(output_damping, "output_damping", "Try 0.1, or None for none.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `jnp.inf` for no bound.")

  def diagonal(layer: Layer) -> bool:
    return layer.kind == "embed" or layer.matrix[0] > max_size

  def dual(layer: Layer) -> bool:
    return (
      decay is None and replica_axis(axis_name) is None and not diagonal(layer) and 0 < layer.rows < layer.matrix[0]
    )

  def word(layer: Layer) -> str:
    return "diagonal" if diagonal(layer) else f"{layer.rows}rows" if dual(layer) else ""

  def init(layer: Layer) -> LeastSquaresState:
    d, k = layer.matrix
    zeros = lambda *shape: jnp.zeros(shape, layer.dtype)
    moment = None if decay is None else zeros(*((d,) if diagonal(layer) else (d, d)))
    rows = zeros(layer.rows, d) if dual(layer) else None
    one = jnp.ones(d, layer.dtype) if diagonal(layer) else jnp.eye(layer.rows if dual(layer) else d, dtype=layer.dtype)
    outputs, kept = (None, None) if output_damping is None else (zeros(k, k), jnp.eye(k, dtype=layer.dtype))
    return LeastSquaresState(jnp.zeros((), jnp.int32), moment, rows, one, jnp.ones((), layer.dtype), outputs, kept)

  def observe(layer: Layer, record: LayerRecord) -> LayerMoments:
    size = extent(record, layer.stack)
    outputs = None if output_damping is None else _output_moment(layer, record)
    if dual(layer):
      return LayerMoments(_batch_rows(layer, record) / size.examples**0.5, outputs)
    inputs = _diagonal(layer, record) if diagonal(layer) else _second_moment(layer, record)
    inputs = inputs * (size.rows / size.examples)
    if (axis := replica_axis(axis_name)) is not None:
      inputs, outputs = jax.lax.pmean((inputs, outputs), axis)
    return LayerMoments(inputs.astype(layer.dtype), outputs)

  def fit(layer: Layer, state: LeastSquaresState, seen: LayerMoments, *, damping) -> LeastSquaresState:
    """S ← S + w (S_B − S), then the inverse of S + λI, by Cholesky."""
    weight = 1.0 if decay is None else running_weight(decay, state.count, layer.dtype)
    mixed = lambda old, new: new if old is None else old + weight * (new - old)
    d = layer.matrix[0]
    if dual(layer):
      rows = seen.inputs
      moment, trace, system = None, jnp.sum(rows**2), jnp.matmul(rows, rows.T, precision="highest")
    else:
      rows, moment = None, mixed(state.moment, seen.inputs)
      trace, system = jnp.sum(moment if diagonal(layer) else jnp.diagonal(moment)), moment
    mean = trace / d
    lam = jnp.asarray(damping * mean + absolute_damping, layer.dtype)
    lam = jnp.where(mean > 0, lam, 1)  # nothing came in: the gradient is zero, and stays it
    inverse = 1 / (system + lam) if diagonal(layer) else _inverse(system, lam, mean)
    outputs, output_inverse = state.outputs, None
    if seen.outputs is not None:
      outputs = mixed(state.outputs, seen.outputs.astype(layer.dtype))
      output_inverse = _output_inverse(outputs, output_damping)
    kept = None if decay is None else moment
    return LeastSquaresState(state.count + 1, kept, rows, inverse, lam, outputs, output_inverse)

  def apply(layer: Layer, state: LeastSquaresState, x: jax.Array) -> jax.Array:
    if diagonal(layer):
      done = x * state.inverse[:, None]
    elif state.rows is not None:
      done = (x - state.rows.T @ (state.inverse @ (state.rows @ x))) / state.added
    else:
      done = state.inverse @ x
    return done if state.output_inverse is None else done @ state.output_inverse

  def factored(layer: Layer, state: LeastSquaresState, rows: jax.Array, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(S + λI)⁻¹ Ãᵀ E, in the dual form Ãᵀ (ÃÃᵀ/n + λI)⁻¹ E, where Ã are the rows of the last fit: without ÃᵀE."""
    if state.rows is not None:
      e = state.inverse @ e
    else:
      rows = rows * state.inverse if diagonal(layer) else rows @ state.inverse
    return rows, e if state.output_inverse is None else e @ state.output_inverse

  return Group(init, observe, fit, apply, word, factored)


def _second_moment(layer: Layer, record: LayerRecord) -> jax.Array:
  """S of the mean over rows, (matrices, d, d)."""
  s = gram(record, layer.stack)
  return s if layer.bias is not None else s[:, :-1, :-1]


def _diagonal(layer: Layer, record: LayerRecord) -> jax.Array:
  """Its diagonal, (matrices, d)."""
  if record.kind == "embed":
    return frequencies(record, layer.stack)
  if record.gram is not None:
    return jnp.diagonal(_second_moment(layer, record), axis1=1, axis2=2)
  mean, variance = feature_moments(record, layer.stack)
  square = variance + mean**2
  return square if layer.bias is None else extended(square)


def _batch_rows(layer: Layer, record: LayerRecord) -> jax.Array:
  """Ã, (matrices, R, d)."""
  came = extent(record, layer.stack).rows
  if not record.inputs or came != layer.rows:
    raise ValueError(
      f"the layer {layer.name!r} was given {came} rows, but `layers` was made for {layer.rows}, and its state keeps as "
      "many. Pass `decay=0.0` in place of None, or batches of one size and no `reduce`."
    )
  return rows_in(layer, record)


def _output_moment(layer: Layer, record: LayerRecord) -> jax.Array:
  """EᵀE up to its scale, (matrices, k, k)."""
  if record.gradients is None and record.kind == "embed":
    return jnp.broadcast_to(jnp.eye(layer.matrix[1], dtype=layer.dtype), (layer.matrices, *[layer.matrix[1]] * 2))
  parts = gradients_out(layer, record, "output_damping")
  total = sum(jnp.einsum("mni,mnj->mij", e, e, precision="highest") for e in parts)
  trace = jnp.trace(total, axis1=1, axis2=2)[:, None, None]
  scale = jnp.where(trace > 0, trace, 1) / layer.matrix[1]
  return total / scale


def _output_inverse(c: jax.Array, rho: Any) -> jax.Array:
  """(1 + ρ) (C k/tr C + ρI)⁻¹."""
  mean = jnp.trace(c) / len(c)
  eye = jnp.eye(len(c), dtype=c.dtype)
  normal = jnp.where(mean > 0, c / jnp.where(mean > 0, mean, 1), eye)
  return _inverse(normal / (1 + rho), jnp.asarray(rho / (1 + rho), c.dtype), jnp.ones((), c.dtype))


def _inverse(system: jax.Array, lam: jax.Array, mean: jax.Array) -> jax.Array:
  """(system + λI)⁻¹ by Cholesky; that of (mean + λ) I, where the factorization fails."""
  eye = jnp.eye(len(system), dtype=system.dtype)
  root = triangular_inverse(jnp.linalg.cholesky(system + lam * eye, symmetrize_input=False))
  inverse = lower_gram(root)  # a product costs less than the second solve
  return jnp.where(jnp.all(jnp.isfinite(inverse)), inverse, eye / (mean + lam))
