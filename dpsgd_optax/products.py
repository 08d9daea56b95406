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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpsgd_optax.layers import names
from dpsgd_optax.selection import Where, punched, selection


class Product:
  """v ↦ C v at fixed parameters: a function, that also knows where it was taken.

  Inside ``optax.partition`` a transform is shown params with holes. Whoever needs the others there, to evaluate the
  loss, finds them here.

  Attributes:
    params: θ, in full; None if it is not known.
  """

  def __init__(self, product: Callable[[Any], Any], params: Any = None):
    self._product, self.params = product, params

  def __call__(self, vector: Any) -> Any:
    return self._product(vector)


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
    >>> from dpsgd_optax.products import hvp
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
    >>> from dpsgd_optax.products import hvp_finite_difference
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
    >>> from dpsgd_optax.products import ggnvp, hvp
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


def value_and_grad_and_hvp(loss: Callable[..., Any], has_aux: bool = False) -> Callable[[optax.Params, Any], tuple]:
  """L, g and H v in one fused pass: the forward-mode derivative of `jax.value_and_grad`.

  The product shares the passes of the gradient, which is cheaper than `jax.value_and_grad` beside `hvp` wherever the
  compiler does not merge the two by itself. Use it where the vector is known before the gradient and the product is
  needed anyway.

  Args:
    loss: L, from the parameters to a real scalar, or to (scalar, aux) if `has_aux`.
    has_aux: whether `loss` returns auxiliary data beside the scalar.

  Returns:
    A function (params, vector) ↦ (value, grads, product), or ((value, aux), grads, product) if `has_aux`. The gradient
    is of all parameters, whatever holes the vector and the product have. Complex gradients come conjugated for Optax.

  Raises:
    ValueError: by that function, if the vector has another structure or shape than `params`, or if any leaf of
      `params` is not floating point or complex.
    TypeError: by that function, if `loss` is not a real scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpsgd_optax.products import value_and_grad_and_hvp
    >>> fused = value_and_grad_and_hvp(lambda x: jnp.sum(x**3))
    >>> value, grad, product = fused(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
    >>> float(value), grad.tolist(), product.tolist()
    (9.0, [3.0, 12.0], [6.0, 0.0])
  """

  def fused(params, vector):
    _check_differentiable("value_and_grad_and_hvp", jax.tree_util.tree_leaves_with_path(params))
    block = _block("value_and_grad_and_hvp", params, vector)

    def run(theta):
      result, grads = jax.value_and_grad(loss, has_aux=has_aux)(block.join(theta))
      value, aux = result if has_aux else (result, None)
      return (value, _ascent(grads)), aux

    with _explaining(
      "value_and_grad_and_hvp", lambda theta: loss(block.join(theta)), block.theta, has_aux, _DIFFERENCE
    ):
      (value, grads), (_, hv), aux = jax.jvp(run, (block.theta,), (block.vector,), has_aux=True)
    return ((value, aux) if has_aux else value), grads, block.restore(block.take(hv))

  return fused


