# SPDX-License-Identifier: Apache-2.0
"""P is symmetric and positive, whatever was fitted: checked on all of P, not on a few vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from tests.table import DESCENDING, PRECONDITIONERS, dense, fitted, random_fits

SEEDS = 8


@pytest.mark.parametrize("name", PRECONDITIONERS)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31 - 1))
def test_p_is_symmetric_and_positive_after_random_fits(name, seed):
  """⟨x, P y⟩ = ⟨P x, y⟩ for all x, y; ⟨x, P x⟩ > 0 for all x ≠ 0."""
  p, *_ = fitted(name)(jax.random.split(jax.random.key(seed), SEEDS))
  p = np.asarray(p, np.float64)
  size = np.abs(p).max(axis=(1, 2), keepdims=True)
  assert np.all(np.abs(p - p.transpose(0, 2, 1)) <= 1e-5 * size)
  smallest = np.linalg.eigvalsh((p + p.transpose(0, 2, 1)) / 2)[:, 0]
  assert np.all(smallest > 0)
  assert not np.allclose(p, np.eye(p.shape[-1]), atol=0.05)  # it has learned something


@pytest.mark.parametrize("name", DESCENDING)
def test_the_criterion_falls_on_the_probe_just_fitted(name):
  """c(P) = hᵀPh + vᵀP⁻¹v: a fit by a small step is a step downhill."""
  _, before, after = fitted(name)(jax.random.split(jax.random.key(3), SEEDS))
  assert np.all(after < before)


def test_a_complex_p_is_hermitian_and_positive():
  """⟨x, P y⟩ = ⟨P x, y⟩ with the complex scalar product."""
  like = jnp.zeros((3, 2), jnp.complex64)

  @jax.jit
  def run(key):
    p = dpo.kron(max_skew=jnp.inf)
    return dense(p, random_fits(p, like, key, 20), like)

  p = np.asarray(run(jax.random.key(0)))
  np.testing.assert_allclose(p, p.conj().T, atol=1e-5 * np.abs(p).max())
  assert np.linalg.eigvalsh(p)[0] > 0
  assert np.abs(p.imag).max() > 1e-2
