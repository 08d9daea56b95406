# SPDX-License-Identifier: Apache-2.0
"""Flax: train states and loops, what enters each layer, norm layers.

The only room that imports Flax. The package does not import it: type ``from dpsgd_optax import training``.
"""

from dpsgd_optax.training.cadence import host_cadence
from dpsgd_optax.training.linen import LAYER_INPUTS, with_layer_inputs
from dpsgd_optax.training.nnx import call_with_layer_inputs
from dpsgd_optax.training.norm_layers import WeightNorm, is_norm_param
from dpsgd_optax.training.train_state import TrainState

__all__ = ["TrainState", "host_cadence"]  # the loop
__all__ += ["LAYER_INPUTS", "call_with_layer_inputs", "with_layer_inputs"]  # what enters each layer
__all__ += ["WeightNorm", "is_norm_param"]  # norm layers