def value_and_grad_then_hvp(
  loss: Callable[..., Any], has_aux: bool = False, *, where: Where = None
) -> Callable[[optax.Params], tuple]:
  """L, g and the function v ↦ H v that goes on from their passes: the gradient linearized at θ.

  Costs what `value_and_grad_and_hvp` does, and v may come later: it is how an optimizer that draws its own probes gets
  its product fused with the gradient. A product that is not called costs nothing under `jit`.

  Args:
    loss: L, from the parameters to a real scalar, or to (scalar, aux) if `has_aux`.
    has_aux: whether `loss` returns auxiliary data beside the scalar.
    where: the parameters that v will speak of, a tree of bools or a function of the parameters; None: all. The others
      are held constant in the product, which then carries no tangents for them. Static.

  Returns:
    A function params ↦ (value, grads, product), or ((value, aux), grads, product) if `has_aux`. The gradient is of all
    parameters. The product takes v with holes (see the module's docstring) wherever `where` is False.

  Raises:
    ValueError: by that function, as `value_and_grad_and_hvp`, and if `where` fits nothing; by the product, if v has an
      array where `where` is False.

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
    _check_differentiable(name, jax.tree_util.tree_leaves_with_path(params))
    block = _block(name, params, punched(params, selection(params, where)))
    count = len(jax.tree.leaves(params))
    places = jax.tree.unflatten(jax.tree.structure(params), range(count))

    def run(theta):
      result, grads = jax.value_and_grad(loss, has_aux=has_aux)(block.join(theta))
      value, aux = result if has_aux else (result, None)
      return (value, _ascent(grads)), aux

    with _explaining(name, lambda theta: loss(block.join(theta)), block.theta, has_aux, _DIFFERENCE):
      (value, grads), push, aux = jax.linearize(run, block.theta, has_aux=True)

    def product(vector):
      part = _block(name, params, vector)
      given = dict(zip(part.take(places), part.vector, strict=True))
      free = block.take(places)
      if held := sorted(given.keys() - set(free)):
        path, _ = jax.tree_util.tree_leaves_with_path(params)[held[0]]
        raise ValueError(
          f"`{name}` holds the parameter at {_at(path)} constant, but the vector has an array there. Give the same "
          "`where` to the optimizer, or leave `where` out."
        )
      tangents = [given[i] if i in given else jnp.zeros_like(x) for i, x in zip(free, block.theta, strict=True)]
      _, hv = push(tangents)
      return part.restore(part.take(hv))

    return ((value, aux) if has_aux else value), grads, Product(product, params)

  return linearized


def has_holes(tree: Any) -> bool:
  """Whether the tree is a part of a larger one, as ``optax.masked`` and ``optax.partition`` show it."""
  hole = lambda x: isinstance(x, optax.MaskedNode)
  return any(map(hole, jax.tree.leaves(tree, is_leaf=hole)))


def stepped(params: Any, step: Any) -> Any:
  """params + step in the dtypes of the params; where the step has a hole the params stay as they are.

  As ``optax.apply_updates``, for params that hold more than the step speaks of: the rest of a partition, or the
  functions and other static fields of a model that is a pytree. Leaves are matched as in the products.
  """
  leaves, treedef = jax.tree.flatten(params)
  slots, places = _matched("the step", params, step)
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


def opposite(params: Any, tree: Any) -> list:
  """The leaves of the params that stand opposite the leaves of a tree, which may have holes."""
  leaves = jax.tree.leaves(params)
  return [leaves[i] for i in _matched("the tree of updates", params, tree)[1] if i is not None]


class _Block(NamedTuple):
  """The part of the parameters that a vector with holes speaks of; the rest is constant."""

  theta: list[jax.Array]  # the leaves of θ opposite an array of the vector
  vector: list[jax.Array]  # those arrays, in the dtypes of theta
  join: Callable[[list], Any]  # leaves like theta -> parameters, the held ones as they are
  take: Callable[[Any], list]  # a tree like the parameters -> its leaves opposite theta
  restore: Callable[[list], Any]  # leaves like theta -> a tree like the vector, holes included


def _block(name: str, params, vector) -> _Block:
  """Match the vector with the parameters, or say where they part."""
  slots, places = _matched(f"`{name}`", params, vector)
  leaves, treedef = jax.tree.flatten(params)
  active = [i for i in places if i is not None]
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole)]
  pairs = [(path, leaves[i], v) for path, i, v in zip(paths, places, slots, strict=True) if i is not None]
  _check_differentiable(name, [(path, x) for path, x, _ in pairs])
  theta = [jnp.asarray(x) for _, x, _ in pairs]

  def join(part):
    return treedef.unflatten(put(leaves, active, part))

  def restore(part):
    held = [j for j, i in enumerate(places) if i is not None]
    return jax.tree.structure(vector, is_leaf=_is_hole).unflatten(put(slots, held, part))

  def put(whole, where, part):
    found = dict(zip(where, part, strict=True))
    return [found.get(i, x) for i, x in enumerate(whole)]

  return _Block(
    theta=theta,
    vector=[_cast(name, path, v, x) for (path, _, v), x in zip(pairs, theta, strict=True)],
    join=join,
    take=lambda tree: [found[i] for found in [jax.tree.leaves(tree)] for i in active],
    restore=restore,
  )


def _matched(what: str, params: Any, vector: Any) -> tuple[list, list[int | None]]:
  """The slots of the vector, and the index of the parameter opposite each of them; None at a hole.

  By position where the two trees are alike, a leaf in a box (of Flax: a tree of one leaf named `value`) counting as the
  leaf; by the names of the leaves where only the containers differ, as a dict and the state of an nnx module do.
  """
  slots, treedef = jax.tree.flatten(vector, is_leaf=_is_hole)
  places = _by_position(slots, treedef, params)
  if places is None:
    places = _by_name(vector, params)
  if places is None:
    raise ValueError(_mismatch(what, params, vector))
  return slots, places


def _by_position(slots: list, treedef: Any, params: Any) -> list[int | None] | None:
  try:
    parts = treedef.flatten_up_to(params)
  except (ValueError, TypeError, KeyError):
    return None
  places, start = [], 0
  for slot, part in zip(slots, parts, strict=True):
    inside = jax.tree_util.tree_leaves_with_path(part)
    if not _is_hole(slot) and (len(inside) != 1 or names(inside[0][0])):
      return None
    places.append(None if _is_hole(slot) else start)
    start += len(inside)
  return places


def _by_name(vector: Any, params: Any) -> list[int | None] | None:
  paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  left = {path: i for i, path in enumerate(paths)}
  if len(left) < len(paths):
    return None
  places, holes = [], []
  for path, slot in jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole):
    if not _is_hole(slot) and names(path) not in left:
      return None
    places.append(None if _is_hole(slot) else left.pop(names(path)))
    holes += [names(path)] if _is_hole(slot) else []
  missing = [path for path in left if not any(path[: len(hole)] == hole for hole in holes)]
  return None if missing else places


def _gradient(loss, join, has_aux) -> Callable[[list], list]:
  """θ_b ↦ g_b, complex leaves in the direction of ascent."""
  gradient = jax.grad(_drop_aux(lambda leaves: loss(join(leaves)), has_aux))
  return lambda leaves: _ascent(gradient(leaves))


def _ascent(grads):
  """∂L/∂x + i ∂L/∂y, where JAX has its conjugate."""
  return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def _drop_aux(f, has_aux):
  return (lambda x: f(x)[0]) if has_aux else f


def _is_hole(x) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def _cast(name, path, v, x):
  v = jnp.asarray(v)
  if v.shape != x.shape:
    raise ValueError(
      f"`{name}` needs a vector with the shapes of the parameters; at {_at(path)} the parameter has shape "
      f"{x.shape} and the vector {v.shape}. Draw it as `optax.tree.random_like(key, params)`."
    )
  if jnp.iscomplexobj(v) and not jnp.iscomplexobj(x):
    raise ValueError(
      f"`{name}` cannot move a real parameter in a complex direction: at {_at(path)} the parameter is {x.dtype} "
      f"and the vector {v.dtype}. Pass the real part."
    )
  return v.astype(x.dtype)


def _check_differentiable(name, leaves_with_path):
  for path, x in leaves_with_path:
    if not hasattr(x, "dtype") and not isinstance(x, bool | int | float | complex):
      raise ValueError(
        f"`{name}` differentiates floating-point or complex parameters, but the leaf at {_at(path)} is a "
        f"{type(x).__name__}. Let the loss be a function of the arrays alone; of an Equinox model: "
        "`params, static = eqx.partition(model, eqx.is_inexact_array)`, `lambda p: loss(eqx.combine(p, static))`."
      )
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"`{name}` differentiates floating-point or complex parameters, but the leaf at {_at(path)} is {dtype}. "
        "Keep it out of the parameters that the loss is a function of, or put `optax.MaskedNode()` there in the vector."
      )


def _mismatch(what, params, vector) -> str:
  """Name the first leaf that only one of the two has, rather than print two trees."""
  slots = jax.tree_util.tree_leaves_with_path(vector, is_leaf=_is_hole)
  holes = [names(path) for path, x in slots if _is_hole(x)]
  came = {names(path): jax.tree_util.keystr(path) for path, x in slots if not _is_hole(x)}
  needed = {names(path): jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  held = lambda path: any(path[: len(hole)] == hole for hole in holes)
  unknown = [came[path] for path in sorted(came.keys() - needed.keys())]
  missing = [needed[path] for path in sorted(needed.keys() - came.keys()) if not held(path)]
  if unknown:
    found = f"has a leaf at `{unknown[0]}` where the parameters have none"
  elif missing:
    found = f"has nothing at `{missing[0]}`, which is a parameter"
  else:
    found = f"is a {jax.tree.structure(vector)}, the parameters are a {jax.tree.structure(params)}"
  return (
    f"{what} needs a vector with the structure of the parameters; this one {found}. Draw it as "
    "`optax.tree.random_like(key, params)`; for the block of some parameters put `optax.MaskedNode()` in place of the "
    "others."
  )


def _at(path) -> str:
  return f"`{jax.tree_util.keystr(path)}`" if path else "the root"
