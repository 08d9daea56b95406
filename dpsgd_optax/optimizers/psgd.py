# SPDX-License-Identifier: Apache-2.0
"""Preconditioned SGD: spike guard → momentum → P → clipping → weight decay → learning rate, a chain of the parts."""

from typing import Any

import jax
import optax

from dpsgd_optax.base import (
  Curvature,
  Preconditioner,
  check,
  check_fraction,
  check_learning_rate,
  check_not_negative,
  forward_extra_args,
)
from dpsgd_optax.curvature.observers import whitening
from dpsgd_optax.preconditioners.kron import kron
from dpsgd_optax.transforms._control import keep_dtype, static_arguments
from dpsgd_optax.transforms.clipping import clip_matrices, clip_spikes
from dpsgd_optax.transforms.precondition import annealed_probability, scale_by_preconditioner


@static_arguments("preconditioner", "curvature", "every", "key", "mask", "mu_dtype")
def psgd(
  learning_rate: optax.ScalarOrSchedule,
  preconditioner: Preconditioner | None = None,
  curvature: Curvature | None = None,
  *,
  every: int | optax.Schedule | None = None,
  b1: float | None = None,
  mu_dtype: Any = None,
  weight_decay: float | None = None,
  damping: Any = 1e-9,
  key: int | jax.Array = 0,
  mask: Any = None,
  clip: float | optax.GradientTransformation | None = 2.0,
  max_jump: float | None = 4.0,
) -> optax.GradientTransformationExtraArgs:
  """Preconditioned SGD: any group, any criterion. With the defaults a drop-in for Adam that needs no extra argument.

  updates = −learning_rate · (clip(P m) + weight_decay · θ), m the gradient or its running mean, P fitted to gradients.

  The preconditioned gradient has entries of the order of 1, as Adam's has: start with Adam's learning rate or a third
  of it. With ``newton()`` it is a Newton step; start with rates of 0.02 to 0.1. The clipping bounds what a step can do:
  with a rate of 0.1 and ``clip=2`` no matrix moves by more than 0.2 in root mean square.

  Args:
    learning_rate: number or schedule.
    preconditioner: ``kron()`` if None. Static.
    curvature: ``whitening()`` if None; ``newton()`` needs ``hvp=`` in ``update``. Static.
    every, key: as for :func:`dpsgd_optax.scale_by_preconditioner`. ``every=None``: ``annealed_probability()``, on every
      step at first and on one in 33 in the end. Static.
    b1: weight kept by the running mean of the gradients (debiased, as Adam's); P is fitted on the raw gradients.
      None: no momentum, and none in the state.
    mu_dtype: of that mean; None: as the gradients. Static.
    weight_decay: decoupled, as in AdamW; None: none.
    mask: which leaves decay, as for ``optax.add_decayed_weights``. Static.
    damping: λ ≥ 0 of the curvature: P ≤ 1/λ.
    clip: the largest root mean square of a preconditioned matrix (``Preconditioner.matrices``), whose entries are cut
      to 10 times that before; or an optax transform such as ``optax.clip_by_global_norm(1.0)``; None: no clipping.
    max_jump: a gradient longer than so many times the running mean of the lengths is shortened before momentum and fit
      see it (:func:`dpsgd_optax.clip_spikes`); None: never.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Every number may be a schedule or set while
    training by ``optax.inject_hyperparams(dpsgd_optax.psgd)(…)``.

  Raises:
    ValueError: for a negative learning rate, damping or weight decay, ``b1`` outside [0, 1), a ``clip`` that is not
      positive, or a ``max_jump`` of 1 or below.

  Source: arXiv:2402.04553, arXiv:2402.11858. The paper's own PSGD, as it is compared with DPSGD, is
  ``dpsgd(lr, damped_kron(average=None), damping=None)``.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> loss = lambda p: jnp.sum((p["w"] @ jnp.array([[1.0], [10.0]]) - 1.0) ** 2)
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> tx = dpo.psgd(learning_rate=1e-3, b1=0.9)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def train_step(params, state):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(300):
    ...   params, state = train_step(params, state)
    >>> bool(loss(params) < 1e-3)
    True
  """
  check_learning_rate(learning_rate)
  check_not_negative(weight_decay, "weight_decay", "Try 1e-4, or None.")
  check_fraction(b1, "b1")
  needed, hint = "positive, an optax transform, or None", "The default is 2.0; None: no clipping."
  check(lambda x: x > 0, clip, "clip", needed, hint)
  p = kron() if preconditioner is None else preconditioner
  preconditioned = scale_by_preconditioner(
    p,
    whitening() if curvature is None else curvature,
    every=annealed_probability() if every is None else every,
    damping=damping,
    before=None if max_jump is None else clip_spikes(max_jump, matrices=p.matrices),
    momentum=None if b1 is None else optax.ema(b1, accumulator_dtype=mu_dtype),
    key=key,
  )
  parts = [preconditioned]
  if clip is not None:
    parts.append(forward_extra_args(clip) if hasattr(clip, "init") else clip_matrices(clip, p.matrices))
  if weight_decay is not None:
    parts.append(keep_dtype(optax.add_decayed_weights(weight_decay, mask)))
  return optax.chain(*parts, keep_dtype(optax.scale_by_learning_rate(learning_rate)))
