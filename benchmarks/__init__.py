# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: optimizers against each other on real data. Run `python -m benchmarks --help`; README.md says more.

engine/              trains, times and reports; knows no problem, no optimizer and no study
problems/            what is minimised: one function, one row; with the data sets and the networks
rivals.py            the same method by other people, where it is installed
optimizers.py        who trains: the table, and contestants as they are typed on the command line
hyperparameters.py   every number: settings, grids of learning rates, groups of contestants
studies/             what is asked: one file, one subcommand
__main__.py          the command line
results/             what was measured: JSON and pictures, from which the figures of the pages are written

Rooms import upwards only: engine, then problems and rivals, then hyperparameters and optimizers, then studies.
"""

import os

# Two BLAS threads that wait for each other on a busy machine turned a triangular solve of 0.3 ms into one of 8 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
