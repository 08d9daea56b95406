# SPDX-License-Identifier: Apache-2.0
"""Curvature products v ↦ C v at fixed parameters, without ever forming C.

Notation
  θ, L       the parameters (any pytree) and the real loss L(θ)
  g, H       its gradient ∇L(θ) and Hessian ∇²L(θ)
  v          a vector with the structure of θ
  z = f(θ)   the outputs of a model, J its Jacobian ∂z/∂θ, ℓ the loss of the outputs: L(θ) = ℓ(f(θ))
  G          the generalized Gauss-Newton matrix Jᵀ ∇²ℓ(z) J: H without the curvature of f

| product                  | computes      | by                              | needs                        |
|--------------------------|---------------|---------------------------------|------------------------------|
| `hvp`                    | H v           | the derivative of a gradient    | two derivatives of L         |
| `ggnvp`                  | G v           | J v, then ∇²ℓ, then Jᵀ          | L = ℓ∘f                      |
| `hvp_finite_difference`  | H v + O(√eps) | two gradients                   | one derivative of L          |
| `value_and_grad_and_hvp` | L, g and H v  | the derivative of a gradient    | v before the gradient        |
| `value_and_grad_then_hvp`| L, g, v ↦ H v | the gradient, linearized        | v after the gradient         |
| `value_and_grad_then_ggnvp`| L, g, v ↦ G v | the outputs, linearized       | L = ℓ∘f                      |

The first three are lazy: `hvp(loss, params)` remembers its arguments, and differentiates when the product is called.
So a call inside `jax.lax.cond` costs nothing in the steps that do not take it. The last three are in `curvature.fused`.

**Holes.** The vector may have `optax.MaskedNode()` or `None` in place of a leaf or a subtree of θ, as transforms inside
`optax.masked` and `optax.partition` see it. Those parameters are held constant and come back as the same hole. The
product is that of the diagonal block, H_bb v_b, and costs no derivative of the others. What is held may be of any type:
integers, or the functions among the leaves of an Equinox model.

**Containers and dtypes.** The product has the structure of the vector and the dtypes of θ, to which the vector is cast.
θ may have other containers, with the same names: a dict for an nnx state, `nnx.Param` for arrays, or the reverse.

**Complex parameters** θ = x + iy of a real loss: `jax.grad` returns ∂L/∂x − i ∂L/∂y, the conjugate of the direction of
ascent. Gradients and products here are those of ∂L/∂x + i ∂L/∂y, as Optax's transforms expect them. The product is the
Hessian of L as a function of (x, y), applied to (Re v, Im v).

References:
  Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994: H v = ∂g(θ + rv)/∂r at r = 0.
  Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14(7),
  2002: G v = Jᵀ (∇²ℓ (J v)).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.arithmetic import dot
from dpsgd_optax.base import Product
from dpsgd_optax.curvature._loss_errors import DIFFERENCE, explaining
from dpsgd_optax.curvature._tangents import Block, ascent, block_of, drop_aux, gradient


def hvp(loss: Callable[..., Any], params: optax.Params, has_aux: bool = False) -> Product:
  """The Hessian-vector product v ↦ H v, forward over reverse: H v = ∂/∂r g(θ + r v) at r = 0. Exact.

  Args:
    loss: L, from the parameters to a real scalar, or to (scalar, aux) if `has_aux`.
    params: θ, where the Hessian is taken.
    has_aux: whether `loss` returns auxiliary data beside the scalar. They are dropped.

  Returns:
    A function v ↦ H v. v has the structure of `params`, possibly with holes (see the module's docstring).

  Raises:
    ValueError: by the product, if v has another structure or shape than `params`, if a leaf to be differentiated is not
      floating point or complex, or if the gradient has no forward-mode derivative.
    TypeError: by the product, if `loss` is not a real scalar.

  Example:
    >>> import dpsgd_optax as dpo
    >>> product = dpo.hvp(lambda p: p["x"] ** 2 * p["y"], {"x": 1.0, "y": 3.0})  # H = [[2y, 2x], [2x, 0]]
    >>> {k: float(x) for k, x in product({"x": 1.0, "y": 10.0}).items()}
    {'x': 26.0, 'y': 2.0}
    >>> float(product({"x": 1.0, "y": None})["x"])  # y held: the block H_xx alone
    6.0
  """

  def of_block(block):
    local = block.of(loss)
    with explaining("hvp", local, block.theta, has_aux):
      return jax.jvp(gradient(local, has_aux), (block.theta,), (block.vector,))[1]

  return _lazy("hvp", params, of_block)


def hvp_finite_difference(
  loss: Callable[..., Any], params: optax.Params, has_aux: bool = False, *, epsilon: float | None = None
) -> Product:
  """The Hessian-vector product by a difference of gradients: H v ≈ (g(θ + δv) − g(θ)) / δ.

  For losses that have a gradient but no forward-mode derivative of it (`jax.custom_vjp`, callbacks). The step,

    δ = epsilon · (1 + ‖θ‖) / ‖v‖,     epsilon = √eps of the dtype,

  moves θ by a fraction √eps of its own length, or of 1 if it is near zero, whatever the length of v. This balances the
  remainder O(δ) of Taylor's series and the rounding O(eps / δ) of the two gradients. About half of the digits survive.
  The product of a zero vector is zero.

  Args:
    loss, has_aux: as for :func:`hvp`.
    params: θ, where the Hessian is taken; float32, float64 or complex of these.
    epsilon: the length of the step relative to 1 + ‖θ‖, positive. None: √eps of the coarsest dtype among the leaves.

  Returns:
    A function v ↦ H v (approximately). At holes of v the parameters do not enter the norms.

  Raises:
    ValueError: if `epsilon` is not positive; by the product, for parameters below float32.
    ValueError, TypeError: by the product, as :func:`hvp`.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> product = dpo.hvp_finite_difference(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))  # H = diag(6x)
    >>> bool(jnp.allclose(product(jnp.array([1.0, 1.0])), jnp.array([6.0, 12.0]), rtol=1e-2))
    True
  """
  if isinstance(epsilon, (int, float)) and not epsilon > 0:
    raise ValueError(
      f"`hvp_finite_difference` needs a positive epsilon, got {epsilon}. It is the length of the step "
      "relative to 1 + ‖params‖; leave it out for the square root of the machine precision."
    )
  norm = lambda leaves: jnp.sqrt(dot(leaves, leaves))

  def of_block(block):
    theta, v, local = block.theta, block.vector, block.of(loss)
    if not theta:
      return []
    coarsest = max((jnp.finfo(x.dtype) for x in theta), key=lambda info: info.eps)
    if coarsest.eps > jnp.finfo(jnp.float32).eps:
      raise ValueError(
        f"`hvp_finite_difference` needs parameters of float32 or wider, got {coarsest.dtype}: a difference "
        "of two gradients would keep none of its digits. Use `hvp(loss, params)`, or cast the parameters to float32."
      )
    relative = float(coarsest.eps) ** 0.5 if epsilon is None else epsilon
    length = norm(v)
    delta = relative * (1 + norm(theta)) / jnp.where(length > 0, length, 1)
    moved = [x + delta.astype(x.dtype) * u for x, u in zip(theta, v, strict=True)]
    g = gradient(local, has_aux)
    with explaining("hvp_finite_difference", local, theta, has_aux, otherwise=None):
      return [(b - a) / delta.astype(a.dtype) for a, b in zip(g(theta), g(moved), strict=True)]

  return _lazy("hvp_finite_difference", params, of_block)


def ggnvp(
  loss: Callable[..., Any], params: optax.Params, has_aux: bool = False, *, outputs: Callable[..., Any]
) -> Product:
  """The Gauss-Newton-vector product v ↦ G v with G = Jᵀ ∇²ℓ(z) J, z = f(θ).

  G is the Hessian of ℓ∘f with f replaced by its linearization at θ. It is H if f is linear, positive semidefinite if ℓ
  is convex, and the Fisher matrix if ℓ is the negative log-likelihood of an exponential family (natural parameters z).

  Args:
    loss: ℓ, from the outputs to a real scalar. Beware: not from the parameters, as in `hvp`.
    params: θ, where the matrix is taken.
    has_aux: whether `outputs` returns auxiliary data beside the outputs. They are dropped.
    outputs: f, from the parameters to the outputs (any pytree of floating-point or complex arrays), or to
      (outputs, aux) if `has_aux`.

  Returns, Raises: as :func:`hvp`.

  Example:
    >>> import dpsgd_optax as dpo
    >>> half_square, f = lambda z: 0.5 * z**2, lambda w: w**2  # G = (2w)², while H = G + 2 f(w)
    >>> float(dpo.ggnvp(half_square, 3.0, outputs=f)(1.0)), float(dpo.hvp(lambda w: half_square(f(w)), 3.0)(1.0))
    (36.0, 54.0)
  """
  otherwise = f"{DIFFERENCE.format('lambda p: loss(outputs(p))')} (It is H v, not G v.)"

  def of_block(block):
    f = drop_aux(block.of(outputs), has_aux)
    with explaining("ggnvp", lambda theta: loss(f(theta)), block.theta, otherwise=otherwise):
      z, jv = jax.jvp(f, (block.theta,), (block.vector,))
      _, hjv = jax.jvp(jax.grad(loss), (z,), (jv,))
    (gv,) = jax.vjp(f, block.theta)[1](hjv)  # XLA merges this forward pass with the one of the jvp
    return ascent(gv)

  return _lazy("ggnvp", params, of_block)


def _lazy(name: str, params: optax.Params, of_block: Callable[[Block], list]) -> Product:
  """v ↦ C v, differentiated when it is called. ``of_block`` computes C_bb v_b of the block that v speaks of."""

  def product(vector):
    block = block_of(name, params, vector)
    return block.restore(of_block(block))

  return Product(product, params)
