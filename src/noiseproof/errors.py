"""The one error of our own, something the user gave is wrong, and the checks that raise it."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST_NAMES = 15  # that a message lists
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class InputError(ValueError):
    """Something the user gave is wrong; says what was expected, what came, what to do.

    The command line prints its message as one line and exits with code 2.

    >>> raise InputError("q must lie in (0, 1], got 2.0; 0.7 is the usual choice")
    Traceback (most recent call last):
        ...
    noiseproof.errors.InputError: q must lie in (0, 1], got 2.0; 0.7 is the usual choice
    """


def unknown_name(what: str, given: str, known: Iterable[str], more: str = "") -> str:
    """One line on an unknown name: the nearest names and the whole list.

    Args:
        what: Kind of name.
        given: The name.
        known: Those that there are.
        more: Where the list stands, for one of more than 15 names.

    >>> unknown_name("method", "Clear", ["CleaR", "ELR"])
    "unknown method 'Clear'; did you mean 'CleaR'? available: CleaR, ELR"
    """
    names = list(known)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lowered, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(lowered[name]) for name in near)}?" if near else ";"
    listed = f"available: {', '.join(names)}"
    if more and len(names) > MOST_NAMES:
        listed = f"see {more}"
    return f"unknown {what} {given!r}{hint} {listed}"


def path_of(given: str | Path) -> Path:
    """The path that a user gave, with the home in the place of ~.

    Raises:
        InputError: It is empty, or there is no such home.

    >>> path_of("")
    Traceback (most recent call last):
        ...
    noiseproof.errors.InputError: expected the name of a file or folder, got ''
    """
    if not str(given).strip():
        raise InputError(f"expected the name of a file or folder, got {str(given)!r}")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(f"{str(given)!r} is not a path: {error}") from error


def check_types(settings: Any, owner: str) -> None:
    """Refuse values of a settings object that are not of the type that its fields declare.

    A path may stand for a text, a whole number for a number, a list for a tuple.

    Args:
        settings: A dataclass.
        owner: What stands before the name of a field in the message, such as ``train.``.

    Raises:
        InputError: One line with the name, what was expected and what came.
    """
    hints = _hints(type(settings))
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        check_type(f"{owner}{item.name}", value, hints.get(item.name, Any))


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of a type, see `check_types`.

    >>> check_type("seed", "3", int)
    Traceback (most recent call last):
        ...
    noiseproof.errors.InputError: seed must be a whole number, got '3'
    """
    if not _fits(value, hint):
        raise InputError(
            f"{name} must be {in_words(hint)}, got {_told(value)}{_instead(value, hint)}"
        )


def in_words(hint: Any, nothing: str = "None", rows: str = "a tuple") -> str:
    """A type in plain words.

    >>> in_words(int | None), in_words(Literal["a", "b"])
    ('a whole number or None', 'one of a, b')
    """
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(in_words(part, nothing, rows) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint is types.NoneType:
        return nothing
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"a {hint.__name__}"
    return _WORDS.get(hint, rows)


def _hints(kind: type) -> Mapping[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a class inside a function, whose types have no name outside
        return {}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, tuple(map(type, get_args(hint))))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(
            _fits(item, get_args(hint)[0]) for item in value
        )
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | Path)
    if isinstance(hint, type) and hint is not Any:  # Any is a class from Python 3.11 on
        return isinstance(value, hint)
    return True


def _told(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _instead(value: Any, hint: Any) -> str:
    """What to write for a class that stands for its object, or for a dict of settings."""
    if isinstance(value, type):
        return f"; write {value.__name__}()"
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint) and isinstance(hint, type):
        given = ", ".join(f"{name}={_told(one)}" for name, one in value.items())
        return f"; write {hint.__name__}({given})"
    return ""
