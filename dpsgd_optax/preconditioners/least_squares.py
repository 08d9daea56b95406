# SPDX-License-Identifier: Apache-2.0
"""Layerwise least squares: the gradient of each layer divided by the second moment of what enters it.

Notation
  x̃      [x, 1], an input row of a layer with a bias; x of one without; (d,)
  Ã       the rows of a batch, (R, d); n examples
  W̃       kernel and bias as a matrix [W; b], (d, k);  g its gradient
  E       neuron gradients, n · dloss/d(output): g = ÃᵀE / n
  S       second moment Ãᵀ Ã / n, averaged over batches
  C       second moment of the rows of E, averaged, with mean eigenvalue 1
  λ, ρ    damping of S, and of C

The step D = −η (S + λI)⁻¹ g is the change of the weights that comes nearest to a gradient step on the outputs:
  D = argmin ‖ÃD + ηE‖² / n + λ ‖D‖².
It is gradient descent on neurons (FOOF, arXiv:2201.12250), one-sided K-FAC (arXiv:1503.05671), and the closed form of
LocoProp-S (arXiv:2106.06199) and ProxProp (arXiv:1706.04638).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import mean_over_replicas, replica_axis
from dpsgd_optax.base import Preconditioner, check, check_fraction, check_not_negative
from dpsgd_optax.geometry.triangular import lower_gram, triangular_inverse
from dpsgd_optax.layers.find import Layer
from dpsgd_optax.layers.matrix import input_moment, input_rows, output_gradients
from dpsgd_optax.layers.moments import extended, feature_moments, frequencies
from dpsgd_optax.layers.record import LayerRecord, extent
from dpsgd_optax.preconditioners._per_layer import LayerMethod, per_layer, running_weight


class LeastSquaresState(NamedTuple):
  """Of one matrix [W; b]."""

  count: jax.Array  # (), int32, fits
  moment: jax.Array | None  # S, (d, d), or its diagonal (d,) where the layer is too wide; None if nothing is averaged
  rows: jax.Array | None  # Ã/√n, (R, d), in the dual form
  inverse: (
    jax.Array
  )  # (S + λI)⁻¹, (d, d); of a diagonal S (d,); in the dual form (ÃÃᵀ/n + λI)⁻¹, (R, R). I before a fit
  added: jax.Array  # (), λ, in squared units of the inputs; at first 1
  outputs: jax.Array | None  # C, (k, k)
  output_inverse: jax.Array | None  # (1 + ρ) (C + ρI)⁻¹, (k, k)


DIAGONAL = "diagonal"  # the form of S of a layer that is too wide, and of an embedding


def least_squares(
  *,
  decay: float | None = 0.95,
  absolute_damping: float = 0.0,
  output_damping: float | None = None,
  max_size: float = 8192,
  layers: Any = None,
) -> Preconditioner:
  """P = (S + λI)⁻¹ on each layer, kernel and bias together. Memory: two d × d matrices for each layer with d inputs.

  With λ = 0 invertible affine maps of the inputs do not change the step, and on a linear layer with the loss ½‖z − y‖²
  (mean over examples) it solves the problem, with η = 1. As λ grows it becomes the gradient step, of length η/λ. Until
  the first fit P = I. Leaves that are no layer keep their updates. For replicas: :func:`dpsgd_optax.data_parallel`.

  A convolution is the dense layer of its patches, the positions of one example summed. Shared weights add the moments
  of their calls. An embedding has a diagonal S, the frequencies of its entries (only with ``layers``).

  The damping of ``fit`` is relative: λ = damping · tr S / d + ``absolute_damping``. If the factorization of S + λI
  fails, the layer takes g / (λ + tr S / d).

  Args:
    decay: weight kept of the old S, in [0, 1); debiased. None: S of the batch alone. If ``layers`` tells that the batch
      has fewer rows than a layer has inputs, that layer then keeps them in place of S, R × d numbers, and takes the
      dual form P = (I − Ãᵀ(ÃÃᵀ + nλI)⁻¹Ã)/λ. It needs λ > 0 (relative 1e-2 or more in float32). Static if None.
    absolute_damping: ≥ 0, added to λ, in squared units of the inputs.
    output_damping: ρ; also divides by (C + ρI)/(1 + ρ) on the output side, which damps the directions in which the
      neurons of a wide layer move together. Small ρ: K-FAC; large ρ, or None: least squares. Needs output gradients:
      ``capture(loss, gradients=True)``.
    max_size: a layer with more inputs (bias included) keeps the diagonal of S only. Static.
    layers: tree of records, or of their shapes, from ``jax.eval_shape`` of the forward pass: which leaves are layers,
      and how many rows a batch has. None: layers are told by name and shape, which suffices unless they are stacked
      (``nn.scan``), grouped, or without bias and with several output axes. Static.

  Cost: a fit is one product of the rows, d²R, and a factorization with its inverse, 2d³; P g takes d²k. The dual form
  takes R²d, 2R³ and 2Rdk, so that a fit at every step is affordable; otherwise use ``every``.

  Returns:
    A :class:`dpsgd_optax.Preconditioner` for ``layer_inputs()``.

  Raises:
    ValueError: at construction, for a decay outside [0, 1) or negative damping; at trace time, for a layer without a
      record, a record without a layer, inputs of the wrong width, or missing output gradients.

  Source: arXiv:2201.12250, Eq. 5; convolutions arXiv:1602.01407; output side arXiv:1503.05671, with C of trace k.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx = dpo.scale_by_preconditioner(dpo.least_squares(), dpo.layer_inputs())
    >>> x, y = jnp.array([[1.0, 2.0], [2.0, 0.0], [0.0, 1.0]]), jnp.array([[5.0], [2.0], [2.0]])
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2) / 2)(params)
    >>> updates, _ = tx.update(grads, tx.init(params), params, layer_inputs={"w": x})
    >>> -updates["w"].round(3).T  # one step of length 1 from zero: the solution
    Array([[1., 2.]], dtype=float32)
  """
  options = dict(absolute_damping=absolute_damping, output_damping=output_damping, max_size=max_size)
  return per_layer(least_squares_method(decay=decay, **options), layers)


def least_squares_method(
  *, decay: float | None, absolute_damping: float = 0.0, output_damping: float | None, max_size: float
) -> LayerMethod:
  """P on one matrix [W; b]; the arguments are those of :func:`least_squares`."""
  check_fraction(decay, "decay")
  check_not_negative(absolute_damping, "absolute_damping", "It is added to S. Try 0.")
  check_not_negative(output_damping, "output_damping", "Try 0.1, or None for none.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `jnp.inf` for no bound.")

  def form(layer: Layer) -> str:
    """How S is kept: as a matrix, "", as its diagonal, or in the dual form as so many rows."""
    if layer.kind == "embed" or layer.matrix[0] > max_size:
      return DIAGONAL
    dual = decay is None and replica_axis() is None and 0 < layer.rows < layer.matrix[0]
    return f"{layer.rows}rows" if dual else ""

  def init(layer: Layer) -> LeastSquaresState:
    return _initial_state(layer, form(layer), averaged=decay is not None, two_sided=output_damping is not None)

  def observe(layer: Layer, record: LayerRecord) -> tuple[jax.Array, jax.Array | None]:
    """(S, its diagonal, or the rows Ã/√n; C up to its scale, or None) of one batch."""
    size = extent(record, layer.stack)
    outputs = None if output_damping is None else _output_moment(layer, record)
    if form(layer) not in ("", DIAGONAL):
      return _batch_rows(layer, record) / size.examples**0.5, outputs
    inputs = _diagonal(layer, record) if form(layer) == DIAGONAL else input_moment(layer, record)
    inputs, outputs = mean_over_replicas((inputs * (size.rows / size.examples), outputs))
    return inputs.astype(layer.dtype), outputs

  def fit(layer: Layer, state: LeastSquaresState, seen: tuple, *, damping) -> LeastSquaresState:
    """S ← S + w (S_B − S), then the inverse of S + λI; C likewise."""
    inputs, outputs = seen
    weight = 1.0 if decay is None else running_weight(decay, state.count, layer.dtype)
    averaged = lambda old, new: new if old is None else old + weight * (new - old)
    rows, s = (None, averaged(state.moment, inputs)) if state.rows is None else (inputs, None)
    inverse, lam = _damped_inverse(rows, s, damping, absolute_damping)
    c, c_inverse = None, None
    if outputs is not None:
      c = averaged(state.outputs, outputs.astype(layer.dtype))
      c_inverse = _output_inverse(c, output_damping)
    return LeastSquaresState(state.count + 1, None if decay is None else s, rows, inverse, lam, c, c_inverse)

  def apply(layer: Layer, state: LeastSquaresState, x: jax.Array) -> jax.Array:
    del layer
    if state.rows is not None:
      done = (x - state.rows.T @ (state.inverse @ (state.rows @ x))) / state.added
    else:
      done = x * state.inverse[:, None] if state.inverse.ndim == 1 else state.inverse @ x
    return done if state.output_inverse is None else done @ state.output_inverse

  return LayerMethod(init, observe, fit, apply, form)


def _initial_state(layer: Layer, form: str, averaged: bool, two_sided: bool) -> LeastSquaresState:
  d, k = layer.matrix
  zeros = lambda *shape: jnp.zeros(shape, layer.dtype)
  eye = lambda size: jnp.eye(size, dtype=layer.dtype)
  moment, rows, inverse = zeros(d, d), None, eye(d)
  if form == DIAGONAL:
    moment, inverse = zeros(d), jnp.ones(d, layer.dtype)
  elif form:
    rows, inverse = zeros(layer.rows, d), eye(layer.rows)
  outputs = (zeros(k, k), eye(k)) if two_sided else (None, None)
  one = jnp.ones((), layer.dtype)
  return LeastSquaresState(jnp.zeros((), jnp.int32), moment if averaged else None, rows, inverse, one, *outputs)


def _diagonal(layer: Layer, record: LayerRecord) -> jax.Array:
  """That of S, the mean over rows, (matrices, d)."""
  if record.kind == "embed":
    return frequencies(record, layer.stack)
  if record.gram is not None:
    return jnp.diagonal(input_moment(layer, record), axis1=1, axis2=2)
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
  return input_rows(layer, record)


def _output_moment(layer: Layer, record: LayerRecord) -> jax.Array:
  """EᵀE up to its scale, (matrices, k, k)."""
  if record.gradients is None and record.kind == "embed":
    return jnp.broadcast_to(jnp.eye(layer.matrix[1], dtype=layer.dtype), (layer.matrices, *[layer.matrix[1]] * 2))
  parts = output_gradients(layer, record, "output_damping")
  total = sum(jnp.einsum("mni,mnj->mij", e, e, precision="highest") for e in parts)
  trace = jnp.trace(total, axis1=1, axis2=2)[:, None, None]
  return total / (jnp.where(trace > 0, trace, 1) / layer.matrix[1])


def _damped_inverse(rows: jax.Array | None, s: Any, damping: Any, absolute: float) -> tuple[jax.Array, jax.Array]:
  """(S + λI)⁻¹, or of the rows (ÃÃᵀ/n + λI)⁻¹, and λ = damping · tr S / d + absolute; for a diagonal S its diagonal."""
  if rows is not None:
    trace, system, d = jnp.sum(rows**2), jnp.matmul(rows, rows.T, precision="highest"), rows.shape[1]
  else:
    trace, system, d = jnp.sum(s if s.ndim == 1 else jnp.diagonal(s)), s, len(s)
  mean = trace / d
  lam = jnp.asarray(damping * mean + absolute, system.dtype)
  lam = jnp.where(mean > 0, lam, 1)  # nothing came in: the gradient is zero, and stays it
  return 1 / (system + lam) if system.ndim == 1 else _inverse(system, lam, mean), lam


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
