# SPDX-License-Identifier: Apache-2.0
"""The condition number of one layer's Hessian: what normalization and preconditioning do to it.

The local rate of gradient descent in z, θ = R z, is (κ − 1)/(κ + 1) with κ = κ(RᵀHR) (arXiv:2410.00232). The network is
64-16-16-10 on digits, tanh, with or without batch normalization before each tanh, trained a little in float64. H is the
exact block of one layer, bias included as the last row of its matrix; P is fitted on that block at these parameters.

  kappa        largest over smallest nonzero |eigenvalue|: H is singular (softmax ignores a common shift of the logits,
               batch normalization a shift and a scale of its input), and there is no descent along its null space
  bulk         largest over median |eigenvalue|
  lanczos      on a layer of 4160 parameters: largest over 64th largest |eigenvalue|, by products with H alone
"""

import itertools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, number, publish
from benchmarks.problems import data
from dpsgd_optax.transforms.fitted import Fitted

FITS = 2_000
NULL = 1e-11  # eigenvalues below this share of the largest are zero up to rounding
TOP = 64  # how far down the spectrum Lanczos goes


class Fit(NamedTuple):
  """A preconditioner, and whether it sees products with H (Newton) or gradients of minibatches (whitening)."""

  preconditioner: dpo.Preconditioner
  newton: bool


FITTED = {
  "second_moment, gradients": Fit(dpo.second_moment(None), False),
  "kron, gradients": Fit(dpo.kron(max_skew=jnp.inf), False),
  "second_moment, Hv": Fit(dpo.second_moment(None), True),
  "diagonal, Hv": Fit(dpo.diagonal(), True),
  "kron, Hv": Fit(dpo.kron(max_skew=jnp.inf), True),
  "lra, Hv": Fit(dpo.lra(rank=20), True),
  "dense, Hv": Fit(dpo.dense(), True),
}
LARGE = ("second_moment, gradients", "kron, gradients", "second_moment, Hv", "diagonal, Hv", "kron, Hv")


def network(widths: tuple[int, ...], normalized: bool) -> Callable[[list[jax.Array], jax.Array], jax.Array]:
  """Matrices with the bias as last row, x -> logits. Normalization is by the statistics of the batch, γ = 1, β = 0."""

  def forward(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for i, w in enumerate(params):
      x = x @ w[:-1] + w[-1]
      if i < len(widths) - 2:
        if normalized:
          x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
        x = jnp.tanh(x)
    return x

  return forward


class Block(NamedTuple):
  """One layer's share of the loss: H v of its matrix, and gradients of minibatches (batches, in + 1, out)."""

  weight: jax.Array
  product: Callable[[jax.Array], jax.Array]
  gradients: jax.Array


def block(widths: tuple[int, ...], normalized: bool, layer: int, steps: int = 200, samples: int = 512) -> Block:
  train = data.digits().train
  x, y = jnp.asarray(train["x"][:samples].reshape(samples, -1), jnp.float64), jnp.asarray(train["y"][:samples])
  forward = network(widths, normalized)
  keys = jax.random.split(jax.random.key(0), len(widths) - 1)
  shapes = list(itertools.pairwise(widths))
  draw = lambda key, d, n: jnp.concatenate([jax.random.normal(key, (d, n)) / d**0.5, jnp.zeros((1, n))])
  params = [draw(key, d, n) for key, (d, n) in zip(keys, shapes, strict=True)]

  def loss(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

  tx = optax.adam(3e-3)

  @jax.jit
  def train_all(params: list[jax.Array]) -> list[jax.Array]:
    def body(carry: Any, _: None) -> tuple[Any, None]:
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params, x, y), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), length=steps)[0][0]

  params = train_all(params)
  of_layer = lambda w, x, y: loss([*params[:layer], w, *params[layer + 1 :]], x, y)
  rows = np.random.default_rng(0).integers(0, samples, (FITS, 64))
  gradients = jax.jit(lambda rows: jax.lax.map(lambda r: jax.grad(of_layer)(params[layer], x[r], y[r]), rows))(rows)
  product = jax.jit(lambda v: dpo.hvp(lambda w: of_layer(w, x, y), params[layer])(v))
  return Block(params[layer], product, gradients)


