# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one runner, one table of problems, one table of optimizers. Run `python -m benchmarks --help`.

problem.py               what a problem is          problems.py           the table of them
layered.py, vision.py    problems of layers, images models.py, resnet.py  the networks
data.py, curves.py       what it is trained on      cifar.py, tabular.py  the same; spoilers.py: spoiled on purpose
optimizers.py            who trains it              hyperparameters.py    every number, in one place
runner.py                train, timed, interleaved  records.py            what is kept, as JSON
analysis.py              curves to figures          report.py, plots.py   figures to tables and pictures
session.py               one invocation             tune.py               choose learning rates
saved.py                 what `--save` keeps        studies.py            and the analyses of it
gls.py                   the claims of the note     curvature_step.py     one of its mends, as a reference
progress.py              live output                __main__.py           the command line
"""

import os

# Two BLAS threads that wait for each other on a busy machine turned a triangular solve of 0.3 ms into one of 8 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
