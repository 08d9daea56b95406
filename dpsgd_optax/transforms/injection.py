# SPDX-License-Identifier: Apache-2.0
"""Which arguments of a constructor ``optax.inject_hyperparams`` must leave alone.

``inject_hyperparams`` reads the signature of a constructor. It calls every callable argument with the step count, as a
schedule, and traces every number. That is wrong for a mask, a model of the reduction or a size. The constructors here
mark such arguments as static in their signature, so that ``optax.inject_hyperparams(dpsgd_optax.psgd)(…)`` works
without ``static_args``.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

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
  """Marks arguments of a constructor as static: no schedules, and never traced.

  The signature that ``inject_hyperparams`` binds its arguments to puts these into boxes; the constructor opens them.

  Args:
    names: of the arguments.
    unless_given: those that are static only as long as they have their default.
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
