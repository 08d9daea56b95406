# SPDX-License-Identifier: Apache-2.0
"""What enters each layer: how it is recorded, found and summed, and step lengths that are read off it."""

from dpsgd_optax.layers.moments import channel_moments, second_moments
from dpsgd_optax.layers.record import LayerRecord
from dpsgd_optax.layers.step_length import clip_output_change, match_layers, match_total

__all__ = ["LayerRecord", "channel_moments", "clip_output_change", "match_layers", "match_total", "second_moments"]
