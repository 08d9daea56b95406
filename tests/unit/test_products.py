# SPDX-License-Identifier: Apache-2.0
"""Products against dense matrices: H and G by `jax.hessian` of the raveled problem, complex numbers as pairs of reals.

What is large is jitted as a whole, and compiled once for all tests that ask for the same product of the same loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dpsgd_optax._trees.paths import opposite, stepped
from dpsgd_optax.curvature.fused import value_and_grad_and_hvp, value_and_grad_then_hvp
from dpsgd_optax.curvature.products import ggnvp, hvp, hvp_finite_difference

pytestmark = pytest.mark.usefixtures("x64")

HOLES = [None, optax.MaskedNode()]


def nested(dtype=jnp.float64):
  """A network's parameters: a list in a dict, a matrix, a vector, a scalar, an empty leaf, an absent one."""
  rng = np.random.default_rng(0)
  tree = {
    "layers": [{"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}, {"w": rng.normal(size=(2, 1)), "b": None}],
    "scale": np.float64(0.7),
    "empty": np.zeros((0, 4)),
  }
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def network(p):
  x = jnp.linspace(-1, 1, 12).reshape(4, 3).astype(p["scale"].dtype)
  first, second = p["layers"]
  return p["scale"] * (jnp.tanh(x @ first["w"] + first["b"]) @ second["w"]) + jnp.sum(p["empty"])


def loss(p):
  return jnp.mean(jnp.square(network(p) - 0.3)) + jnp.prod(p["layers"][0]["b"])


def direction(params, seed=1):
  """A vector like the parameters; drawn by NumPy, which compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(x):
    v = rng.normal(size=x.shape) + (1j * rng.normal(size=x.shape) if jnp.iscomplexobj(x) else 0)
    return jnp.asarray(v, x.dtype)

  return jax.tree.map(draw, params)


@functools.partial(jax.jit, static_argnums=0)
def dense_product(f, params, v):
  """∇²f(params) v by the full matrix."""
  flat, unravel = ravel_pytree(params)
  return unravel(jax.hessian(lambda x: f(unravel(x)))(flat) @ ravel_pytree(v)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def product_of(make, f, params, v):
  """`make(f, params)(v)`, compiled."""
  return make(f, params)(v)


def fused(f, params):
  """`value_and_grad_and_hvp` in the form of the other products."""
  return lambda v: value_and_grad_and_hvp(f)(params, v)[2]


def assert_close(actual, desired, rtol=1e-10, atol=1e-12):
  """Trees of equal structure, holes included, with equal dtypes."""
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(d), rtol=rtol, atol=atol)


def test_hvp_is_the_dense_product():
  """H v = ∇²L(θ) v on a nested tree."""
  params = nested()
  v = direction(params)
  assert_close(product_of(hvp, loss, params, v), dense_product(loss, params, v))


@pytest.mark.parametrize("make", [hvp, hvp_finite_difference])
def test_product_is_linear(make):
  """H (2u − 3w) = 2 H u − 3 H w."""
  params = nested()
  product, u, w = functools.partial(product_of, make, loss, params), direction(params, 1), direction(params, 2)
  combined = product(jax.tree.map(lambda a, b: 2 * a - 3 * b, u, w))
  separate = jax.tree.map(lambda a, b: 2 * a - 3 * b, product(u), product(w))
  tolerance = 1e-10 if make is hvp else 1e-6
  assert_close(combined, separate, rtol=tolerance, atol=tolerance)


def test_hvp_is_symmetric():
  """⟨u, H w⟩ = ⟨H u, w⟩."""
  params = nested()
  product, u, w = functools.partial(product_of, hvp, loss, params), direction(params, 1), direction(params, 2)
  np.testing.assert_allclose(optax.tree.vdot(u, product(w)), optax.tree.vdot(product(u), w), rtol=1e-10)


@pytest.mark.parametrize("make", [hvp, hvp_finite_difference])
def test_has_aux_changes_nothing(make):
  params = nested()
  v = direction(params)
  with_aux = make(lambda p: (loss(p), {"predictions": network(p), "name": "text"}), params, has_aux=True)
  assert_close(jax.jit(with_aux)(v), product_of(make, loss, params, v))


@pytest.mark.parametrize("dtype, rtol", [(jnp.bfloat16, 0.1), (jnp.float16, 0.02), (jnp.float32, 1e-5)])
def test_product_has_the_dtype_of_the_parameters(dtype, rtol):
  """The vector comes in float64 and is cast; the product follows the parameters."""
  params = nested(dtype)
  v = direction(nested())
  product = product_of(hvp, loss, params, v)
  assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype(dtype)}
  rounded = jax.tree.map(lambda x: x.astype(jnp.float64), params)
  reference = ravel_pytree(dense_product(loss, rounded, v))[0]
  error = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), product))[0] - reference
  assert jnp.linalg.norm(error) < rtol * jnp.linalg.norm(reference)


def test_leaves_keep_their_own_dtypes():
  params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(2, jnp.complex64)}

  def mixed(p):
    return jnp.sum(p["a"].astype(jnp.float32) * p["b"] ** 2 * jnp.square(jnp.abs(p["c"])))

  v = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
  product = jax.jit(lambda v: hvp(mixed, params)(v))(v)
  assert jax.tree.map(lambda x: x.dtype, product) == jax.tree.map(lambda x: x.dtype, params)
  product = jax.jit(fused(mixed, params))(v)
  assert jax.tree.map(lambda x: x.dtype, product) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize("make", [hvp, hvp_finite_difference])
def test_nothing_is_differentiated_before_the_call(make):
  """`make(loss, params)` is free: the loss is first traced when a product is asked for."""
  traces = []

  def counted(x):
    traces.append(1)
    return jnp.sum(x**4)

  product = make(counted, jnp.ones(3))
  assert not traces
  product(jnp.ones(3))
  assert traces


def test_hvp_in_jit_vmap_and_cond():
  """The closure is an ordinary function of v under every transformation."""
  x = jnp.array([1.0, -2.0, 0.5])
  product = hvp(lambda x: jnp.sum(x**4) / 12, x)  # H = diag(x²)
  np.testing.assert_allclose(jax.vmap(jax.jit(product))(jnp.eye(3)), jnp.diag(x**2))
  skipped = jax.jit(lambda due: jax.lax.cond(due, product, jnp.zeros_like, jnp.ones(3)))
  np.testing.assert_allclose(skipped(True), x**2)
  np.testing.assert_allclose(skipped(False), 0)


def complex_problem():
  """A real loss of complex and real leaves, not holomorphic, and the same as a function of reals."""
  rng = np.random.default_rng(3)
  z = jnp.asarray(rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3)))
  params = {"z": z, "r": jnp.asarray(rng.normal(size=3))}

  def outputs(p):
    return jnp.sin(p["z"]) @ p["r"].astype(p["z"].dtype) + p["z"][:, 0] ** 2 * jnp.conj(p["z"][:, 1])

  def loss(outs):
    return jnp.sum(jnp.square(jnp.abs(outs - 1j))) + jnp.sum(jnp.real(outs) ** 3)

  def merge(s):
    return {"z": jax.lax.complex(s["x"], s["y"]), "r": s["r"]}

  def split(p):
    return {"x": jnp.real(p["z"]), "y": jnp.imag(p["z"]), "r": p["r"]}

  return params, outputs, loss, split, merge


def test_complex_hvp_is_the_hessian_of_the_split_problem():
  """(Re, Im) of H v is ∇² of L(x, y) applied to (Re v, Im v)."""
  params, outputs, loss, split, merge = complex_problem()
  v = direction(params)
  expected = merge(dense_product(lambda s: loss(outputs(merge(s))), split(params), split(v)))
  composed = lambda p: loss(outputs(p))
  assert_close(product_of(hvp, composed, params, v), expected)
  assert_close(product_of(hvp_finite_difference, composed, params, v), expected, rtol=1e-5, atol=1e-5)
  assert_close(jax.jit(value_and_grad_and_hvp(composed))(params, v)[2], expected)


def test_complex_gradient_is_the_direction_of_ascent():
  """g = ∂L/∂x + i ∂L/∂y: what Optax's transforms are to be given, and a descent by −g lowers the loss."""
  params, outputs, loss, split, merge = complex_problem()
  composed = lambda p: loss(outputs(p))
  value, grads, _ = jax.jit(value_and_grad_and_hvp(composed))(params, params)
  assert_close(grads, merge(jax.jit(jax.grad(lambda s: composed(merge(s))))(split(params))))
  assert composed(jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)) < value


def test_complex_ggnvp_is_that_of_the_split_problem():
  params, outputs, loss, split, merge = complex_problem()
  v = direction(params)

  def real_outputs(s):
    z = outputs(merge(s))
    return {"x": jnp.real(z), "y": jnp.imag(z)}

  split_product = ggnvp(lambda o: loss(jax.lax.complex(o["x"], o["y"])), split(params), outputs=real_outputs)
  expected = jax.jit(split_product)(split(v))
  assert_close(jax.jit(ggnvp(loss, params, outputs=outputs))(v), merge(expected))


@pytest.mark.parametrize("hole", HOLES, ids=["None", "MaskedNode"])
@pytest.mark.parametrize("make", [hvp, hvp_finite_difference, fused])
def test_holes_give_the_diagonal_block(make, hole):
  """With v_o = hole the product is (H_bb v_b, hole): H v for the v that is zero there, a hole where the hole was."""
  params = nested()
  v = direction(params)
  v["layers"][0]["w"] = hole  # a leaf
  v["layers"][1] = hole  # a subtree, as a prefix mask of optax.masked makes it
  zeroed = direction(params)
  zeroed["layers"][0]["w"] = jnp.zeros_like(zeroed["layers"][0]["w"])
  zeroed["layers"][1] = jax.tree.map(jnp.zeros_like, zeroed["layers"][1])
  expected = dense_product(loss, params, zeroed)
  expected["layers"][0]["w"] = expected["layers"][1] = hole
  assert_close(product_of(make, loss, params, v), expected, rtol=1e-5, atol=1e-5)


def test_holes_give_the_block_of_gauss_newton():
  params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
  product = ggnvp(lambda z: jnp.sum(z**2) / 2, params, outputs=lambda p: p["a"] ** 2 * p["b"])
  v = {"a": jnp.array([1.0, 1.0]), "b": optax.MaskedNode()}
  result = product(v)
  assert isinstance(result["b"], optax.MaskedNode)
  np.testing.assert_allclose(result["a"], (2 * params["a"] * params["b"]) ** 2)  # Jᵀ J = diag(2ab)²


def test_held_leaves_may_be_integers():
  """What is held is not differentiated, so it may be of any type."""
  params = {"w": jnp.array([1.0, 2.0]), "steps": jnp.array(3)}
  product = hvp(lambda p: jnp.sum(p["w"] ** 2) * p["steps"].astype(p["w"].dtype), params)
  result = product({"w": jnp.ones(2), "steps": optax.MaskedNode()})
  np.testing.assert_allclose(result["w"], 6.0)


@pytest.mark.parametrize("hole", HOLES, ids=["None", "MaskedNode"])
def test_all_holes_and_empty_trees(hole):
  params = {"a": jnp.ones(2)}
  square = lambda p: jnp.sum(p["a"] ** 2)
  assert hvp(square, params)({"a": hole}) == {"a": hole}
  assert hvp_finite_difference(square, params)({"a": hole}) == {"a": hole}
  assert ggnvp(jnp.sum, params, outputs=lambda p: p["a"])({"a": hole}) == {"a": hole}
  assert value_and_grad_and_hvp(square)(params, {"a": hole})[2] == {"a": hole}
  assert hvp(lambda p: 1.0, {})({}) == {}


def test_hvp_inside_partition_sees_the_exact_block():
  """A transform under `optax.partition` is given params with holes; it passes its updates as v and gets H_bb v_b."""

  def newton_step():
    def update(updates, state, params=None, *, hvp, **extra):
      del params, extra
      return hvp(updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

  params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])}

  def coupled(p):
    return jnp.sum(jnp.sin(p["kernel"]) @ p["bias"]) ** 2

  tx = optax.partition({"second": newton_step(), "first": optax.identity()}, {"kernel": "second", "bias": "first"})
  grads = jax.grad(coupled)(params)

  @jax.jit
  def step(params, state):
    return tx.update(grads, state, params, hvp=hvp(coupled, params))[0]

  updates = step(params, tx.init(params))
  H = jax.hessian(lambda k: coupled({**params, "kernel": k.reshape(2, 2)}))(params["kernel"].ravel())
  np.testing.assert_allclose(updates["kernel"].ravel(), H @ grads["kernel"].ravel(), rtol=1e-10)
  np.testing.assert_allclose(updates["bias"], grads["bias"])


