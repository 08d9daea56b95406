# SPDX-License-Identifier: Apache-2.0
"""FIT and APPLY: one file a method; files with an underscore are what several methods share."""
