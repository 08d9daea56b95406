# SPDX-License-Identifier: Apache-2.0
"""Many devices under ``pmap`` and ``shard_map``: equal replicas, where JAX averages nothing by itself.

Each replica sees its share of the batch. To average the gradient is not enough: replicas also drift apart, without an
error, if a Hessian-vector product, the loss that judges a step or the statistics of the layers are those of one share.
Under ``jit`` with sharded inputs use `dpsgd_optax.sharding`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from dpsgd_optax._trees.mesh import replicas
from dpsgd_optax.base import Product, forward_extra_args


def _averaged_loss(loss: Callable, axis_name: Any) -> Callable:
  """The mean loss, whose gradient is the mean gradient; ``pmean(loss)`` alone has the local gradient."""

  @jax.custom_vjp
  def shared(params):
    return params

  shared.defvjp(lambda params: (params, None), lambda _, cotangent: (jax.lax.pmean(cotangent, axis_name),))

  def mean(params, *args, **kwargs):
    return jax.lax.pmean(loss(shared(params), *args, **kwargs), axis_name)

  return functools.wraps(loss)(mean)  # line searches read which arguments a loss takes


def _check_bound(axis_name: Any) -> None:
  try:
    jax.lax.axis_index(axis_name)
  except NameError as error:
    raise ValueError(
      f"`data_parallel` averages over the axis {axis_name!r}, which is not bound where `update` is called. Call it "
      f"inside `jax.pmap(step, axis_name={axis_name!r})` or `jax.shard_map(step, mesh=mesh, …)` with that axis; under "
      "`jit` with sharded inputs leave `data_parallel` out."
    ) from error


def data_parallel(tx: optax.GradientTransformation, axis_name: Any) -> optax.GradientTransformationExtraArgs:
  """The same optimizer on the replicas of ``pmap`` or ``shard_map``, which stay equal bit for bit.

  Averages over the axis: the gradients that enter, ``value``, ``value_fn`` and its derivatives, ``hvp``, and what
  ``bnp`` and ``gls`` see of ``layer_inputs``. What you averaged before stays what it is. (A ``pmean`` inside the loss
  averages neither its gradient nor its Hessian-vector product.)

  ``shard_map`` with its default, ``check_vma=True``, *sums* the derivatives of replicated params by itself. There let
  the loss be ``jax.lax.pmean(local_loss, axis_name)``; then everything is averaged already.

  Args:
    tx: any optax transformation.
    axis_name: of ``pmap`` or ``shard_map``; a tuple for several axes. ``init`` may be called outside.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`, with the state of ``tx``.

  Raises:
    ValueError: in ``update``, if the axis is not bound.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> tx = dpo.data_parallel(dpo.dpsgd(0.1), "batch")
    >>> params, x = jnp.ones((3, 2)), jnp.ones((jax.device_count(), 4, 3))
    >>> @jax.jit
    ... def train_step(params, state, x):
    ...   loss = lambda p: jnp.mean((x @ p - 1.0) ** 2)  # of this replica's share of the batch
    ...   value, grads = jax.value_and_grad(loss)(params)
    ...   updates, state = tx.update(grads, state, params, value=value, value_fn=loss, hvp=dpo.hvp(loss, params))
    ...   return optax.apply_updates(params, updates), state
    >>> step = jax.vmap(train_step, in_axes=(None, None, 0), out_axes=None, axis_name="batch")  # or pmap, shard_map
    >>> params, state = step(params, tx.init(params), x)
  """
  inner = forward_extra_args(tx)

  def init(params):
    with replicas(axis_name):  # the shapes of a state may depend on whether there are several
      return inner.init(params)

  def update(updates, state, params=None, *, value=None, value_fn=None, hvp=None, grad=None, **extra):
    _check_bound(axis_name)
    mean = lambda tree: jax.lax.pmean(tree, axis_name)
    means: dict[str, Any] = {name: mean(x) for name, x in (("value", value), ("grad", grad)) if x is not None}
    if value_fn is not None:
      means["value_fn"] = _averaged_loss(value_fn, axis_name)
    if hvp is not None:
      means["hvp"] = Product(lambda vector: mean(hvp(vector)), getattr(hvp, "params", None))
    with replicas(axis_name):
      return inner.update(mean(updates), state, params, **means, **extra)

  return optax.GradientTransformationExtraArgs(init, update)
