# SPDX-License-Identifier: Apache-2.0
"""The digits with every usual optimizer: a table and a picture, in a few minutes."""

from argparse import Namespace

from benchmarks.studies import train

add_arguments = train.add_options


def run(args: Namespace) -> None:
  args.name, args.optimizers = args.name or "demo", args.optimizers or "demo"
  train.train("digits", args)
