"""Rows whose label is a text: a prompt, or chat messages, with the response that a model learns.

The given response may be wrong. Where the truth is known, a row is wrong when its response differs
from the true one; so ``labels`` is 0 everywhere and ``clean_labels`` is -1 for wrong rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from noiseproof.data import Examples, Inputs, Ints, Reader, content_of, read_row_ids
from noiseproof.errors import InputError
from noiseproof.tables import Strings, Table, load_table

if TYPE_CHECKING:
    from noiseproof.tables import Source

ROLES = ("system", "user", "assistant", "tool")
CHOICES, ANSWER = "choices", "answer"  # columns of a test set
RESPONSE = "response"  # the one class


@dataclass(frozen=True, eq=False)
class Dialogues(Inputs):
    """Prompts with their responses.

    Attributes:
        prompts: N prompts; chat messages stand as the JSON of a list of ``role`` and ``content``.
        responses: N given responses, or `None` where there are none.
        truth: N true responses, where they are known.
        chat: Whether the prompts are chat messages.
        choices: N lists of possible responses, or `None`.
        answers: N final answers as texts (with choices: the number of the right one), or `None`.
    """

    prompts: Sequence[str]
    responses: Sequence[str] | None = None
    truth: Sequence[str] | None = None
    chat: bool = False
    choices: tuple[tuple[str, ...], ...] | None = None
    answers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Let Arrow keep the texts, and check that there are as many of each."""
        for name in ("prompts", "responses", "truth"):
            column = getattr(self, name)
            if column is not None:
                object.__setattr__(self, name, Strings.of(column))
        for name in ("responses", "truth", "choices", "answers"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.prompts):
                raise InputError(f"there are {len(self.prompts)} prompts and {len(column)} {name}")

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.prompts)

    def take(self, rows: Ints) -> Dialogues:
        """Take the rows at these positions, in the order given."""

        def strings(column: Sequence[str] | None) -> Strings | None:
            return None if column is None else Strings.of(column).take(rows)

        places, choices, answers = rows.tolist(), self.choices, self.answers
        return replace(
            self,
            prompts=Strings.of(self.prompts).take(rows),
            responses=strings(self.responses),
            truth=strings(self.truth),
            choices=None if choices is None else tuple(choices[place] for place in places),
            answers=None if answers is None else tuple(answers[place] for place in places),
        )

    def replaced(self, rows: Ints, pool: Dialogues, chosen: Ints) -> Dialogues:
        """Refuse: a foreign prompt has no response of its own."""
        raise InputError("open-set noise is for classes; rows with responses take swap noise")

    def content(self) -> Iterator[bytes]:
        """Give the prompts and the given responses."""
        yield b"chat" if self.chat else b"prompts"
        for part in (self.prompts, self.responses):
            yield from content_of(part)

    def shown(self) -> Mapping[str, Sequence[str]]:
        """Give prompts and responses."""
        columns = {"prompt": self.prompts}
        return columns if self.responses is None else columns | {"response": self.responses}

    def as_texts(self) -> list[tuple[str, ...]]:
        """Give prompt and response of every row; of a chat what is said in each turn, in order."""
        responses = self.responses or ()
        if not self.chat:
            return list(zip(self.prompts, responses, strict=True))
        chats = (json.loads(prompt) for prompt in self.prompts)
        return [
            (*(turn["content"] for turn in turns), response)
            for turns, response in zip(chats, responses, strict=True)
        ]

    def with_texts(self, texts: Sequence[tuple[str, ...]]) -> Dialogues:
        """Put other prompts and responses (N,) in their place; the truth stays."""
        if not self.chat:
            prompts = [prompt for prompt, _ in texts]
        else:
            prompts = [
                _said(prompt, row[:-1]) for prompt, row in zip(self.prompts, texts, strict=True)
            ]
        return replace(self, prompts=prompts).with_responses([row[-1] for row in texts])

    def with_responses(self, responses: Sequence[str]) -> Dialogues:
        """Put other responses (N,) in their place; those from before are the truth, if none is."""
        truth = self.responses if self.truth is None else self.truth
        return replace(self, responses=responses, truth=truth)

    def trusted(self) -> Dialogues:
        """Give the rows with the true responses, where they are known."""
        return replace(self, responses=self.truth or self.responses, truth=None)

    def labels_shown(self) -> dict[str, Any]:
        """Give the responses and the true ones as columns ``label`` and ``clean_label``."""
        columns = {"label": Strings.of(self.responses or ()).series()}
        return columns if self.truth is None else columns | {"clean_label": self.truth.series()}  # type: ignore[attr-defined]

    @property
    def right(self) -> Ints | None:
        """Labels of the truth (N,): 0 where the response is right, else -1; None if unknown."""
        if self.truth is None or self.responses is None:
            return None
        pairs = zip(self.responses, self.truth, strict=True)
        return np.array([0 if one == other else -1 for one, other in pairs], dtype=np.int64)


