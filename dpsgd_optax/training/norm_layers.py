# SPDX-License-Identifier: Apache-2.0
"""The 1-D parameters that `sgd_ph` looks for: those of norm layers, and lengths for nnx layers without any."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpsgd_optax._trees.paths import names


class Lengths(nnx.Module):
  """The 1-D lengths of a weight-normalised layer, in a module of their own as the scale of a norm layer."""

  def __init__(self, scale: jax.Array):
    self.scale = nnx.Param(scale)


class WeightNorm(nnx.Module):
  """Weight normalization of an nnx layer: kernel = g v/‖v‖, the norm over all axes but that of the outputs.

  The layer keeps v as its kernel. The lengths g are a 1-D `nnx.Param` under "length/scale", which `is_norm_param` finds
  and `nnx.Optimizer` trains: neither is so with `nnx.WeightNorm` of flax 0.12. In linen take `nn.WeightNorm`.

  Args:
    layer: `nnx.Linear`, `nnx.Conv`, or any layer whose `kernel` has its outputs on the last axis.
    epsilon: added to ‖v‖² under the root, in the squared unit of the kernel.

  Source: Salimans, Kingma, arXiv:1602.07868, Eq. 2. g starts as ‖v‖, so that the layer starts as it was.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from dpsgd_optax import training
    >>> plain, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
    >>> normed = training.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> bool(jnp.allclose(normed(x), plain(x))), normed.length.scale.shape
    (True, (2,))
  """

  def __init__(self, layer: Any, epsilon: float = 1e-12):
    self.layer: Any = layer
    self.epsilon = epsilon
    self.length = Lengths(self._norm(layer.kernel[...]))

  def _norm(self, v: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(v**2, range(v.ndim - 1)) + self.epsilon)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    v = self.layer.kernel[...]
    graphdef, state = nnx.split(self.layer)
    kernel = v * jnp.expand_dims(self.length.scale[...] / self._norm(v), tuple(range(v.ndim - 1)))
    state["kernel"] = jax.tree.map(lambda _: kernel, state["kernel"])
    return nnx.merge(graphdef, state)(*args, **kwargs)


def is_norm_param(params: Any) -> Any:
  """True for the parameters of norm layers and for the lengths of weight-normalised layers: Flax, Haiku, Equinox.

  It goes by the names beside a leaf, whatever the layer is called:

  - Flax and Haiku: the parent holds a `scale`, and nothing but `scale`, `bias` and `offset`, as all norm layers do,
    also within attention, `nn.scan` and `nn.vmap`; the parent of a dense layer's bias holds a kernel.
  - Lengths: `nn.WeightNorm` of linen keeps them under a key that ends in "/kernel/scale", `training.WeightNorm` of nnx
    in a module of their own, as a norm layer.
  - Equinox: the parent holds a 1-D `weight`, and nothing but that and a `bias` of the same shape.

  A norm layer with a bias alone (`use_scale=False`) is not found: give `where` as a tree of bools then.

  Args:
    params: linen or Haiku params, an nnx state of `nnx.Param`, an Equinox model or the arrays of one.

  Returns:
    A tree of bools like `params`: `where` for `sgd_ph`, a mask for Optax, labels for `optax.partition`.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
    >>> from dpsgd_optax import training
    >>> model = nn.Sequential([nn.Dense(2), nn.LayerNorm()])
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> training.is_norm_param(params)
    {'layers_0': {'bias': False, 'kernel': False}, 'layers_1': {'bias': True, 'scale': True}}
    >>> tx = optax.partition({True: optax.sgd(0.1), False: optax.adam(1e-3)}, training.is_norm_param)
  """
  leaves = [(names(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
  children: dict[tuple[str, ...], dict[str, tuple[int, ...] | None]] = {}  # parent → name → shape; None: a subtree
  for path, x in leaves:
    if hasattr(x, "shape"):  # the functions and names in a model are no parameters
      for depth in range(len(path)):
        children.setdefault(path[:depth], {})[path[depth]] = x.shape if depth == len(path) - 1 else None

  def is_norm(path, x):
    if not path or not hasattr(x, "shape"):
      return False
    siblings = children[path[:-1]]
    of_flax = "scale" in siblings and siblings.keys() <= {"scale", "bias", "offset"}
    shape = siblings.get("weight")
    of_equinox = shape is not None and len(shape) == 1 and siblings.keys() <= {"weight", "bias"}
    return path[-1].endswith("/kernel/scale") or of_flax or (of_equinox and set(siblings.values()) == {shape})

  return jax.tree.unflatten(jax.tree.structure(params), [is_norm(path, x) for path, x in leaves])
