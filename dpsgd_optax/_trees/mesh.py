# SPDX-License-Identifier: Apache-2.0
"""Many devices under ``jit``: the matrices of a bucket are divided among them, each device fits and applies its share.

The matrices of a bucket do not depend on each other: its leading axis can be cut, and while they are fitted or applied
the devices exchange nothing. Preconditioners take no argument for this. While `dpsgd_optax.sharded` traces a step it
keeps the mesh in a context variable (:func:`dividing`), which the functions below read; without it they do nothing.

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


@contextlib.contextmanager
def while_tracing(variable: ContextVar, value: Any) -> Generator[None]:
  """Inside the block the context variable has this value."""
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)


def dividing(split: Split) -> contextlib.AbstractContextManager[None]:
  """Buckets that are traced inside the block are divided."""
  return while_tracing(_split, split)


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
