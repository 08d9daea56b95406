# SPDX-License-Identifier: Apache-2.0
"""What enters a layer."""
