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

The first three are lazy: `hvp(loss, params)` only remembers its arguments and differentiates when it is called, so that
a call inside `jax.lax.cond` costs nothing in the steps that do not take it.

**Holes.** Where θ has a leaf (or a whole subtree) the vector may have `optax.MaskedNode()` or `None`, as the transforms
inside `optax.masked` and `optax.partition` see it. Those parameters are held constant and come back as the same hole.
The product is then that of the diagonal block, H_bb v_b, exactly, and costs no derivative of the others. What is held
may be of any type: integers, or the functions among the leaves of an Equinox model.

**Containers.** The product has the structure of the vector. θ may have another where the leaves have the same names: a
dict for an nnx state, arrays in `nnx.Param` for pure arrays, and the other way round.

**Dtypes.** The vector is cast to the dtype of the parameters leaf by leaf, and the product has that dtype.

**Complex parameters** θ = x + iy of a real loss: `jax.grad` returns ∂L/∂x − i ∂L/∂y, the conjugate of the direction of
ascent. Every gradient and product here is that of ∂L/∂x + i ∂L/∂y, which is what Optax's transforms expect; pass them
on as they are. The product then is the Hessian of L as a function of (x, y), applied to (Re v, Im v). Real leaves are
not touched.

References:
  Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994: H v = ∂g(θ + rv)/∂r at r = 0.
  Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14(7),
  2002: G v = Jᵀ (∇²ℓ (J v)).
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax._trees.matching import match_leaves
from dpsgd_optax.base import Product
from dpsgd_optax.curvature._tangents import _ascent, _block, _drop_aux, _gradient


def hvp(loss: Callable[..., Any], params: optax.Params, has_aux: bool = False) -> Product:
  """The Hessian-vector product v ↦ H v, forward over reverse: H v = ∂/∂r g(θ + r v) at r = 0.

  Exact. Nothing is differentiated before the product is called.

  Args:
    loss: L, from the parameters to a real scalar, or to (scalar, aux) if `has_aux`.
    params: θ, where the Hessian is taken.
    has_aux: whether `loss` returns auxiliary data beside the scalar. They are dropped.

  Returns:
    A function v ↦ H v. v has the structure of `params`, possibly with holes (see the module's docstring).

  Raises:
    ValueError: by the product, if v has another structure or shape than `params`, or if a leaf to be
      differentiated is not floating point or complex, or if the gradient has no forward-mode derivative.
    TypeError: by the product, if `loss` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.curvature.products import hvp
    >>> loss = lambda p: p["x"] ** 2 * p["y"]  # H = [[2y, 2x], [2x, 0]]
    >>> product = hvp(loss, {"x": 1.0, "y": 3.0})
    >>> {k: float(x) for k, x in product({"x": 1.0, "y": 10.0}).items()}
    {'x': 26.0, 'y': 2.0}
    >>> float(product({"x": 1.0, "y": None})["x"])  # y held: the block H_xx alone
    6.0
  """

  def product(vector):
    block = _block("hvp", params, vector)
    with _explaining("hvp", lambda theta: loss(block.join(theta)), block.theta, has_aux, _DIFFERENCE):
      _, hv = jax.jvp(_gradient(loss, block.join, has_aux), (block.theta,), (block.vector,))
    return block.restore(hv)

  return Product(product, params)


