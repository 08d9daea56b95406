# SPDX-License-Identifier: Apache-2.0
"""What every study needs.

problem          a loss over data                contestant      an optimizer with its options
runner           trains all, interleaved         session         one invocation: compile, run, save
tune_then_race   the best rate of each, raced    timing          the cost of a step, as ratios
records          what is kept, as JSON           saved           what `--save` keeps besides
analysis         from curves to figures          report, plots   figures as tables and pictures
calls            names with options              arguments       arguments of several studies
progress         messages during a run           devices         how params lie on many devices
program          kernels of a compiled step
"""
