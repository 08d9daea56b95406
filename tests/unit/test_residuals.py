# SPDX-License-Identifier: Apache-2.0
"""`residuals` and `gauss_newton` in loops: partitions, scans, mini-batches, many devices, and bad input."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo

x = jnp.linspace(-1.0, 1.0, 12)
y = jnp.sin(3.0 * x)
PARAMS = {"a": jnp.array([0.5, -1.0, 0.3]), "b": jnp.array([1.0, 0.2, -0.4])}


def one(p, x, y):
  return (p["a"] @ jnp.tanh(p["b"] * x + p["a"]) - y) / 12**0.5


FIT = dpo.residuals((one, x, y))


def step(tx, params, state, fit=FIT, **extra):
  updates, state = tx.update(jax.grad(fit.loss)(params), state, params, residual_fn=fit, **extra)
  return optax.apply_updates(params, updates), state


def run(tx, steps=20, fit=FIT):
  body = lambda carry, _: (step(tx, *carry, fit), fit.loss(carry[0]))
  return jax.jit(lambda c: jax.lax.scan(body, c, length=steps))((PARAMS, tx.init(PARAMS)))


def test_a_scan_is_the_loop():
  tx = dpo.gauss_newton(momentum=0.3)
  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(5):
    params, state = step(tx, params, state)
  (scanned, _), _ = run(tx, 5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, scanned)


@pytest.mark.parametrize(
  "solver", (None, dpo.solvers.columns(5), dpo.solvers.conjugate_gradients(dpo.kron()), dpo.solvers.rows())
)
def test_it_trains(solver):
  _, losses = run(dpo.gauss_newton(solver=solver), 40)
  assert losses[-1] < 0.1 * losses[0]


def test_a_plain_function_is_accepted(x64):
  plain = lambda p: jax.vmap(one, (None, 0, 0))(p, x, y)
  tx = dpo.gauss_newton()
  grads = jax.grad(FIT.loss)(PARAMS)
  a, _ = tx.update(grads, tx.init(PARAMS), PARAMS, residual_fn=FIT)
  b, _ = tx.update(grads, tx.init(PARAMS), PARAMS, residual_fn=plain)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b)


def test_in_a_partition_a_block_takes_its_own_step():
  """The step of block a is that of the problem in which b is constant."""
  tx = optax.partition({"ours": dpo.gauss_newton(adapt=False), "theirs": optax.sgd(0.0)}, {"a": "ours", "b": "theirs"})
  grads = jax.grad(FIT.loss)(PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, residual_fn=FIT.at(PARAMS))
  alone = dpo.residuals((lambda a, x, y: one({"a": a, "b": PARAMS["b"]}, x, y), x, y))
  own = dpo.gauss_newton(adapt=False)
  wanted, _ = own.update(grads["a"], own.init(PARAMS["a"]), PARAMS["a"], residual_fn=alone)
  np.testing.assert_allclose(updates["a"], wanted, rtol=1e-5)
  with pytest.raises(ValueError, match=r"have holes.*residuals\.at\(params\)"):
    tx.update(grads, tx.init(PARAMS), PARAMS, residual_fn=FIT)


def test_in_a_partition_the_loss_of_all_params_judges():
  tx = optax.partition({"ours": dpo.gauss_newton(), "theirs": optax.sgd(0.0)}, {"a": "ours", "b": "theirs"})
  state = tx.init(PARAMS)
  updates, state = tx.update(jax.grad(FIT.loss)(PARAMS), state, PARAMS, residual_fn=FIT.at(PARAMS))
  after = FIT.loss(optax.apply_updates(PARAMS, updates))
  np.testing.assert_allclose(optax.tree.get(state, "actual"), FIT.loss(PARAMS) - after, rtol=1e-4)


def test_mini_batches_are_residuals_made_in_the_step():
  tx = dpo.gauss_newton(0.5, damping=0.1)

  @jax.jit
  def train_step(params, state, rows):
    return step(tx, params, state, dpo.residuals((one, x[rows], y[rows])))

  params, state = PARAMS, tx.init(PARAMS)
  for i in range(60):
    params, state = train_step(params, state, jax.random.permutation(jax.random.key(i), 12)[:6])
  assert FIT.loss(params) < 0.1 * FIT.loss(PARAMS)
  assert int(state.mismatched) == int(state.skipped) == 0


def test_replicas_take_the_step_of_the_whole_batch():
  """Under `data_parallel` with three shares of the rows: the step of all of them, the loss the mean."""
  tx = dpo.gauss_newton(damping=0.3, max_bytes=1e6)
  shares = jax.tree.map(lambda x: x.reshape(3, 4), (x, y))
  parallel = dpo.data_parallel(tx, "rows")

  def replica(params, state, x, y):
    return step(parallel, params, state, dpo.residuals((lambda p, x, y: 3**0.5 * one(p, x, y), x, y)))

  together = jax.vmap(replica, (None, None, 0, 0), out_axes=None, axis_name="rows")
  params, state = together(PARAMS, tx.init(PARAMS), *shares)
  wanted, alone = step(tx, PARAMS, tx.init(PARAMS))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params, wanted)
  np.testing.assert_allclose(state.damping, alone.damping, rtol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, dpsgd_optax as dpo
from tests.unit.test_residuals import PARAMS, one, step
mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.linspace(-1.0, 1.0, 64)
divided = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
for solver in (dpo.solvers.rows(), dpo.solvers.columns(), dpo.solvers.conjugate_gradients()):
  tx = dpo.gauss_newton(solver=solver)
  go = jax.jit(lambda p, s, x: step(tx, p, s, dpo.residuals((one, x, jnp.sin(3 * x)))))
  a, b = go(PARAMS, tx.init(PARAMS), x), go(PARAMS, tx.init(PARAMS), divided)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), a[0], b[0])
assert jax.device_count() == 4
"""