def hvp_finite_difference(
  loss: Callable[..., Any], params: optax.Params, has_aux: bool = False, *, epsilon: float | None = None
) -> Product:
  """The Hessian-vector product by a difference of gradients: H v ≈ (g(θ + δv) − g(θ)) / δ.

  For losses that have a gradient but no forward-mode derivative of it (`jax.custom_vjp`, callbacks). The step is
  relative to both vectors,

    δ = epsilon · (1 + ‖θ‖) / ‖v‖,     epsilon = √eps of the dtype,

  so that the result is homogeneous in v, and θ moves by a fraction √eps of its own length, or of 1 where it is near
  zero. This balances the two errors: the remainder O(δ) of Taylor's series, and the rounding O(eps / δ) of the two
  gradients. About half of the digits survive. The product of a zero vector is zero.

  Args:
    loss: L, from the parameters to a real scalar, or to (scalar, aux) if `has_aux`.
    params: θ, where the Hessian is taken; float32, float64 or complex of these.
    has_aux: whether `loss` returns auxiliary data beside the scalar. They are dropped.
    epsilon: the length of the step relative to 1 + ‖θ‖, positive. None: √eps of the coarsest dtype in play.

  Returns:
    A function v ↦ H v (approximately). v may have holes (see the module's docstring); the norms are those of the
    other leaves.

  Raises:
    ValueError: if `epsilon` is not positive; by the product, as `hvp`, and for parameters below float32, half of whose
      digits is nothing.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.curvature.products import hvp_finite_difference
    >>> product = hvp_finite_difference(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))  # H = diag(6x)
    >>> bool(jnp.allclose(product(jnp.array([1.0, 1.0])), jnp.array([6.0, 12.0]), rtol=1e-2))
    True
  """
  if isinstance(epsilon, (int, float)) and not epsilon > 0:
    raise ValueError(
      f"`hvp_finite_difference` needs a positive epsilon, got {epsilon}. It is the length of the step "
      "relative to 1 + ‖params‖; leave it out for the square root of the machine precision."
    )

  def product(vector):
    name = "hvp_finite_difference"
    theta, v, join, _, restore = _block(name, params, vector)
    if not theta:
      return restore([])
    infos = [jnp.finfo(x.dtype) for x in theta]
    coarsest, finest = max(infos, key=lambda i: i.eps), min(infos, key=lambda i: i.eps)
    if coarsest.eps > jnp.finfo(jnp.float32).eps:
      raise ValueError(
        f"`hvp_finite_difference` needs parameters of float32 or wider, got {coarsest.dtype}: a difference "
        "of two gradients would keep none of its digits. Use `hvp(loss, params)`, or cast the parameters to float32."
      )

    def norm(leaves):
      squares = [jnp.sum(jnp.square(jnp.abs(x))).astype(finest.dtype) for x in leaves]
      return jnp.sqrt(jnp.sum(jnp.stack(squares)))

    relative = float(coarsest.eps) ** 0.5 if epsilon is None else epsilon
    length = norm(v)
    delta = relative * (1 + norm(theta)) / jnp.where(length > 0, length, 1)
    gradient = _gradient(loss, join, has_aux)
    with _explaining(name, lambda theta: loss(join(theta)), theta, has_aux, None):
      here, moved = gradient(theta), gradient([x + delta.astype(x.dtype) * u for x, u in zip(theta, v, strict=True)])
    return restore([(b - a) / delta.astype(a.dtype) for a, b in zip(here, moved, strict=True)])

  return Product(product, params)


def ggnvp(
  loss: Callable[..., Any],
  params: optax.Params,
  has_aux: bool = False,
  *,
  outputs: Callable[..., Any],
) -> Product:
  """The Gauss-Newton-vector product v ↦ G v with G = Jᵀ ∇²ℓ(z) J, z = f(θ).

  G is the Hessian of ℓ∘f with f replaced by its linearization at θ. It is H where f is linear, positive semidefinite
  where ℓ is convex, and the Fisher matrix where ℓ is the negative log-likelihood of an exponential family in its
  natural parameters.

  Args:
    loss: ℓ, from the outputs to a real scalar. Beware: not from the parameters, as in `hvp`.
    params: θ, where the matrix is taken.
    has_aux: whether `outputs` returns auxiliary data beside the outputs. They are dropped.
    outputs: f, from the parameters to the outputs (any pytree of floating-point or complex arrays), or to
      (outputs, aux) if `has_aux`.

  Returns:
    A function v ↦ G v. v has the structure of `params`, possibly with holes (see the module's docstring).

  Raises:
    ValueError: by the product, as `hvp`.
    TypeError: by the product, if `loss` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.curvature.products import ggnvp, hvp
    >>> half_square = lambda z: 0.5 * z**2
    >>> f = lambda w: w**2  # G = (2w)², while H = G + 2 f(w)
    >>> float(ggnvp(half_square, 3.0, outputs=f)(1.0)), float(hvp(lambda w: half_square(f(w)), 3.0)(1.0))
    (36.0, 54.0)
  """

  def product(vector):
    block = _block("ggnvp", params, vector)
    f = _drop_aux(lambda theta: outputs(block.join(theta)), has_aux)
    inner, otherwise = lambda theta: loss(f(theta)), _DIFFERENCE.replace("(loss", "(lambda p: loss(outputs(p))")
    with _explaining("ggnvp", inner, block.theta, False, f"{otherwise} (It is H v, not G v.)"):
      z, jv = jax.jvp(f, (block.theta,), (block.vector,))
      _, hjv = jax.jvp(jax.grad(loss), (z,), (jv,))
    (gv,) = jax.vjp(f, block.theta)[1](hjv)  # XLA merges this forward pass with the one of the jvp
    return block.restore(_ascent(gv))

  return Product(product, params)


