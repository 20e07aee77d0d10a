"""Noise models from text, such as `symmetric:0.4` or `pairflip:0.2,step=-1+openset:0.1`."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import fields
from typing import Any

from noiseproof.errors import InputError, unknown_name
from noiseproof.noise.contract import NoiseModel
from noiseproof.noise.matrices import load_transition
from noiseproof.noise.models import NOISE_MODELS, Mixture, PairFlip, Symmetric, Transition

_NAMES: dict[str, tuple[type[NoiseModel], dict[str, Any]]] = {
    **{name: (kind, {}) for name, kind in NOISE_MODELS.items()},
    "symmetric-redraw": (Symmetric, {"redraw": True}),
    "asymmetric": (PairFlip, {}),
}
_ALSO = {"pair-flip": "pairflip", "open-set": "openset", "idn": "instance"}  # as others write them


def parse_noise(text: str | NoiseModel) -> NoiseModel | None:
    """Read a noise model from `name:rate[,key=value...]`, parts joined by `+`; None for `none`.

    What is a model already is given back.

    >>> parse_noise("pairflip:0.4,step=-1")
    PairFlip(rate=0.4, step=-1, pairs=())
    >>> parse_noise("pairflip:0.2 + openset:0.1").spec
    'pairflip:0.2+openset:0.1'
    """
    if isinstance(text, NoiseModel):
        return text
    if not isinstance(text, str):
        raise InputError(
            f"noise must be a text such as symmetric:0.4, or a noise model, got {text!r:.60}"
        )
    if text.strip().lower() in ("", "none"):
        return None
    # only a + before a name joins parts, so that file names may hold one
    parts = re.split(r"\+(?=\s*[A-Za-z_-]+\s*(?::|$))", text.strip())
    models = tuple(_parse_part(part.strip()) for part in parts)
    return models[0] if len(models) == 1 else Mixture(models)


def _parse_part(text: str) -> NoiseModel:
    given, _, settings = (piece.strip() for piece in text.partition(":"))
    name = given.lower().replace("_", "-")
    name = _ALSO.get(name, name)
    if name == "none":
        raise InputError(f"noise '{text}': none takes no rate and stands alone")
    if name not in _NAMES:
        raise InputError(unknown_name("noise model", given, [*_NAMES, "none"]))
    kind, preset = _NAMES[name]
    try:
        return kind(**preset | _parse_settings(kind, settings))
    except InputError as error:
        raise InputError(f"noise '{text}': {error}; for example {kind.example}") from None


def _parse_settings(kind: type[NoiseModel], text: str) -> dict[str, Any]:
    if kind is Transition:
        return _parse_matrix(text)
    first, *settings = text.split(",")
    if not first.strip() or "=" in first:
        raise InputError("the rate is missing")
    known = [f.name for f in fields(kind) if f.name != "rate"]
    values: dict[str, Any] = {"rate": _rate(first.strip())}
    for setting in settings:
        key, equals, value = (piece.strip() for piece in setting.partition("="))
        if not equals and first.strip() == "0" and key.isdigit():
            raise InputError(f"'0,{key}' is no number; write 0.{key}")
        if key not in known:
            raise InputError(f"unknown setting '{key}', known: {', '.join(known) or 'none'}")
        if key in values:
            raise InputError(f"setting '{key}' is given twice")
        values[key] = _setting(key, value)
    return values


def _rate(text: str) -> int | float | str:
    share = _plain(text.removesuffix("%"))
    if text.endswith("%") and not isinstance(share, str):
        raise InputError(f"the rate is a share of the rows, got {text}; write {share / 100:g}")
    return _plain(text)


def _setting(key: str, value: str) -> Any:
    if key == "pairs":
        return [pair.split(">") for pair in value.split(";")]
    if key == "redraw":
        if value.lower() not in ("true", "false"):
            raise InputError(f"redraw must be true or false, got '{value}'")
        return value.lower() == "true"
    return _plain(value)


def _parse_matrix(text: str) -> dict[str, Any]:
    if not text:
        raise InputError("the matrix file is missing")
    if not text.startswith("["):
        return {"matrix": load_transition(text), "source": text}
    try:
        return {"matrix": json.loads(text)}
    except json.JSONDecodeError:
        raise InputError("the matrix is not valid JSON") from None


def _plain(text: str) -> int | float | str:
    """A number where the text is one; the model itself refuses what is left."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
