# SPDX-License-Identifier: Apache-2.0
"""How long the step of each layer is: by the length of the gradient, or by what it does to the layer's outputs.

Notation
  g, U   gradient of [W; b] of a layer, and its preconditioned gradient
  D      the step, with its learning rate and sign
  Ã, Z   extended inputs of the layer and its outputs, Z = Ã [W; b];  S = ÃᵀÃ / R
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.by_shape import safe_norm
from dpsgd_optax._trees.mesh import mean_over_replicas
from dpsgd_optax._trees.paths import opposite
from dpsgd_optax.base import check_automatic, check_not_negative
from dpsgd_optax.layers.find import Layer, find_layers, records_of
from dpsgd_optax.layers.matrix import as_matrix, input_moment, input_rows, write_layer
from dpsgd_optax.layers.record import LayerRecord, extent

Match = Callable[[Any, Any, list[Layer]], Any]
"""(gradient, preconditioned gradient, layers) -> the second, rescaled."""


def _rescaled(updates: Any, done: Any, parts: list[list[int]]) -> Any:
  """``done``, in which each part, a list of leaves, is as long as in ``updates``; a part of zeros stays zero."""
  g, (u, treedef) = jax.tree.leaves(updates), jax.tree.flatten(done)
  for part in parts:
    length = safe_norm([u[i] for i in part])
    ratio = jnp.where(length > 0, safe_norm([g[i] for i in part]) / jnp.where(length > 0, length, 1), 1)
    for i in part:
      u[i] = (u[i] * ratio).astype(jnp.result_type(u[i]))
  return jax.tree.unflatten(treedef, u)


def match_layers(updates: Any, done: Any, layers: list[Layer]) -> Any:
  """U ‖g‖/‖U‖ for each layer, kernel and bias together: the direction of ``gls``, the step length of SGD."""
  return _rescaled(updates, done, [layer.leaves for layer in layers])


def match_total(updates: Any, done: Any, layers: list[Layer]) -> Any:
  """U ‖g‖/‖U‖ with the norms over all layers: the relative lengths of the layers stay as they are."""
  return _rescaled(updates, done, [[i for layer in layers for i in layer.leaves]])


def rescaled_direction(match: Match, layers: Any = None, inner: Callable | None = None) -> Callable:
  """A ``direction`` for ``scale_by_preconditioner``: that of ``inner`` (None: P), rescaled by ``match``."""

  def direction(apply, updates, params, **extra):
    done = apply(updates) if inner is None else inner(apply, updates, params, **extra)
    return match(updates, done, find_layers(updates, layers))

  return direction


def _output_square(layer: Layer, record: LayerRecord, x: jax.Array) -> jax.Array:
  """Mean square of the outputs that [W; b] = x gives: tr(xᵀSx)/k for each matrix, by way of what is smaller."""
  if record.inputs and extent(record, layer.stack).rows < layer.width:
    return mean_over_replicas(jnp.mean(jnp.matmul(input_rows(layer, record), x) ** 2, axis=(1, 2)))
  s = mean_over_replicas(input_moment(layer, record)).astype(x.dtype)
  return jnp.maximum(jnp.einsum("mik,mij,mjk->m", x, s, x, precision="highest"), 0) / x.shape[-1]


def clip_output_change(
  limit: float = 0.1, floor: float = 1e-3, layers: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Shortens the step of a layer that would change its outputs by more than ``limit`` of their size.

  D ← D · min(1, limit · max(rms Z, floor) / rms(ÃD)) for each layer. Put it last, after the learning rate. It does not
  depend on the scale of inputs or weights.

  Args:
    limit: largest relative change of the outputs, by root mean square over the batch.
    floor: least size of the outputs that counts, for layers that start at zero.
    layers: as in :func:`dpsgd_optax.least_squares`.

  Returns:
    A transform without state; ``update`` needs ``params`` and ``layer_inputs``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx, params = dpo.layers.clip_output_change(0.1), {"w": jnp.ones((2, 1))}
    >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])
    >>> tx.update({"w": jnp.ones((2, 1))}, tx.init(params), params, layer_inputs={"w": x})[0]["w"].T
    Array([[0.1, 0.1]], dtype=float32)
  """
  check_not_negative(limit, "limit", "It bounds the relative change of the outputs. Try 0.1.")
  check_not_negative(floor, "floor", "It is the least size of the outputs. Try 1e-3.")

  def update(updates, state, params=None, *, layer_inputs=None, **extra):
    del extra
    check_automatic(updates)
    if params is None or layer_inputs is None:
      raise ValueError(
        "`clip_output_change` compares the change of the outputs with the outputs, but `update` received no "
        f"{'`params`' if params is None else '`layer_inputs`'}. Pass `params` and `layer_inputs=inputs`."
      )
    found = find_layers(updates, layers)
    leaves, treedef = jax.tree.flatten(updates)
    weights = opposite(params, updates)
    for layer, record in zip(found, records_of(found, layer_inputs, updates), strict=True):
      if record.kind == "embed":
        continue
      step = as_matrix(layer, leaves)
      change = jnp.sqrt(_output_square(layer, record, step))
      size = jnp.sqrt(_output_square(layer, record, as_matrix(layer, weights)))
      bound = limit * jnp.maximum(size, floor)
      scale = jnp.where(change > bound, bound / jnp.where(change > 0, change, 1), 1)
      step = step * scale[:, None, None]
      write_layer(layer, step[:, : layer.width], step[:, layer.width :], leaves)
    return jax.tree.unflatten(treedef, leaves), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
