"""Prompts with responses: read from columns or messages, with one clear line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from decoders import chat_rows
from noiseproof.data import Examples
from noiseproof.errors import InputError
from noiseproof.tables import Table
from noiseproof.tasks.dialogues import DialogueColumns, Dialogues, read_dialogues


def read(source: Any, text: str = "prompt", **columns: str | None) -> Examples:
    return read_dialogues(source, DialogueColumns(text, **columns))


def dialogues(examples: Examples) -> Dialogues:
    assert isinstance(examples.inputs, Dialogues)
    return examples.inputs


ROWS = {"prompt": ["1 + 1", "2 + 2", "3 + 3"], "response": ["2", "5", "6"], "true": ["2", "4", "6"]}


def test_reads_prompts_responses_and_which_are_wrong() -> None:
    found = read(ROWS, label="response", clean_label="true")
    assert dialogues(found).prompts == ROWS["prompt"]
    assert dialogues(found).responses == ROWS["response"]
    assert found.labels.tolist() == [0, 0, 0]
    assert found.clean_labels is not None and found.clean_labels.tolist() == [0, -1, 0]
    assert found.label_names == ("response",)
    assert dialogues(found.trusted()).responses == ROWS["true"]
    assert read(ROWS, label="response").clean_labels is None


def test_numbers_are_responses_as_they_are_written() -> None:
    found = read({"prompt": ["a", "b"], "response": [3, 4]}, label="response")
    assert dialogues(found).responses == ["3", "4"]


def test_two_columns_make_one_prompt_and_the_second_may_be_empty() -> None:
    """Alpaca's rows have an instruction and, sometimes, an input."""
    rows = {"instruction": ["Add", "Smile"], "input": ["1 and 2", ""], "output": ["3", ":)"]}
    found = read(rows, "instruction,input", label="output")
    assert dialogues(found).prompts == ["Add\n\n1 and 2", "Smile"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_end_in_the_response(tmp_path: Path, suffix: str) -> None:
    chats, path = chat_rows(4), tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame({"messages": chats})
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    found = dialogues(read(str(path), "messages", label="label"))
    assert found.chat and found.responses == [turns[-1]["content"] for turns in chats]
    assert [json.loads(text) for text in found.prompts] == [turns[:-1] for turns in chats]


def test_a_column_of_responses_goes_before_the_last_message() -> None:
    asked = [turns[:-1] for turns in chat_rows(3)]
    found = dialogues(read({"m": asked, "label": ["a", "b", "c"]}, "m", label="label"))
    assert found.responses == ["a", "b", "c"]
    assert [json.loads(text) for text in found.prompts] == asked


@pytest.mark.parametrize("answers", [[1, 0], ["1", "0"], ["B", "a"], ["two", "red"], ["1.0", "0"]])
def test_the_right_choice_is_the_response_where_there_is_no_other(answers: list[Any]) -> None:
    rows = {"prompt": ["q", "r"], "choices": [["one", "two"], ["red", "blue"]], "answer": answers}
    found = dialogues(read(rows, label="label"))
    assert found.responses == ["two", "red"] and found.answers == ("1", "0")
    assert found.choices == (("one", "two"), ("red", "blue"))


def test_rows_keep_all_their_columns_together() -> None:
    rows = ROWS | {"choices": [["2", "3"], ["4", "5"], ["6", "7"]], "answer": [0, 0, 0]}
    found = dialogues(read(rows, label="response", clean_label="true")).take(np.array([2, 1]))
    assert found.prompts == ["3 + 3", "2 + 2"] and found.responses == ["6", "5"]
    assert found.truth == ["6", "4"] and found.choices == (("6", "7"), ("4", "5"))


def test_other_responses_leave_the_first_ones_as_the_truth() -> None:
    found = dialogues(read(ROWS, label="response")).with_responses(["5", "2", "6"])
    assert found.truth == ROWS["response"]
    assert found.right is not None and found.right.tolist() == [-1, -1, 0]
    again = found.with_responses(["2", "5", "6"])
    assert again.right is not None and again.right.tolist() == [0, 0, 0]


def test_the_fingerprint_is_of_prompts_and_given_responses() -> None:
    """The truth is for metrics; a run with it is the same run."""
    plain = read(ROWS, label="response")
    assert plain.fingerprint == read(ROWS, label="response", clean_label="true").fingerprint
    assert plain.fingerprint != read(ROWS, label="true").fingerprint


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no response column": ({"prompt": ["a", "b"]}, "prompt", "no column 'label'"),
    "no prompt column": ({"q": ["a", "b"], "label": ["x", "y"]}, "prompt", "no column 'prompt'"),
    "an empty response": (
        {"prompt": ["a", "b"], "label": ["x", " "]}, "prompt", "row 2 of .* no response .*'label'"),
    "an empty prompt": ({"prompt": ["a", ""], "label": ["x", "y"]}, "prompt", "row 2 .*no prompt"),
    "a list as response": (
        {"prompt": ["a", "b"], "label": ["x", ["y"]]}, "prompt", "type list in column 'label'"),
    "three columns": (
        {"a": ["1", "2"], "b": ["1", "2"], "c": ["1", "2"]}, "a,b,c", "one column or two"),
    "no last turn": (
        {"m": [turns[:-1] for turns in chat_rows(2)]}, "m", "row 1 .*response of the assistant"),
    "an unknown role": (
        {"m": [[{"role": "bot", "content": "hi"}]] * 2}, "m", "row 1 .*role .system, user"),
    "one choice": (
        {"prompt": ["a", "b"], "choices": [["x"], ["y", "z"]], "answer": [0, 0]},
        "prompt", "row 1 .*at least two choices"),
    "an answer beyond the choices": (
        {"prompt": ["a", "b"], "choices": [["x", "w"], ["y", "z"]], "answer": [0, "C"]},
        "prompt", "row 2 .*answer 'C' names none"),
    "one row": ({"prompt": ["a"], "label": ["x"]}, "prompt", "1 row to train on"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_table_is_said_in_one_line(name: str) -> None:
    rows, text, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        read(rows, text, label="label")
    assert "\n" not in str(caught.value)


def test_text_noise_takes_prompts_with_responses_and_refuses_messages() -> None:
    found = dialogues(read(ROWS, label="response"))
    assert found.as_texts()[1] == ("2 + 2", "5")
    changed = found.with_texts(np.array([["x", "2"], ["2 + 2", "4"], ["3 + 3", "6"]], dtype=object))
    assert changed.prompts[0] == "x" and changed.responses == ["2", "4", "6"]
    assert changed.right is not None and changed.right.tolist() == [0, -1, 0]
    chat = dialogues(read({"m": chat_rows(3)}, "m", label="label"))
    with pytest.raises(InputError, match="text noise cannot be put into chat messages"):
        chat.as_texts()


def test_new_rows_may_have_no_responses() -> None:
    table = Table(pd.DataFrame({"prompt": ["a", "b"]}), "the table")
    found = DialogueColumns("prompt").read(table, np.arange(2))
    assert found.responses is None and found.shown() == {"prompt": ["a", "b"]}


def test_rows_with_one_response_can_be_left_out() -> None:
    """Generated data has rows that a model refused, or left empty."""
    rows = {"prompt": list("abcd"), "label": ["x", "", None, "sorry"]}
    with pytest.raises(InputError, match="row 2 .*drop_label=''"):
        read(rows, label="label")
    reader = DialogueColumns("prompt", label="label")
    found = read_dialogues(rows, reader, drop_label="")
    assert dialogues(found).responses == ["x", "sorry"] and found.dropped == 2
    assert list(found.row_ids) == ["0", "3"]


def test_labels_of_rows_with_choices_name_one_of_them() -> None:
    """Multiple-choice tables call the number of the right choice their label."""
    rows = {"prompt": ["q", "r"], "choices": [["one", "two"], ["red", "blue"]]}
    found = read(rows | {"label": [1, 0], "true": ["A", 0]}, label="label", clean_label="true")
    assert dialogues(found).responses == ["two", "red"]
    assert dialogues(found).truth == ["one", "red"]
    assert found.clean_labels is not None and found.clean_labels.tolist() == [-1, 0]
