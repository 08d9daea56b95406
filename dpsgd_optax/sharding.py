# SPDX-License-Identifier: Apache-2.0
"""Many devices under ``jit``: where the optimizer state lies, and which device fits and applies which matrices.

JAX itself partitions a jitted step by the shardings of its arguments, and averages gradients and products over the
whole batch. Added here is the division of the preconditioner: a bucket of B equal matrices is cut into n shares of B/n,
each fitted and applied where it lies, and the updates are gathered.

Notation
  B    matrices in a bucket: leaves of equal shape, or layers of a stacked leaf
  n    devices along the mesh axes that the bucket is divided over

Source of the idea: the sharded preconditioners of distributed Shampoo, arXiv:2309.06497, and ZeRO, arXiv:1910.02054.
"""

from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dpsgd_optax._trees.mesh import Path, Split, dividing
from dpsgd_optax._trees.paths import is_hole
from dpsgd_optax._trees.selection import spread
from dpsgd_optax.base import forward_extra_args
from dpsgd_optax.preconditioners._lift import LiftState

REPLICATED = PartitionSpec()


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def _check_axes(names: Iterable[str], mesh: Any, where: str) -> None:
  if unknown := [name for name in names if name not in mesh.shape]:
    raise ValueError(
      f"{where} must name axes of the mesh, which are {tuple(mesh.shape)}; got {unknown[0]!r}. "
      f"Type `axes={tuple(mesh.shape)[:1]}`, or make the mesh with that axis."
    )


def _named(axes: str | tuple[str, ...] | None, mesh: Any) -> tuple[str, ...]:
  """The axes as a tuple: all of the mesh if None."""
  found = tuple(mesh.shape) if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
  _check_axes(found, mesh, "`axes`")
  return found


def _spread(param_specs: Any, params: Any, mesh: Any) -> Any:
  """One spec for each leaf of the params, from a prefix tree of specs."""
  try:
    specs = spread(param_specs, params, is_leaf=_is_spec)
  except ValueError as error:
    raise ValueError(
      f"`param_specs` must have the structure of the params, {jax.tree.structure(params)}, or be a prefix of it; got "
      f"{jax.tree.structure(param_specs, is_leaf=_is_spec)}. Type `jax.tree.map(lambda x: PartitionSpec(), params)` "
      "and change the leaves that are sharded."
    ) from error

  def checked(path: Path, leaf: Any, spec: Any) -> PartitionSpec:
    name = jax.tree_util.keystr(path) or "the params"
    if not _is_spec(spec):
      raise ValueError(f"`param_specs` must hold a PartitionSpec for {name}, got {spec!r}. Type `PartitionSpec()`.")
    axes = (axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,)))
    _check_axes(axes, mesh, f"the spec of {name}, {spec},")
    if len(spec) > len(leaf.shape):
      raise ValueError(f"the spec of {name} must have at most {len(leaf.shape)} entries, one per axis; got {spec}.")
    return spec

  return jax.tree_util.tree_map_with_path(checked, params, specs)


