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

import dpsgd_optax as dpo
from dpsgd_optax._trees.paths import opposite, stepped
from dpsgd_optax.curvature._loss_errors import check_scalar
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


# ----------------------------------------------------------------------------------------------------------------- hvp


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


# ------------------------------------------------------------------------------------------------------------- complex


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


# --------------------------------------------------------------------------------------------------------------- holes


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


# --------------------------------------------------------------------------------------------------------- other kinds


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-2), (jnp.float64, 1e-6)])
def test_finite_difference_does_not_depend_on_the_length_of_v(dtype, rtol):
  params = nested(dtype)
  for scale in (1e-8, 1.0, 1e8):
    v = jax.tree.map(lambda x, scale=scale: x * scale, direction(params))
    exact = ravel_pytree(product_of(hvp, loss, params, v))[0]
    close = ravel_pytree(product_of(hvp_finite_difference, loss, params, v))[0]
    assert jnp.linalg.norm(close - exact) < rtol * jnp.linalg.norm(exact)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite_difference_follows_the_length_of_the_parameters(scale):
  """L = ½ ‖A x‖² has the same Hessian everywhere; far from zero an absolute step would drown in rounding."""
  A = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
  x, v = jnp.full(5, scale, jnp.float32), jnp.arange(5, dtype=jnp.float32)
  product = hvp_finite_difference(lambda x: 0.5 * jnp.sum((A @ x) ** 2), x)(v)
  np.testing.assert_allclose(product, A.T @ A @ v, rtol=2e-2, atol=2e-2)


def test_finite_difference_of_a_zero_vector_is_zero():
  product = hvp_finite_difference(lambda x: jnp.sum(x**4), jnp.ones(3))
  np.testing.assert_array_equal(product(jnp.zeros(3)), jnp.zeros(3))


def test_finite_difference_needs_no_forward_mode():
  """A gradient computed outside JAX has no jvp; the difference does not ask for one."""

  @jax.custom_vjp
  def cubes(x):
    return jnp.sum(x**3)

  def backward(x, cotangent):
    return (cotangent * jax.pure_callback(lambda x: 3 * np.asarray(x) ** 2, x, x),)

  cubes.defvjp(lambda x: (jnp.sum(x**3), x), backward)
  x = jnp.array([1.0, 2.0])
  with pytest.raises(ValueError, match="JVP"):
    hvp(cubes, x)(x)
  np.testing.assert_allclose(hvp_finite_difference(cubes, x)(x), 6 * x**2, rtol=1e-6)


