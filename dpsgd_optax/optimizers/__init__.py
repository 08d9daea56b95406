# SPDX-License-Identifier: Apache-2.0
"""Chains of the parts."""
