# SPDX-License-Identifier: Apache-2.0
"""Damped preconditioned SGD and its relatives as pure Optax gradient transformations.

DPSGD here is *damped preconditioned* SGD, not differentially private SGD (that is ``optax.contrib.dpsgd``).

One step is observe → fit → apply: a curvature is observed, a preconditioner P is fitted to it, P is applied to the
gradient. The names below follow that order. More stands in submodules: ``geometry``, ``tikhonov``, ``probes`` (values
for preconditioners and curvatures), ``penalties``, ``layers``, ``diagnostics``, and ``training`` for Flax, which is
imported by name: ``from dpsgd_optax import training``.
"""

from dpsgd_optax import diagnostics, geometry, layers, penalties, probes, solvers, tikhonov
from dpsgd_optax._trees.selection import is_vector
from dpsgd_optax.base import Preconditioner, Probe
from dpsgd_optax.curvature.diagonal import hessian_diagonal
from dpsgd_optax.curvature.fused import value_and_grad_and_hvp, value_and_grad_then_ggnvp, value_and_grad_then_hvp
from dpsgd_optax.curvature.log_derivatives import log_derivatives
from dpsgd_optax.curvature.observers import layer_inputs, newton, whitening
from dpsgd_optax.curvature.products import ggnvp, hvp, hvp_finite_difference
from dpsgd_optax.curvature.residuals import residuals
from dpsgd_optax.diagnostics import diagonality, report, state_bytes
from dpsgd_optax.geometry import eq, pro, qep, qeq, quad
from dpsgd_optax.layers import LayerRecord
from dpsgd_optax.layers.capture import capture
from dpsgd_optax.layers.irls import irls_fit
from dpsgd_optax.optimizers.bnp import bnp
from dpsgd_optax.optimizers.dpsgd import dpsgd
from dpsgd_optax.optimizers.gauss_newton import gauss_newton
from dpsgd_optax.optimizers.gls import gls
from dpsgd_optax.optimizers.psgd import psgd
from dpsgd_optax.optimizers.sgd_ph import sgd_ph
from dpsgd_optax.parallel import data_parallel
from dpsgd_optax.penalties import add_gradient_norm_penalty, gradient_norm
from dpsgd_optax.preconditioners._lift import per_leaf
from dpsgd_optax.preconditioners._views import raveled
from dpsgd_optax.preconditioners.affine import affine, scan, scaw
from dpsgd_optax.preconditioners.batch_norm import batch_norm
from dpsgd_optax.preconditioners.blocked import blocked
from dpsgd_optax.preconditioners.damped_kron import damped_kron
from dpsgd_optax.preconditioners.dense import dense
from dpsgd_optax.preconditioners.diagonal import diagonal
from dpsgd_optax.preconditioners.diagonal_newton import diagonal_newton
from dpsgd_optax.preconditioners.kron import kron
from dpsgd_optax.preconditioners.least_squares import least_squares
from dpsgd_optax.preconditioners.lra import lra
from dpsgd_optax.preconditioners.second_moment import second_moment
from dpsgd_optax.preconditioners.soap import soap
from dpsgd_optax.preconditioners.xmat import xmat
from dpsgd_optax.sharding import partition_specs, sharded
from dpsgd_optax.transforms.clipping import clip_spikes, clipped_learning_rate
from dpsgd_optax.transforms.damping_rule import adapt_damping
from dpsgd_optax.transforms.levenberg_marquardt import levenberg_marquardt
from dpsgd_optax.transforms.precondition import annealed_probability, scale_by_preconditioner
from dpsgd_optax.transforms.reduction_models import half_slope, newton_model, quadratic_model
from dpsgd_optax.transforms.trust_region import trust_region

__version__ = "0.1.0"

# Optimizers, ready made.
__all__ = ["dpsgd", "psgd", "sgd_ph", "bnp", "gls", "gauss_newton"]
# OBSERVE: what P is fitted on, the products it is made of, and what enters a layer.
__all__ += ["whitening", "newton", "hessian_diagonal", "layer_inputs", "residuals", "log_derivatives"]
__all__ += ["hvp", "ggnvp", "hvp_finite_difference", "value_and_grad_and_hvp", "value_and_grad_then_hvp"]
__all__ += ["value_and_grad_then_ggnvp"]
__all__ += ["LayerRecord", "capture", "is_vector"]
# FIT, APPLY: how P is shaped, and how to write another.
__all__ += ["kron", "affine", "scan", "scaw", "diagonal", "dense", "lra", "xmat", "soap", "blocked"]
__all__ += ["damped_kron", "diagonal_newton", "second_moment", "least_squares", "batch_norm"]
__all__ += ["eq", "qep", "qeq", "quad", "pro"]
__all__ += ["Preconditioner", "Probe", "per_leaf", "raveled"]
# THE STEP: transforms for `optax.chain`.
__all__ += ["scale_by_preconditioner", "annealed_probability", "clip_spikes", "clipped_learning_rate"]
__all__ += ["levenberg_marquardt", "adapt_damping", "half_slope", "newton_model", "quadratic_model", "trust_region"]
__all__ += ["add_gradient_norm_penalty", "gradient_norm"]
# Many devices.
__all__ += ["data_parallel", "sharded", "partition_specs"]
# Looking in, and a least-squares solver of single layers.
__all__ += ["report", "diagonality", "state_bytes", "irls_fit"]
# Submodules.
__all__ += ["diagnostics", "geometry", "layers", "penalties", "probes", "solvers", "tikhonov"]
