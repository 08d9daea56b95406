# SPDX-License-Identifier: Apache-2.0
"""The claims of DPSGD: damped preconditioned SGD, and its repository's stored results."""

from benchmarks.studies._claims import (
  REFUTED,
  Case,
  Figure,
  Law,
  Not,
  above,
  below,
  claim,
  final_difference,
  final_ratio,
  per_step,
  to_psgd,
)

AUTHOR = {name: f"{name}-author" for name in ("mnist", "fashion_mnist", "addition", "curves")}
TUNED = {"digits": "ablation"} | {name: f"{name}-tuned" for name in AUTHOR}


def _each(what, rule, measure, where=AUTHOR) -> tuple[Case, ...]:
  return tuple(Figure(f"{what}, {problem}", rule, measure(name)) for problem, name in where.items())


SECONDS = "seconds to PSGD's final training loss, over PSGD's own"
CLAIMS = (
  claim(
    "Training reaches PSGD's final loss in 57 % less time (in the author's setting).",
    *_each(SECONDS, below(0.43), lambda name: to_psgd(name, "dpsgd")),
  ),
  claim(
    "The control: the same, once every learning rate is tuned.",
    *_each(SECONDS, below(0.43), lambda name: to_psgd(name, "dpsgd"), TUNED),
  ),
  claim(
    "Half the iterations are enough for PSGD's final loss.",
    *_each("steps to PSGD's final training loss, over PSGD's", below(0.5), lambda name: to_psgd(name, "dpsgd", "step")),
  ),
  claim(
    "The time is gained by fewer iterations, not by cheaper ones: a step is no cheaper than PSGD's.",
    *_each("seconds of a step, over PSGD's", above(1.0), lambda name: per_step(name, "dpsgd")),
  ),
  claim(
    "Damping and averaging add at most a quarter to the cost of a step.",
    *_each("seconds of a step, over PSGD's", below(1.25), lambda name: per_step(name, "dpsgd")),
  ),
  claim(
    "It ends at a lower training loss than PSGD.",
    *_each("final training loss, over PSGD's", below(1.0), lambda name: final_ratio(name, "dpsgd", "psgd")),
  ),
  claim(
    "It generalises as well as PSGD: the test accuracy is the same to a percentage point.",
    *_each(
      "test accuracy less PSGD's",
      above(-0.01),
      lambda name: final_difference(name, "dpsgd", "psgd", "test_accuracy"),
      {name: AUTHOR[name] for name in ("mnist", "fashion_mnist")},
    ),
  ),
  claim(
    "Damping by itself improves on PSGD.",
    Figure(
      "final training loss, damping alone over neither, digits",
      below(1.0),
      final_ratio("ablation", "psgd+damping", "psgd"),
    ),
  ),
  claim(
    "Averaging the factors by itself improves on PSGD.",
    Figure(
      "final training loss, averaging alone over neither, digits",
      below(1.0),
      final_ratio("ablation", "psgd+averaging", "psgd"),
    ),
  ),
  claim(
    "Averaging improves on damping alone.",
    *(
      Figure(
        f"final training loss, β = {beta} over none, digits",
        below(1.0),
        final_ratio("betas", f"dpsgd(average={beta})", "psgd+damping"),
      )
      for beta in (0.3, 0.5, 0.7, 0.9)
    ),
  ),
  claim(
    "Additive damping (Eq. 36) is faster than PSGD, too.",
    Figure(
      f"{SECONDS}, fashion_mnist", below(1.0), to_psgd("fashion_mnist-author", "dpsgd(form=additive,factor=0.7738)")
    ),
    Figure(f"{SECONDS}, addition", below(1.0), to_psgd("addition-author", "dpsgd(form=additive,factor=0.7738)")),
  ),
  claim(
    "After a step that gained too little, τ has to grow (Eq. 33 as printed, ω < 1).",
    Figure(
      "final training loss, τ grows over τ falls, mnist",
      below(1.0),
      final_ratio("mnist-author", "dpsgd(factor=0.95)", "dpsgd"),
    ),
    Figure(
      "final training loss, τ grows over τ falls, addition",
      below(1.0),
      final_ratio("addition-author", "dpsgd(form=additive,factor=0.7738)", "dpsgd(form=additive)"),
    ),
  ),
  claim(
    "Damping acts as in Levenberg–Marquardt: more of it is a shorter, more careful step.",
    Law(
      "laws/test_damping.py::test_more_damping_of_the_factors_is_a_longer_step",
      "damping of the factors lengthens the step; that of the curvature shortens it",
      REFUTED,
    ),
  ),
  claim(
    "It ends below Adam at equal epochs.",
    *_each(
      "final training loss, over Adam's, both tuned",
      below(1.0),
      lambda name: final_ratio(name, "dpsgd", "adam"),
      {name: f"{name}-tuned" for name in AUTHOR},
    ),
  ),
  claim("It ends below K-FAC and Shampoo.", Not("neither is a contestant here; SOAP, Shampoo's descendant, is")),
  claim(
    "The factors' fixed point is the inverse magnitude of the Hessian, definite or not.",
    Law(
      "laws/test_fixed_points.py::test_newton_fits_reach_the_inverse_magnitude_of_an_indefinite_hessian",
      "P → |H|⁻¹ of an indefinite Hessian",
    ),
    Law(
      "golden/test_golden_dpsgd.py::test_400_fits_on_a_kronecker_hessian_reach_its_inverse",
      "and of a Kronecker product, by the damped factors",
    ),
  ),
  claim(
    "A step on the group keeps the factors triangular and invertible, so that no inverse needs repair.",
    Law(
      "laws/test_invariance.py::test_eq_factors_stay_triangular_with_positive_diagonals",
      "after a thousand fits on pairs of any size the diagonals are positive",
    ),
  ),
  claim(
    "The running mean of the factors starts without bias (Eq. 47).",
    Law("golden/test_golden_dpsgd.py::test_averages_equal_eq_47_and_the_notebooks_mix", "β_t = min(t/(t+1), β)"),
  ),
  claim(
    "The ratio of actual to predicted reduction tells how good the model is (Eqs. 29 to 31).",
    Law(
      "laws/test_damping.py::test_the_reduction_ratio_of_a_newton_step_on_a_quadratic",
      "it has its closed form on a quadratic, where the model is exact",
    ),
  ),
  claim(
    "Clipping at ν = 0.1 √N keeps early steps from diverging (Eq. 48).",
    Not("no committed run leaves the clip away; the tests hold the formula alone"),
  ),
  claim(
    "Additive damping costs O(mn), the other form O(mn(m+n)).",
    Not("follows from the formulas by counting; the two forms are not timed apart"),
  ),
  claim(
    "The LSTM on the adding and XOR problems: level with PSGD, and ahead of Shampoo and Adam.",
    Not("no race of an LSTM is committed"),
  ),
  claim(
    "The MNIST autoencoder reaches PSGD's loss in 58 to 64 % less time.",
    Not("the source's own runs differ in the cadence of the fit as well; no run of `mnist_autoencoder` is committed"),
  ),
)
