# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers: chains of the parts, one file each."""
