# SPDX-License-Identifier: Apache-2.0
"""Theorems of the layerwise methods, least squares (GLS) and batch-norm preconditioning (BNP), by dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpsgd_optax as dpo
from dpsgd_optax.geometry.triangular import lower_gram, triangular_inverse
from dpsgd_optax.layers.record import Window

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
N, D, K = 12, 4, 3
X = RNG.standard_normal((N, D)) * np.array([1.0, 3.0, 0.3, 1.0]) + np.array([0.5, -1.0, 0.0, 2.0])
Y = RNG.standard_normal((N, K))
W, B = RNG.standard_normal((D, K)), RNG.standard_normal(K)
ONES = np.ones((N, 1))
close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)


def neurons(x=X, w=W, b=B, y=Y):
  """n · d(mean ½‖z − y‖²)/dz."""
  return x @ w + b - y


def gradient(x, e):
  return {"w": x.T @ e / len(x), "b": e.mean(0)}


def step(preconditioner, grads, records, damping=0.0, times=1):
  """P g after ``times`` equal batches."""
  tx = dpo.scale_by_preconditioner(preconditioner, dpo.layer_inputs(), damping=damping)
  grads = jax.tree.map(jnp.asarray, grads)
  state = tx.init(grads)
  for _ in range(times):
    updates, state = tx.update(grads, state, grads, layer_inputs=records)
  return jax.tree.map(np.asarray, updates)


def stacked(tree):
  return np.concatenate([tree["w"], tree["b"][None]])


def test_one_unit_step_on_a_linear_layer_reaches_the_least_squares_solution():
  """W − P g = argmin ‖X̃W − Y‖², which is Newton's step too."""
  done = step(dpo.least_squares(), gradient(X, neurons()), {"w": X})
  solution = np.linalg.lstsq(np.concatenate([X, ONES], 1), Y, rcond=None)[0]
  close(stacked({"w": W, "b": B}) - stacked(done), solution)


def test_it_is_newtons_step_for_one_linear_layer():
  """The Hessian of the loss by jax.hessian, inverted."""

  def loss(p):
    return 0.5 * jnp.mean(jnp.sum((X @ p[:-1] + p[-1] - Y) ** 2, axis=1))

  point = jnp.asarray(stacked({"w": W, "b": B}))
  hessian = jax.hessian(loss)(point).reshape(point.size, point.size)
  newton = np.linalg.solve(hessian, np.ravel(jax.grad(loss)(point)))
  done = step(dpo.least_squares(), gradient(X, neurons()), {"w": X})
  close(np.ravel(stacked(done)), newton)


def test_it_is_gradient_descent_as_the_damping_grows():
  """λ P g → g."""
  grads = gradient(X, neurons())
  lam = 1e9
  done = step(dpo.least_squares(absolute_damping=lam), grads, {"w": X})
  np.testing.assert_allclose(lam * stacked(done), stacked(grads), rtol=1e-6)


def test_it_is_the_ridge_problem_of_the_neurons():
  """P g minimizes ‖ÃD − E‖²/n + λ‖D‖², λ relative to the mean eigenvalue of S."""
  e, a = neurons(), np.concatenate([X, ONES], 1)
  lam = 0.1 * np.trace(a.T @ a / N) / (D + 1)
  done = stacked(step(dpo.least_squares(), gradient(X, e), {"w": X}, damping=0.1))
  rows = np.concatenate([a, np.sqrt(N * lam) * np.eye(D + 1)])
  close(done, np.linalg.lstsq(rows, np.concatenate([e, np.zeros((D + 1, K))]), rcond=None)[0])


def test_output_weights_are_invisible_without_a_ridge():
  """For any SPD C, argmin ‖(ÃD − E) C^(−½)‖² is the same: the mend of wide layers has to act on the target."""
  e, a = neurons(), np.concatenate([X, ONES], 1)
  root = np.linalg.cholesky(np.cov(RNG.standard_normal((K, 20))))
  system = np.kron(np.linalg.inv(root), a)
  weighted = np.linalg.lstsq(system, np.ravel((e @ np.linalg.inv(root).T).T), rcond=None)[0]
  done = step(dpo.least_squares(), gradient(X, e), {"w": X})
  close(stacked(done), weighted.reshape(K, D + 1).T)


