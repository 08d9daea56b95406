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


def _line(verdict: Verdict) -> str:
  """A case as an item of a list."""
  figure = f": **{verdict.figure}**, {verdict.over}" if verdict.figure and verdict.figure != "a law" else ""
  how = f" ({verdict.command})" if verdict.command else ""
  return f"- *{verdict.word}*: {verdict.evidence}{figure}{how}"


def section(source: str, claims: tuple[Claim, ...], results: Path) -> str:
  """A source's sentences with their cases."""
  parts = [f"## {source}"]
  for number, claim in enumerate(claims, 1):
    lines = [_line(case.verdict(results)) for case in claim.cases]
    parts += [f"**{number}. {claim.says}** {claim.word(results).capitalize()}.", "\n".join(lines)]
  return "\n\n".join(parts)


def text(results: Path) -> str:
  """Everything between the markers of the page."""
  return "\n\n".join([summary(results).markdown(), *(section(*entry, results) for entry in SOURCES.items())])


def updated(page: str, results: Path) -> str:
  """The page with its figures brought up to date."""
  before, rest = page.split(BEGIN)
  return f"{before}{BEGIN}\n\n{text(results)}\n\n{END}{rest.split(END)[1]}"


def run(args: Namespace) -> None:
  summary(args.out).show()
  if args.out == RESULTS:
    PAGE.write_text(updated(PAGE.read_text(), args.out))
    say(f"wrote {PAGE}")
