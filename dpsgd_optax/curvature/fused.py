# SPDX-License-Identifier: Apache-2.0
"""The loss, its gradient and a Hessian-vector product that share their passes. Notation, holes, complex: `products`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.paths import quoted, with_holes
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.base import Product
from dpsgd_optax.curvature._loss_errors import explaining
from dpsgd_optax.curvature._tangents import Block, ascent, block_of, check_differentiable


def value_and_grad_and_hvp(loss: Callable[..., Any], has_aux: bool = False) -> Callable[[optax.Params, Any], tuple]:
  """L, g and H v in one fused pass: the forward-mode derivative of `jax.value_and_grad`.

  Cheaper than `jax.value_and_grad` beside `hvp` wherever the compiler does not merge the two by itself. Use it if the
  vector is known before the gradient and the product is needed anyway.

  Args:
    loss, has_aux: as for :func:`dpsgd_optax.hvp`; here the auxiliary data are returned.

  Returns:
    A function (params, vector) ↦ (value, grads, product), or ((value, aux), grads, product) if `has_aux`. The gradient
    is of all parameters, whatever holes the vector and the product have. Complex gradients come conjugated for Optax.

  Raises:
    ValueError, TypeError: by that function, as :func:`dpsgd_optax.hvp`, for a leaf anywhere in `params`.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> fused = dpo.value_and_grad_and_hvp(lambda x: jnp.sum(x**3))
    >>> value, grad, product = fused(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
    >>> float(value), grad.tolist(), product.tolist()
    (9.0, [3.0, 12.0], [6.0, 0.0])
  """
  forward = lambda run, block: jax.jvp(run, (block.theta,), (block.vector,), has_aux=True)

  def fused(params, vector):
    value, grads, (_, hv), block = _differentiated("value_and_grad_and_hvp", loss, has_aux, params, vector, forward)
    return value, grads, block.restore(block.take(hv))

  return fused


def value_and_grad_then_hvp(
  loss: Callable[..., Any], has_aux: bool = False, *, where: Where = None
) -> Callable[[optax.Params], tuple]:
  """L, g and the function v ↦ H v that goes on from their passes: the gradient linearized at θ.

  Costs what `value_and_grad_and_hvp` does, and v may come later, as from an optimizer that draws its own probes. A
  product that is not called costs nothing under `jit`.

  Args:
    loss, has_aux: as for :func:`dpsgd_optax.hvp`; here the auxiliary data are returned.
    where: the parameters of which v has arrays, as for :func:`dpsgd_optax.hessian_diagonal`; the product carries no
      tangents for the others. Static.

  Returns:
    A function params ↦ (value, grads, product), or ((value, aux), grads, product) if `has_aux`. The gradient is of all
    parameters. The product takes v with holes wherever `where` is False.

  Raises:
    ValueError: by that function, if `where` fits nothing; by the product, if v has an array where `where` is False.
    ValueError, TypeError: by both, as `value_and_grad_and_hvp`.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> loss = lambda p: jnp.sum(p["scale"] ** 3) * p["kernel"]
    >>> params = {"kernel": jnp.float32(2.0), "scale": jnp.array([1.0, 2.0])}
    >>> value, grads, product = dpo.value_and_grad_then_hvp(loss, where=dpo.is_vector)(params)
    >>> grads["scale"], product({"kernel": None, "scale": jnp.ones(2)})["scale"]  # 6 x², 12 x
    (Array([ 6., 24.], dtype=float32), Array([12., 24.], dtype=float32))
  """
  name = "value_and_grad_then_hvp"

  def linearized(params):
    chosen = with_holes(params, selection(params, where))
    forward = lambda run, block: jax.linearize(run, block.theta, has_aux=True)
    value, grads, push, block = _differentiated(name, loss, has_aux, params, chosen, forward)

    def product(vector):
      part = block_of(name, params, vector)
      given = dict(zip(part.indices, part.vector, strict=True))
      if held := sorted(given.keys() - set(block.indices)):
        path, _ = jax.tree_util.tree_leaves_with_path(params)[held[0]]
        raise ValueError(
          f"`{name}` holds the parameter at {quoted(path)} constant, but the vector has an array there. Give the same "
          "`where` to the optimizer, or leave `where` out."
        )
      tangents = [
        given[i] if i in given else jnp.zeros_like(x) for i, x in zip(block.indices, block.theta, strict=True)
      ]
      _, hv = push(tangents)
      return part.restore(part.take(hv))

    return value, grads, Product(product, params)

  return linearized


def value_and_grad_then_ggnvp(
  loss: Callable[..., Any], has_aux: bool = False, *, outputs: Callable[..., Any]
) -> Callable[[optax.Params], tuple]:
  """L, g and the function v ↦ G v = Jᵀ ∇²ℓ(z) J v that goes on from their passes: the outputs linearized at θ.

  Args:
    loss, outputs, has_aux: ℓ, f and whether f returns auxiliary data, as for :func:`dpsgd_optax.ggnvp`.

  Returns:
    A function params ↦ (value, grads, product), or ((value, aux), grads, product) if `has_aux`, as
    `value_and_grad_then_hvp`. The product takes v with holes.

  Raises:
    ValueError, TypeError: as :func:`dpsgd_optax.ggnvp`.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> fused = dpo.value_and_grad_then_ggnvp(lambda z: 0.5 * z**2, outputs=lambda w: w**2)
    >>> value, grad, product = fused(jnp.float32(3.0))
    >>> float(value), float(grad), float(product(jnp.float32(1.0)))
    (40.5, 54.0, 36.0)
  """
  name = "value_and_grad_then_ggnvp"

  def linearized(params):
    check_differentiable(name, jax.tree_util.tree_leaves_with_path(params))
    block = block_of(name, params, params)
    f = lambda theta: outputs(block.join(theta)) if has_aux else (outputs(block.join(theta)), None)
    with explaining(name, lambda theta: loss(f(theta)[0]), block.theta):
      z, push, aux = jax.linearize(f, block.theta, has_aux=True)
      value, slope = jax.value_and_grad(loss)(z)
    pull = lambda dz: jax.linear_transpose(push, block.theta)(dz)[0]

    def product(vector):
      part = block_of(name, params, vector)
      given = dict(zip(part.indices, part.vector, strict=True))
      tangents = [
        given[i] if i in given else jnp.zeros_like(x) for i, x in zip(block.indices, block.theta, strict=True)
      ]
      bent = jax.jvp(jax.grad(loss), (z,), (push(tangents),))[1]
      return part.restore(part.take(block.restore(ascent(pull(bent)))))

    return (value, aux) if has_aux else value, block.restore(ascent(pull(slope))), Product(product, params)

  return linearized


def _differentiated(
  name: str, loss: Callable, has_aux: bool, params: Any, vector: Any, forward: Callable
) -> tuple[Any, Any, Any, Block]:
  """(L or (L, aux), g of all parameters, what ``forward`` makes of θ_b ↦ (L, g) for its derivative, the block)."""
  check_differentiable(name, jax.tree_util.tree_leaves_with_path(params))
  block = block_of(name, params, vector)

  def run(theta):
    result, grads = jax.value_and_grad(loss, has_aux=has_aux)(block.join(theta))
    value, aux = result if has_aux else (result, None)
    return (value, ascent(grads)), aux

  with explaining(name, block.of(loss), block.theta, has_aux):
    (value, grads), derivative, aux = forward(run, block)
  return ((value, aux) if has_aux else value), grads, derivative, block
