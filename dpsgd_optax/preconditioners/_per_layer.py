# SPDX-License-Identifier: Apache-2.0
"""From one layer to a pytree: kernel and bias as one matrix [W; b], layers of equal shape batched.

`per_layer` does for methods that are told about layers what `per_leaf` does for the others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.mesh import as_leaves
from dpsgd_optax.base import Preconditioner
from dpsgd_optax.layers.find import Layer, find_layers, records_of
from dpsgd_optax.layers.matrix import as_matrix, write_layer
from dpsgd_optax.preconditioners._lift import LiftState, check_same_leaves, over_matrices


class LayerMethod(NamedTuple):
  """A preconditioner of one matrix [W; b], which is told what the layer is."""

  init: Callable  # (layer) -> state of one matrix
  observe: Callable  # (layer, record) -> statistics of its matrices, each array with that leading axis
  fit: Callable  # (layer, state, statistics, *, damping) -> state, of one matrix
  apply: Callable  # (layer, state, x) -> P x, of one matrix
  form: Callable = lambda layer: ""  # a word; layers of equal shape and word are batched


def running_weight(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
  """Weight of the new value in a debiased running mean: (1 − ρ) / (1 − ρᵗ), t = count + 1; exactly 1 at first."""
  log = jnp.log(jnp.asarray(decay, dtype))
  return jnp.expm1(log) / jnp.expm1((count + 1).astype(dtype) * log)


class LayerBucket(NamedTuple):
  """Layers that are batched. Static, made anew from shapes at every trace."""

  name: str  # the key in the state
  layers: tuple[Layer, ...]

  @property
  def size(self) -> int:
    return sum(layer.matrices for layer in self.layers)


def layer_buckets(layers: list[Layer], method: LayerMethod) -> list[LayerBucket]:
  found: dict[str, list[Layer]] = {}
  for layer in layers:
    bias = "" if layer.bias is None else "bias"
    words = ["x".join(map(str, layer.matrix)), jnp.dtype(layer.dtype).name, method.form(layer), bias]
    found.setdefault("_".join(filter(None, words)), []).append(layer)
  return [LayerBucket(name, tuple(members)) for name, members in found.items()]


def side_by_side(*parts: jax.Array) -> jax.Array:
  """The matrices of all layers of a bucket."""
  return as_leaves(jnp.concatenate(parts))


def write_bucket(bucket: LayerBucket, kernels: jax.Array, biases: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes the kernels and biases of a bucket over the leaves they came from."""
  kernels, biases = as_leaves(kernels), as_leaves(biases)
  start = 0
  for layer in bucket.layers:
    mine = slice(start, start + layer.matrices)
    write_layer(layer, kernels[mine], biases[mine], leaves)
    start += layer.matrices


def per_layer(method: LayerMethod, layers: Any = None) -> Preconditioner:
  """One P for each layer that `find_layers(params, layers)` finds; all other leaves keep their updates."""

  def init(params):
    buckets = layer_buckets(find_layers(params, layers), method)
    repeat = lambda size, state: jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)).copy(), state)
    return LiftState({b.name: repeat(b.size, method.init(b.layers[0])) for b in buckets} or jnp.zeros(()))

  def fit(state, observation, *, key, damping):
    del key
    found = find_layers(observation.like, layers)
    records = dict(zip(found, records_of(found, observation.records, observation.like), strict=True))
    buckets = layer_buckets(found, method)
    check_same_leaves(state, buckets)
    new = {}
    for bucket in buckets:
      seen = jax.tree.map(side_by_side, *(method.observe(layer, records[layer]) for layer in bucket.layers))
      one = functools.partial(method.fit, bucket.layers[0], damping=damping)
      new[bucket.name] = over_matrices(one, bucket.size)(state.buckets[bucket.name], seen)
    return LiftState(new) if buckets else state

  def apply(state, updates):
    leaves, treedef = jax.tree.flatten(updates)
    buckets = layer_buckets(find_layers(updates, layers), method)
    check_same_leaves(state, buckets)
    for bucket in buckets:
      x = side_by_side(*(as_matrix(layer, leaves) for layer in bucket.layers))
      run = over_matrices(functools.partial(method.apply, bucket.layers[0]), bucket.size)
      done, width = run(state.buckets[bucket.name], x), bucket.layers[0].width
      write_bucket(bucket, done[..., :width, :], done[..., width:, :], leaves)
    return jax.tree.unflatten(treedef, leaves)

  return Preconditioner(init, fit, apply)
