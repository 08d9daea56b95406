# SPDX-License-Identifier: Apache-2.0
"""The four problems on which Optax's own optimizers must converge."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from tests.conformance.rows import ROWS, one_step
from tests.table import first_leaf


def rosenbrock(params):
  (x, y) = params["b"]
  return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def parabola(target: Any) -> Callable[[Any], jax.Array]:
  return lambda params: sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, target)))


class Problem(NamedTuple):
  """Attributes:
  start, end: params and minimum.
  loss: params -> scalar.
  """

  start: Any
  end: Any
  loss: Callable[[Any], jax.Array]


def bowl(start: dict[str, Any], end: dict[str, Any]) -> Problem:
  start, end = (jax.tree.map(jnp.float32, tree, is_leaf=lambda x: isinstance(x, list)) for tree in (start, end))
  return Problem(start, end, parabola(end))


PROBLEMS = {
  "parabola": bowl({"b": [-1, 10, 1]}, {"b": [1, -1, 1]}),
  "Rosenbrock": Problem({"b": jnp.zeros(2)}, {"b": jnp.ones(2)}, rosenbrock),
  "matrix parabola": bowl({"w": [[0, 0], [0, 0]]}, {"w": [[3, -2], [1, 4]]}),
  "mixed tensors": bowl({"b": [0, 0, 0], "w": [[0, 0], [0, 0]]}, {"b": [1, -1, 2], "w": [[1, 0], [-1, 1]]}),
}

"""Those of optax's own suite, with its tolerance, its starting points and at most its 30000 steps."""

LENGTHS = {"Rosenbrock": 30_000}

CONVERGING: dict[str, Callable[[], Any]] = {
  "psgd whitening": lambda: dpo.psgd(1e-2),
  "psgd newton": lambda: dpo.psgd(0.1, dpo.kron(), dpo.newton(), every=1),
  "soap": lambda: dpo.psgd(1e-2, dpo.soap(max_skew=jnp.inf), b1=0.95, every=1),
  "levenberg_marquardt": lambda: dpo.levenberg_marquardt(optax.sgd(1e-3)),
  "chain": lambda: optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=optax.ema(0.9)),
    optax.clip_by_global_norm(1.0),
    optax.sgd(0.1),
  ),
  "gradient penalty": lambda: optax.chain(
    dpo.scale_by_preconditioner(dpo.diagonal(), dpo.newton(), momentum=dpo.add_gradient_norm_penalty(1e-5)),
    optax.clip_by_global_norm(1.0),
    optax.sgd(0.1),
  ),
  "bnp": lambda: dpo.bnp(1e-3),
  "gls": lambda: dpo.gls(0.1, fallback=optax.sgd(1e-3)),
  "sgd_ph": lambda: dpo.sgd_ph(0.05, first_leaf, tau=1.0, damping=0.1),
}

"""Learning rates, one for all four problems; the other rows converge as they stand in the table."""


def converges(problem: str) -> Callable[[str], None]:
  def promise(name: str) -> None:
    start, end, loss = PROBLEMS[problem]
    tx = CONVERGING.get(name, ROWS[name].make)()
    body = lambda carry, _: (one_step(tx, ROWS[name].extras, loss)(*carry)[:2], None)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=LENGTHS.get(problem, 3000))[0][0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=3e-2, atol=3e-2), run((start, tx.init(start))), end)

  return promise
