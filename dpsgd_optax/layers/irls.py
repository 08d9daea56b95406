# SPDX-License-Identifier: Apache-2.0
"""One nonlinear layer in closed-form sweeps: iteratively reweighted least squares, the ancestor of ``gls``.

Notation
  x        an input row, extended by 1 for the bias, (d,);  X all of them, (n, d)
  θ        weights of one output, (d,);  u = Xθ
  f, y     link (activation) and targets;  z = f⁻¹(y)
  ℓ(u, y)  loss of one row; ½(f(u) − y)² with a link, softplus(u) − yu for logistic regression
  s, w     slope ℓ′(u) and weight w ≥ 0 of a row
  a        length of the step

With a link, w = f′(u) (f(u) − y)/(u − z): Gauss-Newton's weight f′(u)² with one of the tangents replaced by the secant
to the target, so that a single row is fitted in one step. One sweep of the original, θ ← (XᵀWX)⁻¹XᵀWz, is then
θ ← θ − (XᵀWX)⁻¹Xᵀs.

Source: E. Fagnou's note on nonlinear least squares for one layer; for logistic regression it is Newton's method.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax.base import check, check_not_negative
from dpsgd_optax.layers.moments import extended


class Link(NamedTuple):
  """A strictly increasing f and its inverse, entry by entry. To take f⁻¹, targets are clipped to ``range``."""

  value: Callable[[jax.Array], jax.Array]
  inverse: Callable[[jax.Array], jax.Array]
  range: tuple[float, float] = (-jnp.inf, jnp.inf)


identity = Link(lambda u: u, lambda y: y)
sigmoid = Link(jax.nn.sigmoid, lambda y: jnp.log(y) - jnp.log1p(-y), (1e-3, 1 - 1e-3))
tanh = Link(jnp.tanh, jnp.arctanh, (-1 + 1e-3, 1 - 1e-3))
softplus = Link(jax.nn.softplus, lambda y: y + jnp.log(-jnp.expm1(-y)), (1e-3, jnp.inf))
leaky_relu = Link(lambda u: jnp.where(u > 0, u, 0.01 * u), lambda y: jnp.where(y > 0, y, 100 * y))


class Loss(NamedTuple):
  """What is minimized, as functions (u, y) → an entry for each row: ℓ, its slope s = ℓ′(u), a curvature w ≥ 0."""

  value: Callable[[jax.Array, jax.Array], jax.Array]
  slope: Callable[[jax.Array, jax.Array], jax.Array]
  weight: Callable[[jax.Array, jax.Array], jax.Array]


def squared(link: Link) -> Loss:
  """½(f(u) − y)²."""
  if not isinstance(link, Link):
    raise ValueError(
      f"`squared` needs a Link, which has an inverse, got {link!r}. ReLU has none: type `squared(leaky_relu)`, or give "
      "`Link(f, inverse)`."
    )

  tangent = lambda u: jax.jvp(link.value, (u,), (jnp.ones_like(u),))

  def slope(u, y):
    f, df = tangent(u)
    return df * (f - y)

  def weight(u, y):
    y = jnp.clip(y, *link.range)
    z = link.inverse(y)
    f, df = tangent(u)
    near = jnp.abs(u - z) < (1e-6 * (1 + jnp.abs(u)) if u.dtype == jnp.float64 else 1e-3)
    secant = jnp.where(near, df, (f - y) / jnp.where(near, 1, u - z))
    return jnp.maximum(df * secant, 0)

  return Loss(lambda u, y: (link.value(u) - y) ** 2 / 2, slope, weight)


logistic = Loss(
  value=lambda u, y: jax.nn.softplus(u) - y * u,
  slope=lambda u, y: jax.nn.sigmoid(u) - y,
  weight=lambda u, y: jax.nn.sigmoid(u) * (1 - jax.nn.sigmoid(u)),
)
"""Cross-entropy of targets in [0, 1]: the sweeps are Newton's."""


class IrlsResult(NamedTuple):
  """Kernel (inputs, outputs) and bias (outputs,) of the layer, and for each output, (outputs,): the mean ℓ at the end,
  the norm of its gradient, which is 0 at a stationary point, and the number of sweeps, int32.
  """

  kernel: jax.Array
  bias: jax.Array
  loss: jax.Array
  gradient: jax.Array
  iterations: jax.Array


