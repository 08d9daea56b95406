# SPDX-License-Identifier: Apache-2.0
"""Problems of science: small networks, all the data in each step, no noise; the last digits count.

Each is a sum over residuals, so that `gauss_newton` takes them; "error" is the relative L2 error of the solution (of
`tfim` that of the energy). `bits=64` is float64, for which it switches JAX over. Their study is `science`, which races
for equal CPU seconds; `python -m benchmarks poisson` trains for equal steps, as other problems.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dpsgd_optax as dpo
from benchmarks.engine.calls import choice
from benchmarks.engine.problem import Metrics, Problem
from benchmarks.problems import data, references, tabular

Network = Callable[[Any, jax.Array], jax.Array]


def network(sizes: Sequence[int], dtype: Any) -> tuple[Callable[[jax.Array], Any], Network]:
  """(key -> params, (params, one point) -> outputs) of tanh layers, Glorot's normal start."""

  def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    layer = lambda k, a, b: {"w": jax.random.normal(k, (a, b), dtype) * (2 / (a + b)) ** 0.5, "b": jnp.zeros(b, dtype)}
    return [layer(*shape) for shape in shapes]

  def apply(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
      x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]

  return init, apply


def real(bits: int) -> Any:
  """The dtype; float64 is switched on."""
  if choice(str(bits), "bits", {"32": 32, "64": 64}) == 64:
    jax.config.update("jax_enable_x64", True)
  return jnp.float64 if bits == 64 else jnp.float32


def relative(found: jax.Array, wanted: jax.Array) -> jax.Array:
  return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


def _problem(
  init: Callable, groups: Sequence[tuple], error: Callable[[Any], jax.Array], dtype: Any, steps: int = 2000
) -> Problem:
  """A problem of residual groups, arrays cast to the dtype."""
  cast = [(fn, *(jnp.asarray(x, dtype) for x in arrays)) for fn, *arrays in groups]
  system = dpo.residuals(*cast)
  metrics = lambda params, batch: {"loss": system.loss(params), "error": error(params)}
  options = dict(batch_size=1, epochs=steps, evaluations=40, residuals=lambda params: system)
  return Problem(init, metrics, data.nothing(), **options)


def _solution(apply: Network, points: np.ndarray, values: np.ndarray, dtype: Any) -> Callable[[Any], jax.Array]:
  """params -> the relative error of the first output on a grid."""
  points, values = jnp.asarray(points, dtype), jnp.asarray(values, dtype)
  return lambda params: relative(jax.vmap(apply, (None, 0))(params, points).reshape(values.shape), values)


def derivatives(u: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
  """(u, ∂u, ∂²u) along one coordinate, in forward mode."""
  e = jnp.zeros_like(x).at[axis].set(1)
  first = lambda x: jax.jvp(u, (x,), (e,))
  (value, slope), (_, second) = jax.jvp(first, (x,), (e,))
  return value, slope, second


def _grid(low: float, high: float, count: int) -> np.ndarray:
  axis = np.linspace(low, high, count)
  return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def _square(low: float, inside: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
  """Points inside of [low, 1]² and on its edge."""
  rng = np.random.default_rng(0)
  t, side = rng.uniform(low, 1, edge), np.arange(edge) % 4
  end = np.where(side % 2 == 1, 1.0, low)
  along = np.where((side < 2)[:, None], np.stack([t, end], 1), np.stack([end, t], 1))
  return rng.uniform(low, 1, (inside, 2)), along


def _elliptic(u: Callable, k: float, low: float, width: int, points: int, edge: int, weight: float, bits: int):
  """Δu + k²u = f with u = 0 on the edge of [low, 1]², f made for the solution u."""
  dtype = real(bits)
  init, apply = network((2, width, width, width, 1), dtype)
  inside, along = _square(low, points, edge)

  def operator(v: Callable, x: jax.Array) -> jax.Array:
    return sum(derivatives(v, x, axis)[2] for axis in (0, 1)) + k**2 * v(x)

  f = jax.vmap(lambda x: operator(u, x))(jnp.asarray(inside, dtype))
  groups = (
    (lambda p, x, f: (operator(lambda x: apply(p, x)[0], x) - f) / points**0.5, inside, f),
    (lambda p, x: weight * apply(p, x)[0] / edge**0.5, along),
  )
  grid = _grid(low, 1, 50)
  error = _solution(apply, grid, jax.vmap(u)(jnp.asarray(grid, dtype)), dtype)
  return _problem(init, groups, error, dtype)


def poisson(data_dir: str | None, folded: bool, modes: int = 1, width: int = 20, bits: int = 64) -> Problem:
  """PINN: Δu = f on the unit square, u = Σ_m sin(mπx) sin(mπy) / m² made; 3 x 20 tanh, 400 residuals."""
  u = lambda x: sum(jnp.prod(jnp.sin(m * jnp.pi * x)) / m**2 for m in range(1, modes + 1))
  return _elliptic(u, 0.0, 0.0, width, 320, 80, 1.0, bits)


def helmholtz(data_dir: str | None, folded: bool, width: int = 20, bits: int = 64) -> Problem:
  """PINN: Δu + u = f on [-1, 1]², u = sin(πx) sin(2πy) made; 3 x 20 tanh, 500 residuals."""
  u = lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])
  return _elliptic(u, 1.0, -1.0, width, 400, 100, 10.0, bits)


