# SPDX-License-Identifier: Apache-2.0
"""Losses that are sums over samples of a square, or of a convex function of outputs, and their Jacobians.

Notation
  θ        the parameters
  z_i      what the function of one sample returns: its residual, or its outputs
  ℓ        a convex loss of the outputs of one sample
  r, J     the residuals of all samples, n real numbers, and ∂r/∂θ, (n, N)

Squares:  L(θ) = ½ Σ_i ‖z_i‖²,   r = z.
Outputs:  L(θ) = Σ_i ℓ(z_i);  with H_i = ∇²ℓ(z_i) = U diag(h) Uᵀ the rows are diag(√h) Uᵀ ∂z_i/∂θ and r is
          diag(1/√h) Uᵀ ∇ℓ(z_i): then Jᵀ r is the gradient and Jᵀ J the generalized Gauss-Newton matrix.

**J sample by sample.** A residual is a function of θ and of *one* sample, so J is a gradient of that function under
`vmap`, and costs about one gradient of the batch. `jax.jacrev` of the whole vector runs the whole batch for each row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.curvature._linearized import Coordinates, Linearized, real_rows
from dpsgd_optax.curvature._tangents import Block


class Residuals:
  """A loss as a sum over samples. Made by :func:`residuals`.

  Attributes:
    params: θ, if the object is bound to it (:meth:`at`), else None.
  """

  def __init__(self, groups: tuple[tuple, ...], loss: Callable | None = None, params: Any = None):
    self._groups, self._loss, self.params = groups, loss, params

  def __call__(self, params: Any) -> jax.Array:
    """r, (n,): all groups one after the other, complex residuals as real and imaginary parts. Of outputs: z."""
    return jnp.concatenate([_outputs(group, params).reshape(-1) for group in self._groups])

  def loss(self, params: Any) -> jax.Array:
    """L: ½ Σ r², or the sum of the losses of the outputs. A loss for ``jax.value_and_grad``."""
    first, *others = (self._group_loss(group, params) for group in self._groups)
    return sum(others, first)

  def at(self, params: Any) -> "Residuals":
    """The same, bound to θ in full, for transforms inside ``optax.partition`` and ``optax.masked``."""
    return Residuals(self._groups, self._loss, params)

  def linearize(self, block: Block) -> Linearized:
    """r, J and their products for the parameters of the block, the others held."""
    to = Coordinates(block)
    roots = [self._root(group, to.params(to.leaves)) for group in self._groups]
    weigh = [lambda dz, root=root: dz if root is None else jnp.einsum("mij,mj->mi", root[0], dz) for root in roots]

    def stacked(leaves):
      found = [_outputs(group, to.params(leaves)) for group in self._groups]
      return _concatenated([w(z).reshape(-1) for w, z in zip(weigh, found, strict=True)], to.dtype)

    z, push = jax.linearize(stacked, to.leaves)
    given = [None if root is None else root[1].reshape(-1) for root in roots]
    residual = z if self._loss is None else _concatenated(given, to.dtype)

    def pull(u):
      (leaves,) = jax.linear_transpose(push, to.leaves)(u.astype(z.dtype))
      return to.concatenated(leaves)

    def bend(s):
      along = lambda leaves: jax.jvp(stacked, (leaves,), (to.split(s),))[1]
      return jax.jvp(along, (to.leaves,), (to.split(s),))[1]

    def loss(s):
      if s is None and self._loss is None:
        return jnp.sum(residual * residual) / 2  # is at hand
      leaves = to.leaves if s is None else [x + d for x, d in zip(to.leaves, to.split(s), strict=True)]
      return self.loss(to.params(leaves))

    parts = list(zip(self._groups, roots, strict=True))
    jacobian = lambda: _concatenated([_jacobian(group, to, root) for group, root in parts], to.dtype)
    gram = lambda chunk: sum(_gram(group, to, root, chunk) for group, root in parts)
    along = lambda s: push(to.split(s))
    return Linearized(residual, to.size, jacobian, gram, along, pull, bend, loss, to.to_tree, to.to_vector)

  def _group_loss(self, group: tuple, params: Any) -> jax.Array:
    z = _outputs(group, params)
    if self._loss is None:
      return jnp.sum(z * z) / 2
    return jnp.sum(jax.vmap(self._of_vector(group, params))(z, *group[1:]))

  def _root(self, group: tuple, params: Any) -> tuple[jax.Array, jax.Array] | None:
    """Of the Hessian of ℓ: diag(√h) Uᵀ of each sample, (m, c, c), and r, (m, c); None for squares.

    h below √eps of the largest of all counts as that much, so that the gradient of a saturated loss is not lost.
    """
    if self._loss is None:
      return None
    z, of_vector = _outputs(group, params), self._of_vector(group, params)
    slope = jax.vmap(jax.grad(of_vector))(z, *group[1:])
    h, u = jnp.linalg.eigh(jax.vmap(jax.hessian(of_vector))(z, *group[1:]))
    info = jnp.finfo(z.dtype)
    scale = jnp.sqrt(jnp.maximum(h, float(info.eps) ** 0.5 * jnp.max(h) + float(info.tiny)))
    turned = jnp.einsum("mji,mj->mi", u, slope)
    return scale[:, :, None] * jnp.swapaxes(u, 1, 2), turned / scale

  def _of_vector(self, group: tuple, params: Any) -> Callable:
    """ℓ of the outputs of one sample as a vector of real numbers."""
    fn, *arrays = group
    loss = self._loss
    assert loss is not None
    one = jax.eval_shape(lambda params, arrays: fn(params, *jax.tree.map(lambda x: x[0], arrays)), params, arrays)
    if jnp.issubdtype(one.dtype, jnp.complexfloating):
      raise ValueError(
        f"`residuals(…, loss=…)` needs real outputs, got {one.dtype}. Return `jnp.stack([z.real, z.imag])`."
      )

    def of_vector(z, *sample):
      value = loss(z.reshape(one.shape), *sample)
      if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
          f"the `loss` of `residuals` must return one real number for the outputs of one sample, got "
          f"{jnp.result_type(value)}{list(jnp.shape(value))}. Return its `jnp.sum` or `jnp.mean`."
        )
      return value

    return of_vector


def residuals(*groups: Any, loss: Callable[..., Any] | None = None) -> Residuals:
  """A sum over samples, for :func:`dpsgd_optax.gauss_newton`: L = ½ Σ r², r from functions of *one* sample.

  Args:
    *groups: tuples (fn, *arrays), where ``fn(params, *sample)`` returns the residual of one sample: a number or an
      array, real or complex, its weight included (1/√m for a mean over m samples); the arrays (or trees of them) have
      the samples as leading axis. A group without arrays, ``(fn,)`` or ``fn`` alone, returns all residuals at once; its
      Jacobian costs a pass for each of them.
    loss: for losses that are no squares: ``fn`` returns the outputs of one sample and ``loss(outputs, *sample)`` is a
      real number, convex in the outputs. L is the sum. None: squares.

  Returns:
    A :class:`dpsgd_optax.curvature.residuals.Residuals`. Called with params it gives r, (n,); ``.loss(params)`` is L;
    ``.at(params)`` is bound to them, for use inside ``optax.partition``. Make it inside ``jit`` from each mini-batch,
    or outside from the whole data.

  Raises:
    ValueError: for a group that is none, for arrays of different length, and when called, for residuals that are no
      floating-point array.

  Example:
    >>> import jax.numpy as jnp, dpsgd_optax as dpo
    >>> x, y = jnp.arange(3.0), jnp.array([1.0, 3.0, 5.0])
    >>> fit = dpo.residuals((lambda p, x, y: p["a"] * x + p["b"] - y, x, y))
    >>> fit({"a": 2.0, "b": 0.0}), float(fit.loss({"a": 2.0, "b": 0.0}))
    (Array([-1., -1., -1.], dtype=float32), 1.5)
  """
  if not groups:
    raise ValueError("`residuals` needs at least one group (fn, *arrays), got none. Type `residuals((fn, x, y))`.")
  return Residuals(tuple(map(_checked, groups)), loss)


def as_residuals(given: Any) -> Any:
  """What came as ``residual_fn``: an object that can be linearized, or a function params ↦ r."""
  return given if hasattr(given, "linearize") else Residuals((_checked(given),))


def _checked(group: Any) -> tuple:
  group = (group,) if callable(group) else group
  if not isinstance(group, tuple | list) or not group or not callable(group[0]):
    raise ValueError(
      f"`residuals` needs groups (fn, *arrays), got {type(group).__name__}. Type `residuals((fn, x, y))`, with "
      "`fn(params, x_i, y_i)` the residual of one sample."
    )
  lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(group[1:])}
  if len(lengths) > 1 or () in lengths:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(group[1:])]
    raise ValueError(
      f"the arrays of a group of `residuals` must have the samples as leading axis, got shapes {shapes}. Put what all "
      "samples share into the function: `lambda p, x: fn(p, x, shared)`."
    )
  return tuple(group)


def _outputs(group: tuple, params: Any) -> jax.Array:
  """z of all samples, (m, c), real."""
  fn, *arrays = group
  if not arrays:
    return real_rows(_array(fn(params)), 1)
  samples = len(jax.tree.leaves(arrays)[0])
  return real_rows(_array(jax.vmap(fn, (None, *(0,) * len(arrays)))(params, *arrays)), samples)


def _array(z: Any) -> jax.Array:
  """What a function returned; a ValueError unless it is one floating-point or complex array."""
  leaves = jax.tree.leaves(z)
  if len(leaves) != 1 or not (hasattr(z, "dtype") or isinstance(z, float)):
    raise ValueError(
      f"the function of a group of `residuals` must return one number or one array, got {jax.tree.structure(z)}. Make "
      "a group of each residual: `residuals((first, x), (second, x))`, or join them: `jnp.concatenate([a, b])`."
    )
  z = jnp.asarray(z)
  if not jnp.issubdtype(z.dtype, jnp.inexact):
    raise ValueError(
      f"residuals must be floating point or complex, got {z.dtype}. Cast what the function returns, or the data."
    )
  return z


def _concatenated(parts: list, dtype: Any) -> jax.Array:
  return jnp.concatenate([x.astype(jnp.promote_types(x.dtype, dtype)) for x in parts])


def _of_samples(group: tuple, to: Coordinates) -> Callable:
  """(arrays, root) -> the rows of J of these samples, (m·c, N)."""
  fn, *_ = group

  def rows(arrays, root):
    of_one = lambda leaves, *sample: real_rows(_array(fn(to.params(leaves), *sample)), 1)[0]
    slopes = jax.vmap(jax.jacrev(of_one), (None, *(0,) * len(arrays)))(to.leaves, *arrays)
    found = to.concatenated(slopes, 2)
    found = found if root is None else jnp.einsum("mij,mjk->mik", root, found)
    return found.reshape(-1, to.size)

  return rows


def _jacobian(group: tuple, to: Coordinates, root: Any) -> jax.Array:
  fn, *arrays = group
  if arrays:
    return _of_samples(group, to)(arrays, None if root is None else root[0])
  whole = lambda leaves: real_rows(_array(fn(to.params(leaves))), 1)[0]
  count = jax.eval_shape(whole, to.leaves).shape[0]
  found = to.concatenated((jax.jacrev if count <= to.size else jax.jacfwd)(whole)(to.leaves), 1)
  return found if root is None else root[0][0] @ found


def _gram(group: tuple, to: Coordinates, root: Any, chunk: int) -> jax.Array:
  """JᵀJ of a group, ``chunk`` samples at a time, so that no more rows are held at once."""
  _, *arrays = group
  if not arrays:
    rows = _jacobian(group, to, root)
    return rows.T @ rows
  rows_of = _of_samples(group, to)
  roots = None if root is None else root[0]
  samples = len(jax.tree.leaves(arrays)[0])
  whole = samples - samples % chunk
  folded = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), (arrays, roots))

  def add(total, part):
    rows = rows_of(*part)
    return total + rows.T @ rows, None

  total = jnp.zeros((to.size, to.size), jax.eval_shape(lambda: _jacobian(group, to, root)).dtype)
  total, _ = jax.lax.scan(add, total, folded)
  return total if whole == samples else add(total, jax.tree.map(lambda x: x[whole:], (arrays, roots)))[0]
