# SPDX-License-Identifier: Apache-2.0
"""OBSERVE: the diagonal of the Hessian of some parameters, of all or one tensor in each fit. Notation: `probes`."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.arithmetic import working_dtype
from dpsgd_optax._trees.paths import names, with_holes
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.base import Curvature
from dpsgd_optax.curvature.observers import given_product
from dpsgd_optax.curvature.probing import Cycle, DiagonalProbe, rademacher


def _tensor_numbers(leaves: list) -> list[range]:
  """The tensors that each leaf holds, numbered through all leaves: one for each index into its leading axes."""
  ends = itertools.accumulate((math.prod(jnp.shape(x)[:-1]) for x in leaves), initial=0)
  return [range(start, end) for start, end in itertools.pairwise(ends)]


def _tensor_of_each_fit(tree: Any, cycle: Cycle) -> np.ndarray:
  """The number of the tensor that is probed in each fit of one round; −1: none."""
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
  known = {"/".join(names(path)): numbers for path, numbers in zip(paths, _tensor_numbers(leaves), strict=True)}
  order = list(known) if isinstance(cycle, bool) else list(cycle)
  wrong = [f"has {name!r}, which is none of them" for name in order if name is not None and name not in known]
  wrong += [f"lacks {name!r}" for name in known if name not in order]
  if wrong:
    raise ValueError(
      f"`cycle` must name the selected parameters, each at least once: {', '.join(known)}; it {wrong[0]}. Type "
      "`cycle=True` for the order of the tree, `cycle=False` to probe all of them in each step."
    )
  return np.array([i for name in order for i in ([-1] if name is None else known[name])], np.int32)


def _active_mask(tree: Any, cycle: Cycle, fits: Any) -> Any:
  """1.0 on the tensors that are probed in the fit number ``fits``, 0.0 on the others, like ``tree``."""
  leaves, treedef = jax.tree.flatten(tree)
  active = [jnp.ones(jnp.shape(x), jnp.finfo(working_dtype(jnp.result_type(x))).dtype) for x in leaves]
  if cycle is not False and leaves:
    order = _tensor_of_each_fit(tree, cycle)
    current = jnp.asarray(order)[jnp.asarray(fits) % len(order)]
    for i, numbers in enumerate(_tensor_numbers(leaves)):
      shape = active[i].shape[:-1] + (1,) * (active[i].ndim > 0)
      is_current = np.arange(numbers.start, numbers.stop).reshape(shape) == current
      active[i] = active[i] * is_current.astype(active[i].dtype)
  return treedef.unflatten(active)


def hessian_diagonal(probe: DiagonalProbe = rademacher, *, where: Where = None, cycle: Cycle = False) -> Curvature:
  """Observe v and Hv whose v ⊙ Hv estimates the diagonal of the Hessian of the selected parameters: SGD-PH.

  The parameters that are not selected are held constant, which is cheaper than a product over all of them (``python -m
  benchmarks partial_hessian``). ``diagonal_newton`` averages and inverts what is observed.

  Reads ``hvp`` or ``value_fn``, as :func:`dpsgd_optax.newton`. ``hvp`` is given trees with holes
  (``optax.MaskedNode``), as the products of this package take them; your own must return the same holes.

  Args:
    probe: ``rademacher`` (unbiased), ``ones`` (row sums, as the released code) or ``exact`` (a product for each entry).
    where: what is probed: a tree of bools, or a function of the params; None: all. Static.
    cycle: False: all tensors in each fit. True: one tensor in each fit, in turn, in the order of the tree. A list of
      paths such as "BatchNorm_0/scale": in this order, with None for a fit that probes nothing. A leaf with leading
      axes, as of a norm layer under ``nn.scan``, is one tensor for each index into them. Static.

  Raises:
    ValueError: at trace time, as ``newton()``; if ``where`` fits nothing; if ``cycle`` does not name what it selects.

  Source: arXiv:2403.02681 and its released code (``ones``, in turn); random signs: Bekas, Kokiopoulou, Saad, Appl.
  Numer. Math. 57 (2007).

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> loss = lambda p: p["scale"][0] * p["scale"][1] + jnp.sum(p["scale"] ** 2) + jnp.sum(p["kernel"] ** 3)
    >>> params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}  # H_ss = [[2, 1], [1, 2]]
    >>> for probe in (dpo.probes.ones, dpo.probes.exact):
    ...   observe = dpo.hessian_diagonal(probe, where=dpo.is_vector)
    ...   seen = observe(jax.random.key(0), params, params, hvp=dpo.hvp(loss, params))
    ...   (seen.vector["scale"] * seen.product["scale"]).tolist(), seen.product["kernel"]
    ([3.0, 3.0], MaskedNode())
    ([2.0, 2.0], MaskedNode())
  """

  def observe(key, updates, params, *, hvp=None, value_fn=None, value=None, fits=0, **extra):
    del extra
    product = given_product("hessian_diagonal()", params, hvp, value_fn, value)
    chosen = with_holes(updates, selection(updates, where))
    return probe(key, product, _active_mask(chosen, cycle, fits), cycle is not False)

  return observe
