# SPDX-License-Identifier: Apache-2.0
"""OBSERVE: what a preconditioner is fitted on, and the products it is made of."""
