# SPDX-License-Identifier: Apache-2.0
"""From one array to a pytree: trees, batching by shape, keys and damping, once for all groups.

`batched`   leaves of equal shape are stacked on a leading axis and `init`, `fit`, `apply` run once per shape under
            `vmap`; every statistic stays one per matrix
`per_leaf`  `batched` with the curvature damped before the fit: (v, Hv + λv), or g + λ·noise when whitening
`raveled`   the whole tree as one vector
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import check_floating, working_dtype
from dpsgd_optax._trees.buckets import Bucket, Stacked, bucket_paths, make_buckets, stack, unstack
from dpsgd_optax._trees.draws import noise
from dpsgd_optax._trees.mesh import as_leaves, divided
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


def over_matrices(one: Callable, size: int) -> Callable:
  """``vmap(one)``; for a single matrix ``one`` itself, which compiles to less and to faster products.

  On a mesh (`dpsgd_optax.sharded`) each device runs its share of the matrices.
  """
  if size > 1:
    return divided(jax.vmap(one), size)

  def single(*stacked):
    first = jax.tree.map(lambda x: x[0], stacked)
    return jax.tree.map(lambda x: x[None], one(*first))

  return single


def batched(group: Preconditioner, stacked: Stacked = None) -> Preconditioner:
  """A preconditioner of one array, run once per distinct shape on the stacked leaves of a pytree.

  Args:
    group: on one array; ``fit(state, probe, *, key, damping)``.
    stacked: leaves that hold a stack of layers: the number of their leading axes, as a prefix tree of ints or a
      callable on (path, leaf). None: no leaf does.
  """

  meaning: Any = {group.meaning: ()} if group.meaning else ()

  def init(params):
    buckets = make_buckets(params, stacked)
    if not buckets:
      return LiftState(jnp.zeros(()), meaning)
    states = {b.name: jax.vmap(group.init)(jnp.zeros((b.size, *b.shape), b.dtype)) for b in buckets}
    return LiftState(states, meaning)

  def check_meaning(state):
    if state.meaning and meaning and state.meaning != meaning:
      raise ValueError(
        f"the state of a preconditioner with {', '.join(state.meaning)} was given to one with {group.meaning}: the "
        "same arrays mean another P there. Build the optimizer with the arguments of the run that made the state, or "
        "begin with `tx.init(params)`."
      )

  def over_buckets(state, run):
    check_meaning(state)
    if not isinstance(state.buckets, dict):
      return state
    return state._replace(buckets={name: run(i, name, old) for i, (name, old) in enumerate(state.buckets.items())})

  def fit(state, probe, *, key, damping):
    buckets = {b.name: b for b in make_buckets(probe.product, stacked)}
    check_same_leaves(state, list(buckets.values()))
    if not buckets:
      return state
    products = jax.tree.leaves(probe.product)
    vectors = None if probe.vector is None else jax.tree.leaves(probe.vector)
    ends = list(itertools.accumulate((buckets[name].size for name in state.buckets), initial=0))
    keys = jax.random.split(key, ends[-1])  # dropped by the compiler where no group draws

    def run(i, name, old):
      bucket = buckets[name]
      paths = bucket_paths(bucket, probe.product)
      vector = None if vectors is None else as_leaves(stack(bucket, vectors), paths)
      product = as_leaves(stack(bucket, products), paths)

      def one(state, v, h, key):
        return group.fit(state, Probe(v, h), key=key, damping=damping)

      return over_matrices(one, bucket.size)(old, vector, product, keys[ends[i] : ends[i + 1]])

    return over_buckets(state, run)

  def product(of_one, state, updates, *more):
    """``of_one(state, x, *more)`` on every matrix: `apply`, `power` or `root` of the group."""
    leaves, treedef = jax.tree.flatten(updates)
    buckets = make_buckets(updates, stacked)
    check_same_leaves(state, buckets)
    for bucket in buckets:
      run = over_matrices(lambda old, x: of_one(old, x, *more), bucket.size)
      paths = bucket_paths(bucket, updates)
      done = run(state.buckets[bucket.name], as_leaves(stack(bucket, leaves), paths))
      unstack(bucket, as_leaves(done, paths), leaves)
    return jax.tree.unflatten(treedef, leaves)

  def advance(state, *, damping):
    def one(old):
      return old if group.advance is None else group.advance(old, damping=damping)

    # a group may keep nothing for some shapes, and vmap refuses a tree without arrays
    return over_buckets(state, lambda i, name, old: jax.vmap(one)(old) if jax.tree.leaves(old) else old)

  def matrices(updates):
    leaves, treedef = jax.tree.flatten(updates)
    members = {i: (count, bucket.shape) for bucket in make_buckets(updates, stacked) for i, count in bucket.members}
    parts = [jnp.reshape(x, (members[i][0], *members[i][1])) for i, x in enumerate(leaves) if i in members]

    def join(parts):
      found = iter(parts)
      return treedef.unflatten([next(found).reshape(jnp.shape(x)) if i in members else x for i, x in enumerate(leaves)])

    return parts, join

  lift = lambda of_one: of_one and functools.partial(product, of_one)
  return Preconditioner(
    meaning=group.meaning,
    init=init,
    fit=fit,
    apply=lift(group.apply),
    advance=advance if group.advance else None,
    diagonal=group.diagonal,
    power=lift(group.power),
    root=lift(group.root),
    matrices=None if stacked is None else matrices,
  )


def per_leaf(group: Preconditioner, stacked: Stacked = None) -> Preconditioner:
  """One P for each leaf (block diagonal), the leaves of equal shape batched.

  Args:
    group: a preconditioner of one array whose ``fit(state, probe, *, key)`` knows neither trees nor λ.
    stacked: leaves that stand for a stack of layers (``nn.scan``, vmapped modules): the number of their leading
      axes, as a prefix tree of ints or as a callable on (path, leaf). Each layer gets a P of its own.

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
  return _observing(group, stacked)


