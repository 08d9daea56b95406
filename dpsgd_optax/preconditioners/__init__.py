# SPDX-License-Identifier: Apache-2.0
"""FIT, APPLY: one file per preconditioner, each with `init`, `fit` and `apply`.

A *group* is a preconditioner of one array. Two lifts make it one of a pytree: `per_leaf`, one P per leaf, equal
shapes batched; `raveled`, one P for the whole tree as a vector.
"""
