# SPDX-License-Identifier: Apache-2.0
"""Every preconditioner and every optimizer, one row each. To add a method: add a row; the laws and contracts follow."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import dpsgd_optax as dpo

# one matrix and one vector: two buckets, so that nothing holds only for a single leaf
PARAMS = {
  "b": jnp.array([0.3, -0.2]),
  "w": jnp.array([[0.5, -0.4], [0.1, 0.8], [-0.7, 0.2]]),
}
SIZE = 8


def scaling() -> dpo.Preconditioner:
  """A group of one array as a user would write it: P = diag(p), each entry |v| / |h| averaged. For `raveled`."""

  def fit(p, probe, *, key):
    v = jnp.ones_like(p) if probe.vector is None else probe.vector
    return 0.9 * p + 0.1 * jnp.abs(v) / (jnp.abs(probe.product) + 0.1)

  return dpo.Preconditioner(lambda x: jnp.ones(x.shape, x.dtype), fit, lambda p, x: p * x)


def undamped(left, right, c):
  """A `form` of a user's own: U = Pbar_L G Pbar_R, whatever the damping."""
  return 0 * c, 0 * c, 0 * c


PRECONDITIONERS: dict[str, Callable[..., dpo.Preconditioner]] = {
  "diagonal": dpo.diagonal,
  "kron": dpo.kron,
  "kron pro": functools.partial(dpo.kron, geometry=dpo.pro, max_skew=jnp.inf),
  "kron eq": functools.partial(dpo.kron, geometry=dpo.eq, max_skew=jnp.inf),
  "kron quad": functools.partial(dpo.kron, geometry=dpo.quad, max_skew=jnp.inf),
  "kron qeq": functools.partial(dpo.kron, geometry=dpo.qeq, max_skew=jnp.inf),
  "kron qep": functools.partial(dpo.kron, geometry=dpo.qep, max_skew=jnp.inf),
  "kron quad4p": functools.partial(dpo.kron, geometry=dpo.geometry.quad4p, max_skew=jnp.inf),
  "kron pro4p": functools.partial(dpo.kron, geometry=dpo.geometry.pro4p, max_skew=jnp.inf),
  "dense": dpo.dense,
  "dense qeq": functools.partial(dpo.dense, geometry=dpo.qeq),
  "dense eq": functools.partial(dpo.dense, geometry=dpo.eq),
  "dense gl": functools.partial(dpo.dense, geometry=dpo.geometry.gl),
  "affine": functools.partial(dpo.affine, max_skew=jnp.inf),
  "scan": dpo.scan,
  "scaw": dpo.scaw,
  "lra": functools.partial(dpo.lra, rank=3),
  "lra rank 0": functools.partial(dpo.lra, rank=0),
  "xmat": dpo.xmat,
  "damped_kron factored": dpo.damped_kron,
  "damped_kron additive": functools.partial(dpo.damped_kron, form=dpo.tikhonov.additive),
  "damped_kron undamped": functools.partial(dpo.damped_kron, form=undamped, average=None, geometry=dpo.eq),
  "raveled": lambda **_: dpo.raveled(scaling()),
  "blocked": lambda **options: dpo.blocked(dpo.kron(max_skew=jnp.inf, **options), 2),  # w in two blocks, 2 x 2, 1 x 2
  "second_moment": lambda **_: dpo.second_moment(),
  "diagonal_newton": lambda **_: dpo.diagonal_newton(),
  "soap": lambda **_: dpo.soap(max_skew=jnp.inf, basis_every=2),
  "soap factored": lambda **_: dpo.soap(max_skew=jnp.inf, moments=dpo.geometry.kl, factored=True),
}
DESCENDING = [
  name
  for name in PRECONDITIONERS
  if name.split()[0] not in ("raveled", "second_moment", "diagonal_newton", "soap")
  and name not in ("damped_kron factored", "damped_kron additive")
]
"""Those whose fit descends the criterion: no average, no damping of the factors."""


BATCH = 4  # experiments side by side in one compiled fit; compiling is what these tests cost


def draw(seed: int, *lead: int) -> Any:
  """Normal numbers like PARAMS with leading axes."""
  rng = np.random.default_rng(seed)
  return {k: rng.standard_normal((*lead, *x.shape)).astype(np.float32) for k, x in PARAMS.items()}


@functools.cache
def _fit(name: str) -> Callable:
  def one(state, v, h, key, damping, step_size):
    p = PRECONDITIONERS[name](step_size=step_size)
    return p.fit(state, dpo.Probe(v, h), key=jax.random.wrap_key_data(key), damping=damping)

  return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None)))