@dataclass(frozen=True)
class DialogueColumns(Reader):
    """A column of prompts, two of them (the second may be empty), or a column of chat messages.

    Attributes:
        text: Name of the column; ``"instruction,input"`` means two.
        label: Column of the responses; None reads none.
        clean_label: Column of the true responses.
    """

    text: str
    label: str | None = None
    clean_label: str | None = None

    kind = "text"

    def columns(self, table: Table) -> tuple[str, ...]:
        """Name the columns of the prompts."""
        names = set(table.frame.columns)
        parts = (
            (self.text,) if self.text in names else tuple(p.strip() for p in self.text.split(","))
        )
        if len(parts) not in (1, 2) or len(set(parts)) != len(parts):
            raise InputError(f"text must name one column or two different ones, got {self.text!r}")
        for part in parts:
            table.require(part, "prompts")
        return parts

    def read(self, table: Table, rows: Ints) -> Dialogues:
        """Read prompts, responses and what a test set may have beside them."""
        columns = self.columns(table)
        cells = [_picked(table, column, rows) for column in columns]
        chat = len(columns) == 1 and any(_is_chat(cell) for cell in cells[0])
        choices, answers = self._choices(table, rows)
        responses: list[str] | None = None
        if chat:
            messages = [
                _messages(table, int(row), columns[0], cell)
                for row, cell in zip(rows, cells[0], strict=True)
            ]
            if self.label is not None and self.label not in table.frame.columns:
                responses = [
                    _last_turn(table, int(row), turns)
                    for row, turns in zip(rows, messages, strict=True)
                ]
                messages = [turns[:-1] for turns in messages]
            prompts = [json.dumps(turns, ensure_ascii=False) for turns in messages]
        else:
            prompts = [
                _joined(table, int(row), columns, texts)
                for row, *texts in zip(rows, *cells, strict=True)
            ]
        chosen = choices is not None and self._answer(table) == self.label
        if self.label is not None and responses is None:
            missing = self.label not in table.frame.columns
            if choices is not None and answers is not None and (chosen or missing):
                responses = [some[int(place)] for some, place in zip(choices, answers, strict=True)]
            else:
                table.require(self.label, "responses")
                responses = _texts(table, self.label, rows, "response")
        truth = None
        if self.clean_label is not None:
            table.require(self.clean_label, "true responses")
            truth = _texts(table, self.clean_label, rows, "true response")
            if choices is not None and chosen:
                truth = [
                    some[_place_of(text, some, table.place(int(row)))]
                    for row, some, text in zip(rows, choices, truth, strict=True)
                ]
        return Dialogues(prompts, responses, truth, chat, choices, answers)

    def ends_in_response(self, table: Table) -> bool:
        """Whether the first row is a chat whose last turn is the assistant's."""
        if not len(table):
            return False
        first = _picked(table, self.columns(table)[0], np.arange(1))[0]
        return _is_chat(first) and first[-1].get("role") == "assistant"

    def _answer(self, table: Table) -> str | None:
        """The column of the answers: its usual name, or the labels where there are choices."""
        names = table.frame.columns
        if ANSWER in names and ANSWER not in (self.label, *self.text.split(",")):
            return ANSWER
        return self.label if CHOICES in names and self.label in names else None

    def _choices(
        self, table: Table, rows: Ints
    ) -> tuple[tuple[tuple[str, ...], ...] | None, tuple[str, ...] | None]:
        """The lists of choices and the answers (N,), where the table has such columns."""
        names, column = table.frame.columns, self._answer(table)
        if column is None:
            return None, None
        answers = [
            str(cell).strip() if cell is not None else "" for cell in _picked(table, column, rows)
        ]
        if CHOICES not in names:
            return None, tuple(answers)
        choices = []
        for place, cell in enumerate(_picked(table, CHOICES, rows)):
            where = table.place(int(rows[place]))
            some = tuple(map(str, cell)) if isinstance(cell, list | tuple | np.ndarray) else ()
            if len(some) < 2:
                raise InputError(f"{where} needs a list of at least two choices, got {cell!r}")
            answers[place] = str(_place_of(answers[place], some, where))
            choices.append(some)
        return tuple(choices), tuple(answers)


