# SPDX-License-Identifier: Apache-2.0
"""Kron and SOAP by other people, beside which ours are measured: the extra `peers`.

psgdax 0.1.1             geometries `quad` and `pro`, among others
rollfast 1.3.0           the same, for Python 3.12 and later
distributed-kron 2.0.0   `pro` on blocks of 256 of all matrices in one stack, a fit on every step
psgd-jax 0.2.9           the old reference, kept for history
SOAP_JAX                 SOAP, from its repository (haydn-jones/SOAP_JAX): no index of packages has it

A package that is not installed is left out, and so is one that fails to import, which is said once. Two need a repair
to be imported today, see REPAIRS. All get our momentum and, where they have one, our rule of which factor is dense:
an axis of length d ≤ 2048 with d² ≤ N, vectors diagonal. `dpo.kron` differs on arrays of less than 64 numbers alone,
where axes of up to 8 are dense. psgdax and distributed-kron print when they are initialized; that is swallowed.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.engine.calls import SpecError
from benchmarks.engine.progress import say

MOMENTUM = 0.9
DENSE_RULE = {"max_size_triangular": 2048, "max_skew_triangular": 1.0}
MODES = {"quad": "QUAD", "pro": "Q0.5EQ1.5"}  # our names of the geometries, and theirs
CLIPS = ("clip", "clip_by_block_rms", "clip_by_global_norm")


def _repair_psgd_jax() -> None:
  """Gives back `optax._src.clipping` and `jax.tree_unflatten`, which are gone from optax and jax."""
  name = "optax._src.clipping"
  if name not in sys.modules:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update({clip: getattr(optax, clip) for clip in CLIPS})
  if not hasattr(jax, "tree_unflatten"):
    jax.tree_unflatten = jax.tree_util.tree_unflatten


def _repair_distributed_kron() -> None:
  """Leaves out what the package imports first: an annotation there is an error today; `distributed_kron.pro` is not."""
  if "distributed_kron" not in sys.modules and (spec := importlib.util.find_spec("distributed_kron")):
    sys.modules["distributed_kron"] = importlib.util.module_from_spec(spec)


REPAIRS: dict[str, Callable[[], None]] = {
  "psgd_jax": _repair_psgd_jax,
  "distributed_kron": _repair_distributed_kron,
}


def quiet() -> contextlib.AbstractContextManager:
  """Nothing is printed inside."""
  return contextlib.redirect_stdout(io.StringIO())


@functools.cache
def module(name: str) -> Any:
  """A module of another package, or None if it cannot be had."""
  package = name.split(".")[0]
  if importlib.util.find_spec(package) is None:
    return None
  try:
    REPAIRS.get(package, lambda: None)()
    with quiet():
      return importlib.import_module(name)
  except Exception as error:  # of another package: anything
    say(f"  {package} is installed but does not import, and is left out: {type(error).__name__}: {error}")
    return None


def needed(name: str) -> Any:
  """The same, which must be there."""
  if (found := module(name)) is None:
    raise SpecError(f"`{name.split('.')[0]}` cannot be imported here. Type: pip install 'dpsgd_optax[peers]'")
  return found


def plain(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """The same, which prints nothing and is handed no extra arguments: psgdax says that it takes them, and does not."""

  def init(params: Any) -> Any:
    with quiet():
      return tx.init(params)

  return optax.GradientTransformation(init, lambda updates, state, params=None: tx.update(updates, state, params))


def kron(
  package: str, geometry: str, learning_rate: Any, *, probability: Any = None, key: int | None = None
) -> optax.GradientTransformation:
  """`kron` of psgdax or rollfast; `probability` of a fit, a number or a schedule; None: theirs, which is ours too."""
  options: dict[str, Any] = {"b1": MOMENTUM, "preconditioner_mode": MODES[geometry], **DENSE_RULE}
  if probability is not None:
    options["preconditioner_update_probability"] = probability
  if key is not None:
    options["key"] = jax.random.PRNGKey(key)
  return plain(needed(package).kron(learning_rate, **options))


PACKAGES = ("psgdax", "rollfast")
KRONS = {f"{package} {geometry}": (package, geometry) for package in PACKAGES for geometry in MODES}


def installed() -> dict[str, Callable[..., optax.GradientTransformation]]:
  """Those of KRONS that can be had here: name -> constructor, as `kron` without its first two arguments."""
  return {name: functools.partial(kron, *which) for name, which in KRONS.items() if module(which[0])}


def distributed_kron(learning_rate: float, block_size: int) -> optax.GradientTransformation:
  """`pro` of distributed-kron: every matrix in dense blocks, vectors diagonal; it whitens the momentum."""
  pro = needed("distributed_kron.pro").pro
  return plain(pro(learning_rate, lr_style=None, b1=MOMENTUM, weight_decay=0.0, block_size=block_size))


def soap(learning_rate: float, basis_every: int) -> optax.GradientTransformation:
  """SOAP_JAX, with the momentum of its own, in the eigenbasis."""
  return plain(needed("soap_jax").soap(learning_rate, precondition_frequency=basis_every))
