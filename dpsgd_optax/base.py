# SPDX-License-Identifier: Apache-2.0
"""The types everything else is made of, and the checks of arguments whose messages it shares.

OBSERVE   Curvature              (key, updates, params, **extra) -> observation     what to fit on
FIT       Preconditioner.fit     (state, observation, *, key, damping) -> state     how P is shaped
APPLY     Preconditioner.apply   (state, updates) -> P @ updates                    how it is used

`scale_by_preconditioner` calls the three in this order; the first two on some steps only.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Curvature = Callable[..., Any]
"""(key, updates, params, **extra) -> observation. Ignores the extra arguments it does not know."""


class Preconditioner(NamedTuple):
  """A symmetric positive P, as pure functions on a pytree. To write one, write ``init``, ``fit`` and ``apply``.

  ``init`` is called once, ``fit`` where a fit is due, ``apply`` on every step. The state is a pytree of arrays whose
  shapes and dtypes never change. The observation is what the chosen curvature returns: a :class:`Probe`, or from
  ``layer_inputs()`` a :class:`LayerInputs`. :func:`dpsgd_optax.per_leaf` makes a preconditioner of a pytree from one of
  a single array.

  The other fields are optional. No optimizer needs them; they say more about P to those who ask.

  Attributes:
    init: ``(params) -> state``. Reads shapes and dtypes only.
    fit: ``(state, observation, *, key, damping) -> state``. Moves P towards what was observed.
    apply: ``(state, updates) -> updates``. P @ updates, in the dtypes of the updates.
    advance: ``(state, *, damping) -> state``, or None. Takes the place of ``fit`` on the steps without one: running
      averages move on, a new damping takes effect. A finite state must stay finite: it is not checked again.
    diagonal: True if P acts entry by entry. All its powers are then known.
    power: ``(state, updates, exponent) -> P^exponent @ updates``, symmetric, for any real exponent; or None.
    root: ``(state, updates, inverse) -> R @ updates``, or R⁻¹ @ updates if ``inverse`` (a bool), for some R with
      R Rᵀ = P, not necessarily symmetric; or None. With ``power`` it is not needed: R = P^½.
    matrices: ``(updates) -> (parts, sizes, join)``: the matrices that have a P of their own, such as the layers of a
      stack or the blocks of a leaf, which ``psgd`` clips one by one. ``parts`` is a list of arrays (count, *shape), in
      which similar matrices are stacked, padded with zeros; ``sizes`` tells how many numbers each has without them, as
      arrays (count,) of ints; ``join(parts)`` is the tree again. None: every leaf is one.
    meaning: what names and shapes in the state do not tell, such as "geometry=quad"; "": nothing. It is kept in the
      structure of the state, for :func:`dpsgd_optax.diagnostics.check_state_layout`.

  Example:
    A preconditioner of one number, ‖v‖ / ‖Hv‖:

    >>> import jax.numpy as jnp, optax, dpsgd_optax as dpo
    >>> def scalar(decay=0.9):
    ...   def fit(state, probe, *, key, damping):
    ...     size = optax.tree.norm(probe.vector) / (optax.tree.norm(probe.product) + damping)
    ...     return decay * state + (1 - decay) * size
    ...   return dpo.Preconditioner(lambda params: jnp.ones(()), fit, optax.tree.scale)
    >>> loss = lambda p: 2.0 * jnp.sum(p**2)
    >>> tx, params = dpo.psgd(0.1, scalar(), dpo.newton()), jnp.ones(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.ones(3), state, params, hvp=dpo.hvp(loss, params))
    >>> updates.round(4)
    Array([-0.0925, -0.0925, -0.0925], dtype=float32)
  """

  init: Callable[..., Any]
  fit: Callable[..., Any]
  apply: Callable[..., Any]
  advance: Callable[..., Any] | None = None
  diagonal: bool = False
  power: Callable[..., Any] | None = None
  root: Callable[..., Any] | None = None
  matrices: Callable[..., Any] | None = None
  meaning: str = ""


class Probe(NamedTuple):
  """The observation of ``whitening()``, ``newton()`` and ``hessian_diagonal()``.

  Attributes:
    vector: v ~ N(0, I), shaped like the params; None: v is integrated out (whitening).
    product: h = H v (Newton), or h = g (whitening); shaped like the params.
  """

  vector: Any
  product: Any


class LayerInputs(NamedTuple):
  """The observation of ``layer_inputs()``.

  Attributes:
    records: a tree of :class:`dpsgd_optax.LayerRecord`, or of arrays (*rows, inputs).
    like: the updates; only their structure and shapes are used.
  """

  records: Any
  like: Any


class Product:
  """A product v ↦ C v at fixed parameters: a function that also knows where it was taken.

  Inside ``optax.partition`` a transform sees params with holes, and takes the missing ones from here.

  Attributes:
    params: θ, in full; None if it is not known.
  """

  def __init__(self, product: Callable[[Any], Any], params: Any = None):
    self._product, self.params = product, params

  def __call__(self, vector: Any) -> Any:
    return self._product(vector)


def is_static(value: Any) -> bool:
  """True for a plain Python number: only those can be checked when an optimizer is built."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def check(ok: Callable[[Any], bool], value: Any, name: str, needed: str, hint: str) -> None:
  """Raises a ValueError in three parts, unless ``value`` is traced, a schedule, None, or fine."""
  if is_static(value) and not ok(value):
    raise ValueError(f"`{name}` must be {needed}, got {value!r}. {hint}")


