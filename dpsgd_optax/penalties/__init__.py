# SPDX-License-Identifier: Apache-2.0
"""Regularisation of the loss, in the parameters or in the preconditioned variables: a position in the chain.

Source: arXiv:2410.00232.
"""

from dpsgd_optax.penalties.gradient import add_gradient_norm_penalty, gradient_norm, sharpness_aware
from dpsgd_optax.penalties.l1_l2 import add_l1_penalty, add_l2_penalty
from dpsgd_optax.penalties.proximal import proximal_l1, proximal_l2

__all__ = ["add_gradient_norm_penalty", "add_l1_penalty", "add_l2_penalty"]  # added to the gradient
__all__ += ["gradient_norm", "sharpness_aware"]  # a direction of the step
__all__ += ["proximal_l1", "proximal_l2"]  # after the step
