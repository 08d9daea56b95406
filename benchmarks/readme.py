# SPDX-License-Identifier: Apache-2.0
"""The old name, until tests/ says benchmarks.studies.readme."""

from benchmarks.studies.readme import pages as pages