@pytest.mark.full
def test_rows_may_be_divided_over_devices():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_numbers_that_are_not_finite_are_skipped_and_counted():
  """In the residuals, in the Jacobian alone, in the gradient: a zero step, the state as it was, then it goes on."""
  tx = dpo.gauss_newton(momentum=0.5)
  params, state = step(tx, PARAMS, tx.init(PARAMS))
  spoiled = {
    "r": dpo.residuals((one, x, y.at[3].set(jnp.nan))),
    "J": dpo.residuals((lambda p, x, y: one(p, x, y) + jnp.sqrt(jnp.sum((p["b"] - PARAMS["b"] * 0) * 0.0)), x, y)),
  }
  good = jax.grad(FIT.loss)(params)
  for fit in spoiled.values():
    updates, after = jax.jit(lambda s, fit=fit: tx.update(good, s, params, residual_fn=fit))(state)
    assert all(not u.any() for u in jax.tree.leaves(updates))
    assert int(after.skipped) == int(state.skipped) + 1 and int(after.rejected) == int(state.rejected)
    np.testing.assert_array_equal(after.damping, state.damping)
    jax.tree.map(np.testing.assert_array_equal, after.momentum, state.momentum)
    state = after
  bad = jax.tree.map(lambda g: g.at[0].set(jnp.inf), good)
  _, state = jax.jit(lambda s: tx.update(bad, s, params, residual_fn=FIT))(state)
  assert int(state.skipped) == 3
  moved, state = step(tx, params, state)
  assert FIT.loss(moved) < FIT.loss(params)


def test_a_loss_that_is_not_that_of_the_residuals_is_an_error_or_counted():
  """The mean where the sum is meant: outside `jit` an error, inside a zero step and a count."""
  tx = dpo.gauss_newton()
  wrong = jax.tree.map(lambda g: g / 6, jax.grad(FIT.loss)(PARAMS))
  with pytest.raises(ValueError, match=r"not that of ½ Σ r².*residuals\.loss"):
    tx.update(wrong, tx.init(PARAMS), PARAMS, residual_fn=FIT)
  updates, state = jax.jit(lambda s: tx.update(wrong, s, PARAMS, residual_fn=FIT))(tx.init(PARAMS))
  assert int(state.mismatched) == 1 and not any(u.any() for u in jax.tree.leaves(updates))


