# SPDX-License-Identifier: Apache-2.0
"""Compare optimizers on real data: python -m benchmarks STUDY, or a problem to train on it.

python -m benchmarks demo                              digits, all optimizers, a table and a picture, in a few minutes
python -m benchmarks mnist --optimizers ablation       one problem, four optimizers
python -m benchmarks cost --help                       the options of one study
"""

import ast
import importlib
import inspect
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import jax

from benchmarks.engine.arguments import RESULTS
from benchmarks.engine.calls import SpecError, name_of, unknown
from benchmarks.engine.records import ResumeError
from benchmarks.hyperparameters import GROUPS
from benchmarks.problems.data import DataError
from benchmarks.problems.table import PROBLEMS

STUDIES = {path.stem: path for path in sorted(Path(__file__).with_name("studies").glob("[!_]*.py"))}
"""Every file of the folder whose name does not begin with an underscore; it is imported when it is asked for."""


def first_line(text: str | None) -> str:
  return (text or "").strip().partition("\n")[0]


def overview() -> str:
  """Every study, problem and group with a line each."""
  studies = {name: first_line(ast.get_docstring(ast.parse(path.read_text()))) for name, path in STUDIES.items()}
  problems = {name: first_line(inspect.getdoc(getattr(make, "func", make))) for name, make in PROBLEMS.items()}
  groups = {name: ", ".join(members) for name, members in GROUPS.items()}
  parts = [__doc__ or ""]
  for title, entries in (("studies", studies), ("problems", problems), ("groups of optimizers", groups)):
    parts += [f"{title}:", *(f"  {name:<20} {text}" for name, text in entries.items()), ""]
  return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
  """Runs one study: 0 if it succeeds, 2 if it cannot do what was asked, 130 if it was interrupted."""
  argv = sys.argv[1:] if argv is None else argv
  first = argv[0] if argv else "demo"
  if first in ("-h", "--help"):
    print(overview())
    return 0
  problems = [text for text in argv if name_of(text) in PROBLEMS]
  name = first if first in STUDIES else "train" if problems or not first.startswith("-") else "demo"
  if name == "train" and first != name and not problems:
    print(f"error: {unknown('study or problem', name_of(first), [*STUDIES, *PROBLEMS])}", file=sys.stderr)
    raise SystemExit(2)
  study = importlib.import_module(f"benchmarks.studies.{name}")
  parser = ArgumentParser(
    f"python -m benchmarks {name}", description=study.__doc__, formatter_class=RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="where JSON and PNG go (default: benchmarks/results)")
  getattr(study, "add_arguments", lambda parser: None)(parser)
  try:
    study.run(parser.parse_args(argv[first == name :]))
  except (DataError, SpecError, ResumeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  # seconds of compiling are measured: no program may come from a cache, here or in the processes that are started
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
