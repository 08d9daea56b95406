# SPDX-License-Identifier: Apache-2.0
"""The old name, until tests/ says benchmarks.engine.progress."""

from benchmarks.engine.progress import say as say