def test_it_is_invariant_under_invertible_affine_maps_of_the_inputs():
  """X → XA + c, W → A⁻¹W, b → b − cA⁻¹W: the outputs after the step are the same."""
  a, c = RNG.standard_normal((D, D)), RNG.standard_normal(D)
  mapped = X @ a + c
  w, b = np.linalg.solve(a, W), B - c @ np.linalg.solve(a, W)
  e = neurons()
  close(mapped @ w + b, X @ W + B)
  before = step(dpo.least_squares(), gradient(X, e), {"w": X})
  after = step(dpo.least_squares(), gradient(mapped, e), {"w": mapped})
  close(mapped @ after["w"] + after["b"], X @ before["w"] + before["b"])


def spec(x, kernel=(D, K), bias=("b",), **more):
  return {"w": dpo.LayerRecord((x,), kernel_shape=kernel, bias=bias, **more)}


def test_the_dual_form_is_the_primal_form():
  """(I − Ãᵀ(ÃÃᵀ + nλI)⁻¹Ã)/λ = (ÃᵀÃ/n + λI)⁻¹, with three rows of five numbers and any gradient."""
  x = X[:3]
  grads = {"w": W, "b": B}  # not of this batch: as with momentum
  a = np.concatenate([x, ONES[:3]], 1)
  s = a.T @ a / 3
  lam = 0.1 * np.trace(s) / (D + 1)
  dual = dpo.least_squares(decay=None, layers=spec(x))
  assert jax.tree.leaves(dual.init(grads))[1].shape == (1, 3, D + 1)
  expected = np.linalg.solve(s + lam * np.eye(D + 1), stacked(grads))
  close(stacked(step(dual, grads, spec(x), damping=0.1)), expected)
  close(stacked(step(dpo.least_squares(decay=None), grads, {"w": x}, damping=0.1)), expected)
  with pytest.raises(ValueError, match=r"'w' was given 4 rows.*made for 3"):
    step(dual, grads, spec(X[:4]))


@pytest.mark.parametrize("size", [1, 2, 31, 33, 64, 100, 193, 257])
def test_the_inverse_of_a_triangular_matrix_by_blocks_is_the_inverse(size):
  """And the product of the root, which together are the inverse of S + λI; what is above the diagonal is not read."""
  rng = np.random.default_rng(size)
  root = np.linalg.cholesky(np.cov(rng.standard_normal((size, 2 * size + 3))).reshape(size, size) + 0.1 * np.eye(size))
  found = triangular_inverse(jnp.asarray(root + np.triu(rng.standard_normal((size, size)), 1)))
  close(found, np.linalg.inv(root))
  close(lower_gram(found), np.linalg.inv(root @ root.T))


@pytest.mark.parametrize(
  "options", [{"decay": None}, {"decay": 0.5}, {"decay": None, "match": dpo.layers.match_layers}]
)
def test_the_step_made_from_output_gradients_is_that_made_from_the_gradient(options):
  """P g = (P Ãᵀ) E for g = ÃᵀE, in the dual and in the primal form, also with the length of the gradient."""
  x, params = X[:3], {"w": W, "b": B}
  e = neurons(x, y=Y[:3]) / 3
  records = spec(x, gradients=(e,))
  grads = {"w": x.T @ e, "b": e.sum(0)}
  expected, found = (
    (tx := dpo.gls(1.0, layers=records, from_outputs=direct, **options)).update(
      grads if not direct else jax.tree.map(np.zeros_like, grads) if "match" not in options else grads,
      tx.init(params),
      params,
      layer_inputs=records,
    )[0]
    for direct in (False, True)
  )
  close(stacked(found), stacked(expected))
  alone = spec(x, bias=(), gradients=(e,))  # and of a kernel without a bias
  found, expected = (
    (tx := dpo.gls(1.0, layers=alone, from_outputs=direct, **options)).update(
      {"w": grads["w"]}, tx.init({"w": W}), {"w": W}, layer_inputs=alone
    )[0]["w"]
    for direct in (True, False)
  )
  close(found, expected)
  with pytest.raises(ValueError, match="there is no averaged gradient"):
    dpo.gls(1.0, from_outputs=True, b1=0.9)
  with pytest.raises(ValueError, match="no older fit to use"):
    dpo.gls(1.0, from_outputs=True, decay=None, every=2)
  with pytest.raises(ValueError, match="`from_outputs` looks at the output gradients of the layer 'w'"):
    dpo.gls(1.0, from_outputs=True).update(grads, dpo.gls(1.0).init(params), params, layer_inputs={"w": x})


