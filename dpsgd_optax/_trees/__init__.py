# SPDX-License-Identifier: Apache-2.0
"""What `optax.tree` lacks: paths and holes, selections, sums, equal shapes side by side, devices."""
