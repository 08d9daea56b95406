# SPDX-License-Identifier: Apache-2.0
"""A preconditioner of some leaves, and P = I on the others."""

import functools
from typing import Any

from dpsgd_optax._trees.arithmetic import check_floating
from dpsgd_optax._trees.paths import fill_holes, with_holes
from dpsgd_optax._trees.selection import Where, selection
from dpsgd_optax.base import Preconditioner


def selected(preconditioner: Preconditioner, where: Where) -> Preconditioner:
  """``preconditioner`` on the leaves where ``where`` says so. Its observations have holes in place of the others."""

  def part(tree: Any) -> Any:
    return with_holes(tree, selection(tree, where))

  def init(params):
    check_floating(params)
    return preconditioner.init(part(params))

  def product(of_part, state, updates, *more):
    return fill_holes(of_part(state, part(updates), *more), updates)

  lift = lambda of_part: of_part and functools.partial(product, of_part)
  return preconditioner._replace(
    init=init,
    apply=lift(preconditioner.apply),
    power=lift(preconditioner.power),
    root=lift(preconditioner.root),
    matrices=None,
  )
