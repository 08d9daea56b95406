# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of all runs that are kept in --out."""

from argparse import Namespace

from benchmarks import hyperparameters
from benchmarks.engine import arguments
from benchmarks.engine.progress import say
from benchmarks.engine.records import load, runs_in
from benchmarks.engine.report import claim_table, tables

add_arguments = lambda parser: arguments.add(parser, "target")


def run(args: Namespace) -> None:
  documents = [load(path) for path in runs_in(args.out)]
  if claim := claim_table(documents):
    say(claim.markdown() + "\n")
  for results in documents:
    for table in tables(results, args.target or hyperparameters.targets(results.plan.problem)):
      say(table.markdown() + "\n")
