# SPDX-License-Identifier: Apache-2.0
"""What JAX says of a loss without the derivative that is needed, in the words of the user."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp

from dpsgd_optax.curvature._tangents import drop_aux

DIFFERENCE = "Type `hvp=hvp_finite_difference({}, params)`, which asks for gradients alone."


def check_scalar(found: Any, has_aux: bool = False) -> Any:
  """What a loss returned; a TypeError unless it is one real number (beside the auxiliary data, if ``has_aux``)."""
  if fault := _scalar_fault(found, has_aux):
    raise TypeError(fault)
  return found


def _scalar_fault(found: Any, has_aux: bool) -> str | None:
  pair = isinstance(found, tuple | list) and len(found) > 1
  if pair and not has_aux:
    return (
      f"the loss must return a real scalar, but it returned a {type(found).__name__} of {len(found)}, as if it had "
      "auxiliary data. Type `value_fn=lambda p: loss(p)[0]`, or `hvp=hvp(loss, params, has_aux=True)`."
    )
  if has_aux and not pair:
    return (
      f"with `has_aux=True` the loss must return (scalar, aux), but it returned {_described(found)}. Leave `has_aux` "
      "out, or return both."
    )
  value = found[0] if has_aux else found
  real = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) and value.shape == ()
  if real or (isinstance(value, float | int) and not isinstance(value, bool)):
    return None
  cure = "Return its real part" if _described(value).startswith("complex") else "Return its `jnp.mean` or `jnp.sum`"
  return f"the loss must return a real scalar, but it returned {_described(value)}. {cure}."


def _described(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


@contextlib.contextmanager
def explaining(
  name: str, loss: Callable, theta: Any, has_aux: bool = False, otherwise: str | None = DIFFERENCE.format("loss")
) -> Generator[None]:
  """In this block an error of JAX about the loss becomes one that says what is wrong with it and what to type.

  ``theta`` is the argument of the loss, ``name`` that of the product, ``otherwise`` what to type if the gradient has no
  forward-mode derivative (None: the product needs none). Errors that the loss itself raises pass unchanged.
  """
  try:
    yield
  except (TypeError, ValueError, NotImplementedError, IndexError) as error:
    seen = []
    try:
      jax.eval_shape(lambda theta: seen.append(loss(theta)), theta)  # what is returned need not be arrays
      fault = _scalar_fault(seen[0], has_aux)
      if fault is None:
        jax.eval_shape(jax.grad(drop_aux(loss, has_aux)), theta)
    except Exception:  # the loss or its gradient fails by itself: JAX's error stands
      fault = otherwise = None
    if fault is not None:
      raise TypeError(fault) from error
    if otherwise is None:
      raise
    said = str(error).partition("\n")[0]
    raise ValueError(
      f"`{name}` needs a forward-mode derivative (JVP), which some part of the loss or of its gradient does not have "
      f"(a callback, a custom derivative, a kernel). {otherwise} It said: {type(error).__name__}: {said}"
    ) from error
