# SPDX-License-Identifier: Apache-2.0
"""Finite differences, Gauss-Newton and fused products, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dpsgd_optax.curvature.fused import value_and_grad_and_hvp, value_and_grad_then_hvp
from dpsgd_optax.curvature.products import ggnvp, hvp, hvp_finite_difference
from tests.unit.test_product_errors import no_forward_mode
from tests.unit.test_products import assert_close, dense_product, direction, loss, nested, network, product_of

pytestmark = pytest.mark.usefixtures("x64")


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
  cubes = no_forward_mode()
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
