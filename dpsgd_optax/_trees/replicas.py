# SPDX-License-Identifier: Apache-2.0
"""Many devices under ``pmap`` or ``shard_map``: the name of the axis over which replicas hold equal params.

Each replica sees its share of the batch. `dpsgd_optax.data_parallel` averages the gradient, the loss and the products;
statistics of what enters a layer are formed inside a preconditioner, which it cannot reach. So while it traces a step
it names the axis in a context variable (:func:`replicas`), and whoever forms such statistics asks for it here.
"""

import contextlib
from contextvars import ContextVar
from typing import Any

import jax

from dpsgd_optax._trees.mesh import while_tracing

_axis: ContextVar[Any] = ContextVar("replicas", default=None)


def replicas(axis_name: Any) -> contextlib.AbstractContextManager[None]:
  """What is traced inside the block runs on one of several replicas."""
  return while_tracing(_axis, axis_name)


def replica_axis(axis_name: Any = None) -> Any:
  """``axis_name`` if it is given, else that of `data_parallel`; None for a single replica."""
  return _axis.get() if axis_name is None else axis_name


def mean_over_replicas(tree: Any) -> Any:
  """The mean over all replicas; the tree itself if there is one."""
  return tree if _axis.get() is None else jax.lax.pmean(tree, _axis.get())