def halton(count: int) -> np.ndarray:
  """(count, 2) points that fill the unit square evenly: the radical inverses to the bases 2 and 3."""
  found = np.zeros((count, 2))
  for axis, base in enumerate((2, 3)):
    left, digit = np.arange(1, count + 1), 1.0
    while left.any():
      digit /= base
      found[:, axis] += digit * (left % base)
      left //= base
  return found


def _evolution(equation: Callable, start: Callable, ends: Callable, grid: Any, values: Any, width: int, bits: int):
  """A PINN of (t, x) on [0, 1] × [-1, 1]: 2000 residuals inside, 100 of the start, 100 points at the two ends.

  More residuals than parameters: 500 can be brought to zero by a network that is far from the solution in between.
  """
  dtype = real(bits)
  init, apply = network((2, width, width, width, 1), dtype)
  rng = np.random.default_rng(0)
  inside = np.array([0, -1]) + np.array([1, 2]) * halton(2000)
  first = np.stack([np.zeros(100), np.linspace(-1, 1, 100)], 1)
  u = lambda p: lambda x: apply(p, x)[0]
  groups = (
    (lambda p, x: equation(u(p), x) / 2000**0.5, inside),
    (lambda p, x: 10 * (u(p)(x) - start(x[1])) / 100**0.5, first),
    (lambda p, t: ends(u(p), t) / 100**0.5, rng.uniform(0, 1, 100)),
  )
  return _problem(init, groups, _solution(apply, grid, values, dtype), dtype)


def burgers(data_dir: str | None, folded: bool, width: int = 20, bits: int = 64) -> Problem:
  """PINN: Burgers' equation, viscosity 0.01/π, whose solution steepens at x = 0; 3 x 20 tanh, 2300 residuals."""

  def equation(u: Callable, x: jax.Array) -> jax.Array:
    value, slope, second = derivatives(u, x, 1)
    return derivatives(u, x, 0)[1] + value * slope - references.VISCOSITY * second

  ends = lambda u, t: jnp.stack([u(jnp.stack([t, jnp.full_like(t, x)])) for x in (-1.0, 1.0)])
  t, x = (g.ravel() for g in np.meshgrid(np.linspace(0.02, 1, 50), np.linspace(-1, 1, 101), indexing="ij"))
  values = references.burgers(t, x)
  return _evolution(equation, lambda x: -jnp.sin(jnp.pi * x), ends, np.stack([t, x], 1), values, width, bits)


def allen_cahn(data_dir: str | None, folded: bool, width: int = 20, bits: int = 64) -> Problem:
  """PINN: u_t = 1e-4 u_xx + 5 (u - u³) from x² cos πx, periodic; 3 x 20 tanh, 2300 residuals."""

  def equation(u: Callable, x: jax.Array) -> jax.Array:
    value, _, second = derivatives(u, x, 1)
    return derivatives(u, x, 0)[1] - references.DIFFUSION * second - references.REACTION * (value - value**3)

  def ends(u: Callable, t: jax.Array) -> jax.Array:
    left, right = (derivatives(u, jnp.stack([t, jnp.full_like(t, x)]), 1)[:2] for x in (-1.0, 1.0))
    return jnp.stack([right[0] - left[0], right[1] - left[1]])

  found = references.allen_cahn()[:, ::16]
  t, x = (g.ravel() for g in np.meshgrid(np.linspace(0, 1, 21), -1 + 2 * np.arange(128) / 128, indexing="ij"))
  start = lambda x: x**2 * jnp.cos(jnp.pi * x)
  return _evolution(equation, start, ends, np.stack([t, x], 1), found.ravel(), width, bits)


def _regression(inputs: int, target: Callable, points: np.ndarray, grid: np.ndarray, width: int, bits: int) -> Problem:
  dtype = real(bits)
  init, apply = network((inputs, width, width, width, 1), dtype)
  residual = lambda p, x, y: (apply(p, x)[0] - y) / len(points) ** 0.5
  error = _solution(apply, grid, target(grid), dtype)
  return _problem(init, ((residual, points, target(points)),), error, dtype)


def waves(data_dir: str | None, folded: bool, width: int = 32, bits: int = 64) -> Problem:
  """Regression to high precision: three sines of one variable, 512 points; 3 x 32 tanh."""
  target = lambda x: sum(np.sin(m * np.pi * x[:, 0] + m) for m in (1, 4, 9))
  points = np.linspace(-1, 1, 512)[:, None]
  return _regression(1, target, points, np.linspace(-1, 1, 1001)[:, None], width, bits)


