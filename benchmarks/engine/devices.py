# SPDX-License-Identifier: Apache-2.0
"""How params lie on many devices, and what the studies of it have in common."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

LAYOUTS = ("data parallel", "fully sharded")
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def specs_of(layout: str, params: Any, mesh: Any) -> Any:
  """A spec for each parameter. Fully sharded: cut along the first axis that the devices of the mesh divide."""

  def one(x: Any) -> P:
    axis = next((i for i, d in enumerate(x.shape) if d % mesh.size == 0), None)
    return P() if axis is None or layout == LAYOUTS[0] else P(*(None,) * axis, tuple(mesh.shape))

  return jax.tree.map(one, params)
