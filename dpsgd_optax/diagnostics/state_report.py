# SPDX-License-Identifier: Apache-2.0
"""What an optimizer state has to say, as a flat dict of scalars for any logger.

Two tables say what is read: READERS, the numbers of each state, and ENDS, the extremes of the diagonal of P.

Notation
  P       the preconditioner; p_ii its diagonal, over all leaves
  g, u    gradient and update

For a symmetric positive P the smallest eigenvalue is at most min p_ii and the largest at least max p_ii, so that
cond(P) ≥ max p_ii / min p_ii, with equality for diagonal groups. It costs a pass over the diagonals, no factorisation.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.by_shape import safe_norm
from dpsgd_optax.geometry.structured import Arrow
from dpsgd_optax.preconditioners._factors import KronState, factors_of_p
from dpsgd_optax.preconditioners._lift import LiftState
from dpsgd_optax.preconditioners.damped_kron import DampedKronState
from dpsgd_optax.preconditioners.diagonal import DiagonalState
from dpsgd_optax.preconditioners.lra import LRAState
from dpsgd_optax.preconditioners.xmat import XMatState
from dpsgd_optax.transforms.clipping import ClippedLearningRateState, ClipSpikesState
from dpsgd_optax.transforms.levenberg_marquardt import InjectedLevenbergMarquardtState, LevenbergMarquardtState
from dpsgd_optax.transforms.precondition import ScaleByPreconditionerState

Scalars = dict[str, jax.Array]


def report(opt_state: Any, updates: Any = None, grads: Any = None) -> Scalars:
  """Every number worth logging, from a state of any depth: ``chain``, ``partition``, ``MultiSteps``, and so on.

  | part of the optimizer         | numbers                                                                       |
  |-------------------------------|-------------------------------------------------------------------------------|
  | ``scale_by_preconditioner``   | ``steps``, ``fits``, ``skipped``, ``dropped``                                 |
  | its P, if the state shows it  | ``p_smallest``, ``p_largest``, the extreme p_ii; their quotient ``p_condition`` |
  | ``levenberg_marquardt``       | ``damping``, ``ratio``, ``actual``, ``predicted``, ``rejected``               |
  | ``clip_spikes``               | ``clipped``                                                                   |
  | ``clipped_learning_rate``     | ``rate``                                                                      |
  | the arguments                 | ``update_norm``, ``grad_norm``, ``cosine`` of −u and g; 1 is steepest descent |

  Two parts of one kind, as under ``optax.partition``, are told apart by where they stand: ``kernel/fits``.

  Args:
    opt_state: the state of any optax transform; states of other packages add nothing.
    updates, grads: u, what ``update`` returned, and g of the same step; without one of them there is no cosine.

  Returns:
    A flat dict of scalars, its keys known at trace time, so that it may be returned from ``jit`` or stacked by
    ``scan``. P is shown by ``diagonal``, the Kronecker family, ``lra`` and ``xmat``; the leaves of other
    preconditioners are left out. ``p_condition`` is a lower bound of the condition number. ``cosine`` is 0 where u or g
    is zero.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> tx, params, grads = dpo.psgd(0.1, dpo.diagonal()), jnp.ones(2), jnp.array([3.0, 1.0])
    >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    >>> found = dpo.report(state, updates, grads)
    >>> sorted(found)
    ['clipped', 'cosine', 'dropped', 'fits', 'grad_norm', 'p_condition', 'p_largest', 'p_smallest', 'skipped', 'steps',
    'update_norm']
    >>> int(found["fits"]), round(float(found["cosine"]), 2)
    (1, 1.0)
  """
  found: Scalars = {}
  for kind, numbers in READERS.items():
    for name, state in _parts(opt_state, kind).items():
      found.update({f"{name}/{key}" if name else key: number for key, number in numbers(state).items()})
  if updates is not None:
    found["update_norm"] = safe_norm(updates)
  if grads is not None:
    found["grad_norm"] = safe_norm(grads)
  if updates is not None and grads is not None:
    found["cosine"] = -jnp.real(optax.tree.vdot(_unit(updates), _unit(grads)))
  return found


def _parts(tree: Any, kind: type) -> dict[str, Any]:
  """The outermost states of one kind by what their paths do not share; a single one has no name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kind))
  found = [(path, x) for path, x in leaves if isinstance(x, kind)]
  shared = lambda paths: sum(1 for _ in itertools.takewhile(lambda at: len(set(at)) == 1, zip(*paths, strict=False)))
  head = shared([path for path, _ in found])
  tail = shared([path[:head:-1] for path, _ in found])
  name = lambda path: jax.tree_util.keystr(path[head : len(path) - tail], simple=True, separator="/")
  return {name(path): x for path, x in found}


