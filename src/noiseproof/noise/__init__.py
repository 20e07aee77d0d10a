"""Noise models: make labels, or the inputs under them, wrong in a known way.

Every model is a frozen dataclass; `apply` answers with a `Corruption`: the new labels, which rows
were hit, and the realised rate and transition matrix. `parse_noise` reads the same models from
text such as `symmetric:0.4` or `pairflip:0.2,step=-1+openset:0.1`.

One seed decides one noise draw, apart from the seeds of initialisation and order. `Symmetric`,
`PairFlip`, `OpenSet` and `TextCorruption` hit, for one seed, nested sets of rows: those hit at rate
0.2 are also hit at 0.4, so that a sweep over rates compares like with like.
"""

from __future__ import annotations

from noiseproof.noise.contract import Corruption, NoiseModel
from noiseproof.noise.matrices import (
    estimate_transition_from_labels,
    load_transition,
    save_transition,
)
from noiseproof.noise.models import (
    NOISE_MODELS,
    Annotators,
    InstanceDependent,
    Mixture,
    OpenSet,
    PairFlip,
    Swap,
    Symmetric,
    TextCorruption,
    Transition,
)
from noiseproof.noise.spec import parse_noise

__all__ = [
    "NOISE_MODELS",
    "Annotators",
    "Corruption",
    "InstanceDependent",
    "Mixture",
    "NoiseModel",
    "OpenSet",
    "PairFlip",
    "Swap",
    "Symmetric",
    "TextCorruption",
    "Transition",
    "estimate_transition_from_labels",
    "load_transition",
    "parse_noise",
    "save_transition",
]
