# SPDX-License-Identifier: Apache-2.0
"""Generated faults: any value, in any place, at any step, in trees of any shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dpsgd_optax as dpo
from tests.conformance.rows import keeps, one_step, transform
from tests.table import OPTIMIZERS, PARAMS, SIZE, Fault, compiled, counted

VALUES = (0.0, 1e-38, -1e-38, 1e-20, 1e18, 1e38, -3e38, np.nan, np.inf, -np.inf)
rows = pytest.mark.parametrize("name", OPTIMIZERS)
quick = settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
long = settings(quick, max_examples=1000, derandomize=False)

spots = st.lists(st.tuples(st.integers(0, SIZE - 1), st.sampled_from(VALUES)), max_size=3)


def vector(spots):
  x = np.zeros(SIZE, np.float32)
  for place, value in spots:
    x[place] = value
  return x


scalars = st.sampled_from((0.0, *VALUES))
FAULTS = st.builds(
  Fault,
  gradient=spots.map(vector),
  product=spots.map(vector),
  value=scalars,
  ahead=scalars,
  scale=st.sampled_from((1.0, 1.0, 0.0, 1e-38, 1e-19, 1e19, 1e38)),
  inputs=st.sampled_from((0.0, 0.0, *VALUES)),
)
STORY = st.lists(FAULTS, min_size=1, max_size=8)


@functools.cache
def reporter(name):
  return jax.jit(dpo.report)


def learned(state):
  found = optax.tree.get_all_with_path(state, "preconditioner") + optax.tree.get_all_with_path(state, "damping")
  return [x for x in jax.tree.leaves([x for _, x in found]) if jnp.issubdtype(x.dtype, jnp.floating)]


def moves(updates):
  return all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(updates))


def survives(name, story):
  """At a fixed point of the loss, so that only what the state remembers counts.

  A first gradient of 1e38 makes P = 1e-38, with which a calm step may be below the smallest number; P then grows by a
  tenth per fit. So at the end every leaf moves, or P does.
  """
  case = compiled(name)
  state = case.tx.init(PARAMS)
  for fault in [*story, *[Fault()] * 6]:
    _, state, updates = case.run(PARAMS, state, [fault])
    assert all(np.isfinite(x).all() for x in [*jax.tree.leaves(updates), *learned(state)])
  _, later, updates = case.run(PARAMS, state, [Fault()] * 6)
  assert all(np.isfinite(x).all() for x in [*jax.tree.leaves(updates), *learned(later)])
  learns = any(np.any(a != b) for a, b in zip(learned(state), learned(later), strict=True))
  assert moves(updates) or learns, "dead for ever"
  assert reporter(name)(later).get("p_smallest", 1) > 0
  assert len(case.traces) == 1


@rows
@quick
@given(story=STORY)
@example(story=[Fault(gradient=np.full(SIZE, 1e38, np.float32))] * 8)
@example(story=[Fault(scale=1e-38)] * 8)
@example(story=[Fault(scale=0.0), Fault(product=vector([(0, -3e38)]))])
@example(story=[Fault(inputs=1e38)])
def test_whatever_went_by_the_state_is_finite_p_positive_and_nothing_is_dead(name, story):
  survives(name, story)


@pytest.mark.slow
@rows
@long
@given(story=STORY)
def test_a_thousand_stories_are_survived(name, story):
  survives(name, story)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", [dpo.damped_kron, dpo.diagonal_newton])
@pytest.mark.parametrize("every", [1, 100], ids=["with a fit", "without a fit"])
def test_a_step_whose_damping_is_not_finite_is_skipped_and_counted(make, bad, every):
  """P = 1/(|h| + inf) makes a step of zeros: finite, and yet no step."""
  tx = dpo.scale_by_preconditioner(make(), dpo.newton(), every=every)
  params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
  loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 4)
  step = jax.jit(lambda state, damping: tx.update(params, state, params, hvp=dpo.hvp(loss, params), damping=damping))
  _, before = step(tx.init(params), 0.1)
  updates, after = step(before, bad)
  assert int(after.skipped) == 1 and not any(np.any(x) for x in jax.tree.leaves(updates))
  for old, new in zip(*map(jax.tree.leaves, (before.preconditioner, after.preconditioner)), strict=True):
    np.testing.assert_array_equal(old, new)
  updates, _ = step(after, 0.1)
  assert moves(updates)


def test_a_step_too_long_for_its_dtype_is_skipped_and_its_fit_is_kept():
  """P g overflows, nothing else is wrong: P has to be allowed to shrink, or every later step would overflow too."""
  shrinking = dpo.Preconditioner(
    init=lambda params: jnp.float32(3e38),
    fit=lambda p, observation, *, key, damping: p / 10,
    apply=lambda p, updates: jax.tree.map(lambda g: p * g, updates),
  )
  tx = dpo.scale_by_preconditioner(shrinking, dpo.whitening(), momentum=optax.ema(0.9))
  grads = 100 * jnp.ones(3)
  step = jax.jit(tx.update)
  updates, state = step(grads, tx.init(grads))
  assert not np.any(updates) and (int(state.skipped), int(state.fits)) == (1, 1)
  assert not np.any(state.momentum.ema) and np.isclose(state.preconditioner, 3e37, rtol=1e-5)
  updates, state = step(grads, state)
  np.testing.assert_allclose(updates, 3e38, rtol=1e-5)
  assert (int(state.skipped), int(state.fits)) == (1, 2)


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAVES = st.one_of(
  st.none(), st.builds(jax.ShapeDtypeStruct, SHAPES, st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
)
TREES = st.recursive(
  LEAVES,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["kernel", "scale", "0", "a/b"]), inner, max_size=3),
  ),
  max_leaves=6,
).filter(lambda tree: tree is not None)  # to optax, `params=None` are no params
ANY_TREE = pytest.mark.parametrize(
  "name", [name for name, row in OPTIMIZERS.items() if "layer_inputs" not in row.extras]
)


@ANY_TREE
@settings(quick, max_examples=6)
@given(params=TREES)
def test_any_tree_of_any_shapes_and_dtypes_keeps_its_own(name, params):
  """One step: structure, shape and dtype of params and state are those from before."""
  keeps(transform(name), OPTIMIZERS[name].extras, params)


@pytest.mark.slow
@ANY_TREE
@settings(long, max_examples=300)
@given(params=TREES)
def test_hundreds_of_trees_keep_their_own(name, params):
  keeps(transform(name), OPTIMIZERS[name].extras, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["psgd whitening", "psgd newton", "dpsgd"])
@settings(long, max_examples=15)
@given(params=TREES, seed=st.integers(0, 2**32 - 1))
def test_any_tree_is_trained_with_finite_numbers(name, params, seed):
  """Three steps from normal numbers."""
  rng = np.random.default_rng(seed)
  point = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
  tx = transform(name)
  (step, traces), state = counted(one_step(tx, OPTIMIZERS[name].extras)), tx.init(point)
  for _ in range(3):
    point, state, _ = step(point, state)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in [*jax.tree.leaves(point), *learned(state)])
  assert len(traces) == 1
