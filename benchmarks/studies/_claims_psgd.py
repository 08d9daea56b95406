# SPDX-License-Identifier: Apache-2.0
"""The claims of PSGD: arXiv:2402.04553 and arXiv:2402.11858, and the demonstrations in their code."""

from benchmarks.studies._claims import (
  Figure,
  Law,
  Not,
  above,
  below,
  claim,
  final,
  final_difference,
  final_error,
  final_ratio,
  of_lists,
  of_quartiles,
)

LENET = "psgd_whiten(learning_rate=0.003,b1=0.9,weight_decay=0.01{})"
KRON_LM = "psgd_whiten(preconditioner=kron(geometry=quad))"
LRA_55 = "psgd_newton(learning_rate=0.01,clip=1.0,preconditioner=lra(rank=10))"
LRA_TENSOR = "psgd_newton(learning_rate=0.5,preconditioner=lra(rank=10,step_size=0.2))"
EQ_VALLEY = "psgd_newton(preconditioner=dense(geometry=eq,step_size=0.5))"


def _returns(game: str, label: str) -> Figure:
  def differences(found):
    ours, theirs = (found["optimizers"][name]["whole"] for name in (label, "adam(clip=0.5)"))
    return [a - b for a, b in zip(ours, theirs, strict=True)]

  what = f"mean return of {label} less Adam's, both tuned, PPO on {game}"
  return Figure(what, above(0.0), of_lists(f"rl-{game}", f"python -m benchmarks rl {game}", differences))


def _overhead(workload: str, ratio: str, bound: float, what: str) -> Figure:
  keys = ("threads", "one", "ratios", ratio, "cpu")
  measure = of_quartiles(f"cost-{workload}", f"python -m benchmarks cost {workload}", keys)
  return Figure(f"{what}, {workload}", below(bound), measure)


def _outlier(criterion: str) -> Figure:
  def steps(found):
    return [row["outlier"]["recovered"] for row in found["rows"] if row["criterion"] == criterion]

  what = f"steps until the update is back within a factor of 2; {criterion}"
  return Figure(what, below(1.0), of_lists("robustness", "python -m benchmarks robustness", steps, "groups"))


