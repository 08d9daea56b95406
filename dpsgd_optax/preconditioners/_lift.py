# SPDX-License-Identifier: Apache-2.0
"""From one array to a pytree: trees, batching by shape, keys and damping, once for all groups.

A *group* is a preconditioner of one array, a *bucket* the stack of all matrices of one size class. The group runs once
per bucket under `vmap`; every statistic stays one per matrix. A group that takes matrices padded with zeros says which
of them may share a class, `classes`; its ``init`` is given ones where a matrix has numbers, zeros where it is padded.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.buckets import Bucket, Classes, Stacked, bucket_paths, make_buckets, ones, stack, unstack
from dpsgd_optax._trees.by_shape import LARGE
from dpsgd_optax._trees.draws import noise
from dpsgd_optax._trees.mesh import as_leaves, divided, on_mesh
from dpsgd_optax.base import Preconditioner, Probe
from dpsgd_optax.preconditioners._damped import damped


class LiftState(NamedTuple):
  """Attributes:
  buckets: name -> state of the group, every array with a leading axis over the matrices of that shape;
    for a tree without leaves one scalar, which stands for all buckets (`optax.tree.map_params` needs it).
  meaning: ``{group.meaning: ()}``, static and without leaves, so that it is saved, restored and compared as a part of
    the structure by whatever handles pytrees; () if there is nothing to say.
  """

  buckets: Any
  meaning: Any = ()


def check_same_leaves(state: LiftState, buckets: list[Bucket]) -> None:
  """Raises unless the buckets are those of the state."""
  have = {k: jax.tree.leaves(v) for k, v in state.buckets.items()} if isinstance(state.buckets, dict) else {}
  same = set(have) == {b.name for b in buckets} and all(
    not have[b.name] or have[b.name][0].shape[0] == b.size for b in buckets
  )
  if not same:
    needed = ", ".join(f"{len(v) and v[0].shape[0]} of {k}" for k, v in have.items()) or "none"
    came = ", ".join(f"{b.size} of {b.name}" for b in buckets) or "none"
    raise ValueError(
      "the updates must have the leaves that the params had at `init`. "
      f"Leaves by shape at `init`: {needed}; now: {came}. Call `init` again for other params."
    )


def _check_meaning(state: LiftState, group: Preconditioner) -> None:
  """Raises for a state whose arrays mean another P than the group's."""
  if state.meaning and group.meaning and group.meaning not in state.meaning:
    raise ValueError(
      f"the state of a preconditioner with {', '.join(state.meaning)} was given to one with {group.meaning}: the "
      "same arrays mean another P there. Build the optimizer with the arguments of the run that made the state, or "
      "begin with `tx.init(params)`."
    )


def check_batch_size(value: Any) -> None:
  """Raises unless it is None or a whole number from 1 on."""
  whole = value is None or (isinstance(value, int) and value >= 1)
  if not whole:
    raise ValueError(
      f"`batch_size` must be a whole number, at least 1, or None, got {value!r}. So many matrices of a stack "
      "are worked on at once; None: all."
    )


def over_matrices(one: Callable, size: int, numbers: int = LARGE, batch_size: int | None = None) -> Callable:
  """``vmap(one)``; for a single matrix of many ``numbers`` ``one`` itself, whose products and branches are faster.

  With a ``batch_size`` as many at once as it says. On a mesh (`dpsgd_optax.sharded`) each device runs its share.
  """
  if batch_size is not None and size > batch_size:
    return divided(lambda *stacked: jax.lax.map(lambda x: one(*x), stacked, batch_size=batch_size), size)
  if size > 1 or numbers < LARGE:
    return divided(jax.vmap(one), size)

  def single(*stacked):
    first = jax.tree.map(lambda x: x[0], stacked)
    return jax.tree.map(lambda x: x[None], one(*first))

  return single


def batched(
  group: Preconditioner, stacked: Stacked = None, classes: Classes | None = None, batch_size: int | None = None
) -> Preconditioner:
  """The preconditioner of a pytree that runs ``group`` once per size class; ``stacked`` as for :func:`per_leaf`.

  The group's ``fit(state, probe, *, key, damping)`` is handed the ``noise`` of a matrix where the lifted one is told to
  draw it, ``with_noise=True``, and the ``shape`` of one that may be padded, an array of floats.
  """
  check_batch_size(batch_size)
  cut = functools.partial(make_buckets, stacked=stacked, classes=classes)
  over = lambda one, bucket: over_matrices(one, bucket.size, math.prod(bucket.shape), batch_size)

  def init(params):
    states = {b.name: jax.vmap(group.init)(ones(b)) for b in cut(params)}
    return LiftState(states or jnp.zeros(()), {group.meaning: ()} if group.meaning else ())

  def advance(state, *, damping):
    _check_meaning(state, group)
    one = lambda old: old if group.advance is None else group.advance(old, damping=damping)
    if not isinstance(state.buckets, dict):
      return state
    # a group may keep nothing for some shapes, and vmap refuses a tree without arrays
    each = lambda old: jax.vmap(one)(old) if jax.tree.leaves(old) else old
    return state._replace(buckets={name: each(old) for name, old in state.buckets.items()})

  lift = lambda of_one: of_one and functools.partial(_product, of_one, cut, over)
  return Preconditioner(
    meaning=group.meaning,
    init=init,
    fit=functools.partial(_fit, group, cut, over),
    apply=lift(group.apply),
    advance=advance if group.advance else None,
    diagonal=group.diagonal,
    power=lift(group.power),
    root=lift(group.root),
    matrices=functools.partial(_matrices, cut),
  )