def _observing(group: Preconditioner, stacked: Stacked = None) -> Preconditioner:
  """Two lifts of one group, for probes with a vector and for those without, which take the noise in its place."""
  newton, whitening = (batched(damped(group, whitens), stacked) for whitens in (False, True))

  def fit(state, probe, *, key, damping):
    if probe.vector is not None:
      return newton.fit(state, probe, key=key, damping=damping)
    # folded, not split: a key that no group draws from is dropped by the compiler
    observed = Probe(noise(key, probe.product), probe.product)
    return whitening.fit(state, observed, key=jax.random.fold_in(key, 0), damping=damping)

  return newton._replace(fit=fit)


def raveled(group: Preconditioner) -> Preconditioner:
  """One P for the whole tree as one vector: ``group`` is a preconditioner of a 1-D array, as for ``per_leaf``.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> group = dpo.Preconditioner(
    ...   init=lambda x: jnp.zeros(x.shape), fit=lambda s, probe, *, key: s + probe.product, apply=lambda s, x: s * x)
    >>> dpo.raveled(group).init({"a": jnp.ones((2, 2)), "b": jnp.ones(3)}).buckets["7_float32"].shape
    (1, 7)
  """
  lifted = _observing(group)

  def ravel(tree):
    leaves = [x for x in jax.tree.leaves(tree) if math.prod(jnp.shape(x)) > 0]
    check_floating(tree)
    if not leaves:
      return []
    dtype = jnp.result_type(*(working_dtype(jnp.result_type(x)) for x in leaves))
    return [jnp.concatenate([jnp.reshape(x, -1).astype(dtype) for x in leaves])]

  def init(params):
    check_floating(params)
    shapes = jax.eval_shape(ravel, params)
    return lifted.init(shapes)

  def fit(state, probe, *, key, damping):
    vector = None if probe.vector is None else ravel(probe.vector)
    return lifted.fit(state, Probe(vector, ravel(probe.product)), key=key, damping=damping)

  def product(of_vector, state, updates, *more):
    flat = of_vector(state, ravel(updates), *more)
    leaves, treedef = jax.tree.flatten(updates)
    start = 0
    for i, leaf in enumerate(leaves):
      size = math.prod(jnp.shape(leaf))
      if size:
        leaves[i] = flat[0][start : start + size].reshape(jnp.shape(leaf)).astype(jnp.result_type(leaf))
        start += size
    return jax.tree.unflatten(treedef, leaves)

  lift = lambda of_vector: of_vector and functools.partial(product, of_vector)
  return lifted._replace(init=init, fit=fit, apply=lift(lifted.apply), power=lift(lifted.power), root=lift(lifted.root))
