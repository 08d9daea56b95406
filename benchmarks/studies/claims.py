# SPDX-License-Identifier: Apache-2.0
"""Every claim of the five sources that can be checked: confirmed, refuted or not checked here, from committed results.

python -m benchmarks claims            the table, and notebooks/claims.md brought up to date

Nothing is run: the figures are read from the JSON in the folder `--out`, and the rule of each claim judges them, so
that a new run changes the verdicts by itself. A test holds the page to the committed results.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from benchmarks.engine.arguments import RESULTS
from benchmarks.engine.progress import say
from benchmarks.engine.report import Table
from benchmarks.studies import _claims_dpsgd, _claims_layers, _claims_psgd
from benchmarks.studies._claims import VERDICTS, Claim, Verdict

PAGE = Path(__file__).parents[2] / "notebooks" / "claims.md"
BEGIN, END = "<!-- figures: written by `python -m benchmarks claims` -->", "<!-- /figures -->"
SOURCES: dict[str, tuple[Claim, ...]] = {
  "DPSGD: damped preconditioned SGD": _claims_dpsgd.CLAIMS,
  "GLS: the note on layerwise least squares": _claims_layers.GLS,
  "PSGD (arXiv:2402.04553, arXiv:2402.11858)": _claims_psgd.CLAIMS,
  "Regularisation and batch-norm preconditioning (arXiv:2410.00232, arXiv:2108.01110)": _claims_layers.REGULARIZATION,
  "SGD with partial Hessian (arXiv:2403.02681)": _claims_layers.SGD_PH,
}


def counts(claims: tuple[Claim, ...], results: Path) -> Counter[str]:
  """How many sentences came to which verdict."""
  return Counter(claim.word(results) for claim in claims)


def summary(results: Path) -> Table:
  """One row per source."""
  rows = []
  for source, claims in SOURCES.items():
    found = counts(claims, results)
    rows.append((source, str(len(claims)), *(str(found[word]) for word in VERDICTS)))
  totals = [str(sum(int(row[i]) for row in rows)) for i in range(1, len(VERDICTS) + 2)]
  return Table("Sentences by verdict", ("source", "sentences", *VERDICTS), [*rows, ("all", *totals)])


def _line(verdict: Verdict, commands: dict[str, int]) -> str:
  """A case as an item of a list; the command of a figure by its number, that of a law in full."""
  if not verdict.over:
    return f"- *{verdict.word}*: {verdict.evidence}" + (f" ({verdict.command})" if verdict.command else "")
  number = commands.setdefault(verdict.command, len(commands) + 1)
  return f"- *{verdict.word}*: {verdict.evidence}: **{verdict.figure}**, {verdict.over} ([command {number}](#commands))"


def _outcome(words: list[str], word: str) -> str:
  """The verdict of a sentence, and of how many cases if these differ."""
  found = Counter(words)
  parts = [f"{found[each]} {each}" for each in VERDICTS if found[each]]
  return f"{word.capitalize()} ({', '.join(parts)})." if len(parts) > 1 else f"{word.capitalize()}."


def section(source: str, claims: tuple[Claim, ...], results: Path, commands: dict[str, int]) -> str:
  """A source's sentences with their cases; commands that are new get the next numbers."""
  parts = [f"## {source}"]
  for number, claim in enumerate(claims, 1):
    verdicts = [case.verdict(results) for case in claim.cases]
    outcome = _outcome([verdict.word for verdict in verdicts], claim.word(results))
    parts.append(f"**{number}. {claim.says}** {outcome}")
    parts.append("\n".join(_line(verdict, commands) for verdict in verdicts))
  return "\n\n".join(parts)


def text(results: Path) -> str:
  """Everything between the markers of the page."""
  commands: dict[str, int] = {}
  sections = [section(*entry, results, commands) for entry in SOURCES.items()]
  listed = "\n".join(f"{number}. {command}" for command, number in commands.items())
  return "\n\n".join([summary(results).markdown(), *sections, "## Commands", listed])


def updated(page: str, results: Path) -> str:
  """The page with its figures brought up to date."""
  before, rest = page.split(BEGIN)
  return f"{before}{BEGIN}\n\n{text(results)}\n\n{END}{rest.split(END)[1]}"


def run(args: Namespace) -> None:
  summary(args.out).show()
  if args.out == RESULTS:
    PAGE.write_text(updated(PAGE.read_text(), args.out))
    say(f"wrote {PAGE}")
