# SPDX-License-Identifier: Apache-2.0
"""How `hessian_diagonal` and `sgd_ph` probe the diagonal of the Hessian: values for their argument `probe`."""

from dpsgd_optax.curvature.probing import DiagonalProbe, exact, ones, rademacher

__all__ = ["DiagonalProbe", "exact", "ones", "rademacher"]