def test_ggnvp_is_the_hessian_of_a_linear_model():
  """f linear, ℓ convex: G = H; here with softmax cross-entropy."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
  params = {"w": jnp.ones((3, 4)) * jnp.arange(4.0), "b": jnp.arange(4.0)}
  labels = jnp.array([0, 1, 2, 3, 0, 1])

  def outputs(p):
    return x @ p["w"] + p["b"]

  def entropy(z):
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()

  v = direction(params)
  expected = dense_product(lambda p: entropy(outputs(p)), params, v)
  assert_close(jax.jit(ggnvp(entropy, params, outputs=outputs))(v), expected, rtol=1e-9)


def test_ggnvp_is_the_dense_product_and_has_aux():
  """G v = Jᵀ ∇²ℓ J v, and not H v, for a model that is not linear."""
  params = nested()
  v = direction(params)
  ell = lambda z: jnp.mean(jnp.square(z) + z**4)

  @jax.jit
  def dense(params, v):
    flat, unravel = ravel_pytree(params)
    J = jax.jacobian(lambda x: network(unravel(x)).ravel())(flat)
    z = network(params)
    G = J.T @ jax.hessian(lambda z: ell(z.reshape(4, 1)))(z.ravel()) @ J
    return unravel(G @ ravel_pytree(v)[0])

  expected = dense(params, v)
  assert_close(jax.jit(ggnvp(ell, params, outputs=network))(v), expected)
  assert_close(jax.jit(ggnvp(ell, params, has_aux=True, outputs=lambda p: (network(p), "aux")))(v), expected)
  H = ravel_pytree(product_of(hvp, lambda p: ell(network(p)), params, v))[0]
  assert jnp.linalg.norm(H - ravel_pytree(expected)[0]) > 0.01


def test_fused_pass_equals_the_separate_ones():
  params = nested()
  v = direction(params)
  value, grads, product = jax.jit(value_and_grad_and_hvp(loss))(params, v)
  expected_value, expected_grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, expected_value, rtol=1e-12)
  assert_close(grads, expected_grads)
  assert_close(product, product_of(hvp, loss, params, v))


def test_fused_pass_returns_aux():
  params = nested()
  v = direction(params)
  both = value_and_grad_and_hvp(lambda p: (loss(p), network(p)), has_aux=True)
  (value, aux), grads, product = jax.jit(both)(params, v)
  np.testing.assert_allclose(value, loss(params))
  np.testing.assert_allclose(aux, network(params))
  assert_close(grads, jax.jit(jax.grad(loss))(params))
  assert_close(product, product_of(hvp, loss, params, v))


def test_fused_gradient_is_of_all_parameters_whatever_the_holes():
  params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
  _, grads, product = value_and_grad_and_hvp(lambda p: jnp.sum(p["a"] * p["b"] ** 2))(
    params, {"a": None, "b": jnp.ones(2)}
  )
  assert_close(grads, {"a": params["b"] ** 2, "b": 2 * params["a"] * params["b"]})
  assert_close(product, {"a": None, "b": 2 * params["a"]})


# ----------------------------------------------------------------------------------------------------------- bad input

CALLS = {
  "hvp": lambda f, p, v: hvp(f, p)(v),
  "hvp_finite_difference": lambda f, p, v: hvp_finite_difference(f, p)(v),
  "ggnvp": lambda f, p, v: ggnvp(f, p, outputs=lambda p: p)(v),
  "value_and_grad_and_hvp": lambda f, p, v: value_and_grad_and_hvp(f)(p, v),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
  "vector, clue",
  [
    ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}, r"leaf at `\['c'\]`"),
    ({"a": np.ones(2)}, r"nothing at `\['b'\]`"),
    ({"a": {"x": np.ones(2)}, "b": np.ones(2)}, r"leaf at `\['a'\]\['x'\]`"),
    ([np.ones(2), np.ones(2)], r"leaf at `\[0\]`"),
    ({"a": np.ones(3), "b": np.ones(2)}, r"at `\['a'\]` the parameter has shape \(2,\) and the vector \(3,\)"),
    ({"a": np.ones(2) * 1j, "b": np.ones(2)}, r"at `\['a'\]` the parameter is float64 and the vector complex128"),
  ],
)
def test_a_vector_that_does_not_fit_is_a_value_error(name, vector, clue):
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  with pytest.raises(ValueError, match=f"`{name}`.*{clue}"):
    CALLS[name](lambda p: jnp.sum(p["a"] * p["b"]), params, vector)


@pytest.mark.parametrize("name", CALLS)
def test_a_leaf_opposite_a_subtree_is_a_value_error(name):
  params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}}
  with pytest.raises(ValueError, match=f"`{name}`"):
    CALLS[name](lambda p: jnp.sum(p["a"]["x"]), params, {"a": jnp.ones(2)})


@pytest.mark.parametrize("name", CALLS)
def test_integer_leaves_are_a_value_error_naming_the_path(name):
  params = {"w": jnp.ones(2), "table": [jnp.arange(3)]}
  with pytest.raises(ValueError, match=rf"`{name}`.*`\['table'\]\[0\]` is int64"):
    CALLS[name](lambda p: jnp.sum(p["w"]), params, jax.tree.map(lambda x: jnp.ones(x.shape), params))


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_that_is_no_real_scalar_is_an_error(name):
  with pytest.raises(TypeError, match="scalar"):
    CALLS[name](lambda p: p**2, jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_finite_difference_refuses_half_precision(dtype):
  with pytest.raises(ValueError, match=f"float32 or wider, got {jnp.dtype(dtype)}.*hvp"):
    hvp_finite_difference(jnp.sum, jnp.ones(3, dtype))(jnp.ones(3, dtype))


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, float("nan")])
def test_finite_difference_refuses_a_step_that_is_not_positive(epsilon):
  with pytest.raises(ValueError, match="positive epsilon"):
    hvp_finite_difference(jnp.sum, jnp.ones(3), epsilon=epsilon)


def test_the_product_after_the_gradient_is_that_of_the_parameters_it_was_made_for():
  """`value_and_grad_then_hvp`: value, whole gradient and aux of one pass; H_bb v_b of the block, of any part of it."""
  params = nested()
  where = jax.tree.map(lambda x: x.ndim == 1, params)

  @jax.jit
  def seen(params, v):
    (value, aux), grads, product = value_and_grad_then_hvp(lambda p: (loss(p), 3.0), has_aux=True, where=where)(params)
    block = jax.tree.map(lambda x, w: x if w else optax.MaskedNode(), v, where)
    part = jax.tree.map(lambda x: optax.MaskedNode(), v) | {"layers": [{"w": None, "b": v["layers"][0]["b"]}, None]}
    everything = value_and_grad_then_hvp(loss)(params)[2](v)
    return value, aux, grads, product(block)["layers"][0], product(part)["layers"][0], everything

  v = direction(params)
  value, aux, grads, block, part, everything = seen(params, v)
  expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), grads, gradient)
  alone = jax.tree.map(lambda x, w: x if w else 0 * x, v, where)
  b = dense_product(loss, params, alone)["layers"][0]["b"]
  np.testing.assert_allclose(block["b"], b, rtol=1e-10)
  np.testing.assert_allclose(part["b"], b, rtol=1e-10)
  assert aux == 3.0 and isinstance(block["w"], optax.MaskedNode) and part["w"] is None
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), everything, dense_product(loss, params, v)
  )


# -------------------------------------------------------------------------------------- what stands beside the product


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


# ------------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("aux", ["text", 3, {"logits": np.ones(3)}])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "ggnvp"] + ["newton", "dpsgd", "judge"])
def test_a_loss_that_also_returns_aux_names_the_ways_out(name, aux):
  """As all examples of Flax have it, in place of JAX's words about scalar outputs."""

  def with_aux(p):
    return jnp.sum(p**2), aux

  def updated(tx, **extra):
    p = jnp.ones((3, 2))
    return tx.update(p, tx.init(p), p, value=1.0, value_fn=with_aux, **extra)

  calls = {
    **CALLS,
    "newton": lambda f, p, v: updated(dpo.psgd(0.1, dpo.kron(), dpo.newton())),
    "dpsgd": lambda f, p, v: updated(dpo.dpsgd(0.1)),
    "judge": lambda f, p, v: updated(dpo.dpsgd(0.1, judge_every=1), hvp=lambda v: v),
  }
  with pytest.raises(TypeError) as error:
    calls[name](with_aux, jnp.ones(3), jnp.ones(3))
  message = str(error.value)
  for word in ("the loss must return a real scalar", "a tuple of 2", "lambda p: loss(p)[0]", "has_aux=True"):
    assert word in message, message


