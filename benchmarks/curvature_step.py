# SPDX-License-Identifier: Apache-2.0
"""The third mend of specs/GLS section 5: the step of each layer as long as the curvature along it allows.

A reference for the benchmark: one Hessian-vector product per layer and step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import dpsgd_optax as dpo


def gls_curvature(learning_rate: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
  """`gls`, the step D of each layer times 1 / max(1, c), c = D'HD / (rate (-g'D)).

  With U = -D / rate that is U'HU / g'U, the curvature of the loss with respect to the outputs of the layer along the
  change that was asked for: a Rayleigh quotient, one step of the power iteration that would give the largest.
  """
  inner = dpo.gls(learning_rate, **options)

  def update(updates, state, params=None, *, value_fn, **extra):
    steps, state = inner.update(updates, state, params, value_fn=value_fn, **extra)
    paths, treedef = jax.tree_util.tree_flatten_with_path(steps)
    layers = [path[:-1] for path, _ in paths]
    leaves, gradient, product = [x for _, x in paths], jax.tree.leaves(updates), dpo.hvp(value_fn, params)
    for layer in dict.fromkeys(layers):
      mine = [x if where == layer else jnp.zeros_like(x) for where, x in zip(layers, leaves, strict=True)]
      image = jax.tree.leaves(product(jax.tree.unflatten(treedef, mine)))
      curvature, slope = optax.tree.vdot(mine, image), -learning_rate * optax.tree.vdot(mine, gradient)
      scale = 1 / jnp.maximum(1, curvature / jnp.where(slope > 0, slope, jnp.inf))
      leaves = [x * scale if where == layer else x for where, x in zip(layers, leaves, strict=True)]
    return jax.tree.unflatten(treedef, leaves), state

  return optax.GradientTransformationExtraArgs(inner.init, update)
