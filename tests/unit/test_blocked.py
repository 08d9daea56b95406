# SPDX-License-Identifier: Apache-2.0
"""Blocks of long axes: the same as handing the blocks over as parameters of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from dpsgd_optax.preconditioners.blocked import _cut, _join


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 7), max_size=3).map(tuple), block_size=st.integers(1, 8))
def test_blocks_are_small_even_and_can_be_put_together(shape, block_size):
  x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
  blocks = _cut(jnp.asarray(x), block_size)
  np.testing.assert_array_equal(_join(blocks, shape, block_size), x)
  assert len(blocks) == np.prod([max(1, -(-d // block_size)) for d in shape], dtype=int)
  for lengths in zip(*(block.shape for block in blocks), strict=True):
    assert max(lengths) <= block_size and max(lengths) - min(lengths) <= 1


@pytest.mark.full
@pytest.mark.parametrize("criterion", ["newton", "whitening"])
@pytest.mark.parametrize("make", [lambda: dpo.kron(max_skew=jnp.inf), dpo.damped_kron, dpo.diagonal])
def test_blocked_is_the_preconditioner_of_the_blocks(make, criterion):
  rng = np.random.default_rng(0)
  draw = lambda: {"w": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32), "b": jnp.ones(2, jnp.float32)}
  by_hand = lambda x: {"w": [x["w"][:3, :2], x["w"][:3, 2:], x["w"][3:, :2], x["w"][3:, 2:]], "b": [x["b"]]}
  p, plain = dpo.blocked(make(), 3), make()
  state, expected = p.init(draw()), plain.init(by_hand(draw()))
  for i in range(3):
    v, h = draw() if criterion == "newton" else None, draw()
    options = {"key": jax.random.key(i), "damping": 0.01}
    state = p.fit(state, dpo.Probe(v, h), **options)
    expected = plain.fit(expected, dpo.Probe(v and by_hand(v), by_hand(h)), **options)
    g = draw()
    done, blocks = p.apply(state, g), by_hand(p.apply(state, g))
    assert jax.tree.map(jnp.shape, done) == jax.tree.map(jnp.shape, g)
    for a, b in zip(jax.tree.leaves(blocks), jax.tree.leaves(plain.apply(expected, by_hand(g))), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert not np.allclose(done["w"], g["w"], atol=0.1)


def test_equal_blocks_are_one_bucket_and_half_precision_comes_back():
  p = dpo.blocked(dpo.kron(), 4)
  params = {"w": jnp.ones((16, 8), jnp.bfloat16)}
  state = p.init(params)
  assert {name: bucket.q[0].shape for name, bucket in state.buckets.items()} == {"4x4_float32": (8, 4, 4)}
  assert p.apply(state, params)["w"].dtype == jnp.bfloat16


def test_a_training_loop_with_momentum_descends():
  params = {"w": jnp.ones((6, 4)), "norm": jnp.ones(3)}
  scales = jnp.linspace(0.1, 3, 24).reshape(6, 4)
  loss = lambda p: jnp.sum((scales * p["w"]) ** 2) + jnp.sum(p["norm"] ** 2)
  tx = dpo.psgd(0.1, dpo.blocked(dpo.kron(max_skew=jnp.inf), 3), dpo.newton(), every=1, b1=0.5)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params, hvp=dpo.hvp(loss, params))
    return jax.tree.map(jnp.add, params, updates), state

  first = loss(params)
  for _ in range(100):
    params, state = step(params, state)
  assert loss(params) < 1e-4 * first


@pytest.mark.parametrize("block_size", [0, -1, 2.5])
def test_a_block_size_that_is_no_length_is_refused(block_size):
  with pytest.raises(ValueError, match="block_size"):
    dpo.blocked(dpo.kron(), block_size)