def stepped(params: Any, step: Any) -> Any:
  """params + step in the dtypes of the params; where the step has a hole the params stay as they are.

  As ``optax.apply_updates``, for params that hold more than the step speaks of: the rest of a partition, or the
  functions and other static fields of a model that is a pytree. Leaves are matched as in the products.
  """
  leaves, treedef = jax.tree.flatten(params)
  slots, places = match_leaves("the step", params, step)
  for i, s in zip(places, slots, strict=True):
    if i is not None:
      leaves[i] = jnp.asarray(leaves[i] + s, jnp.result_type(leaves[i]))
  return treedef.unflatten(leaves)


def check_scalar(found: Any, has_aux: bool = False) -> Any:
  """What a loss returned, if it is one real number (beside the auxiliary data, if ``has_aux``).

  Raises:
    TypeError: if it is anything else; the message says what to type.
  """
  pair = isinstance(found, tuple | list) and len(found) > 1
  if pair and not has_aux:
    raise TypeError(
      f"the loss must return a real scalar, but it returned a {type(found).__name__} of {len(found)}, as if it had "
      "auxiliary data. Type `value_fn=lambda p: loss(p)[0]`, or `hvp=hvp(loss, params, has_aux=True)`."
    )
  if has_aux and not pair:
    raise TypeError(
      f"with `has_aux=True` the loss must return (scalar, aux), but it returned {_described(found)}. Leave `has_aux` "
      "out, or return both."
    )
  value = found[0] if has_aux else found
  real = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) and value.shape == ()
  if real or (isinstance(value, float | int) and not isinstance(value, bool)):
    return found
  cure = "Return its real part" if _described(value).startswith("complex") else "Return its `jnp.mean` or `jnp.sum`"
  raise TypeError(f"the loss must return a real scalar, but it returned {_described(value)}. {cure}.")


def _described(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


@contextlib.contextmanager
def _explaining(name: str, loss: Callable, theta: Any, has_aux: bool, otherwise: str | None) -> Generator[None]:
  """What JAX says of a loss without a derivative, in the words of the user. Looked into only where JAX has refused.

  Args:
    name: of the product.
    loss: θ ↦ scalar, or (scalar, aux).
    theta: its argument.
    has_aux: whether there is an aux.
    otherwise: what to type where there is a gradient, but no forward-mode derivative of it; None: none is needed.
  """
  try:
    yield
  except (TypeError, ValueError, NotImplementedError, IndexError) as error:
    better = _diagnosis(name, loss, theta, has_aux, otherwise, error)
    if better is None:
      raise
    raise better from error


def _diagnosis(name, loss, theta, has_aux, otherwise, error) -> Exception | None:
  seen = []
  try:
    jax.eval_shape(lambda theta: seen.append(loss(theta)), theta)  # what is returned need not be arrays
  except Exception:
    return None  # the loss itself fails
  try:
    check_scalar(seen[0], has_aux)
  except TypeError as better:
    return better
  try:
    jax.eval_shape(jax.grad(_drop_aux(loss, has_aux)), theta)
  except Exception:
    return None
  if otherwise is None:
    return None
  return ValueError(
    f"`{name}` needs a forward-mode derivative (JVP), which some part of the loss or of its gradient does not have (a "
    f"callback, a custom derivative, a kernel). {otherwise} It said: {type(error).__name__}: "
    f"{str(error).splitlines()[0] if str(error) else ''}"
  )


_DIFFERENCE = "Type `hvp=hvp_finite_difference(loss, params)`, which asks for gradients alone."
