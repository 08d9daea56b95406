# SPDX-License-Identifier: Apache-2.0
"""P is symmetric and positive, whatever was fitted: checked on all of P, not on a few vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from tests.table import BATCH, DESCENDING, PRECONDITIONERS, SIZE, draw, fit, flat, matrix, start


def random_fits(name, seed, count=30):
  """Pairs (v, h) that no matrix explains, of very different sizes."""
  size = np.exp(np.random.default_rng(seed).standard_normal((count, BATCH)))
  h = {k: x * size.reshape(count, BATCH, *[1] * (x.ndim - 2)) for k, x in draw(seed + 1, count, BATCH).items()}
  return fit(name, start(name), draw(seed + 2, count, BATCH), h, key=seed, damping=0.01)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31 - 1))
def test_p_is_symmetric_and_positive_after_random_fits(name, seed):
  """⟨x, P y⟩ = ⟨P x, y⟩ for all x, y; ⟨x, P x⟩ > 0 for all x ≠ 0."""
  p = matrix(name, random_fits(name, seed))
  assert np.all(np.abs(p - p.transpose(0, 2, 1)) <= 1e-5 * np.abs(p).max((1, 2), keepdims=True))
  assert np.all(np.linalg.eigvalsh((p + p.transpose(0, 2, 1)) / 2) > 0)
  assert not np.allclose(p, np.eye(SIZE), atol=0.05)  # it has learned something


@pytest.mark.parametrize("name", DESCENDING)
def test_the_criterion_falls_on_the_probe_just_fitted(name):
  """c(P) = hᵀPh + vᵀP⁻¹v: a fit by a small step is a step downhill."""
  state = random_fits(name, 1)
  v, h = draw(2, 1, BATCH), draw(3, 1, BATCH)

  def criterion(p):
    a, b = flat(h)[0], flat(v)[0]
    return np.einsum("ni,nij,nj->n", a, p, a) + np.einsum("ni,nij,nj->n", b, np.linalg.inv(p), b)

  before, after = (criterion(matrix(name, s)) for s in (state, fit(name, state, v, h, step_size=0.01)))
  assert np.all(after < before)


def test_a_complex_p_is_hermitian_and_positive():
  """⟨x, P y⟩ = ⟨P x, y⟩ with the complex scalar product."""
  like = jnp.zeros((3, 2), jnp.complex64)
  p = dpo.kron(max_skew=jnp.inf)
  one_fit = jax.jit(lambda state, v, h, key: p.fit(state, dpo.Probe(v, h), key=key, damping=0.01))
  state = p.init(like)
  for key in jax.random.split(jax.random.key(0), 20):
    v, h = jax.random.normal(key, (2, 3, 2), like.dtype)
    state = one_fit(state, v, h, key)
  columns = jax.vmap(lambda e: p.apply(state, e.reshape(3, 2)).reshape(-1))(jnp.eye(6, dtype=like.dtype))
  matrix = np.asarray(columns).T
  np.testing.assert_allclose(matrix, matrix.conj().T, atol=1e-5 * np.abs(matrix).max())
  assert np.linalg.eigvalsh(matrix)[0] > 0
  assert np.abs(matrix.imag).max() > 1e-2
