# SPDX-License-Identifier: Apache-2.0
"""The axis of ``pmap`` or ``shard_map`` whose replicas hold equal params, while a step of `data_parallel` is traced.

Statistics of a batch that do not come by way of the gradient, the loss or a product (what enters a layer) read it here.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax

_active: ContextVar[Any] = ContextVar("replicas", default=None)


@contextlib.contextmanager
def replicas(axis_name: Any) -> Generator[None]:
  """What is traced inside runs on one of several replicas."""
  token = _active.set(axis_name)
  try:
    yield
  finally:
    _active.reset(token)


def replica_axis() -> Any:
  """The axis of `data_parallel`; None for a single replica."""
  return _active.get()


def mean_over_replicas(tree: Any) -> Any:
  """The mean over all replicas; the tree itself where there is one."""
  return tree if _active.get() is None else jax.lax.pmean(tree, _active.get())
