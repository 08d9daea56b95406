# SPDX-License-Identifier: Apache-2.0
"""A training loop that chooses on the host which steps fit the preconditioner and which are judged."""

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]  # count ↦ probability of a fit


def host_cadence(
  step: Callable[..., Any],
  *,
  refresh_every: int | Schedule = 1,
  judge_every: int = 1,
  donate_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
  """Jits a training step and tells it in Python bools whether to fit (`refresh`) and whether to judge (`judge`).

  Without it the transforms choose by `jax.lax.cond`, in which a convolution is slow on the CPU, and which computes both
  branches under `vmap`. Here each pair of bools that occurs is a program of its own:

    refresh  ⇔  count mod refresh_every = 0,            the first step included,
             ⇔  ⌊p(0) + … + p(count)⌋ grows at count,   if it is a schedule p of probabilities,
    judge    ⇔  (count + 1) mod judge_every = 0,        the first step not, unless all are.

  The sums are exact (rational numbers): in the long run as many steps fit as the schedule says, and a run that is
  resumed makes the same choices.

  Args:
    step: `step(*args, refresh: bool, judge: bool)`, which passes both on to `tx.update`.
    refresh_every: fit every so many steps (DPSGD's T1), or a schedule count ↦ probability in [0, 1], of JAX operations.
    judge_every: judge every so many steps (DPSGD's T2).
    donate_argnums: arguments of `step` whose buffers may be reused, as in `jax.jit`.

  Returns:
    `run(count, *args)`, which returns what `step` returns. `count` is the number of steps done so far, an int on the
    host: the variable of the loop, not `state.step`, for which each step would wait until the last is computed.

  Raises:
    ValueError: if a period is below 1; by `run`, if the count is negative or a probability is outside [0, 1].

  Example:
    >>> from dpsgd_optax.training.cadence import host_cadence
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
  """count ↦ whether ⌊Σ p⌋ grows at count. Evaluates ``chunk`` counts at once and keeps the answers."""
  due: list[bool] = []
  fraction = Fraction(0)  # of the sum so far

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
