# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the eigenbasis of Shampoo's moments, fitted on gradients or on Hessian-vector products.

Notation, for a matrix
  G, v     (m, n), what is observed: the gradient (whitening), or G = H v with its probe v (Newton)
  L, R     running means of GGᴴ and GᴴG;  Q_L, Q_R: their eigenvectors, of `basis_every` fits ago at most
  G'       Q_Lᴴ G Q_R, the observation in these bases
  V, V̂     the running mean of |G'|², entry by entry, and the same without the bias of its start at zero
  β        the weight kept of the old means
"""

import itertools
import math
import warnings
from typing import Any

import jax.numpy as jnp

from dpsgd_optax._trees.buckets import Stacked
from dpsgd_optax.base import Preconditioner, check, check_fraction, check_not_negative, check_period, is_static
from dpsgd_optax.geometry.eigenbasis import Moments, Refresh, power_iteration, shampoo
from dpsgd_optax.preconditioners._eigenbasis import no_basis, soap_of_array
from dpsgd_optax.preconditioners._factors import Layout, dense_factor
from dpsgd_optax.preconditioners._lift import batched
from dpsgd_optax.preconditioners.affine import squarest


def _check_dtype(dtype: Any, b2: Any) -> None:
  if dtype is None:
    return
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"`moment_dtype` must be a real floating dtype or None, got {dtype}. Try `jnp.bfloat16`.")
  eps = float(jnp.finfo(dtype).eps)
  if is_static(b2) and 1 - b2 < eps:
    warnings.warn(
      f"with `moment_dtype={jnp.dtype(dtype).name}` what b2={b2} takes in is often below half a unit in the last "
      f"place, so that the moments stand still. Use b2={1 - 4 * eps:.2g} or less, or float32.",
      stacklevel=3,
    )


def soap(
  *,
  b2: float = 0.95,
  basis_every: int = 10,
  eps: float = 1e-8,
  max_size: float = 2048,
  max_skew: float = 2.0,
  moments: Moments = shampoo,
  refresh: Refresh = power_iteration,
  factored: bool = False,
  moment_dtype: Any = None,
  stacked: Stacked = None,
) -> Preconditioner:
  """P = (Q_L ⊗ Q_R) diag(1 / (√V̂ + ε)) (Q_L ⊗ Q_R)ᴴ on every leaf, seen as a matrix: Adam's P in Shampoo's eigenbasis.

  ``psgd(3e-3, soap(), b1=0.95, every=1)`` is the optimizer SOAP. One fit:

    Q_L ← qr(L Q_L), Q_R ← qr(R Q_R)          on every ``basis_every``-th; the columns sorted, and V with them
    V ← β V + (1 − β)|G'|²                    G' = Q_Lᴴ G Q_R
    L ← β L + (1 − β) GGᴴ,  R ← β R + (1 − β) GᴴG

  Fitted on gradients, P → (E ggᵀ)^(−½) where that is diagonal in a Kronecker basis. On Newton probes (v, Hv) the
  second moment of h is H², so P → |H|⁻¹, whatever the signs of H, and without a step size of the fit.

  The first fit takes the eigenvectors of its own L and R. P = I before it. A matrix seen as zero throughout teaches
  nothing: on gradients before the first that is not zero, on Newton products ever.

  A tensor is seen as the matrix that is nearest to a square one, as by :func:`dpsgd_optax.affine`. A side of length d
  gets a basis iff 1 < d ≤ ``max_size`` and d² ≤ ``max_skew`` · N; otherwise Q = I on that side. Vectors and scalars
  have none: there P is Adam's. Parameters may be complex.

  Damped, P → (E ggᵀ + λ²)^(−½) on gradients; on Newton probes |H + λ|⁻¹.

  Memory: N numbers for V, and 2 d² for each side with a basis.

  Args:
    b2: β, in [0, 1).
    basis_every: the bases move on every ``basis_every``-th fit. Static.
    eps: ε ≥ 0, in units of √V.
    max_size: the longest side that may have a basis. Static. ``jnp.inf``: any.
    max_skew: a basis holds at most ``max_skew`` · N numbers: with the default both sides have one unless the longer is
      more than twice the other, and then the shorter. Static. ``jnp.inf``: every side up to ``max_size``.
    moments: ``geometry.shampoo``, or ``geometry.kl``, where L and R weigh each other. Static.
    refresh: how a basis moves: ``geometry.power_iteration``, or ``geometry.exact`` eigenvectors. Static.
    factored: keep of V the means of its rows and columns only, as Adafactor: V = r cᵀ / mean(r). Static. It saves N
      numbers, and it averages noise out: a Newton product is one probe, which says little of a single entry.
    moment_dtype: of L, R and V between the fits; None: that of the parameters, float32 at least. The bases always have
      that: rounded to bfloat16 they would not be orthonormal. Complex moments keep their dtype. Static.
    stacked: see :func:`dpsgd_optax.per_leaf`.

  Raises:
    ValueError: for a ``b2`` outside [0, 1), ``basis_every`` below 1, a negative ``eps``, a size or skew that is not
      positive, or a ``moment_dtype`` that is not real.

  Warns:
    UserWarning: if 1 − β is below the precision of ``moment_dtype``.

  Departures from the paper and its code: the first fit counts and gives a step; a tensor is one matrix, not one basis
  per axis; the momentum stays in the original space, where no basis moves under it (``b1`` of ``psgd``); ``max_skew``.
  Without the first step the trajectory is theirs.

  Source: arXiv:2409.11321; Shampoo, arXiv:1802.09568; KL-Shampoo, arXiv:2509.03378; Adafactor, arXiv:1804.04235.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.array([[1.0, 0.5], [0.5, 2.0]])  # H v = A v B
    >>> p, key = dpo.soap(b2=0.999), jax.random.key(0)
    >>> fit = lambda state, v: (p.fit(state, dpo.Probe(v, a @ v @ b), key=key, damping=0.0), None)
    >>> state, _ = jax.lax.scan(fit, p.init(jnp.ones((2, 2))), jax.random.normal(key, (5000, 2, 2)))
    >>> bool(jnp.allclose(p.apply(state, a @ jnp.ones((2, 2)) @ b), 1.0, atol=0.1))
    True
  """
  check_fraction(b2, "b2")
  check_period(basis_every, "basis_every")
  check_not_negative(eps, "eps", "It bounds P by 1/eps. Try 1e-8.")
  check(lambda x: x > 0, max_size, "max_size", "positive", "Use `max_size=1` for Adam, `jnp.inf` for any size.")
  check(
    lambda x: x >= 0, max_skew, "max_skew", "not negative", "Use 0 for Adam, 2.0 for bases unless a side is very long."
  )
  _check_dtype(moment_dtype, b2)

  def layout(shape: tuple[int, ...]) -> Layout:
    if len(shape) < 2:
      return Layout((math.prod(shape),), (no_basis,))
    parts = squarest(shape)
    sides = tuple(math.prod(shape[i] for i in part) for part in parts)
    dense = (1 < d <= max_size and d * d <= max_skew * math.prod(sides) for d in sides)
    kinds = tuple(dense_factor if has and min(sides) > 1 else no_basis for has in dense)
    return Layout(sides, kinds, tuple(itertools.chain(*parts)))

  group = soap_of_array(
    layout,
    b2=b2,
    basis_every=basis_every,
    eps=eps,
    moments=moments,
    refresh=refresh,
    factored=factored,
    moment_dtype=moment_dtype,
  )
  return batched(group, stacked)
