# SPDX-License-Identifier: Apache-2.0
"""What `optax.tree` lacks."""