@functools.cache
def _matrix(family: str) -> Callable:
  p = PRECONDITIONERS[{"damped_kron": "damped_kron factored"}.get(family, family)]()
  flat, unravel = ravel_pytree(PARAMS)
  columns = jax.vmap(lambda state, e: ravel_pytree(p.apply(state, unravel(e)))[0], in_axes=(None, 0))
  return jax.jit(jax.vmap(lambda state: columns(state, jnp.eye(flat.size)).T))


def start(name: str) -> Any:
  """BATCH equal states."""
  return jax.tree.map(lambda x: jnp.stack([x] * BATCH), PRECONDITIONERS[name]().init(PARAMS))


def fit(name: str, state: Any, v: Any, h: Any, *, key: int = 0, damping: Any = 0.0, step_size: Any = 0.1) -> Any:
  """Fits on pairs with leading axes (steps, BATCH); v None: integrated out. ``step_size`` may be one per step."""
  steps = h["w"].shape[0]
  keys = np.random.default_rng(key).integers(0, 2**32, (steps, BATCH, 2), np.uint32)
  sizes = np.broadcast_to(np.float32(step_size), (steps,))
  damping = np.broadcast_to(np.float32(damping), (BATCH,))
  at = lambda tree, t: jax.tree.map(lambda x: np.asarray(x[t], np.float32), tree)
  for t in range(steps):
    state = _fit(name)(state, at(v, t), at(h, t), keys[t], damping, sizes[t])
  return state


def matrix(name: str, state: Any) -> np.ndarray:
  """P as (BATCH, SIZE, SIZE) in the coordinates of ``ravel_pytree(PARAMS)``: b, then w row by row."""
  family = name if name.startswith("soap") else name.split()[0]
  return np.asarray(_matrix(family)(state), np.float64)


def flat(tree: Any) -> np.ndarray:
  """(..., SIZE) in the same coordinates."""
  lead = tree["w"].shape[:-2]
  return np.concatenate([np.reshape(tree[k], (*lead, -1)) for k in ("b", "w")], -1)


def unflat(x: np.ndarray) -> Any:
  return {"b": x[..., :2], "w": x[..., 2:].reshape(*x.shape[:-1], 3, 2)}


class Row(NamedTuple):
  """Attributes:
  make: constructor; takes further keyword arguments.
  extras: what ``update`` needs beside the params.
  takes_key: whether it has probes, and so a preconditioner.
  skips: the counter that a gradient with a NaN moves.
  bound: the largest root mean square of an update of one leaf, or None.
  """

  make: Callable[..., optax.GradientTransformationExtraArgs]
  extras: frozenset[str]
  takes_key: bool = True
  skips: str = "skipped"
  bound: float | None = None


def chained(**kwargs):
  return optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=optax.ema(0.9), **kwargs),
    optax.scale_by_learning_rate(0.1),
  )


def marquardt(**kwargs):
  return dpo.levenberg_marquardt(optax.sgd(0.1), **kwargs)


def penalised(**options):
  """Regularised between fit and P, where the transform sees P."""
  penalty = dpo.add_gradient_norm_penalty(0.01, preconditioned=True)
  return optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=penalty, every=2, **options),
    optax.scale_by_learning_rate(0.1),
  )


