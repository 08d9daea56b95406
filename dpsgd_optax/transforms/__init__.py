# SPDX-License-Identifier: Apache-2.0
"""THE STEP: the Optax transforms around a preconditioner."""
