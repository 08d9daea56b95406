# SPDX-License-Identifier: Apache-2.0
"""How a factor of P moves."""
