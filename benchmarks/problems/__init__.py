# SPDX-License-Identifier: Apache-2.0
"""What is minimised.

table        the rows, and `build`                supervised      problems of a model and a loss of its outputs
vision       images                               layered         plain layers
models       the networks                         resnet          residual networks
data         the data sets                        cifar, tabular, curves   three of them
spoilers     what is done to images on purpose
"""
