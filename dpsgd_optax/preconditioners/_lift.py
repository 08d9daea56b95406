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

from dpsgd_optax._split import Path, as_leaves, divided, everywhere
from dpsgd_optax.base import Preconditioner, Probe, working_dtype
from dpsgd_optax.preconditioners._linalg import tiny
from dpsgd_optax.selection import spread


class Bucket(NamedTuple):
  """Leaves of one shape: static, made anew from shapes at every trace."""

  name: str  # "64x10_float32", the key in the state
  shape: tuple[int, ...]  # of one matrix
  dtype: Any  # float32 at least
  members: tuple[tuple[int, int], ...]  # (index of the leaf, matrices in it)

  @property
  def size(self) -> int:
    return sum(count for _, count in self.members)


class LiftState(NamedTuple):
  """Attributes:
  buckets: name -> state of the group, every array with a leading axis over the matrices of that shape;
    for a tree without leaves one scalar, which stands for all buckets (`optax.tree.map_params` needs it).
  meaning: ``{group.meaning: ()}``, static and without leaves, so that it is saved, restored and compared as a part of
    the structure by whatever handles pytrees; () if there is nothing to say.
  """

  buckets: Any
  meaning: Any = ()


Stacked = Any | Callable[[Any, jax.Array], int] | None


def _stack_depths(params: Any, stacked: Stacked) -> list[int]:
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  if stacked is None:
    return [0] * len(paths)
  if callable(stacked):
    return [int(stacked(path, leaf)) for path, leaf in paths]
  try:
    return [int(depth) for depth in jax.tree.leaves(spread(stacked, params))]
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"`stacked` must be a tree of ints that fits the params, {jax.tree.structure(params)}, or be a prefix of it; got "
      f"{jax.tree.structure(stacked)}: {error}. Type a function of path and leaf, `stacked=lambda path, leaf: …`, or "
      "the number of leading axes for each leaf."
    ) from error


def make_buckets(params: Any, stacked: Stacked = None) -> list[Bucket]:
  """Groups the leaves by (shape, dtype), in the order in which they first appear; empty leaves in none."""
  found: dict[tuple, list[tuple[int, int]]] = {}
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  for index, ((path, leaf), depth) in enumerate(zip(paths, _stack_depths(params, stacked), strict=True)):
    if callable(leaf) or isinstance(leaf, str):
      raise ValueError(
        f"a preconditioner needs floating-point parameters, but {jax.tree_util.keystr(path)} is a "
        f"{type(leaf).__name__}. Leave out what is no array: `tx.init(eqx.filter(model, eqx.is_inexact_array))` for an "
        "Equinox model."
      )
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"a preconditioner needs floating-point parameters, but {jax.tree_util.keystr(path)} has dtype {dtype}. "
        "Leave it out with `optax.masked` or `optax.partition`, or make it a float."
      )
    if depth > len(shape):
      raise ValueError(
        f"`stacked` gives {depth} leading axes for {jax.tree_util.keystr(path)}, which has shape {shape}."
      )
    if math.prod(shape) > 0:
      matrix = shape[depth:]
      found.setdefault((matrix, working_dtype(dtype)), []).append((index, math.prod(shape[:depth])))
  return [
    Bucket(f"{'x'.join(map(str, shape)) or 'scalar'}_{jnp.dtype(dtype).name}", shape, dtype, tuple(members))
    for (shape, dtype), members in found.items()
  ]