def _unit(tree: Any) -> Any:
  """tree / ‖tree‖; zero where it is zero."""
  norm = safe_norm(tree)
  norm = jnp.where(norm > 0, norm, 1)
  return jax.tree.map(lambda x: x.astype(working_dtype(x.dtype)) / norm, tree)


def _ends(diagonal: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The smallest and the largest entry; zeros are padding."""
  real = jnp.real(diagonal)
  return jnp.min(jnp.where(real > 0, real, jnp.inf)), jnp.max(real)


def _factor_ends(p: Any) -> tuple[jax.Array, jax.Array]:
  return _ends(p.diagonal if isinstance(p, Arrow) else p if p.ndim == 1 else jnp.diagonal(p))


def _kron_ends(factors: Any, shifts: Any = None) -> tuple[jax.Array, jax.Array]:
  """Of a Kronecker product of factors p_i + s_i: its diagonal is the product of the diagonals."""
  ends = jnp.stack([jnp.stack(_factor_ends(p)) for p in factors])
  ends = ends if shifts is None else ends + jnp.stack(shifts)[:, None]
  return tuple(jnp.prod(ends, axis=0))


def _damped_kron_ends(state: DampedKronState) -> tuple[jax.Array, jax.Array]:
  """(Pbar_L + s_L) (Pbar_R + s_R) + c."""
  *shifts, c = state.shifts
  low, high = _kron_ends(state.factors(), shifts)
  return low + c, high + c


def _lra_ends(state: LRAState) -> tuple[jax.Array, jax.Array]:
  """p_ii = d_i² ‖e_i + U V_i‖² = d_i² (1 + 2⟨u_i, V_i⟩ + V_iᵀ UᵀU V_i), from Q = (I + UVᵀ) diag(d)."""
  u, v = jnp.split(state.w, 2, axis=1)
  square = 1 + 2 * jnp.sum(u * v, 1) + jnp.sum((v @ (u.T @ u)) * v, 1)
  return _ends(state.d**2 * square)


ENDS: dict[type, Callable[[Any], tuple[jax.Array, jax.Array]]] = {
  DiagonalState: lambda state: _ends(state.q**2),
  KronState: lambda state: _kron_ends(factors_of_p(state)),
  DampedKronState: _damped_kron_ends,
  LRAState: _lra_ends,
  XMatState: lambda state: _ends(state.a**2 + state.b[::-1] ** 2),
}
"""(min p_ii, max p_ii) of one matrix, for the states that show it."""


def _preconditioner(state: ScaleByPreconditionerState) -> Scalars:
  numbers = {"steps": state.count, "fits": state.fits, "skipped": state.skipped, "dropped": state.dropped}
  numbers = {name: number for name, number in numbers.items() if number is not None}
  lifted = state.preconditioner
  buckets = lifted.buckets.values() if isinstance(lifted, LiftState) and isinstance(lifted.buckets, dict) else ()
  ends = [jax.vmap(ENDS[type(bucket)])(bucket) for bucket in buckets if type(bucket) in ENDS]
  if not ends:
    return numbers
  low = jnp.min(jnp.concatenate([low for low, _ in ends]))
  high = jnp.max(jnp.concatenate([high for _, high in ends]))
  return {**numbers, "p_smallest": low, "p_largest": high, "p_condition": high / low}


def _fields(*names: str) -> Callable[[Any], Scalars]:
  return lambda state: {name: getattr(state, name) for name in names}


READERS: dict[type, Callable[[Any], Scalars]] = {
  LevenbergMarquardtState: _fields("damping", "ratio", "actual", "predicted", "rejected"),
  InjectedLevenbergMarquardtState: _fields("current_damping", "ratio", "actual", "predicted", "rejected"),
  ClipSpikesState: _fields("clipped"),
  ClippedLearningRateState: _fields("rate"),
  ScaleByPreconditionerState: _preconditioner,
}
