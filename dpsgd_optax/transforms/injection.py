# SPDX-License-Identifier: Apache-2.0
"""What ``optax.inject_hyperparams`` may take for a number or a schedule of one, and what it must leave alone.

It reads the signature of a constructor, takes every callable argument for a schedule and every number for something to
trace. A mask, a model of the reduction or a size would be called with the step count, or traced, without a word. The
constructors here say which arguments are static, in their signature, so that its plain form works.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

Make = TypeVar("Make", bound=Callable[..., Any])
_injected: ContextVar[bool] = ContextVar("injected", default=False)


class Held:
  """A static argument on its way through ``optax.inject_hyperparams``: neither a number nor callable."""

  def __init__(self, value: Any):
    self.value = value

  def __repr__(self) -> str:
    return repr(self.value)


def injected() -> bool:
  """Whether the constructor that runs was called by ``optax.inject_hyperparams``."""
  return _injected.get()


def static_arguments(*names: str, unless_given: tuple[str, ...] = ()) -> Callable[[Make], Make]:
  """Marks arguments of a constructor as static: no schedules, and never traced.

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
          bound.arguments[name] = Held(value)
      return bound

  def decorate(make: Make) -> Make:
    plain = inspect.signature(make)

    @functools.wraps(make)
    def build(*args, **kwargs):
      held = any(isinstance(x, Held) for x in (*args, *kwargs.values()))
      let_go = lambda x: x.value if isinstance(x, Held) else x
      token = _injected.set(_injected.get() or held)
      try:
        return make(*map(let_go, args), **{name: let_go(x) for name, x in kwargs.items()})
      finally:
        _injected.reset(token)

    build.__signature__ = Signature(list(plain.parameters.values()), return_annotation=plain.return_annotation)  # type: ignore[attr-defined]
    return build  # type: ignore[return-value]

  return decorate
