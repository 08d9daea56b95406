# SPDX-License-Identifier: Apache-2.0
"""Factors kept in half precision: half the bytes, nearly the same P, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo

SHAPE = 6, 4


def fitted(**options):
  """P of 300 whitening fits on gradients A z B, as a matrix, and the state."""
  p = dpo.kron(max_skew=jnp.inf, init_scale=1.0, **options)
  rng = np.random.default_rng(0)
  left, right = np.diag(np.geomspace(0.3, 3, SHAPE[0])), np.diag(np.geomspace(2, 0.5, SHAPE[1]))
  grads = jnp.asarray(left @ rng.standard_normal((300, *SHAPE)) @ right, jnp.float32)

  def one(state, inputs):
    key, g = inputs
    return p.fit(state, dpo.Probe(None, g), key=key, damping=1e-9), None

  @jax.jit
  def run(state):
    state, _ = jax.lax.scan(one, state, (jax.random.split(jax.random.key(0), len(grads)), grads))
    eye = jnp.eye(grads[0].size).reshape(-1, *SHAPE)
    return state, jax.vmap(lambda x: p.apply(state, x))(eye).reshape(len(eye), -1)

  state, matrix = run(p.init(jnp.zeros(SHAPE)))
  return state, np.asarray(matrix, np.float64), left, right


def test_half_precision_factors_whiten_as_well():
  state, p, left, right = fitted(state_dtype=jnp.bfloat16)
  bucket = state.buckets["6x4_float32"]
  assert {x.dtype for x in (*bucket.q, *bucket.p)} == {jnp.dtype(jnp.bfloat16)}
  assert bucket.lipschitz.dtype == jnp.float32
  wanted = np.diag(1 / np.kron(np.diag(left), np.diag(right)))
  _, full, *_ = fitted()
  error = lambda x: np.linalg.norm(x - wanted) / np.linalg.norm(wanted)
  assert error(p) < 1.5 * error(full) < 0.3


def test_the_factors_take_half_the_bytes():
  def bytes_of(**options):
    tx = dpo.scale_by_preconditioner(dpo.kron(max_skew=jnp.inf, **options), dpo.whitening())
    return dpo.state_bytes(tx, jnp.zeros((64, 64)))

  assert bytes_of(state_dtype=jnp.bfloat16) < 0.51 * bytes_of()


@pytest.mark.parametrize("geometry", [dpo.geometry.quad4p, dpo.geometry.pro4p])
def test_p_itself_is_not_kept_in_half_precision(geometry):
  with pytest.raises(ValueError, match=r"`state_dtype` must be float32 at least .* got bfloat16.*geometry="):
    dpo.kron(geometry=geometry, state_dtype=jnp.bfloat16)
  dpo.kron(geometry=geometry, state_dtype=jnp.float32)


def test_an_integer_state_is_refused():
  with pytest.raises(ValueError, match=r"`state_dtype` must be a real floating dtype or None.*jnp.bfloat16"):
    dpo.kron(state_dtype=jnp.int8)


def test_a_small_step_in_half_precision_is_warned_of():
  with pytest.warns(UserWarning, match="half a unit in the last place.*step_size=0.1"):
    dpo.kron(state_dtype=jnp.bfloat16, step_size=0.02)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    dpo.kron(state_dtype=jnp.bfloat16)
    dpo.kron(state_dtype=jnp.float32, step_size=0.02)


def test_complex_factors_keep_their_dtype():
  p = dpo.kron(max_skew=jnp.inf, state_dtype=jnp.bfloat16)
  (bucket,) = p.init(jnp.zeros((2, 2), jnp.complex64)).buckets.values()
  assert {x.dtype for x in bucket.q} == {jnp.dtype(jnp.complex64)}
