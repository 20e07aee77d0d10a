"""Adapters that peft lacks: bottlenecks, biases, prompts and prefixes.

Each is put around the frozen encoder with hooks, and each can be gated row by row and layer by
layer: where a gate is 0 the row meets the frozen layer alone. Where they go is found by asking the
model: it is called once on a tiny input, and what ran in which order tells the rest.
"""

from __future__ import annotations

from noiseproof.adapters.asking import calls_in_layers
from noiseproof.adapters.model import FAMILIES, AdaptedModel, Adapter, restored
from noiseproof.adapters.parts import Gates, idle_parameters, set_adapters

__all__ = [
    "FAMILIES",
    "AdaptedModel",
    "Adapter",
    "Gates",
    "calls_in_layers",
    "idle_parameters",
    "restored",
    "set_adapters",
]