@pytest.mark.parametrize(
  "make", [hvp, hvp_finite_difference, lambda f, p, has_aux: lambda v: value_and_grad_and_hvp(f, has_aux)(p, v)]
)
def test_aux_that_does_not_come_is_named(make):
  with pytest.raises(
    TypeError, match=r"with `has_aux=True` the loss must return \(scalar, aux\).*float64\[\].*Leave `has_aux` out"
  ):
    make(lambda p: jnp.sum(p**2), jnp.ones(3), has_aux=True)(jnp.ones(3))


@pytest.mark.parametrize(
  ("value", "words"),
  [
    (np.ones(3), r"returned float64\[3\]. Return its `jnp.mean`"),
    (np.complex64(1j), r"returned complex64\[\]. Return its real part"),
    ({"loss": 1.0}, "returned a dict"),
    (None, "returned a NoneType"),
  ],
)
def test_a_loss_is_a_real_scalar(value, words):
  with pytest.raises(TypeError, match=words):
    check_scalar(value)
  assert check_scalar(2.0) == 2.0 and check_scalar((2.0, value), has_aux=True)[0] == 2.0


def no_forward_mode():
  """A loss with a gradient that JAX cannot differentiate forwards: of a callback, and of a rule with such a one."""

  @jax.custom_vjp
  def cubes(x):
    return jnp.sum(x**3)

  def backward(x, cotangent):
    return (cotangent * jax.pure_callback(lambda x: 3 * np.asarray(x) ** 2, x, x),)

  cubes.defvjp(lambda x: (jnp.sum(x**3), x), backward)
  return cubes