def check_step_size(value: Any, name: str = "step_size") -> None:
  hint = "It bounds the relative change of the factors per fit; a larger one could make P singular. Try 0.1."
  check(lambda x: 0 < x <= 1, value, name, "in (0, 1]", hint)


def check_period(value: Any, name: str) -> None:
  if isinstance(value, float):
    raise ValueError(f"`{name}` counts steps and must be an int, got {value!r}. Type `{name}={max(1, round(value))}`.")
  check(lambda x: x >= 1, value, name, "at least 1", f"`{name}=10` means: on every tenth step.")


def check_learning_rate(value: Any) -> None:
  hint = "The sign is flipped inside: `learning_rate=0.1` descends."
  check(lambda x: x >= 0, value, "learning_rate", "a schedule or a number that is not negative", hint)


def check_not_negative(value: Any, name: str, hint: str) -> None:
  check(lambda x: x >= 0, value, name, "not negative", hint)


def check_fraction(value: Any, name: str) -> None:
  hint = "It is the weight kept of the old value; 1 would never take anything new in. Try 0.9, or None for none."
  check(lambda x: 0 <= x < 1, value, name, "in [0, 1)", hint)


def check_real(dtype: Any, name: str) -> None:
  """Raises for complex parameters, of which the method ``name`` would make a P that is not Hermitian."""
  if jnp.issubdtype(dtype, jnp.complexfloating):
    raise ValueError(
      f"`{name}` is a preconditioner of real parameters, got {jnp.dtype(dtype).name}. Use `kron()` or `dense()`, or "
      "wrap the optimizer in `optax.contrib.split_real_and_imaginary`."
    )


def check_automatic(tree: Any) -> None:
  """Raises for leaves that are sharded over explicit mesh axes, where JAX leaves every layout to the user."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    spec = getattr(jax.typeof(x).sharding, "spec", ()) if isinstance(x, jax.Array) else ()
    if any(axis is not None for axis in spec):
      raise ValueError(
        f"this transform mixes the entries of a leaf, but {jax.tree_util.keystr(path) or 'the params'} is sharded "
        f"over explicit mesh axes, {spec}. Make the mesh with `axis_types=(jax.sharding.AxisType.Auto,) * n`, and "
        "divide the work by `dpsgd_optax.sharded(tx, mesh, param_specs)`."
      )


def forward_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
  """``tx`` with an ``update`` that takes any extra argument, and hands on those that the one of ``tx`` takes.

  ``optax.with_extra_args_support`` looks at the type instead, and drops all that ``optax.MultiSteps`` takes.
  """
  parameters = inspect.signature(tx.update).parameters.values()
  if any(p.kind == p.VAR_KEYWORD for p in parameters):
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)
  names = frozenset(p.name for p in parameters if p.kind != p.POSITIONAL_ONLY) - {"updates", "state", "params"}

  def update(updates, state, params=None, **extra):
    return tx.update(updates, state, params, **{k: v for k, v in extra.items() if k in names})

  return optax.GradientTransformationExtraArgs(tx.init, update)
