# SPDX-License-Identifier: Apache-2.0
"""The claims of GLS, of regularisation and batch-norm preconditioning, and of SGD with partial Hessian."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from benchmarks.engine.analysis import Spread
from benchmarks.studies._claims import (
  REFUTED,
  Case,
  Figure,
  Law,
  Measured,
  Not,
  Rule,
  above,
  below,
  claim,
  counted,
  document,
  final_difference,
  final_ratio,
  of_lists,
  of_quartiles,
)

# GLS: the races of the study `gls`.


def _gls(problem: str, label: str, other: str, rule: Rule, curve: str = "train_loss") -> Figure:
  def ratios(found: dict[str, Any]) -> list[float]:
    ours, theirs = (found["races"][problem]["contestants"][name][curve] for name in (label, other))
    return [a / b for a, b in zip(ours, theirs, strict=True)]

  what = f"{curve.replace('_', ' ')}, {label} over {other}, {problem}"
  return Figure(what, rule, of_lists("gls", "python -m benchmarks gls", ratios))


def _rate(problem: str) -> Figure:
  def chosen(found: dict[str, Any]) -> list[float]:
    trials = found["races"][problem]["contestants"]["GLS"]["trials"]
    return [float(min((loss, rate) for rate, loss in trials.items() if loss is not None)[1])]

  return Figure(
    f"the best rate of five, {problem}",
    Rule(0.1, 0.4),
    of_lists("gls", "python -m benchmarks gls", chosen, "tuning seeds"),
  )


def _lost(found: dict[str, Any]) -> list[float]:
  """Rates of plain GLS that end above the first loss of the run, or nowhere."""
  of = found["races"]["ae_digits"]["contestants"]["GLS, plain"]
  return [sum(loss is None or loss > of["curve"][0] for loss in of["trials"].values())]


MLPS = ("mlp_mnist", "mlp_cifar10(batches=1)", "digits", "uci")
GLS = (
  claim(
    "At equal epochs GLS trains to a lower loss than Adam.",
    *(_gls(problem, "GLS", "Adam", below(1.0)) for problem in MLPS),
  ),
  claim(
    "And than SGD.",
    *(_gls(problem, "GLS", "SGD", below(1.0)) for problem in MLPS),
  ),
  claim(
    "Even with every step cut to the length of SGD's it ends below SGD.",
    *(_gls(problem, "GLS, length of SGD", "SGD", below(1.0)) for problem in ("mlp_mnist", "digits", "uci")),
  ),
  claim(
    "An epoch takes 4.3 s where Adam's takes 2.6 s (1.65 times).",
    *(
      Figure(
        f"seconds of a step, over Adam's, {problem}",
        below(1.65),
        of_quartiles(
          "gls", "python -m benchmarks gls", ("cost", problem, "ratios", "GLS", "cpu"), ("cost", problem, "rounds")
        ),
      )
      for problem in MLPS[:2]
    ),
  ),
  claim(
    "It over-fits: its loss on unseen data ends above Adam's.",
    *(_gls(problem, "GLS", "Adam", above(1.0), "test_loss") for problem in MLPS),
  ),
  claim("Good learning rates are 0.1 to 0.4.", *(_rate(problem) for problem in MLPS)),
  claim(
    "It is unstable for badly chosen numbers.",
    Figure(
      "rates of five that end above the initial loss, plain GLS, ae_digits",
      above(0.0),
      of_lists("gls", "python -m benchmarks gls", _lost, "tuning seeds"),
    ),
  ),
  claim(
    "It is poor where a layer is wider than its input, as in an autoencoder (the note of 2022).",
    *(_gls(problem, "GLS, plain", "Adam", above(1.0)) for problem in ("ae_digits", "curves")),
    Law(
      "laws/test_least_squares.py::test_a_wide_output_makes_the_step_too_long_and_the_mends_shorten_it",
      "the step is too long by what the outputs have in common",
    ),
  ),
  claim(
    "Autoencoders are its best case: below Adam and SGD (the note of 2023).",
    *(
      _gls(problem, "GLS, whitening and trust region", other, below(1.0))
      for problem, other in itertools.product(("ae_digits", "curves"), ("Adam", "SGD"))
    ),
  ),
  claim(
    "It resembles Newton's method and needs no second derivatives.",
    Law(
      "laws/test_least_squares.py::test_it_is_newtons_step_for_one_linear_layer",
      "on one linear layer it is Newton's step",
    ),
    Law(
      "unit/test_layer_inputs.py::test_unchanged_models_take_a_step_of_gls",
      "the step is given gradients and inputs alone",
    ),
  ),
  claim(
    "It applies to convolutions.",
    Law(
      "laws/test_least_squares.py::test_a_convolution_is_solved_as_the_dense_layers_of_its_patches",
      "a convolution is the dense layer of its patches",
    ),
    Not("the note's convolutional network on CIFAR-10: GLS is not raced on one here"),
  ),
  claim(
    "The one-layer forerunner solves a reweighted least-squares problem whose fixed points are stationary.",
    Law("unit/test_irls.py::test_a_fixed_point_is_a_stationary_point_of_the_true_loss", "the gradient vanishes"),
    Law(
      "unit/test_irls.py::test_a_linear_link_is_ordinary_least_squares_in_one_sweep", "one sweep if the link is linear"
    ),
  ),
  claim(
    "That forerunner takes some hundred times fewer steps than Adam.",
    Not("`irls_fit` stands in the study `gls` with its losses; its steps are not kept in the results"),
  ),
)

# Regularisation under a preconditioner, and BNP.


def _best(variant: dict[str, Any]) -> list[float]:
  """Quartiles of the accuracy at the strength of the best median."""
  return max(variant["accuracy"], key=lambda row: row[1])


def _penalties(ours: str, theirs: str) -> Figure:
  def measure(folder: Path) -> Measured:
    found = document(folder, "regularization")
    variants = found["optimizers"]["adam"]["variants"]
    (low, median, high), (their_low, their_median, their_high) = (_best(variants[name]) for name in (ours, theirs))
    box = Spread(median - their_median, low - their_high, high - their_low)  # the two boxes are all that is kept
    return Measured(box, counted(found["plan"]["seeds"], "seeds"), "python -m benchmarks regularization")

  what = f"test accuracy at the best strength, box of {ours} less box of {theirs}, Adam, 200 digits"
  return Figure(what, above(0.0), measure)


def _conditions(what: str, rows: tuple[tuple[str, str, str], tuple[str, str, str]]) -> tuple[Case, ...]:
  """κ of a layer under one row (network, P) over that under another."""

  def measure(layer: str):
    def ratio(found: dict[str, Any]) -> list[float]:
      (net, p, _), (other, q, _) = rows
      return [found["dense"][layer][net][p]["kappa"] / found["dense"][layer][other][q]["kappa"]]

    return of_lists("condition", "python -m benchmarks condition", ratio, "networks")

  layers = ("hidden layer", "output layer")
  return tuple(Figure(f"condition number, {what}, {layer}", below(1.0), measure(layer)) for layer in layers)


def _batches(size: str, other: str, rule: Rule, curve: str) -> Figure:
  def form(found: dict[str, Any]) -> list[float]:
    ours, theirs = (found["batch_sizes"][size][name][curve] for name in ("BNP", other))
    pairs = zip(ours, theirs, strict=True)
    return [a - b for a, b in pairs] if curve == "test_accuracy" else [a / b for a, b in pairs]

  how = f"BNP less {other}" if curve == "test_accuracy" else f"BNP over {other}"
  command = "python -m benchmarks batch_sizes"
  return Figure(
    f"{curve.replace('_', ' ')}, {how}, batches of {size}, digits", rule, of_lists("batch_sizes", command, form)
  )


PLAIN, NORMED = ("plain", "none", ""), ("batch norm", "none", "")
REGULARIZATION = (
  claim(
    "Preconditioned descent is gradient descent in the variable z = P^(−½) θ.",
    Law("golden/test_golden_regularization.py::test_a_fixed_preconditioner_is_gradient_descent_in_z", "step by step"),
  ),
  claim(
    "AdaGrad, RMSProp and Adam are such methods with a diagonal P.",
    Law("unit/test_regularization.py::test_the_adaptive_methods_are_those_of_optax", "the steps are those of optax"),
  ),
  claim(
    "AdamW's decay is the L2 penalty of z.",
    Law("unit/test_regularization.py::test_decoupled_decay_is_l2_in_preconditioned_variables", "the same step"),
  ),
  claim(
    "The L1 penalty has such a twin in z.",
    Law("unit/test_regularization.py::test_l1_in_z_is_gradient_descent_in_z", "the same step"),
    Law(
      "unit/test_regularization.py::test_proximal_l1_gives_exact_zeros_and_the_explicit_form_does_not",
      "with exact zeros",
    ),
  ),
  claim(
    "Gradient regularisation can be put on θ or on z.",
    Law(
      "unit/test_regularization.py::test_the_gradient_penalty_in_z_is_the_derivative_of_the_penalised_loss",
      "the gradient of the penalised loss",
    ),
  ),
  claim(
    "An adaptive diagonal improves the condition of the Hessian.",
    *_conditions("Adam's second moment over none", (("plain", "second_moment, gradients", ""), PLAIN)),
  ),
  claim(
    "Batch normalisation improves the condition of the Hessian.",
    *_conditions("batch norm over a plain network", (NORMED, PLAIN)),
  ),
  claim("L2 of z generalises better than L2 of θ.", _penalties("L2 in z (AdamW)", "L2 in θ, seen by the fit")),
  claim("L1 of z generalises better than L1 of θ.", _penalties("L1 in z, proximal", "L1 in θ, seen by the fit")),
  claim(
    "Gradient regularisation of z generalises better than that of θ.",
    _penalties("gradient norm in z", "gradient norm in θ"),
  ),
  claim(
    "Centring and scaling a layer's inputs never worsens the condition that BNP works on.",
    Law("laws/test_batch_norm.py::test_the_condition_number_inequalities", "κ of the extended inputs"),
  ),
  claim(
    "BNP does to the gradients what batch normalisation does to the activations.",
    Law("laws/test_batch_norm.py::test_bnp_is_the_step_of_a_batch_normalized_network_mapped_back", "the same step"),
  ),
  claim(
    "BNP helps as much as batch normalisation.",
    *(_batches(size, "batch norm", below(1.0), "train_loss") for size in ("128", "16")),
    *(_batches(size, "batch norm", above(-0.01), "test_accuracy") for size in ("128", "16")),
  ),
  claim(
    "It also works where batch normalisation does not: batches of a few samples, or of one.",
    *(
      _batches(size, other, below(1.0), "train_loss")
      for size, other in itertools.product(("4", "1"), ("batch norm", "plain"))
    ),
    Law("laws/test_batch_norm.py::test_batches_of_one_give_the_statistics_of_the_stream", "its statistics run on"),
  ),
  claim(
    "The local rate of convergence is governed by the condition number of PᵀHP.",
    Not("a theorem about the last steps; the condition numbers are measured, the rates are not"),
  ),
)

# SGD with partial Hessian.

BN = "digits_bn-tuned"


def _diagonality(norm: str, point: str) -> Figure:
  def shares(found: dict[str, Any]) -> list[float]:
    tensors = found["problems"][f"digits_bn(norm={norm})"]["tensors"].values()
    return [statistics.median(of[point]["share"]) for of in tensors]

  when = {"initial": "at the start", "trained": "after 100 steps"}[point]
  return Figure(
    f"off-diagonal share of the Hessian's norm, {norm} norm, {when}",
    below(0.1),
    of_lists("diagonality", f'python -m benchmarks diagonality "digits_bn(norm={norm})"', shares, "tensors"),
  )


def _ph(what: str, rule: Rule, measure) -> tuple[Case, ...]:
  variants = {"sgd_ph": "random signs", "sgd_ph_tau": "larger τ", "sgd_ph_released": "as released"}
  return tuple(Figure(f"{what}, {name}, digits_bn", rule, measure(label)) for label, name in variants.items())


SGD_PH = (
  claim(
    "The Hessian of a norm layer's scales and shifts is diagonal.",
    *(_diagonality(norm, point) for norm in ("batch", "layer", "group") for point in ("initial", "trained")),
    Law(
      "laws/test_norm_layer_hessian.py::test_it_is_not_diagonal_if_a_dense_layer_follows",
      "a dense layer behind it couples the channels",
      REFUTED,
    ),
  ),
  claim(
    "It is diagonal if what follows treats the channels apart.",
    Law(
      "laws/test_norm_layer_hessian.py::test_the_hessian_of_a_norm_layer_is_diagonal_if_the_remainder_is_channel_separable",
      "exactly zero off the diagonal",
    ),
  ),
  claim(
    "One product with a vector of ones gives that diagonal.",
    Law(
      "golden/test_golden_sgd_ph.py::test_the_exact_probe_finds_the_true_diagonal_of_the_record_and_the_row_sums_are_another",
      "row sums are another vector than the diagonal",
      REFUTED,
    ),
  ),
  claim(
    "SGD-PH trains to a lower loss than SGD with momentum.",
    *_ph("final training loss, over momentum's", below(1.0), lambda label: final_ratio(BN, label, "momentum")),
  ),
  claim(
    "It generalises better than SGD with momentum.",
    *_ph(
      "test accuracy less momentum's",
      above(0.0),
      lambda label: final_difference(BN, label, "momentum", "test_accuracy"),
    ),
  ),
  claim(
    "It generalises better than Adam.",
    *_ph("test accuracy less Adam's", above(0.0), lambda label: final_difference(BN, label, "adam", "test_accuracy")),
  ),
  claim(
    "It generalises better than second-order methods.",
    *_ph("test accuracy less PSGD's", above(0.0), lambda label: final_difference(BN, label, "psgd", "test_accuracy")),
  ),
  claim(
    "A step costs more than SGD's, and less than with the product over all parameters (2.2 gradients).",
    Figure(
      "a step, over a gradient, digits_bn",
      Rule(1.0, 2.2),
      of_quartiles("partial_hessian", "python -m benchmarks partial_hessian", ("ratios", "SGD-PH step, fused", "cpu")),
    ),
  ),
  claim(
    "Absolute values and ε make the partial Hessian positive, so that steps stay bounded.",
    Law(
      "unit/test_partial_hessian.py::test_without_curvature_and_damping_the_step_stays_finite",
      "without curvature the step is finite",
    ),
  ),
  claim(
    "Without norm layers, the lengths of weight-normalised kernels serve as well.",
    Not("the Hessian of `digits_bn(norm=weight)` is measured by `diagonality`, but no race on it is committed"),
  ),
  claim(
    "CIFAR, Mini-ImageNet, ImageNet: above first- and second-order methods.",
    Not("needs a GPU for days; of the paper's tables only the supplement's were at hand"),
  ),
  claim(
    "Re-identification of persons: above SGD with momentum on both data sets.",
    Not("the data are not public; the reported differences lie within about one reported deviation"),
  ),
)
