# SPDX-License-Identifier: Apache-2.0
"""Many devices: what a preconditioner has to know of them, though it has no argument for that.

Two context variables say it while a step is traced. The functions below read them, and do nothing if they are not set.

- `dpsgd_optax.sharded` sets the mesh (:func:`dividing`). The matrices of a bucket do not depend on each other: its
  leading axis is cut, and each device fits and applies its share. Notation (B, n): `dpsgd_optax.sharding`.
- `dpsgd_optax.data_parallel` sets the axis of ``pmap`` or ``shard_map`` over which replicas hold equal params
  (:func:`replicas`). It averages the gradient, the loss and the products itself; statistics of what enters a layer are
  formed inside a preconditioner, which averages them over that axis.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

Path = tuple[Any, ...]


class Split(NamedTuple):
  """How buckets are divided."""

  mesh: Any  # of devices
  axes: tuple[str, ...]  # the mesh axes that buckets may be divided over
  specs: Mapping[Path, PartitionSpec] = {}  # path of a leaf of the params -> how it is sharded; if missing: not at all

  def over(self, matrices: int) -> tuple[str, ...]:
    """Those of the axes whose product n is the largest that divides B; () if none does: the bucket is not divided."""
    subsets = (s for r in range(len(self.axes) + 1) for s in itertools.combinations(self.axes, r))
    count = lambda names: math.prod(self.mesh.shape[name] for name in names)
    found = max((s for s in subsets if matrices % count(s) == 0), key=count)
    return found if count(found) > 1 else ()


_split: ContextVar[Split | None] = ContextVar("split", default=None)
_replica_axis: ContextVar[Any] = ContextVar("replica axis", default=None)


@contextlib.contextmanager
def _holding(variable: ContextVar, value: Any) -> Generator[None]:
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)


def dividing(split: Split) -> contextlib.AbstractContextManager[None]:
  """Buckets that are traced inside the block are divided."""
  return _holding(_split, split)


def replicas(axis_name: Any) -> contextlib.AbstractContextManager[None]:
  """What is traced inside the block runs on one of several replicas."""
  return _holding(_replica_axis, axis_name)


def replica_axis() -> Any:
  """The axis of `data_parallel`; None for a single replica."""
  return _replica_axis.get()


def mean_over_replicas(tree: Any) -> Any:
  """The mean over all replicas; the tree itself if there is one."""
  return tree if _replica_axis.get() is None else jax.lax.pmean(tree, _replica_axis.get())


def divided(run: Callable, matrices: int) -> Callable:
  """``run``, a function of arrays with a leading axis over B matrices, on each device for its share of them."""
  split = _split.get()
  axes = split.over(matrices) if split else ()
  if split is None or not axes:
    return run
  share = PartitionSpec(axes)
  return jax.shard_map(run, mesh=split.mesh, in_specs=share, out_specs=share, check_vma=False)


def as_leaves(x: jax.Array, paths: Sequence[Path | None] = (None,)) -> jax.Array:
  """A bucket, (B, …), in the sharding of its leaves: to be called before it is divided and after it is gathered.

  So JAX moves a bucket as one: on the way in each device cuts out its share, on the way out there is one all-gather. If
  all leaves are whole matrices that are sharded alike, as under FSDP, each way is one all-to-all.
  """
  split = _split.get()
  if split is None or not split.over(len(x)):
    return x
  found = [PartitionSpec() if path is None else split.specs.get(path, PartitionSpec()) for path in paths]
  spec = found[0] if all(other == found[0] for other in found) else PartitionSpec()
  return jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, PartitionSpec(None, *spec)))


def on_mesh() -> bool:
  """Whether leaves may lie on many devices, so that to put some of them side by side may mean to send them."""
  return _split.get() is not None


def spec_of(path: Path) -> PartitionSpec | None:
  """How the leaf at this path is sharded; None on one device."""
  split = _split.get()
  return None if split is None else split.specs.get(path, PartitionSpec())


def replicated(x: jax.Array) -> jax.Array:
  """x, whole, on every device: for random bits, which are cheaper to draw everywhere than to send."""
  split = _split.get()
  return x if split is None else jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, PartitionSpec()))
