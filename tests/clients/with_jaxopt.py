# SPDX-License-Identifier: Apache-2.0
"""JAXopt: `OptaxSolver.run`, one `while_loop`. It hands gradients and params to `update`, nothing else."""

import jaxopt

from tests.clients.columns import regression, squares
from tests.clients.with_optax import network, start


def objective(params, data):
  return squares(network(params, data[0]), data[1])


def solve(optimizer):
  solver = jaxopt.OptaxSolver(objective, optimizer.make(), maxiter=60, tol=1e-6)
  params, _ = solver.run(start(), data=regression())
  return [objective(p, regression()) for p in (start(), params)]