BAD = {
  "missing": (lambda: None, r"received no `residual_fn`.*dpo\.residuals\(\(fn, \*arrays\)\)"),
  "integers": (lambda: dpo.residuals((lambda p, x: 1, x)), r"return one number or one array|floating point"),
  "integer array": (lambda: dpo.residuals((lambda p, x: jnp.int32(x), x)), r"floating point or complex, got int32"),
  "a tree": (lambda: dpo.residuals((lambda p, x: {"r": x, "q": x}, x)), r"one number or one array.*a group of each"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_residuals_are_refused(name):
  make, message = BAD[name]
  tx = dpo.gauss_newton()
  with pytest.raises(ValueError, match=message):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, residual_fn=make())


def test_bad_groups_are_refused():
  with pytest.raises(ValueError, match=r"at least one group"):
    dpo.residuals()
  with pytest.raises(ValueError, match=r"groups \(fn, \*arrays\)"):
    dpo.residuals((x, y))
  with pytest.raises(ValueError, match=r"samples as leading axis.*shared"):
    dpo.residuals((one, x, y[:5]))
  with pytest.raises(ValueError, match=r"samples as leading axis"):
    dpo.residuals((one, x, jnp.float32(1.0)))
  with pytest.raises(ValueError, match=r"one real number for the outputs"):
    dpo.residuals((lambda p, x: p["a"] * x, x), loss=lambda z, x: z**2).loss(PARAMS)
  with pytest.raises(ValueError, match=r"needs real outputs"):
    dpo.residuals((lambda p, x: p["a"] * (x + 1j), x), loss=lambda z, x: jnp.sum(abs(z) ** 2)).loss(PARAMS)
  with pytest.raises(ValueError, match=r"`energies` of `log_derivatives`.*\(12,\)"):
    dpo.log_derivatives(lambda p, x: p * x, x, jnp.float32(1.0))


def test_what_would_not_fit_is_refused_with_its_bytes_before_anything_is_computed():
  """A million residuals of a million parameters: 8 TB of J; shapes are enough to know."""
  params = jax.ShapeDtypeStruct((10**6,), jnp.float32)
  fit = lambda z: dpo.residuals((lambda p, z: jnp.sum(p) * z, z))
  tx = dpo.gauss_newton()
  go = lambda p, s, z: tx.update(p, s, p, residual_fn=fit(z))
  with pytest.raises(ValueError, match=r"rows\(\)` needs 1.6e\+13 bytes.*conjugate_gradients\(\)`"):
    jax.eval_shape(go, params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((10**6,), jnp.float32))


def test_numbers_out_of_range_are_refused():
  with pytest.raises(ValueError, match="learning_rate"):
    dpo.gauss_newton(-1.0)
  with pytest.raises(ValueError, match="momentum"):
    dpo.gauss_newton(momentum=1.0)
  with pytest.raises(ValueError, match="tries"):
    dpo.gauss_newton(tries=0)
  with pytest.raises(ValueError, match="adapt=False"):
    dpo.gauss_newton(damping=optax.constant_schedule(1.0))
  with pytest.raises(ValueError, match="chunk"):
    dpo.solvers.columns(0)


def test_inside_levenberg_marquardt_the_wrapper_chooses_the_damping():
  """With products of the same object as the curvature, its model is exact too: ratio 1 on a linear problem."""
  linear = dpo.residuals((lambda p, x, y: p["a"][0] * x + p["b"][1] - y, x, y))
  tx = dpo.levenberg_marquardt(dpo.gauss_newton(), damping=0.5, model=dpo.quadratic_model, reject=True)
  value, grads = jax.value_and_grad(linear.loss)(PARAMS)
  hvp = dpo.hvp(linear.loss, PARAMS)
  extra = {"value": value, "value_fn": linear.loss, "hvp": hvp, "residual_fn": linear}
  _, state = tx.update(grads, tx.init(PARAMS), PARAMS, **extra)
  np.testing.assert_allclose(state.ratio, 1.0, rtol=1e-3)
  np.testing.assert_allclose(state.damping, 0.5 * 19 / 20, rtol=1e-6)


def test_value_grad_and_ggn_product_in_one_pass(x64):
  """The value and gradient of the loss and the product of `ggnvp`, with holes and complex parameters."""
  params = {"a": jnp.array([0.5, -1.0]), "c": jnp.array([0.3 + 0.1j, 1.0])}
  outputs = lambda p: jnp.abs(jnp.outer(x, p["a"]) + jnp.sin(jnp.outer(x, p["c"]))) ** 2
  loss = lambda z: jnp.sum(jnp.cosh(z))
  value, grads, product = jax.jit(
    lambda p: (lambda v, g, h: (v, g, h({"a": p["a"], "c": None})))(
      *dpo.value_and_grad_then_ggnvp(lambda z: loss(z), outputs=outputs)(p)
    )
  )(params)
  wanted, slope = jax.value_and_grad(lambda p: loss(outputs(p)))(params)
  np.testing.assert_allclose(value, wanted)
  np.testing.assert_allclose(grads["a"], slope["a"])
  np.testing.assert_allclose(grads["c"], slope["c"].conj())
  reference = dpo.ggnvp(loss, params, outputs=outputs)({"a": params["a"], "c": None})
  np.testing.assert_allclose(product["a"], reference["a"], rtol=1e-10)
  (value, aux), _, _ = dpo.value_and_grad_then_ggnvp(loss, has_aux=True, outputs=lambda p: (outputs(p), 7))(params)
  assert aux == 7


def network(p, x):
  return (jnp.tanh(x @ p["first"]["w"] + p["first"]["b"]) @ p["last"]["w"])[0]


FORWARD = lambda p, x: jax.jvp(lambda x: network(p, x), (x,), (jnp.ones_like(x),))[1]
DERIVATIVES = {
  "a tangent": FORWARD,
  "a gradient": lambda p, x: jnp.sum(jax.grad(lambda x: network(p, x))(x) ** 2),
  "a Laplacian": lambda p, x: jnp.trace(jax.hessian(lambda x: network(p, x))(x)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_capture_says_that_it_cannot_see_derivatives_of_the_network(name):
  """A loss of a physics-informed network: a warning names the kernels and what to type; the gradient is right."""
  params = {"first": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "last": {"w": jnp.ones((3, 1))}}
  points = jnp.linspace(0.0, 1.0, 10).reshape(5, 2)
  loss = lambda p: jnp.mean(jax.vmap(DERIVATIVES[name], (None, 0))(p, points) ** 2)
  with pytest.warns(UserWarning, match=r"no record of \['first/w'.*derivatives of the network.*dpo\.residuals"):
    _, grads, layers = dpo.capture(loss)(params)
  assert layers["first"]["w"] is None
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, jax.grad(loss)(params))


def test_capture_of_a_plain_network_says_nothing(recwarn):
  params = {"first": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "last": {"w": jnp.ones((3, 1))}}
  _, _, layers = dpo.capture(lambda p: network(p, jnp.ones(2)) ** 2)(params)
  assert layers["first"]["w"] is not None and not recwarn
