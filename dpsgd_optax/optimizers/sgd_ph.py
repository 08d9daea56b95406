# SPDX-License-Identifier: Apache-2.0
"""SGD with partial Hessian: SGD with momentum, and Newton's method for the scales and shifts of the norm layers.

Notation
  g, m   gradient and its momentum m ← b₁ m + g
  H      Hessian of the loss in the 1-D parameters; h, the running estimate of its diagonal, c the weight it has seen
  α, τ   learning rate; ratio of the Newton step to it
  λ, ω   damping of the curvature; weight decay
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.base import check, check_fraction, check_learning_rate, check_not_negative
from dpsgd_optax.curvature.diagonal import hessian_diagonal
from dpsgd_optax.curvature.probing import Cycle, DiagonalProbe, rademacher
from dpsgd_optax.preconditioners._views import selected
from dpsgd_optax.preconditioners.diagonal_newton import Terms, diagonal_newton, visit_count
from dpsgd_optax.transforms._control import keep_dtype, static_arguments
from dpsgd_optax.transforms.precondition import scale_by_preconditioner


def _heavy_ball(b1: Any) -> optax.GradientTransformation:
  """``optax.trace(b1)`` with its buffer, and what it returns, in float32 at least."""
  inner = optax.trace(b1)

  def init(params):
    return inner.init(jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), working_dtype(jnp.result_type(x))), params))

  def update(updates, state, params=None):
    wide = jax.tree.map(lambda x: jnp.asarray(x, working_dtype(jnp.result_type(x))), updates)
    return inner.update(wide, state, params)

  return optax.GradientTransformation(init, update)


@static_arguments("where", "probe", "cycle", "signed", "bias_correction", "every", "key")
def sgd_ph(
  learning_rate: optax.ScalarOrSchedule,
  where: Where,
  *,
  b1: float = 0.9,
  damping: Any = 1e-4,
  tau: float = 1e-3,
  hessian_decay: float | None = None,
  weight_decay: float | None = None,
  probe: DiagonalProbe = rademacher,
  cycle: Cycle = False,
  signed: bool = True,
  bias_correction: Terms = visit_count,
  every: int | optax.Schedule = 1,
  key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  """SGD with partial Hessian: heavy ball everywhere, divided by the Hessian's diagonal on the norm layers.

    elsewhere         m ← b₁ m + g + ω θ     θ ← θ − α m
    where selected    m ← b₁ m + g           θ ← θ − α (τ c m / (|h| + λ) + ω θ)

  ``update(grads, state, params, hvp=hvp(loss, params))`` with the loss of the gradient, in train mode. The product is
  cheaper if it goes on from the passes of the gradient (``value_and_grad_then_hvp``, as in the example). The running
  statistics of BatchNorm (``has_aux``) advance once in a step: the product drops its own. For nnx take gradient and
  product at ``nnx.as_pure(params)``, and hand ``nnx.Optimizer`` the gradient as
  ``jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))``.

  The multiplier of m lies in (0, τ/λ], 10 with the defaults; before the first visit of a tensor it is τ (1 − μ)/λ, with
  the defaults 1: plain SGD.

  **What the diagonal is worth.** A norm layer scales each channel alone, but its block of H is diagonal only if what
  follows is channel-separable too. A dense layer or an ordinary convolution behind it breaks that: ``python -m
  benchmarks diagonality`` finds 41 to 91 % of the norm of a block off its diagonal in small networks. Measure your own
  with :func:`dpsgd_optax.diagonality`. The default probe estimates the diagonal without bias; ``probe=ones`` returns
  the row sums H·1, which are zero for the bias of a softmax classifier, and for some norm layers minus the gradient.

  Args:
    learning_rate: α, number or schedule.
    where: the second-order parameters: ``training.is_norm_param``, ``is_vector`` (every leaf of rank 1, as the released
      code), a function of the params, or a tree of bools. Static.
    b1: momentum, in [0, 1); 0 is none.
    damping: λ > 0, in loss / parameter².
    tau: τ ≥ 0, "the curvature at which Newton equals SGD".
    hessian_decay: μ of the running mean h, in [0, 1); None: ``b1``, as in the paper.
    weight_decay: ω ≥ 0: inside the momentum elsewhere, after the preconditioner where selected; None: none.
    probe, cycle: with what, and which tensors in turn; see :func:`dpsgd_optax.hessian_diagonal`. In turn, there is less
      noise of one tensor in another, and estimates are as old as the cycle is long. Static.
    signed, bias_correction: see :func:`dpsgd_optax.diagonal_newton`. Static.
    every, key: of the probes, see :func:`dpsgd_optax.scale_by_preconditioner`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Inside ``optax.masked`` it needs ``hvp``.

  Raises:
    ValueError: at construction, for a number outside its range; at ``init``, if ``where`` fits no parameter; at trace
      time, for a missing ``hvp`` or a ``cycle`` that does not fit.

  Departures from the released code, which is ``probe=ones, cycle=[…, None], signed=False,
  bias_correction=cycle_count(M)``: random signs and their signed mean; the exact bias correction; with
  ``training.is_norm_param`` the biases of dense and convolution layers are first order. That code updates the last 1-D
  tensor of each cycle as first order (a None in the cycle), and breaks without momentum.

  Source: arXiv:2403.02681; numbers of its code: b₁ = μ = 0.9, τ = 1e-3, λ = 1e-4. They were not seen to beat tuned
  SGD with momentum by more than the spread of the seeds.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> from dpsgd_optax import training
    >>> model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.relu, nn.Dense(1)])
    >>> x = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
    >>> y, variables = jnp.sum(x**2, -1, keepdims=True), model.init(jax.random.key(0), x)
    >>> tx = dpo.sgd_ph(0.02, where=training.is_norm_param)
    >>> @jax.jit
    ... def train_step(params, stats, opt_state):
    ...   def loss(p):
    ...     out, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
    ...     return jnp.mean((out - y) ** 2), new["batch_stats"]
    ...   fused = dpo.value_and_grad_then_hvp(loss, has_aux=True, where=training.is_norm_param)
    ...   (value, stats), grads, hvp = fused(params)
    ...   updates, opt_state = tx.update(grads, opt_state, params, hvp=hvp)
    ...   return optax.apply_updates(params, updates), stats, opt_state, value
    >>> params, stats = variables["params"], variables["batch_stats"]
    >>> opt_state, values = tx.init(params), []
    >>> for _ in range(50):
    ...   params, stats, opt_state, value = train_step(params, stats, opt_state)
    ...   values.append(value)
    >>> bool(values[-1] < 0.5 * values[0])
    True
  """
  check_learning_rate(learning_rate)
  check_fraction(b1, "b1")
  check(lambda x: x > 0, damping, "damping", "positive", "It is λ of τ c m / (|h| + λ) and bounds the step. Try 1e-4.")
  check_not_negative(tau, "tau", "It multiplies the step of the norm layers. Try 1e-3.")
  check_fraction(hessian_decay, "hessian_decay")
  check_not_negative(weight_decay, "weight_decay", "Try 1e-4, or None.")
  decay = b1 if hessian_decay is None else hessian_decay
  stacked = lambda path, leaf: max(jnp.ndim(leaf) - 1, 0)  # every axis before the channels is one of a stack of layers
  p = diagonal_newton(decay=decay, scale=tau, signed=signed, bias_correction=bias_correction, stacked=stacked)
  selected_only = lambda params: selection(params, where)
  elsewhere = lambda params: jax.tree.map(lambda chosen: not chosen, selection(params, where))
  momentum, after = _heavy_ball(b1), None
  if weight_decay is not None:
    momentum = optax.chain(optax.add_decayed_weights(weight_decay, elsewhere), momentum)
    after = optax.add_decayed_weights(weight_decay, selected_only)
  tx = scale_by_preconditioner(
    selected(p, where),
    hessian_diagonal(probe, where=where, cycle=cycle),
    every=every,
    damping=damping,
    momentum=momentum,
    after=after,
    key=key,
  )
  return optax.chain(tx, keep_dtype(optax.scale_by_learning_rate(learning_rate)))
