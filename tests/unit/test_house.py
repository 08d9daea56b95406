# SPDX-License-Identifier: Apache-2.0
"""The plan of the house, held: rooms on floors, arrows one way, files and functions that fit on a screen or two.

Read from the source as text (`ast`), so that nothing is imported. A failure prints every offender.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {"dpsgd_optax": 300, "benchmarks": 400, "tests": 400}  # lines a file may have
FUNCTION = 60  # lines of code a function may have, docstring and blank lines not counted
LEVELS = 5  # the longest chain of rooms, the front door included


@functools.cache
def contents() -> list[tuple[Path, ast.Module]]:
  return [(path, ast.parse(path.read_text())) for name in FILES for path in sorted((ROOT / name).rglob("*.py"))]


def code_lines(function: ast.FunctionDef, text: list[str]) -> int:
  """Lines of a function that hold code: without its own docstring, comments and blank lines."""
  body = function.body
  first = body[0]
  skipped: set[int] = set()
  if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
    skipped = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
  lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
  return sum(
    1
    for number in lines
    if number not in skipped and text[number - 1].strip() and not text[number - 1].lstrip().startswith("#")
  )


def room(module: str, package: str) -> str | None:
  """The room of a module: the folder or the file right under the package; the front door is `__init__`."""
  parts = module.split(".")
  if parts[0] != package:
    return None
  return parts[1] if len(parts) > 1 else "__init__"


def arrows(package: str) -> dict[str, set[str]]:
  """room → the rooms it imports from, wherever in a file the import stands."""
  here = ROOT / package
  result: dict[str, set[str]] = {}
  for path, tree in contents():
    if not path.is_relative_to(here):
      continue
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[1]
    targets = result.setdefault(own, set())
    for node in ast.walk(tree):
      modules = []
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = inside if node.module == package else [node.module]
      for module in modules:
        other = room(module, package)
        exists = other and ((here / other).is_dir() or (here / f"{other}.py").exists())
        if other and other != own:
          targets.add(other if exists else "__init__")
  return result


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
  """The floor of each room: one above the highest room it imports; a circle is an error that names its rooms."""
  found: dict[str, int] = {}

  def floor(name: str, above: tuple[str, ...]) -> int:
    if name in above:
      raise AssertionError(f"circle of imports: {' → '.join([*above[above.index(name) :], name])}")
    if name not in found:
      found[name] = 1 + max((floor(other, (*above, name)) for other in graph[name]), default=0)
    return found[name]

  for name in graph:
    floor(name, ())
  return found


@pytest.mark.parametrize("package", FILES)
def test_no_file_is_longer_than_a_reader_can_hold(package):
  lengths = [
    (len(path.read_text().splitlines()), path) for path, _ in contents() if path.is_relative_to(ROOT / package)
  ]
  offenders = [f"{path.relative_to(ROOT)}: {lines} lines" for lines, path in lengths if lines > FILES[package]]
  assert not offenders, f"over {FILES[package]} lines:\n" + "\n".join(offenders)


@pytest.mark.parametrize("package", FILES)
def test_no_function_is_longer_than_one_thought(package):
  offenders = []
  for path, tree in contents():
    if path.is_relative_to(ROOT / package):
      text = path.read_text().splitlines()
      for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (lines := code_lines(node, text)) > FUNCTION:
          offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines of code")
  assert not offenders, f"over {FUNCTION} lines of code:\n" + "\n".join(offenders)


def test_imports_go_one_way_on_at_most_five_floors():
  """Folders are rooms; a room imports rooms below it only, so there is no circle and the longest chain is short."""
  graph = arrows("dpsgd_optax")
  assert "base" in graph and "__init__" in graph, sorted(graph)
  back = [name for name, targets in graph.items() if "__init__" in targets]
  assert not back, f"rooms that import the front door: {back}"
  floors = levels(graph)
  assert max(floors.values()) <= LEVELS, "\n".join(
    f"{floors[name]} {name}: {sorted(graph[name])}" for name in sorted(floors, key=floors.get)
  )


def test_benchmarks_do_not_import_tests_and_the_package_imports_neither():
  offenders = []
  for path, tree in contents():
    top = path.relative_to(ROOT).parts[0]
    forbidden = {"dpsgd_optax": {"tests", "benchmarks"}, "benchmarks": {"tests"}, "tests": set()}[top]
    for node in ast.walk(tree):
      modules = []
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module]
      offenders += [f"{path.relative_to(ROOT)} imports {m}" for m in modules if m.split(".")[0] in forbidden]
  assert not offenders, "\n".join(offenders)