CLAIMS = (
  claim(
    "Fitted on Hessian-vector products P goes to |H|⁻¹, also where H is indefinite.",
    Law(
      "laws/test_fixed_points.py::test_newton_fits_reach_the_inverse_magnitude_of_an_indefinite_hessian", "P → |H|⁻¹"
    ),
  ),
  claim(
    "Noise in the products damps P by itself: P → (H² + E εεᵀ)^(−½).",
    Law("laws/test_fixed_points.py::test_noise_in_the_products_damps_p", "P with known noise"),
  ),
  claim(
    "Fitted on gradients P whitens them: P → (E g gᵀ)^(−½).",
    Law(
      "laws/test_fixed_points.py::test_fits_on_gradients_reach_the_inverse_root_of_their_covariance", "P of known noise"
    ),
  ),
  claim(
    "On a definite Hessian the fit converges linearly at a constant step.",
    Law(
      "unit/test_convergence.py::test_dense_newton_fits_converge_as_recorded", "errors after recorded numbers of fits"
    ),
  ),
  claim(
    "The fit converges on indefinite Hessians as well at a constant step.",
    Not(
      "a single probe does not vanish at |H|⁻¹ there, so that a constant step keeps a distance; the tests let it fall"
    ),
  ),
  claim("PSGD converges quadratically.", Not("what is derived bounds the rate linearly; no test separates the two")),
  claim(
    "Each update lowers the criterion of the pair it has just seen.",
    Law("laws/test_symmetry.py::test_the_criterion_falls_on_the_probe_just_fitted", "every group and geometry"),
  ),
  claim(
    "No damping is needed to stay invertible: an update never leaves the group.",
    Law("laws/test_groups.py::test_a_large_step_never_leaves_the_group", "the largest step that is allowed"),
  ),
  claim(
    "The fit is equivariant: new coordinates in the group change nothing (EQ).",
    Law("laws/test_invariance.py::test_eq_commutes_with_a_change_of_variables_in_its_group", "Kronecker groups"),
    Law("laws/test_groups.py::test_xmat_commutes_with_a_change_of_variables_in_its_group", "X-shaped matrices"),
    Law("laws/test_groups.py::test_lra_commutes_with_a_diagonal_change_of_variables", "low rank: diagonal changes"),
  ),
  claim(
    "P follows the scale of the loss without tuning.",
    Law("laws/test_invariance.py::test_p_scales_as_one_over_the_loss", "P(c · loss) = P / c"),
  ),
  claim(
    "Fitting Q by QEQ is fitting P by QUAD.",
    Law("laws/test_groups.py::test_qeq_and_quad4p_give_the_same_p", "the same P after every fit"),
  ),
  claim(
    "The low-rank form fits both ends of the spectrum.",
    Law("unit/test_convergence.py::test_lra_fits_converge_as_recorded", "H = diagonal + low rank is inverted"),
  ),
  claim(
    "The Kronecker fit is unbiased where H is a Kronecker product.",
    Law("unit/test_convergence.py::test_kron_fits_converge_as_recorded", "P → H⁻¹ exactly"),
  ),
  claim(
    "LeNet-5 on MNIST: 99.26 % (Affine), 99.22 % (XMat), 99.22 % (low rank of 5) after ten epochs.",
    Figure(
      "test error in %, Kron on Hv",
      below(0.74),
      final_error("lenet-psgd", "psgd(learning_rate=0.1,every=10)"),
    ),
    Figure("test error in %, Kron on gradients", below(0.74), final_error("lenet-psgd", LENET.format(""))),
    Figure(
      "test error in %, XMat",
      below(0.78),
      final_error("lenet-psgd", LENET.format(",preconditioner=xmat()")),
    ),
    Figure(
      "test error in %, low rank of 5",
      below(0.78),
      final_error("lenet-psgd", LENET.format(",preconditioner=lra(rank=5)")),
    ),
  ),
  claim(
    "Logistic regression on products of pixels: a training loss ten times below SGD's and L-BFGS's.",
    *(
      Figure(
        f"final training loss, {label} over {other}, products of the digits' 64 pixels",
        below(0.1),
        final_ratio("logistic-tuned", label, other),
      )
      for label in ("psgd_newton", "psgd_whiten")
      for other in ("sgd", "lbfgs")
    ),
  ),
  claim(
    "There it also has the smallest test error.",
    *(
      Figure(
        f"test accuracy, {label} less {other}",
        above(0.0),
        final_difference("logistic-tuned", label, other, "test_accuracy"),
      )
      for label in ("psgd_newton", "psgd_whiten")
      for other in ("sgd", "lbfgs")
    ),
  ),
  claim(
    "The delayed XOR of length 32 is solved in every run.",
    Figure("final training loss, Kron on gradients, 8192 steps", below(0.1), final("xor-author", "psgd_whiten")),
  ),
  claim(
    "At length 55 low-rank PSGD still solves it.",
    Figure("final training loss, lra(rank=10) on Hv", below(0.1), final("xor-length-55-author", LRA_55)),
  ),
  claim(
    "At length 55 first-order methods fail.",
    Figure("final training loss, Adam", above(0.1), final("xor-length-55-author", "adam")),
  ),
  claim("Lengths of 64 and 112 are solved, and success grows with the rank.", Not("not run: hours on two cores")),
  claim(
    "Language models: a test loss below AdamW's at equal steps.",
    Figure(
      "test loss, over AdamW's, a character transformer of 0.11 M parameters",
      below(1.0),
      final_ratio("charlm-tuned", KRON_LM, "adamw", "test_loss"),
    ),
    Not("50 M parameters on OpenWebText: no GPU; the source's AdamW ends far above what that model reaches elsewhere"),
  ),
  claim("LSTMs on Penn Treebank: the lowest perplexity.", Not("the data are not among the problems here")),
  claim(
    "Policy gradients: higher returns than adaptive first-order methods.",
    *(
      _returns(game, label)
      for game in ("Acrobot-v1", "CartPole-v1", "Pendulum-v1")
      for label in ("psgd_newton(every=10)", "psgd_whiten(b1=0.9)")
    ),
    Not("Walker2d and HalfCheetah: no MuJoCo here"),
  ),
  claim(
    "A Hessian-vector product costs about a gradient more.",
    *(
      _overhead(workload, "gradient + Hvp, fused", 2.2, "gradient and product, over a gradient")
      for workload in ("layers", "lenet5", "charlm")
    ),
  ),
  claim(
    "With one fit in ten steps the overhead is negligible (taken as 10 %).",
    *(
      _overhead(workload, "psgd newton step, Hvp and fit every 10", 1.1, "a step of Kron on Hv, over a gradient")
      for workload in ("layers", "lenet5", "charlm")
    ),
  ),
  claim(
    "A single outlier does no harm: the memory of the step's normaliser holds P where it is.",
    _outlier("newton"),
    _outlier("whitening"),
  ),
  claim(
    "Dense PSGD goes to the bottom of the Rosenbrock valley of 100 variables.",
    Figure("final loss after 2000 steps", below(1e-6), final("rosenbrock-author", "psgd_newton")),
  ),
  claim(
    "Tensor decomposition: PSGD goes to the rounding of the loss (taken as 10⁻⁶).",
    Figure("final loss, Kron", below(1e-6), final("tensor_decomposition-author", "psgd_newton")),
    Figure("final loss, low rank", below(1e-6), final("tensor_decomposition-author", LRA_TENSOR)),
  ),
  claim(
    "The geometry Q½EQ1½ fits better than triangular EQ.",
    Figure(
      "final training loss, pro over eq, logistic regression",
      below(1.0),
      final_ratio(
        "logistic-geometries",
        "psgd_newton(preconditioner=kron(geometry=pro))",
        "psgd_newton(preconditioner=kron(geometry=eq))",
      ),
    ),
    Figure(
      "final loss, pro over eq, Rosenbrock", below(1.0), final_ratio("rosenbrock-author", "psgd_newton", EQ_VALLEY)
    ),
  ),
  claim(
    "ResNet-18 on CIFAR-10: at or above SGD with momentum, with and without shortcuts.",
    Not("200 epochs need a GPU; `python -m benchmarks gpu` has the run, what is committed is eight steps"),
  ),
  claim(
    "Wrong labels, missing classes and blurred images harm PSGD less than SGD.",
    Not("the problems are there (`cifar10(noise=…)`, `imbalance`, `blur`); long runs need a GPU"),
  ),
  claim(
    "Its networks are less certain, and forget in the order of that.",
    Not("the studies `entropy` and `forgetting` measure it; no networks trained to the end are committed"),
  ),
  claim("Transformers on images and text: ahead of Adam for 10 to 23 % more time.", Not("needs a GPU")),
)
