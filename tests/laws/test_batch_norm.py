# SPDX-License-Identifier: Apache-2.0
"""Batch-norm preconditioning: against the network with batch normalization, its inequalities, its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from tests.laws.test_least_squares import B, D, K, N, W, X, close, gradient, neurons, stacked, step

pytestmark = pytest.mark.usefixtures("x64")


def test_bnp_is_the_explicit_product_p_pt():
  """P = (1/q) U D on [b; W]: U = [[1, −μᵀ], [0, I]], D = diag(1, 1/σ̃)."""
  grads = gradient(X, neurons())
  mu, variance = X.mean(0), X.var(0)
  damped = variance + 0.01 * variance.max() + 1e-3
  u = np.eye(D + 1)
  u[0, 1:] = -mu
  p = u @ np.diag(np.concatenate([[1.0], damped**-0.5])) / np.sqrt(2.5)
  expected = p @ p.T @ np.concatenate([grads["b"][None], grads["w"]])
  done = step(dpo.batch_norm(q2=2.5), grads, {"w": X}, damping=1e-3)
  close(done["b"], expected[0])
  close(done["w"], expected[1:])


def test_bnp_is_the_step_of_a_batch_normalized_network_mapped_back():
  """a = ((x − μ)/σ) V + c with constant μ, σ: a gradient step of (V, c), written in (W, b), is the BNP step, q = 1."""
  mu, sigma = X.mean(0), X.std(0)
  normal = (X - mu) / sigma
  v, c = sigma[:, None] * W, B + mu @ W
  close(normal @ v + c, X @ W + B)
  e = np.tanh(neurons())
  v, c = v - 0.1 * normal.T @ e / N, c - 0.1 * e.mean(0)
  w = v / sigma[:, None]
  done = step(dpo.batch_norm(q2=1.0, relative_damping=0.0), gradient(X, e), {"w": X})
  close(W - 0.1 * done["w"], w)
  close(B - 0.1 * done["b"], c - mu @ w)


def condition(a):
  values = np.linalg.svd(a, compute_uv=False)
  return values[0] / values[-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(0, 30))
def test_the_condition_number_inequalities(seed, width, more):
  """κ(ĤU) ≤ κ(Ĥ);  κ(Ĝ) ≤ √(m+1) κ(ĤU·diag) for all positive scalings;  κ(ĤᵀSĤ) ≤ κ(S) κ(Ĥ)²."""
  rng = np.random.default_rng(seed)
  rows = width + 2 + more
  h = rng.standard_normal((rows, width)) * np.exp(rng.normal(0, 2, width)) + rng.normal(0, 3, width)
  e = np.ones((rows, 1))
  raw, centred = np.concatenate([e, h], 1), np.concatenate([e, h - h.mean(0)], 1)
  normal = np.concatenate([e, (h - h.mean(0)) / h.std(0)], 1)
  slack = 1 + 1e-6
  assert condition(centred) <= slack * condition(raw)
  for scale in np.exp(rng.normal(0, 2, (5, width + 1))):
    assert condition(normal) <= slack * np.sqrt(width + 1) * condition(centred * scale)
  s = np.exp(rng.normal(0, 1, rows))
  assert condition(raw.T @ (s[:, None] * raw)) <= slack * s.max() / s.min() * condition(raw) ** 2


def test_batches_of_one_give_the_statistics_of_the_stream():
  """With batches of one example the running variance is that of the examples, not the zero of each batch."""
  tx = dpo.scale_by_preconditioner(dpo.batch_norm(decay=0.999), dpo.layer_inputs())
  grads = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
  update = jax.jit(lambda state, x: tx.update(grads, state, grads, layer_inputs={"w": x})[1])
  state = tx.init(grads)
  for x in np.concatenate([X, X])[:, None]:
    state = update(state, x)
  (seen,) = state.preconditioner.buckets.values()
  np.testing.assert_allclose(seen.mean[0], X.mean(0), atol=0.02 * X.std())
  np.testing.assert_allclose(seen.variance[0], X.var(0), rtol=0.02)
  assert int(state.skipped) == 0


def test_a_layer_without_bias_is_divided_by_its_mean_squares():
  done = step(dpo.batch_norm(q2=1.0, relative_damping=0.0), {"w": W}, {"w": X})
  close(done["w"], W / np.mean(X**2, 0)[:, None])


def test_shared_layers_are_refused_unless_averaging_is_asked_for():
  record = dpo.LayerRecord((X, 2 * X), kernel_shape=(D, K), bias=("b",))
  grads = {"w": W, "b": B}
  with pytest.raises(ValueError, match=r"'w' is called 2 times.*average_calls=True"):
    step(dpo.batch_norm(), grads, {"w": record})
  both = step(dpo.batch_norm(average_calls=True, q2=1.0), grads, {"w": record})
  whole = step(dpo.batch_norm(q2=1.0), grads, {"w": np.concatenate([X, 2 * X])})
  close(stacked(both), stacked(whole))


@pytest.mark.parametrize("make", [dpo.batch_norm, dpo.least_squares])
def test_shards_average_to_the_statistics_of_the_whole_batch(make):
  """`data_parallel`: each of two shards gives the P of the whole batch."""
  grads = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
  kwargs = {"q2": 1.0} if make is dpo.batch_norm else {}
  tx = dpo.data_parallel(dpo.scale_by_preconditioner(make(**kwargs), dpo.layer_inputs(), damping=0.1), "i")
  shard = lambda x: tx.update(grads, tx.init(grads), grads, layer_inputs={"w": x})[0]
  done = jax.vmap(shard, axis_name="i")(X.reshape(2, -1, D))
  whole = step(make(**kwargs), grads, {"w": X}, damping=0.1)
  for i in range(2):
    close(stacked(jax.tree.map(lambda x: x[i], done)), stacked(whole))


@pytest.mark.parametrize("make", [dpo.batch_norm, dpo.least_squares])
def test_reduced_records_are_the_records(make):
  """`reduce=` in the forward pass changes nothing but the memory."""
  record = dpo.LayerRecord((X,), kernel_shape=(D, K), bias=("b",))
  reduced = (dpo.layers.channel_moments if make is dpo.batch_norm else dpo.layers.second_moments)(record)
  assert not reduced.inputs and (reduced.rows, reduced.examples) == (N, N)
  grads = {"w": W, "b": B}
  close(stacked(step(make(), grads, {"w": reduced}, 0.1)), stacked(step(make(), grads, {"w": record}, 0.1)))
