# SPDX-License-Identifier: Apache-2.0
"""How the factors of a Kronecker product move: arrays only, no trees, no keys, no λ.

``kron(geometry=…, normalizer=…)`` and its relatives take these values. A geometry says where the probe is looked at and
how a factor moves on its Lie group; a normalizer says what the step is divided by. `moves` has their equations.
"""

from dpsgd_optax.geometry.eigenbasis import Moments, Refresh, exact, kl, power_iteration, shampoo
from dpsgd_optax.geometry.moves import (
  Geometry,
  Normalizer,
  eq,
  gl,
  lipschitz,
  max_abs,
  pro,
  pro4p,
  qep,
  qeq,
  quad,
  quad4p,
  spectral,
)

__all__ = ["Geometry", "Moments", "Normalizer", "Refresh"]  # the types
__all__ += ["eq", "gl", "pro", "pro4p", "qep", "qeq", "quad", "quad4p"]  # geometries
__all__ += ["lipschitz", "max_abs", "spectral"]  # normalizers
__all__ += ["kl", "shampoo"]  # moments of `soap`
__all__ += ["exact", "power_iteration"]  # how its bases move
