# SPDX-License-Identifier: Apache-2.0
"""The old name, until tests/ says benchmarks.engine.report."""

from benchmarks.engine.report import Table as Table
