# SPDX-License-Identifier: Apache-2.0
"""Names with options, as typed on the command line: dpsgd(average=0.5, form=additive), xor(length=55, cell=lstm)."""

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

Options = dict[str, Any]


class SpecError(ValueError):
  """A contestant or a problem that cannot be understood. The message says what to type."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
  """What to say to a name that is misspelt: all the names there are, and the one that was probably meant."""
  known = list(known)
  near = difflib.get_close_matches(name, known, 1)
  meant = f" Did you mean `{near[0]}`?" if near else ""
  return f"no {kind} is called `{name}`; known are {', '.join(known)}.{meant}"


def split(text: str) -> list[str]:
  """The parts between the commas outside parentheses."""
  parts, depth = [""], 0
  for character in text:
    depth += (character == "(") - (character == ")")
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  return [part.strip() for part in parts if part.strip()]


def name_of(text: str) -> str:
  """`xor(length=55)` -> `xor`."""
  return text.partition("(")[0].strip()


def parse(text: str, example: str) -> tuple[str, Options]:
  """`name(option=value, ...)` -> the name and its options; values that are not literals stay text."""
  complaint = SpecError(f"`{text}`: options are written as name=value, for example {example}.")
  match = re.fullmatch(r"([\w+]+)(\(.*\))?", text.strip())
  if match is None:
    raise complaint
  try:
    call = ast.parse(f"f{match[2] or '()'}", mode="eval").body
  except SyntaxError:
    raise complaint from None
  if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
    raise complaint
  return match[1], {str(keyword.arg): literal(keyword.value) for keyword in call.keywords}


def literal(node: ast.expr) -> Any:
  """The value of a literal, the text of anything else."""
  try:
    return ast.literal_eval(node)
  except ValueError:
    return ast.unparse(node)


def file_name(text: str) -> str:
  """`xor(length=55, cell=lstm)` -> `xor-length-55-cell-lstm`."""
  return re.sub(r"[^\w.+]+", "-", text).strip("-")


def choice(given: str, option: str, known: Mapping[str, Any] | tuple[str, ...]) -> Any:
  """What an option that is one of a few words stands for in a table; without a table it stands for itself."""
  if given not in known:
    raise SpecError(f"`{option}` must be one of {', '.join(known)}, got {given!r}.")
  return known[given] if isinstance(known, Mapping) else given
