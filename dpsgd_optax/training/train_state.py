# SPDX-License-Identifier: Apache-2.0
"""A train state for linen that hands extra arguments on to the transform, as `nnx.Optimizer.update` does in NNX.

In NNX the transform sees pure arrays; `hvp` and `value_fn` may be functions of an `nnx.State`, or of its `nnx.as_pure`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from dpsgd_optax.base import check_fraction, forward_extra_args


def _at_least_single(params: Any) -> Any:
  """In bfloat16 a mean of weight 0.99 would stand still."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


class TrainState(train_state.TrainState):
  """Flax's `TrainState`, whose `apply_gradients` forwards extra arguments to the transform.

  Without `extra_args` the two are the same. With Flax's overwrite-with-gradient collection (fp8) the transform sees
  only the collection `params`, so `hvp` and `value_fn` have to be functions of that collection.

  With `average=0.95` the state keeps a running mean of the parameters beside them, and `averaged_params` is what to
  evaluate and to save: noise of the last steps is averaged out of it, at one more copy of the parameters. Training does
  not change. Equation, with β = `average` and θ_s the parameters after step s:

    averaged = (1 − β) Σ_{s ≤ t} β^{t−s} θ_s / (1 − β^t)

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from dpsgd_optax import training
    >>> x, model = jnp.ones((4, 3)), nn.Dense(1)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9))
    >>> state = training.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    >>> @jax.jit
    ... def train_step(state):
    ...   loss = lambda p: jnp.mean((state.apply_fn({"params": p}, x) - 1.0) ** 2)
    ...   value, grads = jax.value_and_grad(loss)(state.params)
    ...   extra = {"value": value, "value_fn": loss, "grad": grads}
    ...   return state.apply_gradients(grads=grads, extra_args=extra), value
    >>> state, first = train_step(state)
    >>> state, second = train_step(state)
    >>> bool(second < first), int(state.step)
    (True, 2)

    The mean of the parameters, in three lines:

    >>> state = training.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1), average=0.9)
    >>> state = state.apply_gradients(grads=params)  # as often as there are batches
    >>> outputs = state.apply_fn({"params": state.averaged_params}, x)
  """

  # by keyword, so that a subclass may have fields without a default, as `batch_stats`
  average: float | None = struct.field(pytree_node=False, default=None, kw_only=True)
  mean: optax.EmaState | None = struct.field(default=None, kw_only=True)

  @classmethod
  def create(cls, *, apply_fn: Any, params: Any, tx: Any, average: float | None = None, **kwargs: Any) -> "TrainState":
    """As Flax's; `average`: weight kept by the running mean of the parameters, in [0, 1); None: no mean.

    The mean is kept in float32 at least. Source: Polyak averaging with exponential weights, `optax.ema`.

    Raises:
      ValueError: for an `average` outside [0, 1).
    """
    if average is not None:
      check_fraction(average, "average")
      kwargs["mean"] = optax.ema(average).init(_at_least_single(params))
    return super().create(apply_fn=apply_fn, params=params, tx=tx, average=average, **kwargs)

  @property
  def averaged_params(self) -> Any:
    """The running mean, shapes and dtypes of the parameters; themselves before the first step or without `average`."""
    if self.average is None or self.mean is None:
      return self.params
    count = self.mean.count
    mean = optax.tree.bias_correction(self.mean.ema, self.average, jnp.maximum(count, 1))
    return optax.tree.where(count > 0, optax.tree.cast_like(mean, self.params), self.params)

  def apply_gradients(self, *, grads: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any) -> "TrainState":
    """One step: `updates, opt_state = tx.update(grads, opt_state, params, **extra_args)`, then apply the updates.

    Args:
      grads: gradients with the structure of `params`.
      extra_args: keyword arguments of the transform's `update`: `value`, `value_fn`, `hvp`, `refresh`, ... A transform
        that takes none ignores them. With `optax.MultiSteps(tx, k)` add `accumulating=state.opt_state.mini_step < k -
        1`, else the k - 1 calls whose result it throws away compute products and fits too.
      **kwargs: attributes of the state to be replaced, as in Flax.

    Returns:
      The state after the step, `step` incremented by one.
    """
    tx = forward_extra_args(self.tx)

    def update(updates, state, params=None):
      return tx.update(updates, state, params, **(extra_args or {}))

    bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
    stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
    if self.average is not None and self.mean is not None:
      _, mean = optax.ema(self.average).update(_at_least_single(stepped.params), self.mean)
      stepped = stepped.replace(mean=mean)
    return stepped.replace(tx=kwargs.get("tx", self.tx))
