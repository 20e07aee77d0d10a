"""Noise on texts: words change places, characters appear and disappear, row by row.

Everything here is a pure function of texts, settings and a random generator. `row_random` gives
each row a generator of its own, so that what happens to a row depends neither on the order of the
rows nor on what happened to others.

The definitions are ours: the paper that they serve (LoPE) names the three operations and one rate.
"""

from __future__ import annotations

import re
import string
import zlib
from dataclasses import dataclass

import numpy as np

from noiseproof.errors import InputError

OPERATIONS = ("shuffle", "insert", "delete")
KINDS = (*OPERATIONS, "replace")  # which needs words to put in place, so it is never drawn unasked
UNITS = ("sample", "word", "char")
CHARSETS = ("ascii", "keyboard")

ASCII = string.ascii_letters + string.digits + string.punctuation
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # rows of letters; each is shifted to the right
TRIES = 10  # draws until a picked row differs; then characters are inserted, which always differs


@dataclass(frozen=True)
class TextNoise:
    """How texts are corrupted.

    Attributes:
        rate: Share of rows, words or characters that are hit.
        unit: sample (a hit row gets one operation, applied to all its texts), word or char.
        operations: Which of shuffle, insert, delete and replace are drawn, each equally often.
        strength: unit=sample: share of the characters that are inserted or deleted, of the words
            that are replaced.
        window: unit=sample: words are shuffled inside windows of so many; 0 is the whole text.
        charset: Inserted characters: ascii, or keyboard (a neighbour of the character before).
        words: What replace puts in the place of a word, each equally often.
    """

    rate: float
    unit: str = "sample"
    operations: tuple[str, ...] = OPERATIONS
    strength: float = 0.1
    window: int = 4
    charset: str = "ascii"
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every setting where it stands.

        Raises:
            InputError: A setting is out of its range.
        """
        _check(0 <= self.rate <= 1, "rate", "lie in [0, 1]", self.rate)
        _check(self.unit in UNITS, "unit", f"be one of {', '.join(UNITS)}", self.unit)
        known = len(self.operations) > 0 and set(self.operations) <= set(KINDS)
        _check(known, "operations", f"name some of {', '.join(KINDS)}", self.operations)
        whole = "replace" not in self.operations or self.unit != "char"
        _check(whole, "operations", "not name replace with unit=char", self.operations)
        _check(0 < self.strength <= 1, "strength", "lie in (0, 1]", self.strength)
        _check(self.window == 0 or self.window >= 2, "window", "be 0 or at least 2", self.window)
        charsets = ", ".join(CHARSETS)
        _check(self.charset in CHARSETS, "charset", f"be one of {charsets}", self.charset)

    def apply(self, texts: tuple[str, ...], random: np.random.Generator) -> tuple[str, ...]:
        """Corrupt the texts of one row; what is hit at one rate is hit at every higher one.

        >>> TextNoise(1.0, operations=("delete",)).apply(("right",), np.random.default_rng(0))
        ('riht',)
        >>> TextNoise(0.0).apply(("right",), np.random.default_rng(0))
        ('right',)

        Raises:
            InputError: Words are to be replaced and fewer than two are given.
        """
        some = "replace" not in self.operations or len(self.words) > 1
        _check(some, "words", "be two or more for replace", self.words)
        if self.unit == "word":
            return tuple(self._by_word(text, random) for text in texts)
        if self.unit == "char":
            return tuple(self._by_character(text, random) for text in texts)
        return self._row(texts, random) if random.random() < self.rate else texts

    def _row(self, texts: tuple[str, ...], random: np.random.Generator) -> tuple[str, ...]:
        """One operation on all texts of a picked row, which then differ."""
        operation = self.operations[int(random.integers(len(self.operations)))]
        for _ in range(TRIES):
            changed = tuple(self._text(text, operation, random) for text in texts)
            if changed != texts:
                return changed
        if set(self.operations) == {"replace"}:  # nothing to replace
            return texts
        return tuple(self._text(text, "insert", random) for text in texts)

    def _text(self, text: str, operation: str, random: np.random.Generator) -> str:
        """One operation on one text, or another where it is impossible."""
        if operation == "shuffle" and len(set(text.split())) < 2:
            rest = [name for name in self.operations if name != "shuffle"] or ["insert"]
            operation = rest[int(random.integers(len(rest)))]
        if operation == "shuffle":
            return shuffle_words(text, self.window, random)
        if operation == "replace":
            return replace_words(text, self.strength, self.words, random)
        count = max(1, round(self.strength * len(text)))
        if operation == "delete" and len(text) > 1:
            return delete_characters(text, count, random)
        return insert_characters(text, count, self.charset, random)

    def _by_word(self, text: str, random: np.random.Generator) -> str:
        """Every word on its own: lose a character, gain one, give way to another, or move."""
        parts, places = _words(text)
        hit = random.random(len(places)) < self.rate
        drawn = random.integers(len(self.operations), size=len(places))
        for number in np.flatnonzero(hit):
            place, operation = places[number], self.operations[drawn[number]]
            if operation == "shuffle" and len(places) > 1:
                other = places[number + 1 if number + 1 < len(places) else number - 1]
                parts[place], parts[other] = parts[other], parts[place]
            elif operation == "replace":
                parts[place] = another(parts[place], self.words, random)
            elif operation == "delete" and len(parts[place]) > 1:
                parts[place] = delete_characters(parts[place], 1, random)
            else:
                parts[place] = insert_characters(parts[place], 1, self.charset, random)
        return "".join(parts)

    def _by_character(self, text: str, random: np.random.Generator) -> str:
        """Every character on its own: go, get a follower, or move its word behind its neighbour."""
        hit = random.random(len(text)) < self.rate
        drawn = random.integers(len(self.operations), size=len(text))
        extra = random.integers(2**31, size=len(text))
        parts: list[str] = []
        swaps: list[int] = []  # numbers of words
        start = 0
        for part in re.split(r"(\s+)", text):
            kept = []
            for place, character in enumerate(part, start):
                operation = self.operations[drawn[place]] if hit[place] else ""
                if operation != "delete":
                    kept.append(character)
                if operation == "insert":
                    kept.append(_new_character(character, self.charset, int(extra[place])))
                if operation == "shuffle":
                    swaps.append(len(parts) // 2)
            parts.append("".join(kept))
            start += len(part)
        for word in dict.fromkeys(swaps):
            place = 2 * word
            other = place + 2 if place + 2 < len(parts) else place - 2
            if other >= 0:
                parts[place], parts[other] = parts[other], parts[place]
        changed = "".join(parts)
        return changed if changed or not text else text[:1]


def row_random(purpose: str, seed: int, row: int, epoch: int = 0) -> np.random.Generator:
    """The random generator of one row for one purpose.

    >>> row_random("example", 0, row=3).random() == row_random("example", 0, row=3).random()
    True
    """
    return np.random.default_rng([zlib.crc32(purpose.encode()), seed, epoch, row])


def shuffle_words(text: str, window: int, random: np.random.Generator) -> str:
    """Permute words inside consecutive windows; all white space stays where it is.

    >>> shuffle_words("one two  three", 0, np.random.default_rng(3))
    'three two  one'
    """
    parts, places = _words(text)
    size = window or max(1, len(places))
    shuffled = list(parts)
    for start in range(0, len(places), size):
        group = places[start : start + size]
        for place, other in zip(group, random.permutation(len(group)), strict=True):
            shuffled[place] = parts[group[other]]
    return "".join(shuffled)


def insert_characters(text: str, count: int, charset: str, random: np.random.Generator) -> str:
    """Put random characters at random positions, the ends included.

    >>> len(insert_characters("four", 2, "ascii", np.random.default_rng(0)))
    6
    """
    before = np.bincount(random.integers(len(text) + 1, size=count), minlength=len(text) + 1)
    pieces = []
    for place, number in enumerate(before):
        last = text[place - 1] if place else ""
        for _ in range(number):
            pieces.append(_new_character(last, charset, int(random.integers(2**31))))
        pieces.append(text[place : place + 1])
    return "".join(pieces)


def delete_characters(text: str, count: int, random: np.random.Generator) -> str:
    """Take away characters at random positions; one is always left.

    >>> delete_characters("abc", 9, np.random.default_rng(0)) in "abc"
    True
    """
    count = min(count, len(text) - 1)
    if count < 1:
        return text
    gone = set(random.choice(len(text), count, replace=False).tolist())
    return "".join(character for place, character in enumerate(text) if place not in gone)


def replace_words(
    text: str, share: float, words: tuple[str, ...], random: np.random.Generator
) -> str:
    """Put other words in the place of a share of the words, of one at least where there is one.

    >>> replace_words("one two three", 0.1, ("four",), np.random.default_rng(0))
    'one two four'
    """
    parts, places = _words(text)
    count = min(len(places), max(1, round(share * len(places))))
    for number in random.choice(len(places), count, replace=False):
        parts[places[number]] = another(parts[places[number]], words, random)
    return "".join(parts)


def another(word: str, words: tuple[str, ...], random: np.random.Generator) -> str:
    """One of these words, not the same again where there are others."""
    number = int(random.integers(len(words)))
    drawn = words[number]
    return words[(number + 1) % len(words)] if drawn == word else drawn


def keyboard_neighbours(letter: str) -> str:
    """Letters beside this one on a QWERTY keyboard, in its case; none for what is no letter.

    >>> keyboard_neighbours("a"), keyboard_neighbours("G"), keyboard_neighbours("7")
    ('qwsz', 'TYFHVB', '')
    """
    for row, keys in enumerate(KEYS):
        place = keys.find(letter.lower())
        if not letter or place < 0:
            continue
        above = KEYS[row - 1][place : place + 2] if row else ""
        beside = keys[max(0, place - 1) : place] + keys[place + 1 : place + 2]
        below = KEYS[row + 1][max(0, place - 1) : place + 1] if row + 1 < len(KEYS) else ""
        found = above + beside + below
        return found.upper() if letter.isupper() else found
    return ""


def _words(text: str) -> tuple[list[str], list[int]]:
    """The words and what stands between them, and the places of the words."""
    parts = re.split(r"(\s+)", text)
    return parts, [place for place, part in enumerate(parts) if part and not part.isspace()]


def _new_character(before: str, charset: str, number: int) -> str:
    choices = (keyboard_neighbours(before) if charset == "keyboard" else "") or ASCII
    return choices[number % len(choices)]


def _check(ok: bool, setting: str, expected: str, got: object) -> None:
    if not ok:
        raise InputError(f"{setting} of text noise must {expected}, got {got!r}")