def test_a_product_knows_where_it_was_taken():
  """All parameters, also where the vector has holes: a judge inside `optax.partition` finds them there."""
  params = nested()
  made = [hvp(loss, params), hvp_finite_difference(loss, params), ggnvp(jnp.sum, params, outputs=network)]
  made.append(value_and_grad_then_hvp(loss, where=jax.tree.map(lambda x: x.ndim == 1, params))(params)[2])
  assert all(product.params is params for product in made)


def test_a_step_with_holes_moves_what_it_speaks_of_and_keeps_the_rest():
  """θ + s leaf by leaf in the dtypes of θ; functions, integers and whole subtrees stay where s has a hole."""
  hole = optax.MaskedNode()
  params = {
    "w": jnp.ones(2, jnp.bfloat16),
    "f": jnp.tanh,
    "n": 3,
    "rest": {"a": jnp.ones(2), "b": jnp.tanh},
    "c": jnp.zeros(2),
  }
  step = {"w": jnp.full(2, 0.5), "f": None, "n": None, "rest": hole, "c": jnp.ones(2)}
  moved = stepped(params, step)
  assert moved["w"].dtype == jnp.bfloat16 and moved["w"].tolist() == [1.5, 1.5] and moved["c"].tolist() == [1.0, 1.0]
  assert moved["f"] is jnp.tanh and moved["n"] == 3 and moved["rest"] is not None and moved["rest"]["b"] is jnp.tanh
  assert moved["rest"]["a"].tolist() == [1.0, 1.0] and params["w"].tolist() == [1.0, 1.0]
  assert [x.tolist() for x in opposite(params, step)] == [[0.0, 0.0], [1.0, 1.0]]
  with pytest.raises(ValueError, match=r"the step needs a vector with the structure.*leaf at `\['x'\]`"):
    stepped({"a": jnp.ones(2)}, {"a": None, "x": jnp.ones(2)})
