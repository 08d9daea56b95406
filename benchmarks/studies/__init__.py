# SPDX-License-Identifier: Apache-2.0
"""One file is one subcommand: its name is the command, the first line of its docstring the line in `--help`.

A study has `add_arguments(parser)`, which adds its own to `--out`, and `run(args)`. It is found by its name. A file
that begins with an underscore is no study, but what one or several of them are made of.
"""
