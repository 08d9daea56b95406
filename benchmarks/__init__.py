# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one runner, one table of problems, one table of optimizers. Run `python -m benchmarks --help`.

problems.py, models.py   what is trained            data.py, curves.py    what it is trained on
optimizers.py            who trains it              hyperparameters.py    every number, in one place
runner.py                train, timed, interleaved  records.py            what is kept, as JSON
analysis.py              curves to figures          report.py, plots.py   figures to tables and pictures
session.py               one invocation             tune.py               choose learning rates
progress.py              live output                __main__.py           the command line
"""

import os

# Two BLAS threads that wait for each other on a busy machine turned a triangular solve of 0.3 ms into one of 8 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
