# SPDX-License-Identifier: Apache-2.0
"""Equal matrices divided among the devices of a mesh: each device fits and applies its share.

What a lift stacks on a leading axis is independent matrix by matrix, so that axis is cut and nothing is exchanged
while they are fitted or applied. `dpsgd_optax.sharding` says over which mesh, while a step is traced.

Notation
  B    matrices in a bucket
  n    devices along the axes that the bucket is divided over
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
  """Attributes:
  mesh: of devices.
  axes: names of the mesh axes that buckets may be divided over.
  specs: path of a leaf of the params -> how that leaf is sharded; none for a path that is not there.
  """

  mesh: Any
  axes: tuple[str, ...]
  specs: Mapping[Path, PartitionSpec] = {}

  def over(self, matrices: int) -> tuple[str, ...]:
    """Those of the axes whose product n is the largest that divides B; () for none: every device holds all."""
    subsets = (s for r in range(len(self.axes) + 1) for s in itertools.combinations(self.axes, r))
    count = lambda names: math.prod(self.mesh.shape[name] for name in names)
    found = max((s for s in subsets if matrices % count(s) == 0), key=count)
    return found if count(found) > 1 else ()


_active: ContextVar[Split | None] = ContextVar("split", default=None)


@contextlib.contextmanager
def dividing(split: Split) -> Generator[None]:
  """Buckets that are traced inside are divided."""
  token = _active.set(split)
  try:
    yield
  finally:
    _active.reset(token)


def divided(run: Callable, matrices: int) -> Callable:
  """``run``, a function of arrays with a leading axis over B matrices, on each device for its share of them."""
  split = _active.get()
  axes = split.over(matrices) if split else ()
  if split is None or not axes:
    return run
  share = PartitionSpec(axes)
  return jax.shard_map(run, mesh=split.mesh, in_specs=share, out_specs=share, check_vma=False)


def as_leaves(x: jax.Array, paths: Sequence[Path | None] = (None,)) -> jax.Array:
  """A bucket, (B, …), in the sharding of its leaves, before it is divided and before it is handed out again.

  Said at both ends, it makes JAX move a bucket as one: in, each device cuts out its share; out, one all-gather. Where
  all leaves are whole matrices that are sharded alike, as under FSDP, both are one all-to-all.
  """
  split = _active.get()
  if split is None or not split.over(len(x)):
    return x
  found = [PartitionSpec() if path is None else split.specs.get(path, PartitionSpec()) for path in paths]
  spec = found[0] if all(other == found[0] for other in found) else PartitionSpec()
  return jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, PartitionSpec(None, *spec)))


def on_mesh() -> bool:
  """Whether leaves may lie on many devices: to put any of them side by side may then be to send them."""
  return _active.get() is not None


def spec_of(path: Path) -> PartitionSpec | None:
  """How the leaf at this path is sharded; None on one device."""
  split = _active.get()
  return None if split is None else split.specs.get(path, PartitionSpec())


def replicated(x: jax.Array) -> jax.Array:
  """x, whole, on every device: for what is cheaper to draw everywhere than to send in pieces."""
  split = _active.get()
  return x if split is None else jax.lax.with_sharding_constraint(x, NamedSharding(split.mesh, PartitionSpec()))
