# SPDX-License-Identifier: Apache-2.0
"""What the products say to vectors and losses that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.curvature._loss_errors import check_scalar
from dpsgd_optax.curvature.fused import value_and_grad_and_hvp, value_and_grad_then_hvp
from dpsgd_optax.curvature.products import ggnvp, hvp, hvp_finite_difference

pytestmark = pytest.mark.usefixtures("x64")

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
