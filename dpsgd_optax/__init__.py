# SPDX-License-Identifier: Apache-2.0
"""Damped preconditioned SGD and its relatives as pure Optax gradient transformations.

DPSGD here is *damped preconditioned* SGD, not differentially private SGD (that is ``optax.contrib.dpsgd``).
Flax helpers live in ``dpsgd_optax.training``, which is not imported here.
"""

from dpsgd_optax._trees.selection import is_vector
from dpsgd_optax.base import Curvature, Preconditioner, Probe
from dpsgd_optax.curvature.diagonal import hessian_diagonal
from dpsgd_optax.curvature.fused import value_and_grad_and_hvp, value_and_grad_then_hvp
from dpsgd_optax.curvature.observers import layer_inputs, newton, whitening
from dpsgd_optax.curvature.products import ggnvp, hvp, hvp_finite_difference
from dpsgd_optax.diagnostics.checkpoint import STATE_VERSION, check_state_layout, state_layout
from dpsgd_optax.diagnostics.memory import state_bytes
from dpsgd_optax.diagnostics.off_diagonal import Diagonality, diagonality
from dpsgd_optax.diagnostics.state_report import report
from dpsgd_optax.geometry.moves import eq, gl, lipschitz, max_abs, pro, pro4p, qep, qeq, quad, quad4p, spectral
from dpsgd_optax.layers.capture import capture
from dpsgd_optax.layers.irls import irls_fit
from dpsgd_optax.layers.moments import channel_moments, second_moments
from dpsgd_optax.layers.record import LayerRecord
from dpsgd_optax.layers.step_length import clip_output_change, match_layers, match_total
from dpsgd_optax.optimizers.bnp import bnp
from dpsgd_optax.optimizers.dpsgd import dpsgd
from dpsgd_optax.optimizers.gls import gls
from dpsgd_optax.optimizers.psgd import psgd
from dpsgd_optax.optimizers.sgd_ph import sgd_ph
from dpsgd_optax.parallel import data_parallel
from dpsgd_optax.penalties.gradient import add_gradient_norm_penalty, gradient_norm, sharpness_aware
from dpsgd_optax.penalties.l1_l2 import add_l1_penalty, add_l2_penalty
from dpsgd_optax.penalties.proximal import proximal_l1, proximal_l2
from dpsgd_optax.preconditioners._lift import per_leaf, raveled
from dpsgd_optax.preconditioners.affine import affine, scan, scaw
from dpsgd_optax.preconditioners.batch_norm import batch_norm, expected_scale
from dpsgd_optax.preconditioners.blocked import blocked
from dpsgd_optax.preconditioners.damped_kron import damped_kron
from dpsgd_optax.preconditioners.dense import dense
from dpsgd_optax.preconditioners.diagonal import diagonal
from dpsgd_optax.preconditioners.diagonal_newton import by_cycles, by_visits, diagonal_newton
from dpsgd_optax.preconditioners.kron import kron
from dpsgd_optax.preconditioners.least_squares import least_squares
from dpsgd_optax.preconditioners.lra import lra
from dpsgd_optax.preconditioners.second_moment import second_moment
from dpsgd_optax.preconditioners.xmat import xmat
from dpsgd_optax.probes import exact, ones, rademacher
from dpsgd_optax.sharding import partition_specs, sharded
from dpsgd_optax.tikhonov import additive, factored, recursive, two_tap, undamped
from dpsgd_optax.transforms.clipping import clip_spikes, clipped_learning_rate
from dpsgd_optax.transforms.fitted import Fitted
from dpsgd_optax.transforms.levenberg_marquardt import adapt_damping, levenberg_marquardt
from dpsgd_optax.transforms.precondition import annealed_probability, scale_by_preconditioner
from dpsgd_optax.transforms.reduction_models import half_slope, newton_model, quadratic_model

__version__ = "0.1.0"

__all__ = [
  "STATE_VERSION",
  "Curvature",
  "Diagonality",
  "Fitted",
  "LayerRecord",
  "Preconditioner",
  "Probe",
  "adapt_damping",
  "add_gradient_norm_penalty",
  "add_l1_penalty",
  "add_l2_penalty",
  "additive",
  "affine",
  "annealed_probability",
  "batch_norm",
  "blocked",
  "bnp",
  "by_cycles",
  "by_visits",
  "capture",
  "channel_moments",
  "check_state_layout",
  "clip_output_change",
  "clip_spikes",
  "clipped_learning_rate",
  "damped_kron",
  "data_parallel",
  "dense",
  "diagonal",
  "diagonal_newton",
  "diagonality",
  "dpsgd",
  "eq",
  "exact",
  "expected_scale",
  "factored",
  "ggnvp",
  "gl",
  "gls",
  "gradient_norm",
  "half_slope",
  "hessian_diagonal",
  "hvp",
  "hvp_finite_difference",
  "irls_fit",
  "is_vector",
  "kron",
  "layer_inputs",
  "least_squares",
  "levenberg_marquardt",
  "lipschitz",
  "lra",
  "match_layers",
  "match_total",
  "max_abs",
  "newton",
  "newton_model",
  "ones",
  "partition_specs",
  "per_leaf",
  "pro",
  "pro4p",
  "proximal_l1",
  "proximal_l2",
  "psgd",
  "qep",
  "qeq",
  "quad",
  "quad4p",
  "quadratic_model",
  "rademacher",
  "raveled",
  "recursive",
  "report",
  "scale_by_preconditioner",
  "second_moment",
  "second_moments",
  "sgd_ph",
  "sharded",
  "sharpness_aware",
  "scan",
  "scaw",
  "spectral",
  "state_bytes",
  "state_layout",
  "two_tap",
  "undamped",
  "value_and_grad_and_hvp",
  "value_and_grad_then_hvp",
  "whitening",
  "xmat",
]
