# SPDX-License-Identifier: Apache-2.0
"""From one layer to a pytree of layers, those of equal shape batched."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import as_leaves
from dpsgd_optax.base import Preconditioner
from dpsgd_optax.layers.find import Layer, find_layers, matched
from dpsgd_optax.layers.matrix import as_matrix, from_parts
from dpsgd_optax.preconditioners._lift import LiftState, check_same_leaves, over_matrices


class Group(NamedTuple):
  """A preconditioner of one matrix [W; b], which is told what the layer is.

  Attributes:
    init: (layer) -> state of one matrix.
    observe: (layer, record) -> statistics of its matrices, each array with that leading axis.
    fit: (layer, state, statistics, *, damping) -> state, of one matrix.
    apply: (layer, state, x) -> P x, of one matrix.
    kind: (layer) -> a word; layers of equal shape and word are batched.
    factored: (layer, state, rows, e) -> (a, b) with P rowsᵀ e = aᵀ b, of one matrix; for `from_outputs`.
  """

  init: Callable
  observe: Callable
  fit: Callable
  apply: Callable
  kind: Callable = lambda layer: ""
  factored: Callable | None = None


def running_weight(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
  """Weight of the new value in a debiased running mean: (1 − ρ) / (1 − ρᵗ), t = count + 1; exactly 1 at first."""
  log = jnp.log(jnp.asarray(decay, dtype))
  return jnp.expm1(log) / jnp.expm1((count + 1).astype(dtype) * log)


class LayerBucket(NamedTuple):
  """Layers of one shape, for `_lift.match`."""

  name: str
  layers: tuple[Layer, ...]

  @property
  def size(self) -> int:
    return sum(layer.matrices for layer in self.layers)


def make_layer_buckets(layers: list[Layer], group: Group) -> list[LayerBucket]:
  found: dict[str, list[Layer]] = {}
  for layer in layers:
    words = ["x".join(map(str, layer.matrix)), jnp.dtype(layer.dtype).name, group.kind(layer)]
    words.append("bias" if layer.bias is not None else "")
    found.setdefault("_".join(filter(None, words)), []).append(layer)
  return [LayerBucket(name, tuple(members)) for name, members in found.items()]


def per_layer(group: Group, spec: Any = None) -> Preconditioner:
  """One P for each layer, kernel and bias together; all other leaves keep their updates.

  Args:
    group: on one matrix.
    spec: tree of records or of their shapes; None: layers are told by name and shape, see `find_layers`.
  """

  def init(params):
    buckets = make_layer_buckets(find_layers(params, spec), group)
    if not buckets:
      return LiftState(jnp.zeros(()))
    repeat = lambda size, state: jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)).copy(), state)
    return LiftState({b.name: repeat(b.size, group.init(b.layers[0])) for b in buckets})

  def fit(state, observation, *, key, damping):
    del key
    layers = find_layers(observation.like, spec)
    records = dict(zip(layers, matched(layers, observation.records, observation.like), strict=True))
    buckets = make_layer_buckets(layers, group)
    check_same_leaves(state, buckets)
    new = {}
    for bucket in buckets:
      seen = [group.observe(layer, records[layer]) for layer in bucket.layers]
      seen = jax.tree.map(lambda *parts: as_leaves(jnp.concatenate(parts) if len(parts) > 1 else parts[0]), *seen)
      one = functools.partial(group.fit, bucket.layers[0], damping=damping)
      new[bucket.name] = over_matrices(one, bucket.size)(state.buckets[bucket.name], seen)
    return LiftState(new) if buckets else state

  def apply(state, updates):
    layers = find_layers(updates, spec)
    leaves, treedef = jax.tree.flatten(updates)
    buckets = make_layer_buckets(layers, group)
    check_same_leaves(state, buckets)
    for bucket in buckets:
      parts = [as_matrix(layer, leaves) for layer in bucket.layers]
      x = as_leaves(parts[0] if len(parts) == 1 else jnp.concatenate(parts))
      run = over_matrices(functools.partial(group.apply, bucket.layers[0]), bucket.size)
      done = run(state.buckets[bucket.name], x)
      width = bucket.layers[0].width
      _write(bucket, (done[..., :width, :], done[..., width:, :]), leaves)
    return jax.tree.unflatten(treedef, leaves)

  return Preconditioner(init, fit, apply)


def _write(bucket: LayerBucket, done: tuple[jax.Array, jax.Array], leaves: list[jax.Array]) -> None:
  """The kernels and biases of a bucket over the leaves they came from."""
  kernels, biases = map(as_leaves, done)
  start = 0
  for layer in bucket.layers:
    mine = slice(start, start + layer.matrices)
    from_parts(layer, kernels[mine], biases[mine], leaves)
    start += layer.matrices
