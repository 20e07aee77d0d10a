"""All methods, by name. A new one costs an import and an entry here."""

from __future__ import annotations

from noiseproof.errors import InputError, unknown_name
from noiseproof.method import Method
from noiseproof.methods.baselines import (
    ELR,
    GCE,
    SCE,
    Bootstrapping,
    CoTeaching,
    CrossEntropy,
    ForwardCorrection,
    LabelSmoothing,
    SmallLoss,
)
from noiseproof.methods.clear import CleaR
from noiseproof.methods.lope import LoPE
from noiseproof.methods.nmtune import NMTune
from noiseproof.methods.turn import TURN

__all__ = [
    "ELR",
    "GCE",
    "METHODS",
    "SCE",
    "TURN",
    "Bootstrapping",
    "CleaR",
    "CoTeaching",
    "CrossEntropy",
    "ForwardCorrection",
    "LabelSmoothing",
    "LoPE",
    "NMTune",
    "SmallLoss",
    "find_method",
    "method_of",
]

METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        CleaR,
        TURN,
        LoPE,
        NMTune,
        CrossEntropy,
        LabelSmoothing,
        GCE,
        SCE,
        Bootstrapping,
        ForwardCorrection,
        ELR,
        CoTeaching,
        SmallLoss,
    )
}


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: Unknown name; gives the nearest and all names.
    """
    if name not in METHODS:
        raise InputError(unknown_name("method", name, METHODS))
    return METHODS[name]


def method_of(given: str | Method | type[Method]) -> Method:
    """A method by its name with or without a preset, by its class, or as it is.

    Raises:
        InputError: Unknown name or preset, or something else.

    >>> method_of("CleaR:fast") == CleaR.preset("fast"), method_of(GCE) == GCE()
    (True, True)
    """
    if isinstance(given, str):
        name, _, preset = given.partition(":")
        return find_method(name).preset(preset or "default")
    if isinstance(given, type) and issubclass(given, Method):
        return given()
    if not isinstance(given, Method):
        raise InputError(
            f"method must be a name such as CleaR, or a method such as CleaR(), got {given!r:.60}"
        )
    return given
