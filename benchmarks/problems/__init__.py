# SPDX-License-Identifier: Apache-2.0
"""What is minimised.

table     the rows, and `build`          vision    images, and what is done to them on purpose
models    the networks                   layered   plain layers, for the layerwise methods
resnet    the residual networks          data      the data sets; cifar, tabular and curves are three of them
science   equations and regression       references   solutions to compare them with
"""
