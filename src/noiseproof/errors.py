"""The one error of our own: something the user gave is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; says what was expected, what came, what to do.

    The command line prints its message as one line and exits with code 2.

    >>> raise InputError("q must lie in (0, 1], got 2.0; 0.7 is the usual choice")
    Traceback (most recent call last):
        ...
    noiseproof.errors.InputError: q must lie in (0, 1], got 2.0; 0.7 is the usual choice
    """


def unknown_name(what: str, given: str, known: Iterable[str]) -> str:
    """One line on an unknown name: the nearest names and the whole list.

    >>> unknown_name("method", "Clear", ["CleaR", "ELR"])
    "unknown method 'Clear'; did you mean 'CleaR'? available: CleaR, ELR"
    """
    names = list(known)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lowered, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(lowered[name]) for name in near)}?" if near else ";"
    return f"unknown {what} {given!r}{hint} available: {', '.join(names)}"
