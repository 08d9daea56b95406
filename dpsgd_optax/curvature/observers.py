# SPDX-License-Identifier: Apache-2.0
"""OBSERVE: what a preconditioner is fitted on.

Notation
  g     the updates that enter (gradients)
  v     probe vector, v ~ N(0, I)
  H, h  Hessian of the loss, h = H v

The criterion of PSGD, c(P) = E[hᵀ P h + vᵀ P⁻¹ v] (arXiv:1512.04202, Eq. 9 there), has its minimum at
  P = |H|⁻¹           for the pairs (v, H v)    Newton
  P = (E g gᵀ)^(−½)   for the pairs (v, g)      whitening
"""

from typing import Any

import jax

from dpsgd_optax._trees.draws import normal_like
from dpsgd_optax._trees.paths import has_holes
from dpsgd_optax.base import Curvature, LayerInputs, Probe, Product
from dpsgd_optax.curvature.products import hvp as hessian_product


def whitening() -> Curvature:
  """Observe the gradient itself: P → (E g gᵀ)^(−½). Costs nothing; a drop-in for Adam.

  The probe vector is integrated out (``Probe.vector`` is None): E[vᵀ P⁻¹ v] = tr P⁻¹. A geometry that needs a
  sample (``eq``) draws one itself. P is biased a little, because each fit divides by the size of its own sample.

  Source: arXiv:2402.04553, whitening criterion; arXiv:2402.11858.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> probe = dpo.whitening()(jax.random.key(0), {"w": jnp.ones(2)}, None)
    >>> probe.vector is None, probe.product["w"]
    (True, Array([1., 1.], dtype=float32))
  """

  def observe(key, updates, params, **extra):
    del key, params, extra
    return Probe(None, updates)

  return observe


_TRAIN_STATE = (
  "Flax's own TrainState drops extra arguments: use `dpsgd_optax.training.TrainState`, with "
  "`apply_gradients(grads=grads, extra_args=dict({}))`"
)


def given_product(name: str, params: Any, hvp: Any, value_fn: Any, value: Any, otherwise: str = "") -> Product:
  """v ↦ Hv, from the extra arguments ``hvp`` or else ``value_fn``; what it returns is checked when it is called.

  Raises a ValueError if both are missing; ``value`` and ``otherwise``, what else could be typed, are for its message.
  """
  if hvp is None and value_fn is None:
    came = "received `value`, but no `hvp`" if value is not None else "received no `hvp`"
    raise ValueError(
      f"`{name}` needs Hessian-vector products, but `update` {came}. Pass `hvp=hvp(loss, params)`{otherwise}. "
      f"{_TRAIN_STATE.format('hvp=…')}."
    )
  if hvp is None:
    if params is None:
      raise ValueError(f"`{name}` with `value_fn` differentiates at `params`, got None. Pass `params` to `update`.")
    if has_holes(params):
      raise ValueError(
        f"`{name}` with `value_fn` differentiates at `params`, but here, inside `optax.partition` or `optax.masked`, "
        "they have holes. Pass `hvp=dpo.hvp(loss, params)`, made outside, of the whole params."
      )
    hvp = hessian_product(value_fn, params)

  def product(vector):
    found = hvp(vector)
    if jax.tree.structure(found) != jax.tree.structure(vector):
      raise ValueError(
        "`hvp(v)` must return a tree of the structure of the updates, "
        f"{jax.tree.structure(vector)}; got {jax.tree.structure(found)}. Type `hvp=hvp(loss, params)`."
      )
    return found

  return Product(product, getattr(hvp, "params", None))


def newton() -> Curvature:
  """Observe (v, Hv) with v ~ N(0, I): P → |H|⁻¹, also where H is indefinite.

  One probe over all parameters jointly, so that the product carries the terms between layers. Costs one product, on
  the steps on which a fit is due and on no other (``python -m benchmarks cost``). For the Gauss-Newton matrix in place
  of H pass ``hvp=ggnvp(...)``, for a product without second derivatives ``hvp=hvp_finite_difference(...)``.

  Reads the extra argument ``hvp`` (v ↦ Hv, see :func:`dpsgd_optax.hvp`), or else ``value_fn`` (params ↦ loss), from
  which it makes the product. Inside ``optax.masked`` or ``optax.partition`` only ``hvp`` works. Under ``pmap`` and
  ``shard_map`` replicas drift apart unless the optimizer is wrapped in :func:`dpsgd_optax.data_parallel`.

  Source: arXiv:1512.04202; one fused pass: Pearlmutter (1994).

  Raises:
    ValueError: at trace time, if neither argument is there, if ``params`` is missing or has holes and only ``value_fn``
      came, or if the product has another structure than the updates.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> loss, params = lambda p: 3.0 * jnp.sum(p**2), jnp.ones(2)
    >>> probe = dpo.newton()(jax.random.key(0), params, params, hvp=dpo.hvp(loss, params))
    >>> bool(jnp.allclose(probe.product, 6.0 * probe.vector))
    True
  """

  def observe(key, updates, params, *, hvp=None, value_fn=None, value=None, **extra):
    del extra
    otherwise = (
      ", or use `whitening()`, which needs no Hessian: `dpsgd(lr, curvature=whitening())` works in loops that pass "
      "only `value`, `psgd(lr)` in all"
    )
    hvp = given_product("newton()", params, hvp, value_fn, value, otherwise)
    vector = normal_like(key, updates)
    return Probe(vector, hvp(vector))

  return observe


def layer_inputs() -> Curvature:
  """Observe what entered each layer: P → (E x xᵀ + λI)⁻¹ (``least_squares``), or its diagonal (``batch_norm``).

  Costs no derivative and no further pass: the inputs are values of the forward pass that gave the gradient.

  Reads the extra argument ``layer_inputs``: a tree of :class:`dpsgd_optax.LayerRecord`, one for each layer, where its
  kernel stands in the params. It comes from ``training.with_layer_inputs`` (linen), ``training.call_with_layer_inputs``
  (nnx) or ``capture`` (any JAX loss). For a dense layer an array (*rows, inputs) in place of the layer will do.

  Source: arXiv:2201.12250; arXiv:2108.01110.

  Raises:
    ValueError: at trace time, if the argument is missing.

  Example:
    >>> import jax, jax.numpy as jnp, dpsgd_optax as dpo
    >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> seen = dpo.layer_inputs()(jax.random.key(0), params, params, layer_inputs={"w": x})
    >>> seen.records["w"].shape
    (2, 2)
  """

  def observe(key, updates, params, *, layer_inputs=None, **extra):
    del key, params, extra
    if layer_inputs is None:
      raise ValueError(
        "`layer_inputs()` fits on what enters each layer, but `update` received no `layer_inputs`. "
        "Let `training.with_layer_inputs(model.apply)` (Flax) return it beside the prediction, as aux of the loss, or "
        "`capture(loss)` (any JAX code: Equinox, Haiku) beside the gradient, and pass `layer_inputs=inputs`; or use "
        f"`whitening()`, which needs only the gradient. {_TRAIN_STATE.format('layer_inputs=inputs')}."
      )
    return LayerInputs(layer_inputs, updates)

  return observe
