# SPDX-License-Identifier: Apache-2.0
"""Parity of `soap` with a numpy reference written from the equations, P against P after every fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from tests.golden.reference_soap import soap as reference

COMMON = dict(b2=0.9, basis_every=3, eps=1e-3)
CASES = {  # shape, options of ours, options of the reference
  "two-sided": ((4, 3), {}, {}),
  "tall, left side too long": ((5, 3), {"max_size": 4}, {"sides": (False, True)}),
  "wide, right side too long": ((3, 5), {"max_size": 4}, {"sides": (True, False)}),
  "no side": ((4, 3), {"max_size": 1}, {"sides": (False, False)}),
  "skew": ((3, 5), {"max_skew": 1.0}, {"sides": (True, False)}),
  "coupled": ((4, 3), {"moments": dpo.geometry.kl}, {"kl": True}),
  "coupled, one-sided": ((5, 3), {"moments": dpo.geometry.kl, "max_size": 4}, {"kl": True, "sides": (False, True)}),
  "factored": ((4, 3), {"factored": True}, {"factored": True}),
  "every fit": ((4, 3), {"basis_every": 1}, {"basis_every": 1}),
  "damped": ((4, 3), {}, {"shift": 0.3**2}),
}


def trajectory(p, probes, shape, damping):
  """P as a matrix after each fit on (v, h)."""
  eye = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)

  def one(state, probe):
    state = p.fit(state, dpo.Probe(*probe), key=jax.random.key(0), damping=damping)
    return state, jax.vmap(lambda e: p.apply(state, e).reshape(-1))(eye).T

  return np.asarray(jax.jit(lambda s: jax.lax.scan(one, s, probes)[1])(p.init(jnp.zeros(shape))))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("newton", [False, True], ids=["gradients", "products"])
def test_p_is_that_of_the_equations_after_every_fit(name, newton, x64):
  shape, ours, theirs = CASES[name]
  rng = np.random.default_rng(len(name))
  mixing = [np.eye(d) + 0.5 * rng.standard_normal((d, d)) for d in shape]
  v, g = rng.standard_normal((2, 12, *shape))
  g = mixing[0] @ g @ mixing[1]
  damping = theirs.get("shift", 0.0) ** 0.5
  options = COMMON | {"max_skew": np.inf} | ours
  wanted = dict(theirs)
  if newton:  # the probe of H + λ
    wanted["shift"] = 0.0
  seen = g + damping * v if newton else g
  expected = reference(seen, **(COMMON | wanted))
  probes = (jnp.asarray(v) if newton else None, jnp.asarray(g))
  found = trajectory(dpo.soap(**options), probes, shape, damping)
  np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_a_kernel_is_seen_as_the_squarest_matrix(x64):
  """(2, 2, 3, 3) is the 6 × 6 matrix of the axes (0, 2) and (1, 3): the same P as that one, put back in place."""
  g = np.random.default_rng(0).standard_normal((6, 2, 2, 3, 3))
  p = dpo.soap(**COMMON, max_skew=np.inf)
  (bucket,) = p.init(jnp.zeros(g.shape[1:])).buckets.values()
  assert [q.shape[1:] for q in bucket.bases] == [(6, 6), (6, 6)]
  found = trajectory(p, (None, jnp.asarray(g)), g.shape[1:], 0.0)
  place = np.arange(36).reshape(2, 2, 3, 3).transpose(0, 2, 1, 3).reshape(-1)
  expected = np.stack(reference(g.transpose(0, 1, 3, 2, 4).reshape(6, 6, 6), **COMMON))
  np.testing.assert_allclose(found[:, place][:, :, place], expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
