# SPDX-License-Identifier: Apache-2.0
"""One file is one subcommand: its name is the command, the first line of its docstring the line in `--help`.

A study has `run(args)` and, if it takes arguments besides `--out`, `add_arguments(parser)`. It is found by its name. A
file whose name begins with an underscore is not a study, but a part of one or of several.
"""
