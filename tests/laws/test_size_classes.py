# SPDX-License-Identifier: Apache-2.0
"""Size classes, and what else lightens a step: none of it changes P."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpsgd_optax as dpo
from dpsgd_optax._trees.buckets import LAUNCHES, make_buckets
from dpsgd_optax.geometry.linalg import kron_power
from dpsgd_optax.preconditioners._factors import Layout, dense_factor, size_classes
from dpsgd_optax.preconditioners.kron import rounded

SHAPES = [(12, 12), (12, 7), (9, 5), (12,), (7,), (1,), (), (1, 6), (3, 3, 2, 4), (3, 3, 3, 4), (0, 3), (2, 3, 4)]
GEOMETRIES = ("pro", "quad", "qeq", "qep", "quad4p", "pro4p", "eq")


def tree(seed, scale=1.0):
  keys = jax.random.split(jax.random.key(seed), len(SHAPES))
  return {str(i): scale * jax.random.normal(k, s) for i, (k, s) in enumerate(zip(keys, SHAPES, strict=True))}


def fitted(p, newton, fits=6):
  """P g after some fits on probes of an H that is no Kronecker product."""
  state, fit = p.init(tree(0)), jax.jit(p.fit)
  for i in range(fits):
    v, g = tree(10 + i), tree(20 + i, 3.0)
    probe = dpo.Probe(v, jax.tree.map(lambda x: x * (1 + jnp.abs(x)), v)) if newton else dpo.Probe(None, g)
    state = fit(state, probe, key=jax.random.key(i), damping=0.0)
  return state, jax.jit(p.apply)(state, tree(5))


def close(one, other, tolerance=2e-5):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.max(np.abs(b), initial=1e-30)))


@pytest.mark.parametrize("newton", [False, True], ids=["whitening", "newton"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_padding_does_not_change_p(name, newton):
  make = lambda bound: dpo.kron(geometry=getattr(dpo.geometry, name), max_padding=bound, max_skew=jnp.inf)
  alone, with_padding = (fitted(make(bound), newton) for bound in (1.0, 8.0))
  close(with_padding[1], alone[1])
  fewer = len(with_padding[0].buckets) < len(alone[0].buckets)
  assert fewer == (name != "eq")  # which solves equations with q


@pytest.mark.parametrize("form", ["factored", "additive"])
def test_padding_does_not_change_the_damped_p(form):
  def run(bound):
    p = dpo.damped_kron(form=getattr(dpo.tikhonov, form), max_padding=bound)
    state = p.init(tree(0))
    for i in range(5):
      v = tree(10 + i)
      probe = dpo.Probe(v, jax.tree.map(lambda x: x * (1 + jnp.abs(x)), v))
      state = p.fit(state, probe, key=jax.random.key(i), damping=0.3)
    state = p.advance(state, damping=0.1)
    return p.apply(state, tree(5)), p.power(state, tree(5), -0.5)

  close(run(8.0), run(1.0), 1e-4)


def test_padding_does_not_change_the_step_of_psgd():
  def run(bound):
    tx = dpo.psgd(0.1, dpo.kron(max_padding=bound), b1=0.9, weight_decay=0.1, clip=0.3)  # so that all are clipped
    params = tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(6):
      updates, state = update(tree(30 + i, 100.0 if i == 4 else 1.0), state, params)  # a spike, and large updates
    return updates

  close(run(8.0), run(1.0))


def test_a_negative_power_of_a_padded_p_is_finite_and_inverts_it():
  p = dpo.kron(max_padding=8.0)
  state, _ = fitted(p, False)
  close(p.power(state, p.power(state, tree(5), -0.5), 0.5), tree(5), 1e-3)
  padded = (jnp.array([1.0, 4.0, 0.0]), jnp.diag(jnp.array([4.0, 0.0])))
  x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
  close(kron_power(padded, x, -0.5), jnp.array([[0.5, 0.0], [0.25, 0.0], [0.0, 0.0]]))


def test_padding_adds_no_more_than_its_bound_and_leaves_wide_layers_alone():
  layout_of = lambda max_padding: dpo.kron(max_skew=jnp.inf, max_padding=max_padding)
  params = [jnp.zeros(s) for s in ((64, 64), (64, 32), (32, 10), (512, 512), (512, 400), (300,), (10,))]
  names = lambda p: sorted(jax.eval_shape(p.init, params).buckets)
  assert names(layout_of(1.0)) == sorted([f"{'x'.join(map(str, x.shape))}_float32" for x in params])
  together = names(layout_of(4.0))
  assert "512x512_float32" in together and "512x400_float32" in together
  assert len(together) == 5
  classes = size_classes(lambda shape: Layout(shape, (dense_factor,) * len(shape)), None, 1.5)
  for bucket in make_buckets([jnp.zeros((d, d)) for d in range(2, 80)], classes=classes):
    real = sum(m.count * classes.multiplications(m.shape) for m in bucket.members)
    padded = bucket.size * classes.multiplications(bucket.shape)
    assert padded <= 1.5 * real and (padded - real <= LAUNCHES or padded <= 1.02 * real)


def test_p_is_the_same_whether_it_is_kept_or_not():
  for newton in (False, True):
    one, other = (fitted(dpo.kron(keep_p=keep), newton) for keep in (False, True))
    close(one[1], other[1])
    assert not any(state.p for state in one[0].buckets.values())
    assert all(state.p for state in other[0].buckets.values())


def test_a_stack_in_batches_is_the_stack_at_once():
  params = [jnp.zeros((4, 3)) for _ in range(7)]
  grads = [jax.random.normal(jax.random.key(i), (4, 3)) for i in range(7)]

  def run(batch_size):
    p = dpo.kron(batch_size=batch_size)
    state = p.init(params)
    for i in range(3):
      state = p.fit(state, dpo.Probe(None, grads), key=jax.random.key(i), damping=0.0)
    return p.apply(state, grads)

  close(run(3), run(None), 1e-6)


def test_stochastic_rounding_is_right_in_the_mean():
  x = jnp.array([1.0 + 2.0**-10, -3.0 - 2.0**-9, 0.0, 1e-3, 1.0])
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = jax.vmap(lambda key: rounded(x, jnp.bfloat16, key).astype(jnp.float32))(keys)
  spread = np.std(drawn, axis=0) / np.sqrt(len(keys))
  assert np.all(np.abs(np.mean(drawn, axis=0) - x) <= 4 * spread + 1e-9)
  assert len(np.unique(np.asarray(drawn[:, 0]))) == 2 and len(np.unique(np.asarray(drawn[:, 4]))) == 1


@pytest.mark.filterwarnings("ignore:with `state_dtype")
def test_stochastic_rounding_lets_small_steps_through():
  """A step size far below half a unit in the last place of bfloat16: to the nearest the factors stand still."""
  grads = {"w": jnp.diag(jnp.array([1.0, 0.1, 0.1, 0.1]))}

  def moved(stochastic):
    options = dict(init_scale=1.0, state_dtype=jnp.bfloat16, geometry=dpo.qeq, normalizer=dpo.geometry.spectral)
    p = dpo.kron(step_size=1e-3, stochastic_rounding=stochastic, **options)
    fit = jax.jit(p.fit)
    state = start = p.init(grads)
    for i in range(300):
      state = fit(state, dpo.Probe(None, grads), key=jax.random.key(i), damping=0.0)
    (q,), (q0,) = ([b.q[0].astype(jnp.float32) for b in s.buckets.values()] for s in (state, start))
    return float(jnp.max(jnp.abs(q - q0)))

  assert moved(False) == 0
  assert moved(True) > 0.02


def test_the_momentum_takes_the_dtype_that_is_asked_for():
  params = {"w": jnp.ones((3, 2))}
  tx = dpo.psgd(0.1, b1=0.9, mu_dtype=jnp.bfloat16)
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(params, state, params)
  assert state[0].momentum.ema["w"].dtype == jnp.bfloat16 and updates["w"].dtype == jnp.float32


@pytest.mark.parametrize("every", [1, 3])
def test_averages_of_dpsgd_move_on_with_the_fits(every):
  """With a fit on every k-th step the average of k fits is the average of k fits, whatever lies between them."""
  p = dpo.damped_kron(average=0.7)
  params = {"w": jnp.zeros((4, 3))}
  often = rarely = p.init(params)
  for i in range(4):
    v = {"w": jax.random.normal(jax.random.key(i), (4, 3))}
    probe = dpo.Probe(v, jax.tree.map(lambda x: 3 * x, v))
    often = p.fit(often, probe, key=jax.random.key(i), damping=0.1)
    rarely = p.fit(rarely, probe, key=jax.random.key(i), damping=0.1)
    for _ in range(every - 1):
      rarely = p.advance(rarely, damping=0.1)
  close(jax.tree.leaves(often), jax.tree.leaves(rarely), 0)


def test_the_papers_average_moves_on_with_the_steps():
  """Pbar_t = β_t Pbar_{t−1} + (1 − β_t) P_t with P_t = P_{t−1} on a step without a fit."""
  p = dpo.damped_kron(average=dpo.tikhonov.recursive(0.7, each_step=True))
  params = {"w": jnp.zeros((4, 3))}
  state = p.init(params)
  expected, t = None, 0
  for i in range(3):
    v = {"w": jax.random.normal(jax.random.key(i), (4, 3))}
    state = p.fit(state, dpo.Probe(v, jax.tree.map(lambda x: 3 * x, v)), key=jax.random.key(i), damping=0.1)
    for step in range(3):
      state = p.advance(state, damping=0.1) if step else state
      current = next(iter(state.buckets.values())).kron.p[0]
      beta = min(t / (t + 1), 0.7)
      expected = current if expected is None else beta * expected + (1 - beta) * current
      t += 1
  np.testing.assert_allclose(next(iter(state.buckets.values())).average[0], expected, rtol=1e-5)