def read_dialogues(
    source: Source,
    reader: DialogueColumns,
    *,
    row_id: str | None = None,
    drop_label: str | None = None,
    split: str = "train",
    role: str = "training",
) -> Examples:
    """Read prompts with their responses.

    Args:
        source: What `read_table` reads.
        reader: Where prompts and responses lie.
        row_id: A column of unique ids; without one, ids are positions from "0".
        drop_label: Leave out the rows with this response; "" stands for none at all.
        split: The split to take where there are several.
        role: What messages call the data; "training" data must have two rows.

    Raises:
        InputError: A column is missing, a prompt or a response is empty.
    """
    table = load_table(source, split, f"the {role} table")
    rows = _kept(table, reader.label, drop_label)
    if role == "training" and len(rows) < 2:
        raise InputError(f"{table.name} has {len(rows)} row to train on; expected at least 2")
    inputs, ids = reader.read(table, rows), read_row_ids(table, row_id).take(rows)
    labels = np.zeros(len(inputs), dtype=np.int64)
    left_out = len(table) - len(rows)
    return Examples(ids, inputs, labels, inputs.right, (RESPONSE,), dropped=left_out)


def _kept(table: Table, column: str | None, dropped: str | None) -> Ints:
    """The rows whose response is not the one to drop."""
    rows: Ints = np.arange(len(table))
    if dropped is None or column is None or column not in table.frame.columns:
        return rows
    cells = ["" if cell is None else str(cell).strip() for cell in _picked(table, column, rows)]
    return rows[[cell != dropped.strip() for cell in cells]]


def _picked(table: Table, column: str, rows: Ints) -> list[Any]:
    cells = table.frame[column].iloc[rows].tolist() if column in table.frame.columns else []
    return [None if isinstance(cell, float) and cell != cell else cell for cell in cells]


def _texts(table: Table, column: str, rows: Ints, what: str) -> list[str]:
    """Give a column of texts, none of them empty; numbers stand as they are written."""
    texts = []
    for row, cell in zip(rows, _picked(table, column, rows), strict=True):
        where = table.place(int(row))
        if not isinstance(cell, str | int | float | None):
            raise InputError(
                f"{where} holds a value of type {type(cell).__name__} in column {column!r}, "
                f"expected a {what} as text"
            )
        text = "" if cell is None else str(cell)
        if not text.strip():
            raise InputError(
                f"{where} has no {what} in column {column!r}; fill or remove such rows"
                + (", or leave them out with drop_label=''" if what == "response" else "")
            )
        texts.append(text)
    return texts


def _joined(table: Table, row: int, columns: tuple[str, ...], texts: Sequence[Any]) -> str:
    """One prompt of one or two cells, of which the second may be empty."""
    parts = []
    for place, (column, text) in enumerate(zip(columns, texts, strict=True)):
        if text is None or (isinstance(text, str) and not text.strip()):
            if place == 0:
                raise InputError(
                    f"{table.place(row)} has no prompt in column {column!r}; fill or remove it"
                )
            continue
        if not isinstance(text, str | int | float):
            raise InputError(
                f"{table.place(row)} holds a value of type {type(text).__name__} in column "
                f"{column!r}, expected text or a list of chat messages"
            )
        parts.append(str(text))
    return "\n\n".join(parts)


def _is_chat(cell: Any) -> bool:
    return (
        isinstance(cell, list | tuple | np.ndarray) and len(cell) > 0 and isinstance(cell[0], dict)
    )


def _messages(table: Table, row: int, column: str, cell: Any) -> list[dict[str, str]]:
    """The turns of one row as plain role and content."""
    where = f"{table.place(row)}, column {column!r}"
    if not _is_chat(cell):
        raise InputError(
            f"{where}: expected a list of messages with role and content, got {cell!r}"
        )
    turns = []
    for turn in cell:
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"{where}: a message needs a role ({', '.join(ROLES)}) and a content of text, got "
                f"{turn!r}"
            )
        turns.append({"role": role, "content": content})
    return turns


def _said(prompt: str, contents: Sequence[str]) -> str:
    """The messages of one row with other contents."""
    turns = json.loads(prompt)
    said = [turn | {"content": text} for turn, text in zip(turns, contents, strict=True)]
    return json.dumps(said, ensure_ascii=False)


def _last_turn(table: Table, row: int, turns: list[dict[str, str]]) -> str:
    """The response of one row: its last turn, which the assistant has."""
    last = turns[-1]
    if last["role"] != "assistant" or not last["content"].strip() or len(turns) < 2:
        raise InputError(
            f"{table.place(row)}: the last of at least two messages must be a response of the "
            f"assistant, got {last!r}"
        )
    return last["content"]


def _place_of(answer: str, choices: tuple[str, ...], where: str) -> int:
    """The number of the right choice, from 0: its number, its letter (A is 0) or its text."""
    if answer in choices:
        return choices.index(answer)
    place = int(answer.removesuffix(".0")) if answer.removesuffix(".0").isdigit() else -1
    if len(answer) == 1 and answer.isalpha():
        place = ord(answer.upper()) - ord("A")
    if not 0 <= place < len(choices):
        raise InputError(
            f"{where}: answer {answer!r} names none of its {len(choices)} choices; expected a "
            "number from 0, a letter from A, or the text of one"
        )
    return place
