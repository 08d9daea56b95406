# SPDX-License-Identifier: Apache-2.0
"""Peers that the cost of a step is compared with (extra `peers`).

psgd-jax 0.2.9 does not import today; `psgd_jax` gives back the two names that it misses. It holds the factors, not P;
ours keeps P as well, so that a step without a fit costs one product per factor.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

import jax
import optax


def installed() -> bool:
  return importlib.util.find_spec("psgd_jax") is not None


def psgd_jax(module: str) -> Any:
  """A module of it, importable again: `optax._src.clipping` and `jax.tree_unflatten` are gone from optax and jax."""
  name = "optax._src.clipping"
  if name not in sys.modules:
    clipping = types.ModuleType(name)
    clipping.clip_by_global_norm = optax.clip_by_global_norm
    clipping.clip_by_block_rms = optax.clip_by_block_rms
    clipping.clip = optax.clip
    sys.modules[name] = clipping
  if not hasattr(jax, "tree_unflatten"):
    jax.tree_unflatten = jax.tree_util.tree_unflatten
  try:
    return importlib.import_module(f"psgd_jax.{module}")
  except ModuleNotFoundError:
    raise SystemExit("error: psgd-jax is not installed. Type: pip install 'dpsgd_optax[peers]'") from None
