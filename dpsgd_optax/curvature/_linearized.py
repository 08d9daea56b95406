# SPDX-License-Identifier: Apache-2.0
"""A loss as a sum of squares near θ, in coordinates: what a solver of least squares is given.

Notation
  θ        the parameters that are moved, N real numbers in one vector (a complex parameter counts as two)
  r, J     the residuals, n real numbers, and ∂r/∂θ, (n, N)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.mesh import mean_over_replicas, replica_axis
from dpsgd_optax.curvature._tangents import Block


class Linearized(NamedTuple):
  """Attributes:
  residual: (n,), r at θ.
  size: N.
  jacobian: () -> (n, N), J.
  gram: chunk -> (N, N), JᵀJ from ``chunk`` samples at a time; None if there is no such way.
  push, pull: s (N,) -> J s (n,) and u (n,) -> Jᵀ u (N,), without J.
  bend: s -> ∂²r(θ + t s)/∂t² at t = 0, (n,); None if r has no meaning away from θ.
  loss: (N,) or None -> the loss at θ + s, or at θ; None if it is not known.
  to_tree, to_vector: from the coordinates to a tree like the updates, and back.
  """

  residual: jax.Array
  size: int
  jacobian: Callable[[], jax.Array]
  gram: Callable[[int], jax.Array] | None
  push: Callable[[jax.Array], jax.Array]
  pull: Callable[[jax.Array], jax.Array]
  bend: Callable[[jax.Array], jax.Array] | None
  loss: Callable[[Any], jax.Array] | None
  to_tree: Callable[[jax.Array], Any]
  to_vector: Callable[[Any], jax.Array]

  @property
  def rows(self) -> int:
    return self.residual.shape[0]

  def with_jacobian(self) -> tuple[jax.Array, "Linearized"]:
    """J, and the same with products by J."""
    matrix = self.jacobian()
    return matrix, self._replace(push=lambda s: matrix @ s, pull=lambda u: u @ matrix)


class Coordinates:
  """θ as a list of real arrays and as one vector. A complex leaf is two real ones."""

  def __init__(self, block: Block):
    self.block = block
    self.leaves = [part for x in block.theta for part in _parts(x)]
    self.dtype = jnp.result_type(jnp.float32, *(x.dtype for x in self.leaves))
    self.size = sum(x.size for x in self.leaves)

  def params(self, leaves: list[jax.Array]) -> Any:
    """The whole parameters, with these real arrays in place of θ."""
    return self.block.join(self._joined(leaves))

  def split(self, vector: jax.Array) -> list[jax.Array]:
    """A vector as real arrays, in the dtypes of θ."""
    found, start = [], 0
    for x in self.leaves:
      found.append(vector[start : start + x.size].reshape(x.shape).astype(x.dtype))
      start += x.size
    return found

  def concatenated(self, leaves: list[jax.Array], lead: int = 0) -> jax.Array:
    """Real arrays as one vector, or as a matrix of vectors with ``lead`` leading axes."""
    flat = [jnp.reshape(x, (*x.shape[:lead], -1)).astype(self.dtype) for x in leaves]
    return jnp.concatenate(flat, -1) if flat else jnp.zeros(0, self.dtype)

  def to_tree(self, vector: jax.Array) -> Any:
    """A vector as a tree like the updates, not rounded to the dtypes of θ."""
    wide, start = [], 0
    for x in self.leaves:
      wide.append(vector[start : start + x.size].reshape(x.shape))
      start += x.size
    return self.block.restore(self._joined(wide))

  def to_vector(self, tree: Any) -> jax.Array:
    return self.concatenated([part for x in jax.tree.leaves(tree) for part in _parts(x)])

  def _joined(self, leaves: list[jax.Array]) -> list[jax.Array]:
    found = iter(leaves)
    return [jax.lax.complex(next(found), next(found)) if jnp.iscomplexobj(x) else next(found) for x in self.block.theta]


def _parts(x: jax.Array) -> list[jax.Array]:
  return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def over_replicas(local: Linearized) -> Linearized:
  """Under `data_parallel` the rows of all replicas; their mean loss is the loss. Else ``local`` as it is."""
  axis = replica_axis()
  if axis is None:
    return local
  count = jax.lax.axis_size(axis)
  weight = jnp.asarray(count, local.residual.dtype) ** -0.5
  everywhere = lambda x: jax.lax.all_gather(weight * x, axis, tiled=True)
  mine = lambda u: jax.lax.dynamic_slice_in_dim(u, jax.lax.axis_index(axis) * local.rows, local.rows)
  gram, bend, loss = local.gram, local.bend, local.loss
  return local._replace(
    residual=everywhere(local.residual),
    jacobian=lambda: everywhere(local.jacobian()),
    gram=None if gram is None else lambda chunk: mean_over_replicas(gram(chunk)),
    push=lambda s: everywhere(local.push(s)),
    pull=lambda u: weight * jax.lax.psum(local.pull(mine(u)), axis),
    bend=None if bend is None else lambda s: everywhere(bend(s)),
    loss=None if loss is None else lambda s: mean_over_replicas(loss(s)),
  )


def real_rows(z: jax.Array, samples: int) -> jax.Array:
  """(samples, …) as (samples, c) real numbers; a complex number is two."""
  flat = jnp.reshape(z, (samples, -1))
  flat = jnp.concatenate([jnp.real(flat), jnp.imag(flat)], -1) if jnp.iscomplexobj(flat) else flat
  return flat.astype(working_dtype(flat.dtype))
