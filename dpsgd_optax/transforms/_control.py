# SPDX-License-Identifier: Apache-2.0
"""What the constructors share, static arguments, and what their `update` functions share.

`optax.inject_hyperparams` reads the signature of a constructor, calls every callable argument with the step count, as a
schedule, and traces every number. That is wrong for a mask, a model of the reduction or a size. The constructors here
mark these as static in their signature, so that `inject_hyperparams` needs no `static_args`.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpsgd_optax._trees.mesh import on_mesh
from dpsgd_optax.base import Preconditioner, forward_extra_args

Make = TypeVar("Make", bound=Callable[..., Any])
_injected: ContextVar[bool] = ContextVar("injected", default=False)


class _Held:
  """A box around a static argument: ``inject_hyperparams`` passes it on, as it is neither a number nor callable."""

  def __init__(self, value: Any):
    self.value = value

  def __repr__(self) -> str:
    return repr(self.value)


def injected() -> bool:
  """Whether the constructor that runs was called by ``optax.inject_hyperparams``."""
  return _injected.get()


def static_arguments(*names: str, unless_given: tuple[str, ...] = ()) -> Callable[[Make], Make]:
  """Marks arguments of a constructor as static; those ``unless_given`` only as long as they have their default.

  The signature that ``inject_hyperparams`` binds its arguments to puts them into boxes; the constructor opens these.
  """

  class Signature(inspect.Signature):
    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
      bound = super().bind(*args, **kwargs)
      given = set(bound.arguments)
      bound.apply_defaults()
      for name, value in bound.arguments.items():
        if name in names or (name in unless_given and name not in given):
          bound.arguments[name] = _Held(value)
      return bound

  def decorate(make: Make) -> Make:
    plain = inspect.signature(make)

    @functools.wraps(make)
    def build(*args, **kwargs):
      held = any(isinstance(x, _Held) for x in (*args, *kwargs.values()))
      open_box = lambda x: x.value if isinstance(x, _Held) else x
      token = _injected.set(_injected.get() or held)
      try:
        return make(*map(open_box, args), **{name: open_box(x) for name, x in kwargs.items()})
      finally:
        _injected.reset(token)

    build.__signature__ = Signature(list(plain.parameters.values()), return_annotation=plain.return_annotation)  # type: ignore[attr-defined]
    return build  # type: ignore[return-value]

  return decorate


def is_due(planned: Any, asked: Any, name: str, accumulating: Any) -> Any:
  """Whether to act on this step: as ``asked``, or where that is None as ``planned``; never while ``accumulating``.

  A Python bool if all are known when traced, an array otherwise. ``name`` is that of the argument ``asked``.
  """
  if not (asked is None or isinstance(asked, bool | np.bool_)) and (
    getattr(asked, "dtype", None) != jnp.bool_ or jnp.shape(asked) != ()
  ):
    what = type(asked).__name__ if not hasattr(asked, "dtype") else f"{asked.dtype}{list(jnp.shape(asked))}"
    raise ValueError(
      f"`{name}` must be True, False, or a scalar array of bools, got {what}. Inside `optax.MultiSteps(tx, k)` type "
      f"`{name}=opt_state.mini_step == k - 1`."
    )
  due = planned if asked is None else asked
  if isinstance(due, bool) and isinstance(accumulating, bool):
    return due and not accumulating
  return jnp.logical_and(due, not accumulating if isinstance(accumulating, bool) else ~accumulating)


def scheduled(value: Any, count: Any) -> Any:
  """A number, or a schedule at this count."""
  return value(count) if callable(value) else value


def choose(predicate: bool | jax.Array, yes: Callable, no: Callable, *operands: Any) -> Any:
  """``lax.cond``, or a plain choice where the predicate is known: a Python bool, or any value outside ``jit``."""
  if not isinstance(predicate, jax.core.Tracer):
    return (yes if predicate else no)(*operands)
  return jax.lax.cond(predicate, yes, no, *operands)


def check_state(state: Any, kind: type, *others: type) -> None:
  """Raises unless ``state`` is of one of the kinds that ``init`` returns."""
  if not isinstance(state, (kind, *others)):
    raise ValueError(
      f"`update` needs the state that `init` of the same transform returned, a {kind.__name__}, got "
      f"{type(state).__name__}. Inside a wrapper (`optax.MultiSteps`, `optax.chain`) call `update` of the wrapper."
    )


def _is_typed(key: Any) -> bool:
  return hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def make_key(key: int | jax.Array) -> tuple[Callable[[], jax.Array], Any]:
  """From an int or a key of either kind: a function that returns the raw data of the key, and its generator.

  The state holds raw data, because wrappers of Optax cast, ravel, save and multiply the leaves of a state, which a
  typed key does not allow. Each call returns a new array, so that states can be donated.
  """
  if _is_typed(key):
    return lambda: jnp.array(jax.random.key_data(key)), jax.random.key_impl(key)
  if isinstance(key, int) or jnp.ndim(key) == 0:
    return lambda: jax.random.key_data(jax.random.key(key)), None
  return lambda: jnp.array(key), None


def step_keys(key: jax.Array, generator: Any, count: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two keys of this step to draw from, made of the key of the run, raw or typed, and of the number of the step.

  One that nothing draws from is dropped by the compiler. With JAX's default generator, Threefry, the number of the step
  is added to the first word of the key, which is zero for small ints: a key for each step without a draw, as in
  Random123. Its highest bit is set, so that none is the key of a small int, from which the params may have been drawn.
  """
  raw = key if not _is_typed(key) else jax.random.key_data(key)
  kind = generator if not _is_typed(key) else jax.random.key_impl(key)
  numbers = 2 * count.astype(jnp.uint32) + jnp.arange(2, dtype=jnp.uint32) + jnp.uint32(2**31)
  typed = jax.random.wrap_key_data(jnp.asarray(raw, jnp.uint32), impl=kind)
  if str(jax.random.key_impl(typed)) == "threefry2x32":
    data = jax.random.key_data(typed)
    probe, fit = (jax.random.wrap_key_data(data.at[0].add(n), impl=kind) for n in numbers)
    return probe, fit
  return jax.random.fold_in(typed, numbers[0]), jax.random.fold_in(typed, numbers[1])


def compiled_once(preconditioner: Preconditioner) -> Preconditioner:
  """The same, for loops without ``jit``: ``fit``, ``apply`` and ``advance`` are compiled at their first call.

  Inside ``jit`` they are called as they are; so they are under ``optax.inject_hyperparams``, which builds the transform
  anew on every step, so that nothing compiled would be met again.
  """
  if injected():
    return preconditioner

  def compiled(function):
    jitted = jax.jit(function)

    def call(*args, **kwargs):
      leaves = jax.tree.leaves((args, kwargs))
      traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
      known = all(isinstance(x, jax.Array | np.ndarray | np.generic | int | float) for x in leaves)
      return (jitted if known and not traced and not on_mesh() else function)(*args, **kwargs)

    return call

  fit, apply, advance = preconditioner.fit, preconditioner.apply, preconditioner.advance
  return preconditioner._replace(fit=compiled(fit), apply=compiled(apply), advance=advance and compiled(advance))


def keep_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """``tx``, its updates cast back to the dtypes in which they came: a float32 rate leaves bfloat16 updates bfloat16."""
  inner = forward_extra_args(tx)

  def update(updates, state, params=None, **extra):
    done, state = inner.update(updates, state, params, **extra)
    return cast_like(done, updates), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def cast_like(tree: Any, other: Any) -> Any:
  """``tree`` in the dtypes of ``other``."""
  return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), tree, other)
