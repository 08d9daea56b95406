# SPDX-License-Identifier: Apache-2.0
"""Promises × optimizers, one table: what optax promises of its own, asked of every row of ours.

A promise is a function of the name of a row that raises if it is broken. Most of them are about shapes, dtypes and
structure, which `jax.eval_shape` answers without compiling anything. A cell that cannot hold is listed in EXCUSES with
its reason, and its error is part of the table: the test asserts that it comes, and that it says what to do.

``python -m tests.contract`` prints the table.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import dpsgd_optax as dpo
from tests.table import OPTIMIZERS, PARAMS, Fault, Row, compiled, layer_inputs, residual_of, scaling

CALM = Fault()


def whitened(preconditioner: Callable[[], dpo.Preconditioner]) -> Row:
  make = lambda **options: dpo.scale_by_preconditioner(preconditioner(), dpo.whitening(), **options)
  return Row(make, frozenset())


def unkeyed(make: Callable, *extras: str) -> Row:
  return Row(make, frozenset(extras), takes_key=False)


TRANSFORMS = {
  "lra": whitened(functools.partial(dpo.lra, rank=2)),
  "xmat": whitened(dpo.xmat),
  "dense": whitened(dpo.dense),
  "affine": whitened(functools.partial(dpo.affine, max_skew=jnp.inf)),
  "blocked": whitened(lambda: dpo.blocked(dpo.kron(max_skew=jnp.inf), 2)),
  "second_moment": whitened(dpo.second_moment),
  "raveled": whitened(lambda: dpo.raveled(scaling())),
  "clipped_learning_rate": unkeyed(lambda: dpo.clipped_learning_rate(0.1)),
  "add_gradient_norm_penalty": unkeyed(lambda: dpo.add_gradient_norm_penalty(0.1), "hvp"),
  "sharpness_aware": unkeyed(lambda: dpo.penalties.sharpness_aware(0.1), "value_fn"),
  "add_l1_penalty": unkeyed(lambda: dpo.penalties.add_l1_penalty(0.1)),
  "proximal_l1": unkeyed(lambda: dpo.penalties.proximal_l1(0.1, 0.1)),
  "proximal_l2": unkeyed(lambda: dpo.penalties.proximal_l2(0.1, 0.1)),
  "clip_output_change": unkeyed(lambda: dpo.layers.clip_output_change(), "layer_inputs"),
  "trust_region": unkeyed(lambda: dpo.trust_region(optax.sgd(0.1)), "value", "value_fn"),
  "clip_spikes": unkeyed(lambda: dpo.clip_spikes()),
}

"""Those that are no optimizers by themselves, each alone."""

ROWS: dict[str, Row] = {**OPTIMIZERS, **TRANSFORMS}


@functools.cache
def transform(name: str) -> optax.GradientTransformationExtraArgs:
  return compiled(name).tx if name in OPTIMIZERS else TRANSFORMS[name].make()


def squares(params):
  """A loss of any tree, smooth and not quadratic."""
  return sum((jnp.sum(jnp.cosh(x.astype(jnp.float32)) - 0.5 * x) for x in jax.tree.leaves(params)), jnp.zeros(()))


def one_step(tx, extras, loss=squares, **more):
  """(params, state) -> (params, state, updates), with the extra arguments that the row needs."""

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    offers = {"value": value, "value_fn": loss, "hvp": dpo.hvp(loss, params), "layer_inputs": layer_inputs(params)}
    offers["residual_fn"] = dpo.residuals(residual_of(loss)).at(params)
    updates, state = tx.update(grads, state, params, **{k: v for k, v in offers.items() if k in extras}, **more)
    return optax.apply_updates(params, updates), state, updates

  return step


def avals(tree):
  """Structure, and shape, dtype and weak type of each leaf."""
  leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda x: x, tree))
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def raw(tree):
  typed = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


def same(a, b):
  chex.assert_trees_all_equal(raw(a), raw(b))


def keeps(tx: Any, extras: Any, params: Any = PARAMS, loss: Callable = squares, **more: Any) -> None:
  """A step changes neither structure, shape, dtype nor weak type of params and state; nor does it need values."""
  state = jax.eval_shape(tx.init, params)
  assert avals(jax.eval_shape(one_step(tx, extras, loss, **more), params, state)[:2]) == avals((params, state))


def wrapped(wrap: Callable[[Any], Any], *more: str) -> Callable[[str], None]:
  """The promise that a wrapper of optax accepts the row; ``more``: extra arguments that the wrapper needs."""
  return lambda name: keeps(wrap(transform(name)), ROWS[name].extras | set(more))