Cut = Callable[[Any], list[Bucket]]
Over = Callable[[Callable, Bucket], Callable]


def _fit(
  group: Preconditioner, cut: Cut, over: Over, state: LiftState, probe: Probe, *, key, damping, with_noise=False
):
  """``group.fit`` on every matrix, each with a key of its own."""
  buckets = {b.name: b for b in cut(probe.product)}
  check_same_leaves(state, list(buckets.values()))
  _check_meaning(state, group)
  if not buckets:
    return state
  ends = list(itertools.accumulate((buckets[name].size for name in state.buckets), initial=0))
  keys = jax.random.split(key, ends[-1])  # dropped by the compiler where no group draws
  keys_of = {name: keys[start:end] for name, (start, end) in zip(state.buckets, itertools.pairwise(ends), strict=True)}
  trees = [None if tree is None else jax.tree.leaves(tree) for tree in probe]
  drawn: dict[str, Any] = dict.fromkeys(buckets)
  if with_noise:
    shapes = [((buckets[name].size, *buckets[name].shape), buckets[name].dtype) for name in state.buckets]
    drawn = dict(zip(state.buckets, noise(key, shapes), strict=True))

  def one(state, v, h, xi, key, shape):
    given = {name: x for name, x in (("noise", xi), ("shape", shape)) if x is not None}
    return group.fit(state, Probe(v, h), key=key, damping=damping, **given)

  new = {}
  for name, old in state.buckets.items():
    bucket = buckets[name]
    paths = bucket_paths(bucket, probe.product)
    v, h = (None if leaves is None else as_leaves(stack(bucket, leaves), paths) for leaves in trees)
    new[name] = over(one, bucket)(old, v, h, drawn[name], keys_of[name], bucket.shapes)
  return state._replace(buckets=new)


def _product(of_one: Callable, cut: Cut, over: Over, state: LiftState, updates: Any, *more: Any) -> Any:
  """``of_one(state, x, *more)`` on every matrix: `apply`, `power` or `root` of the group."""
  leaves, treedef = jax.tree.flatten(updates)
  buckets = cut(updates)
  check_same_leaves(state, buckets)
  for bucket in buckets:
    run = over(lambda old, x: of_one(old, x, *more), bucket)
    paths = bucket_paths(bucket, updates)
    done = run(state.buckets[bucket.name], as_leaves(stack(bucket, leaves), paths))
    unstack(bucket, as_leaves(done, paths), leaves)
  return jax.tree.unflatten(treedef, leaves)


def _matrices(cut: Cut, updates: Any) -> tuple[list[jax.Array], list[np.ndarray], Callable[[list[jax.Array]], Any]]:
  """`Preconditioner.matrices`: each size class; on a mesh each leaf, since to stack them may mean to send them."""
  leaves, treedef = jax.tree.flatten(updates)
  buckets = cut(updates)
  if on_mesh():  # the matrices in the same order
    buckets = [b._replace(shape=m.shape, members=(m,)) for b in buckets for m in b.members]

  def join(parts):
    done = list(leaves)
    for bucket, part in zip(buckets, parts, strict=True):
      unstack(bucket, part, done)
    return treedef.unflatten(done)

  return [stack(bucket, leaves) for bucket in buckets], [bucket.numbers for bucket in buckets], join


def per_leaf(
  group: Preconditioner, stacked: Stacked = None, classes: Classes | None = None, batch_size: int | None = None
) -> Preconditioner:
  """One P for each leaf (block diagonal), the leaves of equal shape batched, fitted on the damped curvature.

  Args:
    group: a preconditioner of one array whose ``fit(state, probe, *, key)`` knows neither trees nor λ.
    stacked: leaves that stand for a stack of layers (``nn.scan``, vmapped modules): the number of their leading
      axes, as a prefix tree of ints or as a callable on (path, leaf). Each layer gets a P of its own. None: no leaf.
    classes: which shapes may be padded with zeros and batched together; None: none. For groups that know of it.
    batch_size: matrices of equal shape that are worked on at once; None: all.

  Returns:
    A preconditioner of any pytree of floating-point leaves. Its ``fit`` takes λ as ``damping``.

  Raises:
    ValueError: for integer leaves, at ``init``; for leaves other than at ``init``, when it is used.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> p = dpo.diagonal(init_scale=2.0)
    >>> state = p.init({"a": jnp.ones(3), "b": jnp.ones(3)})
    >>> {name: jax.tree.map(jnp.shape, s.q) for name, s in state.buckets.items()}
    {'3_float32': (2, 3)}
    >>> p.apply(state, {"a": jnp.ones(3), "b": jnp.ones(3)})["b"]
    Array([4., 4., 4.], dtype=float32)
  """
  lifted = batched(damped(group), stacked, classes, batch_size)

  def fit(state, probe, *, key, damping):
    return lifted.fit(state, probe, key=key, damping=damping, with_noise=probe.vector is None)

  return lifted._replace(fit=fit)
