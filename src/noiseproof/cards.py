"""What is said about each method, read from its code: there is no second text to keep in step."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from noiseproof.method import Method
from noiseproof.methods import METHODS

_MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Setting:
    """One field of a method or of another settings class."""

    name: str
    type: str
    default: str
    meaning: str


def summary(method: type[Method]) -> str:
    """The first line of the class docstring."""
    return inspect.cleandoc(method.__doc__ or "").splitlines()[0]


def card(method: type[Method]) -> str:
    """The method card: the module's docstring if the file holds one method, else the class's."""
    module = sys.modules[method.__module__]
    alone = [other for other in METHODS.values() if other.__module__ == method.__module__]
    text = module.__doc__ if len(alone) == 1 else method.__doc__
    return re.split(r"\n\s*Attributes:", inspect.cleandoc(text or ""))[0].strip()


def settings(kind: type[Any], prefix: str = "", preset: Any = None) -> list[Setting]:
    """All fields of a settings class, nested ones with dots, with their meaning.

    Args:
        kind: The class.
        prefix: Stands before every name.
        preset: An object of the class, whose values stand in the place of the defaults.
    """
    found: list[Setting] = []
    meanings = field_meanings(kind)
    for item in dataclasses.fields(kind):
        default: Any = item.default
        factory: Any = item.default_factory
        if default is _MISSING and factory is not _MISSING:
            default = factory()
        if preset is not None:
            default = getattr(preset, item.name)
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            found += settings(type(default), f"{prefix}{item.name}.", default)
            continue
        shown = "required" if default is _MISSING else str(default)
        found.append(
            Setting(f"{prefix}{item.name}", str(item.type), shown, meanings.get(item.name, ""))
        )
    return found


def field_meanings(kind: type[Any]) -> dict[str, str]:
    """Field name -> sentence, from the ``Attributes`` sections of the class and its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, found, attributes = text.partition("Attributes:\n")
        if not found:
            continue
        for entry in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE):
            meanings[entry.group(1)] = re.sub(r"\s+", " ", entry.group(2)).strip()
    return meanings
