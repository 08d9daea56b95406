# SPDX-License-Identifier: Apache-2.0
"""The loops import packages that need not be installed: they are imported by the cell that asks for them."""

collect_ignore_glob = ["with_*.py"]
