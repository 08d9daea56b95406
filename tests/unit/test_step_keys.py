# SPDX-License-Identifier: Apache-2.0
"""The keys of the steps: all different, and none that the caller is likely to have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.transforms._control import make_key, step_keys

KEYS = {
  "int": 0,
  "another int": 7,
  "raw": jax.random.PRNGKey(3),
  "typed": jax.random.key(3),
  "rbg": jax.random.key(3, impl="rbg"),
}


@pytest.mark.parametrize("name", KEYS)
def test_no_two_draws_of_a_run_are_equal(name):
  data, generator = make_key(KEYS[name])
  drawn = [jax.random.bits(key, (2,)) for t in range(40) for key in step_keys(data(), generator, jnp.int32(t))]
  assert len(np.unique(np.stack(drawn), axis=0)) == 80


def test_runs_of_small_ints_share_no_draw_with_each_other_nor_with_their_own_keys():
  words = set()
  for seed in range(8):
    data, generator = make_key(seed)
    words.add(tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))))
    for t in range(20):
      words |= {tuple(np.asarray(jax.random.key_data(key))) for key in step_keys(data(), generator, jnp.int32(t))}
  assert len(words) == 8 * (1 + 2 * 20)


def test_each_fit_sees_a_probe_of_its_own():
  seen = []
  watch = dpo.Preconditioner(
    init=lambda params: jnp.zeros(()),
    fit=lambda state, probe, *, key, damping: seen.append(np.asarray(probe.vector)) or state,
    apply=lambda state, updates: updates,
  )
  tx, x = dpo.scale_by_preconditioner(watch, dpo.newton()), jnp.ones(4)
  with jax.disable_jit():
    state = tx.init(x)
    for _ in range(3):
      _, state = tx.update(x, state, x, hvp=lambda v: v)
  assert len(np.unique(np.stack(seen), axis=0)) == 3