def stack(bucket: Bucket, leaves: list[jax.Array]) -> jax.Array:
  """(size, *shape) in the working dtype."""
  parts = [jnp.reshape(leaves[i], (count, *bucket.shape)).astype(bucket.dtype) for i, count in bucket.members]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _paths(bucket: Bucket, tree: Any) -> list[Path | None]:
  """Where the matrices of a bucket are leaves of the tree; None for a leaf that is a stack of them."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [leaves[i][0] if jnp.shape(leaves[i][1]) == bucket.shape else None for i, _ in bucket.members]


def unstack(bucket: Bucket, x: jax.Array, leaves: list[jax.Array]) -> None:
  """Writes (size, *shape) back over the leaves it came from, in their shapes and dtypes."""
  start = 0
  for i, count in bucket.members:
    part = x if count == bucket.size else jax.lax.slice_in_dim(x, start, start + count)
    leaves[i] = part.reshape(jnp.shape(leaves[i])).astype(jnp.result_type(leaves[i]))
    start += count


def _match(state: LiftState, buckets: list[Bucket]) -> None:
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
    _match(state, list(buckets.values()))
    if not buckets:
      return state
    products = jax.tree.leaves(probe.product)
    vectors = None if probe.vector is None else jax.tree.leaves(probe.vector)
    ends = list(itertools.accumulate((buckets[name].size for name in state.buckets), initial=0))
    keys = jax.random.split(key, ends[-1])  # dropped by the compiler where no group draws

    def run(i, name, old):
      bucket = buckets[name]
      paths = _paths(bucket, probe.product)
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
    _match(state, buckets)
    for bucket in buckets:
      run = over_matrices(lambda old, x: of_one(old, x, *more), bucket.size)
      paths = _paths(bucket, updates)
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


def noise(key: jax.Array, tree: Any) -> Any:
  """Random signs ξ like the leaves, ±1 each: E ξξᴴ = I, which is all that is asked of noise here.

  32 of them come from one random word, where a normal number takes one; one draw serves all leaves, because a draw is
  a loop to compile, and those of equal shape are made side by side, as they will be used.
  """
  leaves, treedef = jax.tree.flatten(tree)
  groups: dict[Any, list[int]] = {}
  for i, x in enumerate(leaves):
    groups.setdefault((jnp.shape(x), working_dtype(jnp.result_type(x))), []).append(i)
  words_of = lambda shape: -(-math.prod(shape) // 32)
  ends = list(itertools.accumulate((len(own) * words_of(shape) for (shape, _), own in groups.items()), initial=0))
  words = jax.random.bits(key, (ends[-1],), jnp.uint32)
  for ((shape, dtype), members), (start, end) in zip(groups.items(), itertools.pairwise(ends), strict=True):
    own = everywhere(words[start:end]).reshape(len(members), words_of(shape), 1)
    bits = ((own >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1).reshape(len(members), -1)[:, : math.prod(shape)]
    signs = (2 * bits.astype(dtype) - 1).reshape(len(members), *shape)
    for row, i in enumerate(members):
      leaves[i] = jax.lax.index_in_dim(signs, row, keepdims=False)
  return jax.tree.unflatten(treedef, leaves)


def damp(probe: Probe, xi: jax.Array | None, damping) -> Probe:
  """The probe of the damped curvature.

  Newton: h ← h + λ v, that is H + λI.
  Whitening: h ← h + (λ + ε|h|) ξ with ε the machine epsilon: E hhᴴ grows by at least λ² I, so P ≤ I/λ.

  Where h is exactly zero it stays so, that a fit can tell what was not seen (see ``seen_slices``).
  """
  h = probe.product
  if probe.vector is not None:
    return Probe(probe.vector, jnp.where(h != 0, h + jnp.asarray(damping, h.dtype) * probe.vector, h))
  size = jnp.abs(h)
  eps = jnp.finfo(h.dtype).eps
  return Probe(None, jnp.where(h != 0, h + (jnp.asarray(damping, size.dtype) + eps * size) * xi, h))


def sampled(probe: Probe, key: jax.Array) -> Probe:
  """The probe with v drawn, where it was integrated out."""
  return probe if probe.vector is not None else Probe(noise(key, probe.product), probe.product)


def unless_zero(x: jax.Array, fit: Callable[[Probe], Any], probe: Probe, old: Any) -> Any:
  """``fit(probe)``, or ``old`` where x is zero throughout: nothing was seen, so nothing is learned, P cannot run away.

  A branch, or in a batch of matrices a choice. What enters and leaves a branch is written to memory; fused into every
  pass of the fit and of what reads the new state, the noise and the small sums would be made anew in each: time for
  ``xmat``, instructions to compile for ``kron``.
  """
  # of squares, which a library sums in one pass, no normal number so small that its square vanishes; a NaN is seen
  larger = x * (2 / math.sqrt(tiny(x)))
  seen = jnp.sum(jnp.real(larger * jnp.conj(larger))) != 0
  return jax.lax.cond(seen, lambda probe, old: fit(probe), lambda probe, old: old, probe, old)


def damped(group: Preconditioner, whitens: bool) -> Preconditioner:
  """A group whose ``fit(state, probe, *, key)`` knows no λ, fitted on the probe of the damped curvature.

  Where it ``whitens``, v is integrated out, and the place of the vector holds the noise of the damping.
  """

  def fit(state, probe, *, key, damping):
    seen = damp(Probe(None, probe.product), probe.vector, damping) if whitens else damp(probe, None, damping)
    # λ alone says nothing about a leaf that is not in use: 2000 such fits would leave it with P = I/λ
    like = lambda new: jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)
    return unless_zero(probe.product, lambda seen: like(group.fit(state, seen, key=key)), seen, state)

  return group._replace(fit=fit)


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
    make_buckets(tree)  # for its message about integer leaves
    if not leaves:
      return []
    dtype = jnp.result_type(*(working_dtype(jnp.result_type(x)) for x in leaves))
    return [jnp.concatenate([jnp.reshape(x, -1).astype(dtype) for x in leaves])]

  def init(params):
    make_buckets(params)  # for its message about leaves that are no arrays
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
