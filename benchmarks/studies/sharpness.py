# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalue of the Hessian where a kept run has ended."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import dpsgd_optax as dpo
from benchmarks.studies._kept import Found, Kept, add_arguments, run_all

__all__ = ["add_arguments", "run"]


def largest_eigenvalue(loss: Callable[[Any], jax.Array], params: Any, tolerance: float = 1e-3) -> float:
  """Of the Hessian of the loss: Lanczos by ARPACK, on Hessian-vector products."""
  from scipy.sparse.linalg import LinearOperator, eigsh

  flat, unravel = jax.flatten_util.ravel_pytree(params)
  product = jax.jit(lambda v: jax.flatten_util.ravel_pytree(dpo.hvp(loss, params)(unravel(v)))[0])
  matvec = lambda v: np.asarray(product(jnp.asarray(v.reshape(-1), flat.dtype)))
  operator = LinearOperator((flat.size, flat.size), matvec=matvec, dtype=np.dtype(flat.dtype))
  start = np.random.default_rng(0).normal(size=flat.size).astype(flat.dtype)
  return float(eigsh(operator, k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0])


def sharpness(kept: Kept, samples: int = 512) -> Found:
  """Of the training loss over the first samples, running statistics held."""
  problem = kept.problem
  params, statistics = problem.split(kept.saved.variables)
  batch = {name: jnp.asarray(array[:samples]) for name, array in problem.arrays.train.items()}
  loss = lambda p: problem.loss(problem.join(p, statistics), batch)
  return {"largest_eigenvalue": largest_eigenvalue(loss, jax.tree.map(jnp.asarray, params))}


run = partial(run_all, sharpness)