def first_leaf(params):
  """The first leaf, whatever the tree: a vector in PARAMS."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten([i == 0 for i in range(len(leaves))])


OPTIMIZERS = {
  "psgd whitening": Row(functools.partial(dpo.psgd, 0.1), frozenset(), bound=0.2),
  "psgd newton": Row(functools.partial(dpo.psgd, 0.1, dpo.kron(), dpo.newton()), frozenset({"hvp"}), bound=0.2),
  "soap": Row(functools.partial(dpo.psgd, 0.1, dpo.soap(max_skew=jnp.inf), every=1), frozenset(), bound=0.2),
  "soap newton": Row(
    functools.partial(dpo.psgd, 0.1, dpo.soap(basis_every=2), dpo.newton()), frozenset({"hvp"}), bound=0.2
  ),
  "dpsgd": Row(
    functools.partial(dpo.dpsgd, 0.1, judge_every=2),
    frozenset({"hvp", "value", "value_fn"}),
    bound=0.1 * 0.1 * SIZE**0.5,
  ),
  "dpsgd undamped": Row(
    functools.partial(dpo.dpsgd, 0.1, dpo.damped_kron(average=None), damping=None),
    frozenset({"hvp"}),
    bound=0.1 * 0.1 * SIZE**0.5,
  ),
  "levenberg_marquardt": Row(marquardt, frozenset({"value", "value_fn"}), takes_key=False, skips="rejected"),
  "chain": Row(chained, frozenset({"hvp"})),
  "sgd_ph": Row(functools.partial(dpo.sgd_ph, 0.05, first_leaf), frozenset({"hvp"})),
  "gradient penalty": Row(penalised, frozenset({"hvp"})),
  "bnp": Row(functools.partial(dpo.bnp, 0.05), frozenset({"layer_inputs"}), takes_key=False),
  "gauss_newton": Row(dpo.gauss_newton, frozenset({"residual_fn"})),
  "gls": Row(functools.partial(dpo.gls, 0.1, fallback=optax.sgd(0.1)), frozenset({"layer_inputs"}), takes_key=False),
}


def loss(params):
  """Smooth, neither quadratic nor convex."""
  return jnp.sum((jnp.tanh(params["w"]) @ params["b"] - 1.0) ** 2) + 0.1 * jnp.sum(params["w"] ** 2)


def layer_inputs(params):
  """What enters the layer ("w", "b"), if the tree has one: four rows. The loss need not be that of a network."""
  if not isinstance(params, dict) or not hasattr(params.get("w"), "shape"):
    return {}
  return {"w": np.random.default_rng(0).standard_normal((4, params["w"].shape[0])).astype(np.float32)}


def residual_of(of: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
  """A function params ↦ r with ½ Σ r² the loss ``of``; one number, √(2 L), for a loss that is not known."""
  if of is loss:
    return lambda p: jnp.concatenate(
      [2**0.5 * (jnp.tanh(p["w"]) @ p["b"] - 1.0), jnp.sqrt(0.2) * p["w"].astype(p["b"].dtype).ravel()]
    )
  return lambda p: jnp.sqrt(2 * jnp.maximum(of(p), 1e-12))


class Fault(NamedTuple):
  """What goes wrong in a step. Added to the gradient, to Hv, the loss at θ, the loss at θ + s, the layer inputs.

  Of gradient and Hv a number is added to the first entry, a vector to all SIZE of them. ``scale`` multiplies both: 0
  makes a step in which nothing is learned.
  """

  gradient: Any = 0.0
  product: Any = 0.0
  value: Any = 0.0
  ahead: Any = 0.0
  scale: Any = 1.0
  inputs: Any = 0.0

  def arrays(self) -> "Fault":
    first = np.arange(SIZE) == 0
    spread = lambda x: np.where(first | (np.ndim(x) > 0), x, 0).astype(np.float32)
    rest = {name: np.float32(getattr(self, name)) for name in ("value", "ahead", "scale", "inputs")}
    return Fault(spread(self.gradient), spread(self.product), **rest)


def spoil(tree: Any, fault: jax.Array, scale: Any) -> Any:
  flat, unravel = ravel_pytree(tree)  # a product may have holes: then only the first entries are there
  return jax.tree.map(lambda x, f: scale * x + f, tree, unravel(fault[: flat.size]))


class Compiled(NamedTuple):
  """A row, its transform, and its one compiled step (params, state, fault) -> (params, state, updates)."""

  row: Row
  tx: optax.GradientTransformationExtraArgs
  step: Callable[..., Any]
  traces: list[int]

  def run(self, params: Any, state: Any, faults: list[Fault]):
    updates = None
    for fault in faults:
      params, state, updates = self.step(params, state, fault.arrays())
    return params, state, updates


def counted(function: Callable) -> tuple[Callable, list[int]]:
  """The function under ``jit``, and a list that grows whenever it is traced: longer than one, it was compiled again."""
  traces: list[int] = []

  @functools.wraps(function)
  def traced(*args, **kwargs):
    traces.append(1)
    return function(*args, **kwargs)

  return jax.jit(traced), traces


@functools.cache
def compiled(name: str) -> Compiled:
  """Compiling is what these tests cost: one program for each row, in each process."""
  row = OPTIMIZERS[name]
  tx = row.make()

  def step(params, state, fault):
    value, grads = jax.value_and_grad(loss)(params)
    hvp = dpo.hvp(loss, params)
    offers = {
      "value": value + fault.value,
      "value_fn": lambda p: loss(p) + fault.ahead,
      "hvp": lambda v: spoil(hvp(v), fault.product, fault.scale),
      "layer_inputs": jax.tree.map(lambda x: x + fault.inputs, layer_inputs(params)),
      "residual_fn": dpo.residuals(lambda p: residual_of(loss)(p) * fault.scale + fault.value).at(params),
    }
    extras = {k: v for k, v in offers.items() if k in row.extras}
    updates, state = tx.update(spoil(grads, fault.gradient, fault.scale), state, params, **extras)
    return optax.apply_updates(params, updates), state, updates

  return Compiled(row, tx, *counted(step))