def test_it_is_the_input_factor_of_kfac_and_with_output_damping_also_its_output_factor():
  """D = A⁻¹ g C⁻¹, A = ÃᵀÃ/n and C = EᵀE k/tr: K-FAC with the output factor normalized."""
  e, a = neurons(), np.concatenate([X, ONES], 1)
  c = e.T @ e / np.trace(e.T @ e) * K
  record = dpo.LayerRecord((X,), gradients=(e,), kernel_shape=(D, K), bias=("b",))
  grads = gradient(X, e)
  one_sided = np.linalg.solve(a.T @ a / N, stacked(grads))
  rho = 1e-12
  done = step(dpo.least_squares(output_damping=rho), grads, {"w": record})
  np.testing.assert_allclose(stacked(done), one_sided @ np.linalg.inv(c), rtol=1e-6)
  done = step(dpo.least_squares(output_damping=0.5), grads, {"w": record})
  close(stacked(done), one_sided @ np.linalg.inv(c + 0.5 * np.eye(K)) * 1.5)
  done = step(dpo.least_squares(output_damping=1e9), grads, {"w": record})
  np.testing.assert_allclose(stacked(done), one_sided, rtol=1e-6)
  with pytest.raises(ValueError, match=r"output gradients of the layer 'w'.*gradients=True"):
    step(dpo.least_squares(output_damping=0.5), grads, {"w": X})


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_solved_as_the_dense_layers_of_its_patches(groups):
  """(S + λI)⁻¹ g for each group, S from `jax.lax.conv_general_dilated_patches` and summed over the positions."""
  x = jnp.asarray(RNG.standard_normal((3, 5, 4, 4)))
  kernel = RNG.standard_normal((2, 2, 4 // groups, 6))
  bias = RNG.standard_normal(6)
  window = Window((2, 1), "SAME", (1, 1), (1, 1), groups)
  record = dpo.LayerRecord((x,), kind="conv", kernel_shape=kernel.shape, input_axes=3, bias=("bias",), window=window)
  p = dpo.least_squares(layers={"kernel": record})
  done = step(p, {"kernel": kernel, "bias": bias}, {"kernel": record}, damping=0.1)
  found = jax.lax.conv_general_dilated_patches(x, (2, 2), (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  rows = np.asarray(found).reshape(-1, 4, 4)  # rows, channels, window
  width, out = 4 // groups, 6 // groups
  for g in range(groups):
    a = np.moveaxis(rows[:, g * width : (g + 1) * width], 1, 2).reshape(len(rows), -1)
    a = np.concatenate([a, np.ones((len(a), 1))], 1)
    s = a.T @ a / 3
    lam = 0.1 * np.trace(s) / len(s)
    part = slice(g * out, (g + 1) * out)
    grads = np.concatenate([kernel[..., part].reshape(-1, out), bias[None, part]])
    expected = np.linalg.solve(s + lam * np.eye(len(s)), grads)
    close(done["kernel"][..., part].reshape(-1, out), expected[:-1])
    close(done["bias"][part], expected[-1])


def test_shared_weights_add_their_moments():
  """S = Σ_calls ÃᵀÃ / n, n the examples of one call."""
  record = dpo.LayerRecord((X, 2 * X), kernel_shape=(D, K), bias=("b",))
  a = np.concatenate([X, ONES], 1)
  b = np.concatenate([2 * X, ONES], 1)
  grads = {"w": W, "b": B}
  done = step(dpo.least_squares(), grads, {"w": record})
  close(stacked(done), np.linalg.solve((a.T @ a + b.T @ b) / N, stacked(grads)))


def test_an_embedding_is_divided_by_the_frequencies_of_its_entries():
  """The dense layer of one-hot rows: S = diag(frequency)."""
  ids = jnp.array([[0, 2], [2, 2]])
  table = RNG.standard_normal((4, 3))
  record = dpo.LayerRecord((ids,), kind="embed", kernel_shape=(4, 3))
  p = dpo.least_squares(absolute_damping=0.5, layers={"table": record})
  done = step(p, {"table": table}, {"table": record})
  close(done["table"], table / (np.array([0.25, 0, 0.75, 0]) + 0.5)[:, None])


def test_a_layer_that_is_too_wide_keeps_the_diagonal():
  grads = gradient(X, neurons())
  done = step(dpo.least_squares(max_size=D), grads, {"w": X})
  close(done["w"], grads["w"] / np.mean(X**2, 0)[:, None])
  close(done["b"], grads["b"])


def test_the_second_moment_is_the_debiased_running_mean():
  """S_t = Σ ρ^(t−s) S_s (1 − ρ)/(1 − ρᵗ)."""
  tx = dpo.scale_by_preconditioner(dpo.least_squares(decay=0.9), dpo.layer_inputs())
  grads = {"w": jnp.asarray(W)}
  state, batches = tx.init(grads), [X, 2 * X[:5], X[3:] - 1]
  for x in batches:
    updates, state = tx.update(grads, state, grads, layer_inputs={"w": x})
  moments = [x.T @ x / len(x) for x in batches]
  s = sum(0.9 ** (2 - i) * m for i, m in enumerate(moments)) / sum(0.9**i for i in range(3))
  close(updates["w"], np.linalg.solve(s, W))


def test_equal_layers_are_solved_as_if_they_were_alone():
  """Stacked by shape ≡ one by one."""
  grads = {"one": {"w": W, "b": B}, "two": {"w": 2 * W, "b": -B}}
  inputs = {"one": X, "two": X[:5] ** 2}
  p = dpo.least_squares()
  assert {s.moment.shape for s in p.init(grads).buckets.values()} == {(2, D + 1, D + 1)}
  together = step(p, grads, inputs, damping=0.1)
  for name, x in inputs.items():
    alone = step(p, grads[name], {"w": x}, damping=0.1)
    close(stacked(together[name]), stacked(alone))


@pytest.mark.parametrize("match", [dpo.layers.match_layers, dpo.layers.match_total])
def test_a_matched_step_is_as_long_as_that_of_sgd(match):
  grads = {"one": {"w": W, "b": B}, "two": {"w": 0.1 * W, "b": -B}}
  tx = dpo.gls(0.3, match=match)
  updates, _ = tx.update(grads, tx.init(grads), grads, layer_inputs={"one": X, "two": X**2})
  close(optax.tree.norm(updates), 0.3 * optax.tree.norm(grads))
  if match is dpo.layers.match_layers:
    close(optax.tree.norm(updates["two"]), 0.3 * optax.tree.norm(grads["two"]))


def test_the_trust_region_bounds_the_change_of_the_outputs():
  """rms(ÃD) = limit · rms(Z) where the step was longer, and the step itself where it was not."""
  params, steps = {"w": W, "b": B}, {"w": RNG.standard_normal((D, K)), "b": RNG.standard_normal(K)}
  rms = lambda z: np.sqrt(np.mean(z**2))
  for rows, inputs in ((X, {"w": X}), (X[:2], {"w": X[:2]})):
    tx = dpo.layers.clip_output_change(0.1)
    done, _ = tx.update(steps, tx.init(params), params, layer_inputs=inputs)
    close(rms(rows @ done["w"] + done["b"]), 0.1 * rms(rows @ W + B))
    small = jax.tree.map(lambda x: 1e-3 * x, steps)
    jax.tree.map(close, tx.update(small, tx.init(params), params, layer_inputs=inputs)[0], small)


@pytest.mark.full
def test_a_wide_output_makes_the_step_too_long_and_the_mends_shorten_it():
  """Linear autoencoder d → D → d: one step changes the final output by λ_max(VVᵀ) times what was asked for.

  The change of the layer's outputs is −ηE, E = (z V − y)Vᵀ, so that the residual becomes r (I − η VᵀV): it diverges
  for η > 2 / λ_max, which grows with the width. With whitened outputs the bound is of the order of one again.
  """
  wide = 40
  v = RNG.standard_normal((wide, D)) * np.sqrt(2 / D)
  x = RNG.standard_normal((30, D))
  w = RNG.standard_normal((D, wide)) / 3
  residual = lambda w: x @ w @ v - x
  e = residual(w) @ v.T
  grads = {"w": x.T @ e / 30}
  eta = 4 / np.linalg.eigvalsh(v.T @ v)[-1]
  size = lambda r: np.linalg.norm(r)
  plain = step(dpo.least_squares(), grads, {"w": x})["w"]
  close(residual(w - eta * plain), residual(w) @ (np.eye(D) - eta * v.T @ v))
  point, blown = w, w
  for _ in range(20):
    e = residual(blown) @ v.T
    blown = blown - eta * step(dpo.least_squares(), {"w": x.T @ e / 30}, {"w": x})["w"]
    e = residual(point) @ v.T
    record = dpo.LayerRecord((x,), gradients=(e,), kernel_shape=(D, wide))
    point = point - eta * step(dpo.least_squares(output_damping=0.1), {"w": x.T @ e / 30}, {"w": record})["w"]
  assert size(residual(blown)) > 1e3 * size(residual(w))
  assert size(residual(point)) < 0.5 * size(residual(w))


def test_levenberg_marquardt_sets_the_relative_damping():
  """λ = damping · tr S/d with the damping of the wrapper, not that of the constructor."""
  tx = dpo.levenberg_marquardt(dpo.gls(1.0, damping=123.0), damping=0.25)
  params = {"w": jnp.asarray(W), "b": jnp.asarray(B)}
  value = lambda p: 0.5 * jnp.mean(jnp.sum((X @ p["w"] + p["b"] - Y) ** 2, axis=1))
  grads = jax.grad(value)(params)
  updates, state = tx.update(grads, tx.init(params), params, value_fn=value, layer_inputs={"w": X})
  expected = step(dpo.least_squares(), grads, {"w": X}, damping=0.25)
  close(-stacked(updates), stacked(expected))
  assert float(state.ratio) > 0


@pytest.mark.parametrize("make", [dpo.bnp, dpo.gls])
def test_layers_that_hold_none_of_the_leaves_are_refused(make):
  """Else the fallback would train everything without a word; a loss whose layers are all in a `scan` is such a case."""
  params = {"w": jnp.asarray(W)}
  loop = lambda p: jnp.sum(jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"] @ p["w"].T), None), X, length=2)[0])
  layers = jax.eval_shape(lambda: dpo.capture(loop)(params))[2]
  with pytest.raises(ValueError, match=r"`layers` must hold the record .*\['w'\], but holds none.*capture\(loss\)"):
    make(0.1, layers=layers, fallback=optax.sgd(0.1)).init(params)
  make(0.1, layers=layers, fallback=optax.sgd(0.1)).init({})  # no leaves, nothing amiss


@pytest.mark.parametrize("make", [dpo.batch_norm, dpo.least_squares])
def test_records_reduced_for_the_other_method_are_refused(make):
  record = dpo.LayerRecord((X,), kernel_shape=(D, K), bias=("b",))
  other = (dpo.layers.second_moments if make is dpo.batch_norm else dpo.layers.channel_moments)(record)
  with pytest.raises(ValueError, match=r"a record of .* has no .*Type `reduce="):
    step(make(), {"w": W, "b": B}, {"w": other})


def test_kernels_alone_are_solved_without_the_bias_that_another_transform_trains():
  """`optax.partition`: GLS on the kernel sees x, not [x, 1]."""
  both = optax.partition({"kernel": dpo.gls(1.0, damping=0.0), "bias": optax.sgd(0.1)}, {"w": "kernel", "b": "bias"})
  grads = jax.tree.map(jnp.asarray, gradient(X, neurons()))
  updates, _ = both.update(grads, both.init(grads), grads, layer_inputs={"w": X})
  close(-updates["w"], np.linalg.solve(X.T @ X / N, grads["w"]))
  close(-updates["b"], 0.1 * grads["b"])


def test_after_bnp_it_divides_what_bnp_has_made_of_the_gradient():
  """`optax.chain`: both are shown the layer's inputs; (S + λI)⁻¹ P Pᵀ g."""
  scale = lambda p: dpo.scale_by_preconditioner(p, dpo.layer_inputs(), damping=0.1)
  chained = optax.chain(scale(dpo.batch_norm()), scale(dpo.least_squares()))
  grads = jax.tree.map(jnp.asarray, gradient(X, neurons()))
  found, _ = chained.update(grads, chained.init(grads), grads, layer_inputs={"w": X})
  normalized = step(dpo.batch_norm(), grads, {"w": X}, damping=0.1)
  a = np.concatenate([X, ONES], 1)
  s = a.T @ a / N
  close(stacked(found), np.linalg.solve(s + 0.1 * np.trace(s) / (D + 1) * np.eye(D + 1), stacked(normalized)))
  assert not np.allclose(stacked(normalized), stacked(grads))


def test_layers_are_solved_while_the_norms_take_the_partial_hessian():
  """`optax.partition`: each leaf moves as with its transform alone, the product over the leaves of `sgd_ph`."""
  params = jax.tree.map(jnp.asarray, {"layer": {"w": W, "b": B}, "norm": {"scale": np.full(K, 1.5)}})
  value = lambda p: jnp.mean(((X @ p["layer"]["w"] + p["layer"]["b"]) * p["norm"]["scale"] - Y) ** 2)
  grads, norms = jax.grad(value)(params), functools.partial(jax.tree.map, lambda _: True)  # all that it is given
  solver, partial = dpo.gls(0.1), dpo.sgd_ph(0.1, norms, probe=dpo.probes.exact)
  both = optax.partition({"layer": solver, "norm": partial}, {"layer": "layer", "norm": "norm"})
  hvp = dpo.hvp(lambda p: value(params | p), {"norm": params["norm"]})
  whole = dpo.hvp(value, params)
  found, _ = both.update(grads, both.init(params), params, layer_inputs={"layer": {"w": X}}, hvp=whole)
  mine = {"layer": grads["layer"]}
  alone, _ = solver.update(mine, solver.init(mine), mine, layer_inputs={"layer": {"w": X}})
  close(stacked(found["layer"]), stacked(alone["layer"]))
  rest = {"norm": params["norm"]}
  alone, _ = partial.update({"norm": grads["norm"]}, partial.init(rest), rest, hvp=hvp)
  close(found["norm"]["scale"], alone["norm"]["scale"])


def test_inputs_in_half_precision_are_averaged_in_single():
  """bfloat16 inputs give the moments of the same numbers in float32, not a sum in bfloat16."""
  x = jnp.asarray(np.tile(X, (50, 1)), jnp.bfloat16)
  grads = {"w": jnp.asarray(W, jnp.float32), "b": jnp.asarray(B, jnp.float32)}
  found, expected = (step(dpo.least_squares(), grads, {"w": x.astype(d)}, damping=0.1) for d in (x.dtype, jnp.float32))
  np.testing.assert_allclose(stacked(found), stacked(expected), rtol=1e-5)
  assert found["w"].dtype == np.float32
