# SPDX-License-Identifier: Apache-2.0
"""Penalties under preconditioning: each is a transform, and its place says which variables it is meant in.

Notation
  θ, g     parameters, gradient of the loss
  P, R     the preconditioner and its root, P = R Rᵀ
  z        the preconditioned ("intrinsic") variables, θ = R z;  gradient descent in z is θ ← θ − a P g
  λ, a     strength of the penalty, learning rate
  s        `power`: the penalty is r(P^(−s/2) θ), so 0 means in θ, 1 in z
  S_c      soft thresholding, sign(x) max(|x| − c, 0)

There are four places: before P is fitted; between fit and P (`momentum=` of `scale_by_preconditioner`); behind P with
P in sight (`after=`); behind P without it (further on in the chain). With P for `scale_by_preconditioner(…)`,

  decay = optax.add_decayed_weights(λ), l1 = add_l1_penalty(λ), gnp = add_gradient_norm_penalty(λ),
  sam = sharpness_aware(ρ), and gnp', sam' the same with `preconditioned=True`:

| penalty        | in θ, seen by the fit | in θ, not seen by the fit        | in z                                |
|----------------|-----------------------|----------------------------------|-------------------------------------|
| λ/2 ‖·‖²       | chain(decay, P)       | momentum=chain(decay, ema)       | chain(P, decay), that is AdamW      |
|   proximal     |                       | after=proximal_l2(λ, a, power=0) | after=proximal_l2(λ, a, power=1)    |
|   0 < s < 1    |                       | after=add_l2_penalty(λ, power=s) |                                     |
| λ ‖·‖₁         | chain(l1, P)          | momentum=chain(l1, ema)          | after=add_l1_penalty(λ, power=1)    |
|   proximal     |                       | after=proximal_l1(λ, a, power=0) | after=proximal_l1(λ, a, power=1)    |
| λ/2 ‖∇L‖²      | chain(gnp, P)         | momentum=chain(gnp, ema)         | momentum=chain(gnp', ema)           |
| sharpness      | chain(sam, P)         | momentum=chain(sam, ema)         | momentum=chain(sam', ema)           |

`chain(P, l1)` looks like AdamW, but is L1 in neither variable. Without momentum,
`scale_by_preconditioner(…, direction=gradient_norm(λ))` is the gradient penalty in z.

P is held constant within a step: the identities hold for each step; the penalty in z itself moves with P.

Sources: Ye, arXiv:2410.00232 (the change of variables; AdamW as L2 in z); AdamW, arXiv:1711.05101; sharpness-aware
minimization, arXiv:2010.01412. The formulas are derived from θ = R z.
"""

from dpsgd_optax.penalties.gradient import add_gradient_norm_penalty, gradient_norm, sharpness_aware
from dpsgd_optax.penalties.l1_l2 import add_l1_penalty, add_l2_penalty, proximal_l1, proximal_l2

__all__ = ["add_gradient_norm_penalty", "add_l1_penalty", "add_l2_penalty"]  # added to the gradient
__all__ += ["gradient_norm", "sharpness_aware"]  # a direction of the step
__all__ += ["proximal_l1", "proximal_l2"]  # after the step