@pytest.mark.parametrize(
  "name", ["hvp", "ggnvp", "value_and_grad_and_hvp", "value_and_grad_then_hvp", "newton", "dpsgd"]
)
def test_a_gradient_without_forward_mode_names_the_finite_difference(name):
  f, x = no_forward_mode(), jnp.array([1.0, 2.0])

  def updated(tx):
    return tx.update(x, tx.init(x), x, value=1.0, value_fn=f)

  calls = {
    **CALLS,
    "ggnvp": lambda f, p, v: ggnvp(lambda z: z**2, p, outputs=f)(v),
    "value_and_grad_then_hvp": lambda f, p, v: value_and_grad_then_hvp(f)(p),
    "newton": lambda f, p, v: updated(dpo.psgd(0.1, dpo.kron(), dpo.newton())),
    "dpsgd": lambda f, p, v: updated(dpo.dpsgd(0.1)),
  }
  with pytest.raises(
    ValueError,
    match=r"forward-mode derivative \(JVP\).*Type `hvp=hvp_finite_difference\(.*It said: (Value|Type)Error: ",
  ):
    calls[name](f, x, x)
  np.testing.assert_allclose(hvp_finite_difference(f, x)(x), 6 * x**2, rtol=1e-5)


def test_the_errors_of_the_loss_itself_are_not_touched():
  """What fails for reasons of its own, and what has no gradient either, is said in JAX's words."""

  def broken(p):
    raise ValueError("mine")

  with pytest.raises(ValueError, match=r"^mine"):
    hvp(broken, jnp.ones(2))(jnp.ones(2))
  with pytest.raises(ValueError, match="Pure callbacks do not support JVP") as error:
    hvp(lambda x: jnp.sum(jax.pure_callback(np.asarray, x, x)), jnp.ones(2))(jnp.ones(2))
  assert "hvp_finite_difference" not in str(error.value)


def test_functions_among_the_parameters_are_named():
  with pytest.raises(ValueError, match=r"`value_and_grad_then_hvp` .*leaf at `\['act'\]` is a .*eqx.partition\(model"):
    value_and_grad_then_hvp(lambda p: 1.0)({"w": jnp.ones(2), "act": jnp.tanh})


@pytest.mark.parametrize("curvature", ["newton()", "hessian_diagonal()"])
@pytest.mark.parametrize("given", ["nothing", "value", "value_fn, holes"])
def test_a_missing_product_names_what_to_type(curvature, given):
  observe = {"newton()": dpo.newton, "hessian_diagonal()": dpo.hessian_diagonal}[curvature]()
  params = {"a": jnp.ones(2), "b": optax.MaskedNode()}
  extra = {"nothing": {}, "value": {"value": 1.0}, "value_fn, holes": {"value_fn": lambda p: jnp.sum(p["a"] * p["b"])}}
  with pytest.raises(ValueError) as error:
    observe(jax.random.key(0), params, params, **extra[given])
  words = {
    "nothing": ["received no `hvp`", "dpsgd_optax.training.TrainState", "extra_args=dict(hvp=…)"],
    "value": ["received `value`, but no `hvp`", "dpsgd_optax.training.TrainState"],
    "value_fn, holes": ["inside `optax.partition` or `optax.masked`", "`hvp=dpo.hvp(loss, params)`, made outside"],
  }[given]
  if curvature == "newton()" and given != "value_fn, holes":
    words.append("`dpsgd(lr, curvature=whitening())` works in loops that pass only `value`")
  assert all(word in str(error.value) for word in [f"`{curvature}`", *words]), str(error.value)


def test_dpsgd_on_gradients_needs_nothing_but_the_value():
  """What the message advises: the loops of numpyro and jinns."""
  x, target = jnp.array([[1.0, 0.5], [0.2, 2.0]]), jnp.array([[1.0], [-1.0]])
  f = lambda p: jnp.mean((x @ p - target) ** 2)
  tx, params = dpo.dpsgd(0.1, curvature=dpo.whitening()), jnp.zeros((2, 1))
  step = jax.jit(lambda p, s: tx.update(jax.grad(f)(p), s, p, value=f(p)))
  state, first = tx.init(params), f(params)
  for _ in range(30):
    updates, state = step(params, state)
    params = optax.apply_updates(params, updates)
  assert f(params) < 0.5 * first