def fitted(fit: Fit, found: Block, damping: float) -> Any:
  """The state after FITS probes. λ = `damping`, in units of H; for gradients of g."""
  p = fit.preconditioner

  def body(state: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    key, gradient = given
    vector = jax.random.normal(key, gradient.shape, gradient.dtype)
    probe = dpo.Probe(vector, found.product(vector)) if fit.newton else dpo.Probe(None, gradient)
    return p.fit(state, probe, key=key, damping=damping), None

  keys = jax.random.split(jax.random.key(1), FITS)
  return jax.jit(lambda state: jax.lax.scan(body, state, (keys, found.gradients))[0])(p.init(found.weight))


def matrix(f: Callable[[jax.Array], jax.Array], like: jax.Array) -> np.ndarray:
  columns = jax.jit(lambda e: jax.lax.map(lambda x: f(x.reshape(like.shape)).reshape(-1), e))(jnp.eye(like.size))
  found = np.asarray(columns, np.float64)
  return (found + found.T) / 2


def spectrum(values: np.ndarray) -> dict[str, Any]:
  """kappa, bulk and the spectrum relative to its largest value, without the null space."""
  size = np.sort(np.abs(values))[::-1]
  size = size[size > NULL * size[0]]
  relative = size / size[0]
  return {
    "kappa": 1 / relative[-1],
    "bulk": 1 / float(np.median(relative)),
    "rank": len(size),
    "spectrum": relative.tolist(),
  }


def dense_rows(found: Block) -> dict[str, Any]:
  """Without a preconditioner, and with each: the eigenvalues of LᵀHL, P = LLᵀ."""
  hessian = matrix(found.product, found.weight)
  values = np.linalg.eigvalsh(hessian)
  rows = {"none": spectrum(values)}
  for name, fit in FITTED.items():
    state = fitted(fit, found, 1e-6 * np.abs(values).max() if fit.newton else 1e-9)
    root = np.linalg.cholesky(matrix(lambda x: fit.preconditioner.apply(state, x), found.weight))
    rows[name] = spectrum(np.linalg.eigvalsh(root.T @ hessian @ root))
  return rows


def lanczos_rows(found: Block) -> dict[str, Any]:
  """The same by ARPACK's Lanczos on v ↦ P^½ H P^½ v, for layers whose H is not formed."""
  from scipy.sparse.linalg import LinearOperator, eigsh

  def top(product: Callable[[jax.Array], jax.Array]) -> dict[str, Any]:
    run = jax.jit(lambda v: product(v.reshape(found.weight.shape)).reshape(-1))
    size = found.weight.size
    operator = LinearOperator((size, size), matvec=lambda v: np.asarray(run(v.reshape(-1))), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    values = np.sort(np.abs(eigsh(operator, TOP, which="LM", v0=start, return_eigenvectors=False, tol=1e-4)))[::-1]
    return {"top": float(values[0] / values[-1]), "spectrum": (values / values[0]).tolist()}

  rows = {"none": top(found.product)}
  for name in LARGE:
    fit = FITTED[name]
    state = fitted(fit, found, 1e-6 if fit.newton else 1e-9)
    root = Fitted(fit.preconditioner, state, found.weight).root
    rows[name] = top(lambda v, root=root: root(found.product(root(v))))
  return rows


CASES = (  # by which method, the name of the layer, the widths of its network, its index there
  ("dense", "hidden layer", (64, 16, 16, 10), 1),
  ("dense", "output layer", (64, 16, 16, 10), 2),
  ("lanczos", "hidden layer, 4160 parameters", (64, 64, 64, 10), 1),
)


def measure() -> dict[str, Any]:
  """method -> layer -> network -> preconditioner -> figures."""
  document: dict[str, Any] = {"fits": FITS, "null": NULL, "environment": environment(), "dense": {}, "lanczos": {}}
  with jax.enable_x64(True):
    for method, layer, widths, index in CASES:
      rows = {"dense": dense_rows, "lanczos": lanczos_rows}[method]
      blocks = {kind: block(widths, kind == "batch norm", index) for kind in ("plain", "batch norm")}
      document[method][layer] = {kind: rows(found) for kind, found in blocks.items()}
      say(f"{layer}: done")
  return document


def columns_of(document: dict[str, Any]) -> dict[str, Any]:
  """Layer and network -> preconditioner -> figures."""
  cases = document["dense"] | document["lanczos"]
  return {f"{layer}, {kind}": rows for layer, found in cases.items() for kind, rows in found.items()}


def table(document: dict[str, Any]) -> Table:
  columns = columns_of(document)

  def cell(row: dict[str, Any] | None) -> str:
    if row is None:
      return "–"
    return number(row["top"]) if "top" in row else f"{number(row['kappa'])} / {number(row['bulk'])}"

  rows = [(name, *(cell(column.get(name)) for column in columns.values())) for name in ["none", *FITTED]]
  note = f"kappa / bulk, as `condition --help` explains; of the large layer the largest over the {TOP}th eigenvalue."
  return Table("Condition number of one layer's Hessian, digits", ("preconditioner", *columns), rows, (note,))


def plot(document: dict[str, Any], path: Path) -> None:
  """The spectra, largest eigenvalue first, relative to it."""
  from benchmarks.engine.plots import panels

  cases = columns_of(document)
  with panels(path, len(cases) // 2, 2, 3.3) as grid:
    for axes, (title, rows) in zip(grid.flat, cases.items(), strict=True):
      for name, row in rows.items():
        colour = "black" if name == "none" else f"C{list(FITTED).index(name)}"
        axes.plot(np.arange(1, 1 + len(row["spectrum"])), row["spectrum"], lw=1.3, color=colour, label=name)
      axes.set(title=title, yscale="log", xlabel="index", ylabel="|eigenvalue| / largest")


def run(args: Namespace) -> None:
  document = measure()
  publish(document, args.out / "condition.json", table(document))
  plot(document, args.out / "condition.png")
