# SPDX-License-Identifier: Apache-2.0
"""Flax and the training loop. The only module that imports Flax, and not imported by the package itself.

`TrainState` hands extra arguments (`value`, `value_fn`, `hvp`, ...) to transforms that need more than a gradient. Flax
NNX needs no such help: `nnx.Optimizer.update(model, grads, **extra)` forwards what it is given. Its transform sees pure
arrays, so `hvp` and `value_fn` are functions of `nnx.as_pure(params)`, while `grads` stay in their `nnx.Param`.

`host_cadence` chooses on the host which steps fit the preconditioner and which are judged, so that each kind of step is
a program of its own without `jax.lax.cond`.
"""

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

Schedule = Callable[[Any], Any]  # count ↦ probability of a fit


class TrainState(train_state.TrainState):
  """Flax's `TrainState`, whose `apply_gradients` forwards extra arguments to the transform.

  A drop-in for it: without `extra_args` it is the same. Flax's overwrite-with-gradient collection (fp8) is handled by
  Flax's own code; the transform then sees only the collection `params`, so that `hvp` and `value_fn` have to be
  functions of that collection.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from dpsgd_optax import training
    >>> x, model = jnp.ones((4, 3)), nn.Dense(1)
    >>> state = training.TrainState.create(
    ...   apply_fn=model.apply,
    ...   params=model.init(jax.random.key(0), x)["params"],
    ...   tx=optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9)),
    ... )
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
  """

  def apply_gradients(self, *, grads: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any) -> "TrainState":
    """One step: `updates, opt_state = tx.update(grads, opt_state, params, **extra_args)`, then apply the updates.

    Args:
      grads: gradients with the structure of `params`.
      extra_args: keyword arguments of the transform's `update`: `value`, `value_fn`, `hvp`, `refresh`, ... A transform
        that takes none ignores them.
      **kwargs: attributes of the state to be replaced, as in Flax.

    Returns:
      The state after the step, `step` incremented by one.
    """
    tx = optax.with_extra_args_support(self.tx)

    def update(updates, state, params=None):
      return tx.update(updates, state, params, **(extra_args or {}))

    bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
    stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
    return stepped.replace(tx=kwargs.get("tx", self.tx))


def host_cadence(
  step: Callable[..., Any],
  *,
  refresh_every: int | Schedule = 1,
  judge_every: int = 1,
  donate_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
  """A training loop's step that knows on the host whether to fit (`refresh`) and whether to judge (`judge`).

  On the CPU a convolution inside `jax.lax.cond` is many times slower than outside; and under `vmap` a cond computes
  both of its branches. Here the two choices are Python bools, constant in each of the at most four programs that are
  compiled, one for every pair that occurs:

    refresh  ⇔  count mod refresh_every = 0,            the first step included,
             ⇔  ⌊p(0) + … + p(count)⌋ grows at count,   if it is a schedule p of probabilities,
    judge    ⇔  (count + 1) mod judge_every = 0,        the first step not, unless all are.

  The sums are exact (rational numbers), so that the long-run rate is that of the schedule without a coin, and the same
  count gives the same choice wherever a run is resumed.

  Args:
    step: `step(*args, refresh: bool, judge: bool)`, to be passed on to `tx.update`; it is jitted here.
    refresh_every: fit every so many steps (DPSGD's T1), or a schedule count ↦ probability in [0, 1], of JAX operations.
    judge_every: judge every so many steps (DPSGD's T2).
    donate_argnums: arguments of `step` whose buffers may be reused, as in `jax.jit`; the old ones are then gone.

  Returns:
    `run(count, *args)`, which returns what `step` returns. The count is that of the steps done so far, an int on the
    host: the Python variable of the loop, not `state.step`, for which every step would have to wait.

  Raises:
    ValueError: if a period is below 1; by `run`, if the count is negative or a probability is outside [0, 1].

  Example:
    >>> from dpsgd_optax.training import host_cadence
    >>> def step(x, *, refresh, judge):
    ...   return x + 1 + 10 * refresh + 100 * judge
    >>> run = host_cadence(step, refresh_every=2, judge_every=3)
    >>> [int(run(count, 0)) for count in range(6)]
    [11, 1, 111, 1, 11, 101]
  """
  fit_due = _scheduled(refresh_every) if callable(refresh_every) else _periodic(refresh_every, "refresh_every")
  judge_due = _periodic(judge_every, "judge_every")
  jitted = jax.jit(step, static_argnames=("refresh", "judge"), donate_argnums=donate_argnums)

  def run(count: int, *args: Any) -> Any:
    count = operator.index(count)
    if count < 0:
      raise ValueError(f"`run` needs the number of steps done so far, 0 on the first step, got {count}.")
    return jitted(*args, refresh=fit_due(count), judge=judge_due(count + 1))

  return run


def _periodic(every: int, name: str) -> Callable[[int], bool]:
  """count ↦ count mod every = 0."""
  try:
    period = operator.index(every)
  except TypeError:
    period = 0
  if period < 1:
    raise ValueError(f"`host_cadence` needs `{name}` to be a whole number of steps, at least 1, got {every!r}.")
  return lambda count: count % period == 0


def _scheduled(probability: Schedule, chunk: int = 256) -> Callable[[int], bool]:
  """count ↦ whether ⌊Σ p⌋ grows at count. Evaluates the schedule for many counts at once and remembers the answers."""
  due: list[bool] = []
  fraction = Fraction(0)  # the sum so far, less its whole part

  def at(count: int) -> bool:
    nonlocal fraction
    while len(due) <= count:
      counts = np.arange(len(due), len(due) + chunk, dtype=np.int32)
      for p in np.asarray(jax.vmap(lambda t: jnp.asarray(probability(t)))(counts)).tolist():
        if not 0 <= p <= 1:
          raise ValueError(
            f"`refresh_every` must give probabilities in [0, 1], but at count {len(due)} its value is {p}. "
            "For a fixed period pass an int."
          )
        fraction += Fraction(p)
        due.append(fraction >= 1)
        fraction -= due[-1]
    return due[count]

  return at
