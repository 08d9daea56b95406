# SPDX-License-Identifier: Apache-2.0
"""Layer inputs of any JAX loss: its jaxpr is walked, and what is multiplied with a parameter is recorded.

Notation
  leaf     one array of the params
  origin   which leaf a value is, but for its dtype and the order of its axes
  call     one product of some x with a leaf: a dense layer, a convolution, or rows taken from an embedding
  offset   zeros added to the output of a call; the derivative with respect to it is E = dloss/d(output)

This happens while the loss is traced, and leaves nothing of itself in the compiled program. kfac-jax finds its layers
in the jaxpr too, by their patterns and by tags; here a product with a parameter is enough.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpsgd_optax._trees.paths import names
from dpsgd_optax.layers._jaxpr import Interpreter, Origin
from dpsgd_optax.layers.record import LayerRecord, merged


def capture(
  loss: Callable[..., Any],
  *,
  has_aux: bool = False,
  gradients: bool = False,
  reduce: Callable[..., LayerRecord] | None = None,
) -> Callable[..., Any]:
  """``jax.value_and_grad`` of a loss that also returns what enters each linear layer, for any JAX code.

  Recorded is every product of a value with a parameter: ``x @ w``, ``x @ w.T``, einsum, convolution, and rows of a
  table (``table[ids]``); inside ``jit``, ``vmap`` and ``checkpoint`` too (which is inlined, and saves no memory then).
  The bias is the parameter that is added to the product. Not recorded are products inside ``scan``, ``while_loop``,
  ``cond`` and functions with their own derivative, and those with a parameter that was changed before (masked, sliced).
  A kernel that is used in two ways has no record; of dense layers a warning names it, for so it is in losses that hold
  derivatives of the network.

  Args:
    loss: (params, *args, **kwargs) → scalar, or (scalar, aux) if ``has_aux``.
    has_aux: as in ``jax.value_and_grad``.
    gradients: also return E = dloss/d(output) in the records, for methods that look at the outputs.
    reduce: what to keep in place of the inputs: ``second_moments`` for ``gls``, ``channel_moments`` for ``bnp``.

  Returns:
    ``run(params, *args, **kwargs) -> (value, grads, layers)``; value is (loss, aux) if ``has_aux``. ``layers`` has the
    structure of the params, with a :class:`dpsgd_optax.LayerRecord` in the place of each kernel and None elsewhere;
    ``jax.eval_shape(lambda: run(params, batch))[2]`` is what ``layers=`` of an optimizer needs. The params may be a
    whole Equinox model: the gradient of what is no floating-point array (functions, integers, rates) is None.

  Example:
    >>> import jax, jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> def loss(p, x, y):
    ...   return jnp.mean((jnp.tanh(x @ p["first"] + p["shift"]) @ p["second"] - y) ** 2)
    >>> params = {"first": jnp.ones((3, 4)), "shift": jnp.zeros(4), "second": jnp.ones((4, 1))}
    >>> x, y = jnp.eye(3), jnp.zeros((3, 1))
    >>> value, grads, layers = dpo.capture(loss)(params, x, y)
    >>> layers["first"].inputs[0].shape, layers["first"].bias, layers["second"].inputs[0].shape
    ((3, 3), ('shift',), (3, 4))
    >>> tx = dpo.bnp(0.1, layers=layers)
    >>> updates, state = tx.update(grads, tx.init(params), params, layer_inputs=layers)
  """

  def run(params, *args, **kwargs):
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    free = _differentiable([leaf for _, leaf in paths])
    leaves, held = [paths[i][1] for i in free], {i: leaf for i, (_, leaf) in enumerate(paths) if i not in free}
    shapes = [jnp.shape(leaf) for leaf in leaves]
    origins = [Origin(i, tuple(range(len(s)))) for i, s in enumerate(shapes)]
    last: Any = None

    def like_params(leaves, held):
      found = held | dict(zip(free, leaves, strict=True))
      return jax.tree.unflatten(treedef, [found.get(i) for i in range(len(paths))])

    flat = lambda leaves: loss(like_params(leaves, held), *args, **kwargs)
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(leaves)

    def traced(leaves, offsets):
      nonlocal last
      last = Interpreter(shapes, offsets)
      out, *_ = last.run(closed.jaxpr, closed.consts, leaves, origins, [None] * len(leaves))
      result = jax.tree.unflatten(jax.tree.structure(shape), out)
      value, aux = result if has_aux else (result, None)
      return value, (aux, [call.record for call in last.calls])

    if gradients:
      jax.eval_shape(lambda leaves: traced(leaves, None), leaves)  # for the shapes of the outputs
      offsets = [None if o is None else jnp.zeros(o.shape, o.dtype) for o in last.outputs]
      run_both = jax.value_and_grad(traced, argnums=(0, 1), has_aux=True)
      (value, (aux, records)), (grads, errors) = run_both(leaves, offsets)
      pairs = zip(records, errors, strict=True)
      records = [r if e is None else dataclasses.replace(r, gradients=(e,)) for r, e in pairs]
    else:
      (value, (aux, records)), grads = jax.value_and_grad(lambda p: traced(p, None), has_aux=True)(leaves)
    layers = _by_leaf(records, last, [names(paths[i][0]) for i in free], shapes, reduce)
    return (value, aux) if has_aux else value, like_params(grads, {}), like_params(layers, {})

  return run


def _differentiable(leaves: list) -> list[int]:
  """Which leaves are parameters. A model that is a pytree has functions, flags and rates among its leaves too."""
  is_array = lambda x: isinstance(getattr(x, "dtype", None), np.dtype)
  model = any(isinstance(x, bool) or not (is_array(x) or isinstance(x, int | float | complex)) for x in leaves)
  inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact) if is_array(x) else isinstance(x, float | complex)
  return [i for i, x in enumerate(leaves) if inexact(x) and (is_array(x) or not model)]


def _by_leaf(records, walk: Interpreter, paths, shapes, reduce) -> list[LayerRecord | None]:
  """The calls of each leaf that is a kernel, merged; a leaf that is used in two ways has none."""
  found: list[LayerRecord | None] = [None] * len(paths)
  derivatives: list[str] = []
  for leaf in {call.leaf for call in walk.calls} - walk.hidden:
    mine = [i for i, call in enumerate(walk.calls) if call.leaf == leaf]
    way = lambda r, bias: (r.kind, r.kernel_shape, r.layout, r.window, bias)
    ways = {way(records[i], walk.calls[i].bias) for i in mine}
    if len(ways) > 1 and {kind for kind, *_ in ways} == {"dense"}:
      derivatives.append("/".join(paths[leaf]))
    if len(ways) == 1:
      bias = walk.calls[mine[0]].bias
      one = dataclasses.replace(merged([records[i] for i in mine]), bias=None if bias is None else paths[bias])
      depth = len(shapes[leaf]) - len(one.kernel_shape)
      found[leaf] = one if reduce is None else reduce(one, shapes[leaf][:depth])
  if derivatives:
    _warn_of_derivatives(sorted(derivatives))
  return found


def _warn_of_derivatives(kernels: list[str]) -> None:
  warnings.warn(
    f"`capture` keeps no record of {kernels}: each enters the loss in two ways, as it does where the loss holds "
    "derivatives of the network (physics-informed networks: tangents are multiplied with the same kernel, without its "
    "bias) and where weights are tied. `gls` and `bnp` cannot train them. For a loss of residuals type "
    "`gauss_newton()` with `residual_fn=dpo.residuals((fn, *arrays))`; `psgd(lr)` takes any loss.",
    UserWarning,
    stacklevel=4,
  )
