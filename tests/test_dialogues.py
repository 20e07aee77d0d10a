"""Reading prompts with responses: every form of table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noiseproof.data import Examples
from noiseproof.errors import InputError
from noiseproof.tasks.dialogues import DialogueColumns, Dialogues, read_dialogues

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
]


def read(source: Any, text: str = "p", label: str = "r", clean: str | None = None) -> Examples:
    return read_dialogues(source, DialogueColumns(text, label, clean))


def dialogues(rows: Examples) -> Dialogues:
    assert isinstance(rows.inputs, Dialogues)
    return rows.inputs


def test_prompts_and_responses_and_which_are_wrong() -> None:
    """A response that differs from the true one is a wrong label."""
    rows = read({"p": ["a", "b"], "r": ["x", "y"], "c": ["x", "z"]}, clean="c")
    assert rows.labels.tolist() == [0, 0] and rows.label_names == ("response",)
    assert rows.clean_labels is not None and rows.clean_labels.tolist() == [0, -1]
    assert list(dialogues(rows).shown()["response"]) == ["x", "y"]
    true = dialogues(rows.trusted())
    assert list(true.responses or ()) == ["x", "z"] and true.right is None


def test_the_truth_is_no_part_of_what_is_encoded_or_fingerprinted() -> None:
    """Else the identifier of a run, or worse its training, would depend on the answers."""
    one = read({"p": ["a", "b"], "r": ["x", "y"], "c": ["x", "z"]}, clean="c")
    other = read({"p": ["a", "b"], "r": ["x", "y"], "c": ["u", "y"]}, clean="c")
    assert one.fingerprint == other.fingerprint
    changed = read({"p": ["a", "b"], "r": ["x", "q"]})
    assert changed.fingerprint != one.fingerprint


def test_an_instruction_with_an_input_that_may_be_empty() -> None:
    """Instruction sets leave the input empty in most rows."""
    table = {"instruction": ["add", "sing"], "input": ["1 2", ""], "output": ["3", "la"]}
    rows = dialogues(read(table, "instruction, input", "output"))
    assert list(rows.prompts) == ["add\n\n1 2", "sing"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_last_turn_of_chat_messages_is_the_response(suffix: str, tmp_path: Path) -> None:
    """Parquet gives arrays of records where JSON gives lists."""
    import pandas as pd

    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame({"messages": [CHAT, CHAT[1:]]})
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    rows = dialogues(read(path, "messages", "label"))
    assert rows.chat and list(rows.responses or ()) == ["good day"] * 2
    assert [json.loads(text) for text in rows.prompts] == [CHAT[:2], CHAT[1:2]]


def test_messages_with_a_response_column_are_prompts_whole() -> None:
    """A preference set has the chat in one column and the chosen response in another."""
    rows = dialogues(read({"m": [CHAT[:2], CHAT[:2]], "r": ["x", "y"]}, "m"))
    assert list(rows.responses or ()) == ["x", "y"]
    assert json.loads(rows.prompts[0]) == CHAT[:2]


@pytest.mark.parametrize("answer", [1, "1", 1.0, "B", "b", "red"])
def test_the_right_choice_by_number_letter_or_text(answer: Any) -> None:
    """Every public set has another convention, and off by one is chance accuracy."""
    table = {"p": ["q"] * 2, "choices": [["blue", "red"]] * 2, "answer": [answer] * 2}
    rows = dialogues(read(table))
    assert rows.answers == ("1", "1") and rows.choices == (("blue", "red"),) * 2
    assert list(rows.responses or ()) == ["red", "red"]  # no response column: the right choice


def test_rows_are_taken_with_all_they_have() -> None:
    """A choice that is joined to another row's prompt is a wrong answer."""
    table = {"p": ["q", "s"], "r": ["x", "y"], "choices": [["a", "b"], ["c", "d"]],
             "answer": [0, 1], "c": ["x", "z"]}  # fmt: skip
    rows = dialogues(read(table, clean="c")).take(np.array([1]))
    assert (list(rows.prompts), rows.choices, rows.answers) == (["s"], (("c", "d"),), ("1",))
    assert list(rows.truth or ()) == ["z"]


