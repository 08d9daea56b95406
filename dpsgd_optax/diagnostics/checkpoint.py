# SPDX-License-Identifier: Apache-2.0
"""A label to keep beside a saved optimizer state, so that an old one either loads or says why it does not.

The states are plain pytrees of arrays, which Orbax saves and restores as they are. What it cannot know is whether two
states of one shape mean the same. ``STATE_VERSION`` counts the changes of layout or of meaning, and the state itself
names its geometry and form (``LiftState.meaning``).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from dpsgd_optax.preconditioners._lift import LiftState

STATE_VERSION = 3
"""Raised by one whenever a field of a state of this package is added, removed, renamed or takes another meaning."""

CHANGES = {
  2: "the PRNG key is raw data (uint32) in place of a typed key; `dropped`, `idle` and `before` are new; "
  '`levenberg_marquardt` says "not yet" with 0 and the largest number in place of NaN; the preconditioners name their '
  "geometry",
  3: "matrices of similar shape share a bucket, padded with zeros; Kronecker factors are kept as Q alone unless "
  "`keep_p=True`; DPSGD's averages move on with the fits, their mean eigenvalues are new; the key of the run stays",
}
"""What each version changed."""


def state_layout(opt_state: Any) -> dict[str, Any]:
  """The layout of a state as a dict that JSON can hold: version, path, dtype and shape of every leaf, what P means.

  Save it with the state, and give it to :func:`check_state_layout` before restoring.

  Args:
    opt_state: of any transform or chain; arrays or, from ``jax.eval_shape(tx.init, params)``, their shapes.

  Example:
    >>> import json, jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx, params = dpo.psgd(0.1, dpo.diagonal()), jnp.ones(3)
    >>> saved = json.dumps(dpo.diagnostics.state_layout(tx.init(params)))  # with Orbax: ocp.args.JsonSave(…)
    >>> dpo.diagnostics.check_state_layout(json.loads(saved), jax.eval_shape(tx.init, params))
    >>> dpo.diagnostics.check_state_layout(json.loads(saved), jax.eval_shape(tx.init, jnp.ones(5)))
    Traceback (most recent call last):
      ...
    ValueError: the saved optimizer state does not fit the optimizer and params at hand: ...
    >>> kron = lambda geometry: jax.eval_shape(dpo.psgd(0.1, dpo.kron(geometry=geometry)).init, params)
    >>> dpo.diagnostics.check_state_layout(dpo.diagnostics.state_layout(kron(dpo.eq)), kron(dpo.quad))
    Traceback (most recent call last):
      ...
    ValueError: ... fitted with geometry=eq in the checkpoint and geometry=quad here. ...
  """
  leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  found = {_path(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}
  is_lift = lambda x: isinstance(x, LiftState)
  lifts = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_lift) if is_lift(x)]
  meaning = {_path(path): ", ".join(x.meaning) for path, x in lifts if x.meaning}
  versions = {name: _version(name) for name in ("dpsgd_optax", "optax", "jax")}
  return {"state_version": STATE_VERSION, "versions": versions, "leaves": found, "meaning": meaning}


def check_state_layout(saved: dict[str, Any] | None, opt_state: Any) -> None:
  """Raises unless a state saved with this layout can be restored into ``opt_state``.

  Args:
    saved: what :func:`state_layout` returned when the state was saved; None if nothing was kept.
    opt_state: what it shall be restored into, as for :func:`state_layout`.

  Raises:
    ValueError: if the layout is unknown or another; the message names the first leaves that differ, the versions
      that wrote the checkpoint, and what to type.
  """
  if not isinstance(saved, dict) or "state_version" not in saved:
    raise ValueError(
      f"the checkpoint needs the layout of its optimizer state beside it, got {saved!r:.60}. Save "
      "`state_layout(opt_state)` with the state from now on; to go on from these params, begin with `tx.init(params)`."
    )
  now, written = state_layout(opt_state), ", ".join(f"{k} {v}" for k, v in saved["versions"].items())
  way_out = (
    f"It was written by {written}. Restore it with those versions and the arguments of that run "
    f"(`pip install dpsgd_optax=={saved['versions']['dpsgd_optax']}`), or keep only the params and begin with "
    "`tx.init(params)`."
  )
  if saved["state_version"] != STATE_VERSION:
    since = "; ".join(words for version, words in CHANGES.items() if version > saved["state_version"])
    raise ValueError(
      f"the saved optimizer state has layout version {saved['state_version']}, this package reads {STATE_VERSION}"
      f"{since and f' (since then: {since})'}. {way_out}"
    )
  differences = _differences(saved["leaves"], now["leaves"])
  if differences := differences or _differences(saved["meaning"], now["meaning"], what="fitted with "):
    raise ValueError(
      f"the saved optimizer state does not fit the optimizer and params at hand: {differences}. {way_out}"
    )


def _version(name: str) -> str:
  try:
    return version(name)
  except PackageNotFoundError:
    return "unknown"


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _differences(saved: dict[str, str], now: dict[str, str], shown: int = 3, what: str = "") -> str:
  """The first entries that are not the same on both sides, in words."""
  words = [
    f"{path} is {what}{saved.get(path, 'not there')} in the checkpoint and {now.get(path, 'not there')} here"
    for path in {**saved, **now}
    if saved.get(path) != now.get(path)
  ]
  more = f"; and {len(words) - shown} more" if len(words) > shown else ""
  return "; ".join(words[:shown]) + more
