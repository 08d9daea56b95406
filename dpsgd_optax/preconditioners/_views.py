# SPDX-License-Identifier: Apache-2.0
"""The same preconditioner on another view of the tree: as one vector, on some leaves only, in blocks (`blocked`)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import check_floating, leaves_apart, working_dtype
from dpsgd_optax._trees.paths import fill_holes, with_holes
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.base import Preconditioner, Probe
from dpsgd_optax.preconditioners._lift import per_leaf


def seen_as(inner: Preconditioner, cut: Callable[[Any], Any], join: Callable[[Any, Any], Any]) -> Preconditioner:
  """The preconditioner of a tree that is ``inner`` on a view of it.

  Args:
    inner: a preconditioner of the view.
    cut: tree -> view.
    join: (view, tree) -> a tree like the one given, with the values of the view.
  """

  def init(params):
    check_floating(params)
    return inner.init(jax.eval_shape(cut, params))

  def fit(state, probe, **options):
    vector = None if probe.vector is None else cut(probe.vector)
    return inner.fit(state, Probe(vector, cut(probe.product)), **options)

  def product(of_view, state, updates, *more):
    return join(of_view(state, cut(updates), *more), updates)

  def matrices(updates):
    parts, sizes, back = (inner.matrices or leaves_apart)(cut(updates))
    return parts, sizes, lambda parts: join(back(parts), updates)

  lift = lambda of_view: of_view and functools.partial(product, of_view)
  products = dict(apply=lift(inner.apply), power=lift(inner.power), root=lift(inner.root))
  return inner._replace(init=init, fit=fit, matrices=matrices, **products)


def raveled(group: Preconditioner) -> Preconditioner:
  """One P for the whole tree as one vector: ``group`` is a preconditioner of a 1-D array, as for ``per_leaf``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> group = dpo.Preconditioner(
    ...   init=lambda x: jnp.zeros(x.shape), fit=lambda s, probe, *, key: s + probe.product, apply=lambda s, x: s * x)
    >>> dpo.raveled(group).init({"a": jnp.ones((2, 2)), "b": jnp.ones(3)}).buckets["7_float32"].shape
    (1, 7)
  """
  return seen_as(per_leaf(group), _ravel, _unravel)._replace(matrices=None)


def _ravel(tree: Any) -> list[jax.Array]:
  """All leaves as one vector, in their common dtype; none for a tree without numbers."""
  check_floating(tree)
  leaves = [x for x in jax.tree.leaves(tree) if math.prod(jnp.shape(x)) > 0]
  if not leaves:
    return []
  dtype = jnp.result_type(*(working_dtype(jnp.result_type(x)) for x in leaves))
  return [jnp.concatenate([jnp.reshape(x, -1).astype(dtype) for x in leaves])]


def _unravel(flat: list[jax.Array], tree: Any) -> Any:
  """The vector in the shapes and dtypes of the tree."""
  leaves, treedef = jax.tree.flatten(tree)
  start = 0
  for i, leaf in enumerate(leaves):
    size = math.prod(jnp.shape(leaf))
    if size:
      leaves[i] = flat[0][start : start + size].reshape(jnp.shape(leaf)).astype(jnp.result_type(leaf))
      start += size
  return jax.tree.unflatten(treedef, leaves)


def selected(preconditioner: Preconditioner, where: Where) -> Preconditioner:
  """``preconditioner`` on the leaves where ``where`` says so, P = I on the others.

  What it is fitted on has holes in place of the others already.
  """
  view = seen_as(preconditioner, lambda tree: with_holes(tree, selection(tree, where)), fill_holes)
  return view._replace(fit=preconditioner.fit, matrices=None)
