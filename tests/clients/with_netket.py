# SPDX-License-Identifier: Apache-2.0
"""NetKet: the ground state of an Ising chain by `VMC`. It hands gradients and params to `update`, nothing else."""

import netket as nk
import numpy as np

SPINS, STEPS = 6, 40


def ground_state(optimizer, dtype):
  """Energy above the exact ground state."""
  hilbert = nk.hilbert.Spin(0.5, N=SPINS)
  hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(SPINS), h=1.0)
  model = nk.models.RBM(alpha=1, param_dtype=dtype)
  state = nk.vqs.MCState(nk.sampler.ExactSampler(hilbert), model, n_samples=256, seed=0, sampler_seed=1)
  driver = nk.driver.VMC(hamiltonian, optimizer.make(), variational_state=state)
  log = nk.logging.RuntimeLog()
  driver.run(STEPS, out=log, show_progress=False)
  return np.asarray(log.data["Energy"]["Mean"]).real - nk.exact.lanczos_ed(hamiltonian)[0]


def real(optimizer):
  return ground_state(optimizer, float)


def complex_params(optimizer):
  return ground_state(optimizer, complex)
