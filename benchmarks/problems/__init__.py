# SPDX-License-Identifier: Apache-2.0
"""What is minimised.

table        the rows, and `build`
vision       images, and what is done to them on purpose       layered      plain layers
models       the networks                         resnet          residual networks
data         the data sets                        cifar, tabular, curves   three of them
"""