def irls_fit(
  x: jax.Array,
  y: jax.Array,
  loss: Loss | None = None,
  *,
  damping: Any = 1e-6,
  sample_weights: jax.Array | None = None,
  start: tuple[jax.Array, jax.Array] | None = None,
  tolerance: float = 1e-7,
  max_iterations: int = 100,
) -> IrlsResult:
  """Fits one layer, y ≈ f(xW + b), in sweeps of weighted least squares. A fixed point is stationary for the true loss.

    θ ← θ − a (XᵀWX/n + λI)⁻¹ Xᵀs/n,   λ = damping · tr(XᵀWX/n)/d,   a = 1, ½, ¼, … until the loss falls enough (Armijo)

  The ridge is on the step (as Levenberg's), so that it does not move the solution. Targets at the ends of the range of
  f are clipped for the weights only, not for the loss. Not convex: the result may be a local minimum; start again from
  elsewhere and compare ``loss``. Where f has a kink a sweep may end on it.

  Args:
    x: (n, inputs).
    y: (n, outputs), or (n,) for one output. Each output is a problem of its own.
    loss: ``squared(link)`` with a link of this module or your own, or ``logistic``; None: ``squared(sigmoid)``. Static.
    damping: ≥ 0, relative to the mean eigenvalue.
    sample_weights: (n,), ≥ 0, of the rows, or None.
    start: (kernel, bias); None: zeros.
    tolerance: stop when no entry of θ moves by more.
    max_iterations: of sweeps. Static.

  Returns:
    An :class:`IrlsResult`.

  Raises:
    ValueError: for shapes that do not fit, a negative damping, or a link without inverse.

  Source: the note's algorithm (a). It has the ridge on θ and no line search.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from dpsgd_optax.layers import irls
    >>> x = jax.random.normal(jax.random.key(0), (100, 3))
    >>> y = jnp.tanh(x @ jnp.array([1.0, -1.0, 0.5]) + 0.2)
    >>> fit = irls.irls_fit(x, y, irls.squared(irls.tanh), tolerance=1e-4)
    >>> fit.kernel[:, 0].round(3), fit.bias.round(3)
    (Array([ 1. , -1. ,  0.5], dtype=float32), Array([0.2], dtype=float32))
  """
  check_not_negative(damping, "damping", "It is relative to the mean eigenvalue of XᵀWX. Try 1e-6.")
  check(lambda i: i >= 1, max_iterations, "max_iterations", "at least 1", "Try 100.")
  loss = squared(sigmoid) if loss is None else loss
  dtype = working_dtype(jnp.result_type(x, y, jnp.float32))
  x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
  y = y[:, None] if y.ndim == 1 else y
  if x.ndim != 2 or len(x) != len(y):
    raise ValueError(f"`irls_fit` needs x (n, inputs) and y (n, outputs) with one n, got {x.shape} and {y.shape}.")
  rows, n = extended(x), len(x)
  share = jnp.full(n, 1 / n, dtype) if sample_weights is None else jnp.asarray(sample_weights, dtype) / n
  kernel, bias = start or (jnp.zeros((x.shape[1], y.shape[1])), jnp.zeros(y.shape[1]))
  theta = jnp.concatenate([jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype)[None]])

  def one(theta, y):
    total = lambda theta: jnp.sum(share * loss.value(rows @ theta, y))
    slope = lambda theta: rows.T @ (share * loss.slope(rows @ theta, y))

    def sweep(state):
      theta, _, count = state
      g = slope(theta)
      delta = _solved(rows, share * loss.weight(rows @ theta, y), g, damping)
      a = _armijo(total, theta, delta, g)
      return theta - a * delta, jnp.max(jnp.abs(a * delta)), count + 1

    going = lambda state: (state[1] > tolerance) & (state[2] < max_iterations)
    first = theta, jnp.asarray(jnp.inf, dtype), jnp.zeros((), jnp.int32)
    theta, _, count = jax.lax.while_loop(going, sweep, first)
    return theta, total(theta), jnp.linalg.norm(slope(theta)), count

  theta, value, gradient, count = jax.vmap(one, in_axes=(1, 1))(theta, y)
  return IrlsResult(theta[:, :-1].T, theta[:, -1], value, gradient, count)


def _solved(rows: jax.Array, weights: jax.Array, g: jax.Array, damping: Any) -> jax.Array:
  """(XᵀWX + λI)⁻¹ g, λ relative to the mean eigenvalue."""
  system = jnp.einsum("ni,n,nj->ij", rows, weights, rows, precision="highest")
  mean = jnp.trace(system) / len(system)
  # not zero even if all rows are saturated: a long step, which the line search shortens
  shift = jnp.asarray(damping, g.dtype) * mean + jnp.finfo(g.dtype).tiny
  return jnp.linalg.solve(system + shift * jnp.eye(len(system), dtype=g.dtype), g)


def _armijo(total: Callable, theta: jax.Array, delta: jax.Array, g: jax.Array, slack: float = 1e-4) -> jax.Array:
  """The first a of 1, ½, ¼, … with L(θ − aδ) ≤ L(θ) − slack · a ⟨g, δ⟩; 0 if there is none."""
  now, fall = total(theta), slack * jnp.vdot(g, delta)
  low = jnp.asarray(2.0**-30, theta.dtype)
  poor = lambda a: ~(total(theta - a * delta) <= now - a * fall)
  a = jax.lax.while_loop(lambda a: (a > low) & poor(a), lambda a: a / 2, jnp.ones((), theta.dtype))
  return jnp.where(poor(a), 0, a)