def test_text_noise_and_swaps_keep_the_first_responses_as_the_truth() -> None:
    """A noised response of which nobody knows any more that it is wrong cannot be detected."""
    rows = dialogues(read({"p": ["a", "b"], "r": ["x", "y"]}))
    noised = rows.with_texts([("a!", "x"), ("b", "y?")])
    assert list(noised.prompts) == ["a!", "b"]
    assert noised.right is not None and noised.right.tolist() == [0, -1]
    twice = noised.with_responses(["y?", "x"])
    assert list(twice.truth or ()) == ["x", "y"]


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no response column": ({"p": ["a", "b"]}, "p", "responses"),
    "no prompt column": ({"r": ["a", "b"]}, "p", "prompts"),
    "empty response": ({"p": ["a", "b"], "r": ["x", " "]}, "p", "row 2 .*no response"),
    "missing response": ({"p": ["a", "b"], "r": ["x", None]}, "p", "row 2 .*no response"),
    "empty prompt": ({"p": ["", "b"], "r": ["x", "y"]}, "p", "row 1 .*no prompt"),
    "a list as response": ({"p": ["a", "b"], "r": [["x"], ["y"]]}, "p", "type list"),
    "one row": ({"p": ["a"], "r": ["x"]}, "p", "at least 2"),
    "three columns": ({"p": ["a", "b"], "r": ["x", "y"]}, "p,q,s", "one column or two"),
    "a dict as prompt": ({"p": [{"a": 1}] * 2, "r": ["x"] * 2}, "p", "expected text or a list"),
    "the user has the last turn": ({"p": [CHAT[:2]] * 2}, "p", "last of at least two"),
    "a message without content": ({"p": [[{"role": "user"}]] * 2, "r": ["x"] * 2}, "p", "content"),
    "an unknown role": (
        {"p": [[{"role": "human", "content": "x"}]] * 2, "r": ["x"] * 2}, "p", "system, user",
    ),
    "chat beside text": ({"p": [CHAT, "b"], "r": ["x"] * 2}, "p", "list of messages"),
    "one choice": ({"p": ["a"] * 2, "choices": [["b"]] * 2, "answer": [0] * 2}, "p", "two choices"),
    "no such choice": (
        {"p": ["a"] * 2, "choices": [["b", "c"]] * 2, "answer": ["E"] * 2}, "p", "letter from A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_in_one_line_that_says_where(case: str) -> None:
    """A traceback, or training on "nan" as a response, is what happens otherwise."""
    table, text, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        read(table, text)
    assert "\n" not in str(caught.value)


def test_text_noise_goes_into_what_is_said_in_a_chat() -> None:
    """Noise on the JSON of the messages would break it."""
    long = [{"role": "system", "content": "be kind"}, *CHAT]
    rows = dialogues(read({"p": [CHAT, long]}))
    texts = rows.as_texts()
    assert [len(row) for row in texts] == [len(CHAT), len(CHAT) + 1]
    assert texts[1][0] == "be kind" and texts[1][1:] == texts[0]
    noised = rows.with_texts([tuple(f"{text}!" for text in row) for row in texts])
    assert [tuple(f"{text}!" for text in row) for row in texts] == noised.as_texts()
    turns = json.loads(noised.prompts[1])
    assert [turn["role"] for turn in turns] == [turn["role"] for turn in long[:-1]]
    assert noised.right is not None and noised.right.tolist() == [-1, -1]


def test_rows_with_one_response_can_be_left_out() -> None:
    """Generated data has rows that a model refused, or left empty."""
    rows = {"p": list("abcd"), "r": ["x", "", None, "sorry"]}
    with pytest.raises(InputError, match=r"row 2 .*drop_label=''"):
        read(rows)
    found = read_dialogues(rows, DialogueColumns("p", label="r"), drop_label="")
    assert dialogues(found).responses == ["x", "sorry"] and found.dropped == 2
    assert list(found.row_ids) == ["0", "3"]


def test_labels_of_rows_with_choices_name_one_of_them() -> None:
    """Multiple-choice tables call the number of the right choice their label."""
    rows = {"p": ["q", "s"], "choices": [["one", "two"], ["red", "blue"]]}
    found = read(rows | {"r": [1, 0], "true": ["A", 0]}, clean="true")
    assert dialogues(found).responses == ["two", "red"]
    assert dialogues(found).truth == ["one", "red"]
    assert found.clean_labels is not None and found.clean_labels.tolist() == [-1, 0]