def waves_2d(data_dir: str | None, folded: bool, width: int = 32, bits: int = 64) -> Problem:
  """Regression to high precision: three plane waves of two variables, 1024 points; 3 x 32 tanh."""
  target = lambda x: sum(np.sin(np.pi * (a * x[:, 0] + b * x[:, 1]) + a) for a, b in ((1, 1), (3, -2), (2, 4)))
  return _regression(2, target, np.random.default_rng(0).uniform(-1, 1, (1024, 2)), _grid(-1, 1, 41), width, bits)


def pharmacokinetics(data_dir: str | None, folded: bool, width: int = 20, bits: int = 64) -> Problem:
  """A stiff system of three linear equations on [0, 5] hours as one network of t; 2 x 20 tanh, 600 residuals."""
  dtype = real(bits)
  init, apply = network((1, width, width, 3), dtype)
  matrix = jnp.asarray(references.pharmacokinetics(), dtype)
  times = 5 * np.linspace(0, 1, 199)[:, None] ** 2  # most of them where the solution is fast
  scale = jnp.asarray([20.0, 20.0, 2.0], dtype)
  of_log = lambda p, t: apply(p, jnp.log(0.02 + t) / 2)

  def rate(p: Any, t: jax.Array) -> jax.Array:
    value, slope = jax.jvp(lambda t: of_log(p, t), (t,), (jnp.ones_like(t),))
    return (slope - matrix @ value) / scale / 199**0.5

  start = jnp.asarray([1.0, 0, 0], dtype)
  groups = ((rate, times), (lambda p, t: of_log(p, t) - start, np.zeros((1, 1))))
  grid = np.linspace(0, 5, 501)
  error = _solution(of_log, grid[:, None], references.concentrations(grid), dtype)
  return _problem(init, groups, error, dtype)


def tfim(data_dir: str | None, folded: bool, length: int = 10, density: int = 2, bits: int = 64) -> Problem:
  """Ising chain in a transverse field at its critical point, all configurations: a restricted Boltzmann machine.

  The loss is the energy a site above that of exact diagonalisation, the error that of the energy, relative.
  """
  dtype = real(bits)
  exact = references.ising_energy(length)
  s = jnp.asarray(references.spins(length), dtype)
  flipped = jnp.arange(2**length)[:, None] ^ (1 << jnp.arange(length))[None]
  diagonal = -jnp.sum(s * jnp.roll(s, 1, 1), 1)
  hidden = length * density

  def init(key: jax.Array) -> Any:
    a, b, c = jax.random.split(key, 3)
    draw = lambda key, *shape: 0.1 * jax.random.normal(key, shape, dtype)
    return {"visible": draw(a, length), "bias": draw(b, hidden), "kernel": draw(c, length, hidden)}

  def log_psi(p: Any, s: jax.Array) -> jax.Array:
    z = s @ p["kernel"] + p["bias"]
    return s @ p["visible"] + jnp.sum(jnp.logaddexp(z, -z), -1)

  def local(p: Any) -> tuple[jax.Array, jax.Array]:
    """The local energies, and the probabilities."""
    logs = log_psi(p, s)
    return diagonal - jnp.sum(jnp.exp(logs[flipped] - logs[:, None]), 1), jax.nn.softmax(2 * logs)

  def energy(p: Any) -> jax.Array:
    energies, weights = local(p)
    return weights @ energies

  def metrics(params: Any, batch: Any) -> Metrics:
    above = energy(params) - exact
    return {"loss": above / length, "error": above / abs(exact)}

  def rows(params: Any) -> Any:
    energies, weights = local(params)
    return dpo.log_derivatives(lambda p, s: log_psi(p, s) / length**0.5, s, energies / length**0.5, weights)

  return Problem(init, metrics, data.nothing(), batch_size=1, epochs=1000, evaluations=40, residuals=rows)


def uci_network(data_dir: str | None, folded: bool, name: str = "energy", width: int = 50, bits: int = 32) -> Problem:
  """A network of one hidden layer on a set of the UCI repository, all of it in each step; the error is of the test."""
  dtype = real(bits)
  arrays = tabular.regression(choice(name, "name", {n: n for n in tabular.NAMES}), data_dir)
  x, y = (np.asarray(arrays.train[k], np.float64) for k in ("x", "y"))
  init, apply = network((x.shape[1], width, 1), dtype)
  residual = lambda p, x, y: (apply(p, x)[0] - y[0]) / len(arrays.train["x"]) ** 0.5
  return _problem(init, ((residual, x, y),), _solution(apply, arrays.test["x"], arrays.test["y"], dtype), dtype)


ROWS = (poisson, helmholtz, burgers, allen_cahn, waves, waves_2d, pharmacokinetics, tfim, uci_network)
