# SPDX-License-Identifier: Apache-2.0
"""The old name, until tests/ says benchmarks.engine.devices."""

from benchmarks.engine.devices import QUICK_TO_COMPILE as QUICK_TO_COMPILE