def partition_specs(
  tx: optax.GradientTransformation, params: Any, param_specs: Any, mesh: Any, axes: str | tuple[str, ...] | None = None
) -> Any:
  """How the optimizer state is sharded: a `PartitionSpec` for each of its leaves. Nothing is allocated.

  The leading axis of a bucket, over its matrices, is divided over those of ``axes`` whose product n divides B and is
  the largest. If none does, as with B < n on a mesh of one axis, every device holds the whole bucket. What is shaped
  like the params (momentum, averages) lies as they do. All else is on every device, such as the states of
  preconditioners of one vector (``dense``, ``lra``, ``xmat``).

  Args:
    tx: any optax transformation, chains and partitions included.
    params: arrays or ``jax.ShapeDtypeStruct``.
    param_specs: how the params are sharded: a tree of `PartitionSpec` like them, or a prefix of one, such as
      `PartitionSpec()`: all of them on every device.
    mesh: ``jax.sharding.Mesh`` or ``AbstractMesh``.
    axes: mesh axes that buckets may be divided over; None: all of them.

  Returns:
    A tree with the structure of ``tx.init(params)``.

  Raises:
    ValueError: for an axis that the mesh does not have, in ``axes`` or in a spec; for specs of another structure.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> from jax.sharding import AbstractMesh, PartitionSpec
    >>> params = [jnp.zeros((4, 4)) for _ in range(8)] + [jnp.zeros((4, 2))]
    >>> tx = dpo.psgd(1e-3, dpo.kron(max_padding=1.0))  # equal shapes only, so that 4 divides 8
    >>> specs = dpo.partition_specs(tx, params, PartitionSpec(), AbstractMesh((4,), ("data",)))
    >>> buckets = optax.tree.get(specs, "buckets")
    >>> [[tuple(spec) for spec in buckets[name].q] for name in ("4x4_float32", "4x2_float32")]
    [[('data',), ('data',)], [(), ()]]
  """
  split = Split(mesh, _named(axes, mesh))
  shapes = jax.eval_shape(lambda x: x, params)
  specs = _spread(param_specs, shapes, mesh)
  state = jax.eval_shape(tx.init, params)

  def like_param(x: Any, param: Any, spec: PartitionSpec) -> Any:
    if is_hole(x):
      return x
    return spec if x.shape == param.shape else REPLICATED

  replicated = lambda tree: jax.tree.map(lambda _: REPLICATED, tree)
  found = optax.tree.map_params(tx, like_param, state, shapes, specs, transform_non_params=replicated, is_leaf=is_hole)

  def of_bucket(x: Any) -> PartitionSpec:
    over = split.over(x.shape[0]) if x.shape else ()
    return PartitionSpec(over[0] if len(over) == 1 else over) if over else REPLICATED

  is_lift = lambda x: isinstance(x, LiftState)
  divided = lambda x, spec: jax.tree.map(of_bucket, x) if is_lift(x) else spec
  return jax.tree.map(divided, state, found, is_leaf=is_lift)


def sharded(
  tx: optax.GradientTransformation, mesh: Any, param_specs: Any = REPLICATED, axes: str | tuple[str, ...] | None = None
) -> optax.GradientTransformationExtraArgs:
  """The same optimizer, with the work and the memory of its preconditioners divided among the devices of a mesh.

  Fit and apply of a bucket run under ``jax.shard_map``, each device on its share. One all-gather for each distinct
  shape hands the updates out, or an all-to-all if the leaves are sharded alike (FSDP). ``init`` and ``update`` lay out
  the state as :func:`partition_specs` says. The same key gives the same step as on one device, up to rounding, and a
  checkpoint can be restored on another number of devices.

  Jit the step as ever, with params on the mesh and the batch divided over one of its axes. On several hosts
  (``jax.distributed.initialize``) nothing changes but the mesh.

  Args:
    tx, param_specs, axes: as for :func:`partition_specs`.
    mesh: ``jax.sharding.Mesh`` with axes of type ``Auto``.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`, with the state of ``tx``.

  Raises:
    ValueError: for axes of another type than ``Auto`` and, as :func:`partition_specs`, in ``init`` and ``update``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    >>> tx = dpo.sharded(dpo.psgd(1e-2), mesh)
    >>> params = jax.device_put({"w": jnp.ones((3, 2))}, NamedSharding(mesh, PartitionSpec()))
    >>> state = jax.jit(tx.init)(params)
    >>> @jax.jit
    ... def train_step(params, state, x):
    ...   grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - 1.0) ** 2))(params)
    ...   updates, state = tx.update(grads, state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> batch = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, PartitionSpec("data")))
    >>> params, state = train_step(params, state, batch)
  """
  names = _named(axes, mesh)
  if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"`mesh` must have axes of type Auto, got {mesh.axis_types}. Make it with "
      "`jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))`."
    )
  inner = forward_extra_args(tx)

  def lay(tree: Any, specs: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, s)), tree, specs)

  def init(params: Any) -> Any:
    state = inner.init(params)
    if not jax.tree.leaves(params):
      return state
    return lay(state, partition_specs(inner, params, param_specs, mesh, names))

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    specs = _spread(param_specs, jax.eval_shape(lambda x: x, updates), mesh)
    by_path = dict(jax.tree_util.tree_flatten_with_path(specs, is_leaf=_is_spec)[0])
    with dividing(Split(mesh, names, by_path)):
      done, state = inner.update(updates, state, params, **extra)
    return lay(done, specs), lay(state, partition_specs(inner, updates, param_specs, mesh, names))

  return optax.GradientTransformationExtraArgs(init, update)
