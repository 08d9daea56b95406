# SPDX-License-Identifier: Apache-2.0
"""How the factors of a Kronecker product move: arrays only, no trees, no keys, no λ.

``kron(geometry=…, normalizer=…)`` and its relatives take these values. A geometry says where the probe is looked at and
how a factor moves on its Lie group; a normalizer says what the step is divided by.

  geometry   moves                                 needs
  ``eq``     an upper triangular Q                 triangular solves
  ``gl``     any invertible Q, ``dense`` only      its inverse, kept
  ``qep``    Q, from the left                      matrix products
  ``qeq``    Q, from the right                     matrix products
  ``quad``   Q Hermitian positive, both sides      matrix products
  ``pro``    Q nearly Hermitian, by a rotation     matrix products
  ``quad4p`` P itself, both sides                  matrix products, a float32 state
  ``pro4p``  P itself, by rotations                matrix products, a float32 state
"""

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

__all__ = ["Geometry", "Normalizer"]  # the types
__all__ += ["eq", "gl", "pro", "pro4p", "qep", "qeq", "quad", "quad4p"]  # geometries
__all__ += ["lipschitz", "max_abs", "spectral"]  # normalizers
