# SPDX-License-Identifier: Apache-2.0
"""Looking in from outside: how P is doing, how many bytes it holds, whether a saved state fits."""

from dpsgd_optax.diagnostics.checkpoint import check_state_layout, state_layout
from dpsgd_optax.diagnostics.memory import bytes_per_device, state_bytes
from dpsgd_optax.diagnostics.off_diagonal import Diagonality, diagonality
from dpsgd_optax.diagnostics.state_report import report

__all__ = ["report"]  # of a state
__all__ += ["Diagonality", "diagonality"]  # of a Hessian
__all__ += ["bytes_per_device", "state_bytes"]  # before anything is allocated
__all__ += ["check_state_layout", "state_layout"]  # of a saved state
