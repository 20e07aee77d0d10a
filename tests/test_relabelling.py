"""A reviewed list changes the labels that it changes, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import noiseproof
from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.relabelling import relabel_table

ROWS = {"text": list("abcdef"), "kind": ["x", "y", "x", "y", "z", "z"]}


def listed(rows: dict[str, str], **columns: list[Any]) -> dict[str, list[Any]]:
    return {"row_id": list(rows), "label": list(rows.values()), **columns}


def test_labels_are_replaced_rows_without_one_dropped_and_the_rest_left_alone() -> None:
    table, done = noiseproof.relabel(ROWS, listed({"4": "x", "1": "", "0": "x"}), label="kind")
    assert table["text"].tolist() == list("acdef")
    assert table["kind"].tolist() == ["x", "x", "y", "x", "z"]
    assert (done.changed.tolist(), done.dropped.tolist(), done.listed) == ([4], [1], 3)


def test_suggestions_are_taken_where_there_are_any() -> None:
    found = listed({"0": "x", "3": "y"}, suggested_label=["z", None])
    table, done = noiseproof.relabel(ROWS, found, label="kind", accept=True)
    assert table["kind"].tolist() == ["z", "y", "x", "y", "z", "z"]
    assert done.changed.tolist() == [0] and not len(done.dropped)


def test_rows_are_found_by_their_own_ids() -> None:
    rows = ROWS | {"key": [7, 6, 5, 4, 3, 2]}
    table, done = noiseproof.relabel(rows, listed({"6": "z"}), label="kind", row_id="key")
    assert done.changed.tolist() == [1] and table["kind"][1] == "z"


@pytest.mark.parametrize(
    ("labels", "wanted", "type_"),
    [([0, 1, 2, 1], "2", "int64"), ([True, False, True, False], "True", "bool")],
)
def test_a_column_keeps_its_type(labels: list[Any], wanted: str, type_: str) -> None:
    rows = pd.DataFrame({"text": list("abcd"), "label": labels})
    table, done = noiseproof.relabel(rows, listed({"1": wanted}))
    assert str(table["label"].dtype) == type_ and table["label"][1] == type(labels[0])(
        int(labels[2])
    )
    assert done.changed.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ({"0": "xx"}, {}, r"row 1 of the table: .* label 'xx' \(new_labels=true acc.*mean 'x'\?$"),
        ({"9": "x"}, {}, "has no row '9'; name the column of its row ids with row_id"),
        ({"0": "x"}, {"label": "kin"}, "no column 'kin' .*did you mean 'kind'"),
        ({"0": "x"}, {"accept": True}, "no column 'suggested_label'"),
        ({"0": "x"}, {"lable": "kind"}, "relabel: .*unexpected keyword argument 'lable'"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    rows: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        noiseproof.relabel(ROWS, listed(rows), **({"label": "kind"} | settings))


def test_a_row_counts_once() -> None:
    with pytest.raises(InputError, match="row '0' is listed a second time"):
        noiseproof.relabel(ROWS, {"row_id": ["0", "0"], "label": ["y", "z"]}, label="kind")


def test_a_new_label_is_taken_for_a_mistake_unless_it_is_said_to_be_meant() -> None:
    table, _ = noiseproof.relabel(ROWS, listed({"0": "new"}), label="kind", new_labels=True)
    assert table["kind"][0] == "new"
    numbers = pd.DataFrame({"text": list("ab"), "label": [0, 1]})
    with pytest.raises(InputError, match="values of type int64, which 'new' is not"):
        noiseproof.relabel(numbers, listed({"0": "new"}), new_labels=True)


def test_labels_that_noise_made_wrong_do_not_get_into_the_data() -> None:
    """The list of a run with --noise holds injected labels; the table is right."""
    found = listed({"0": "y"}, clean_label=["x"])
    with pytest.raises(InputError, match="'y' was made wrong on purpose, by the noise of the run"):
        noiseproof.relabel(ROWS, found, label="kind")
    known = listed({"0": "y"}, clean_label=["y"])  # a column of true labels, and a wrong one given
    assert noiseproof.relabel(ROWS, known, label="kind")[0]["kind"][0] == "y"


def test_arrays_of_an_archive_lose_the_same_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.arange(8.0).reshape(4, 2), label=np.array([0, 1, 0, 1]))
    pd.DataFrame(listed({"1": "", "2": "1"})).to_csv(tmp_path / "list.csv", index=False)
    table, _ = relabel_table(tmp_path / "rows.npz", tmp_path / "list.csv")
    assert table.arrays["x"].tolist() == [[0, 1], [4, 5], [6, 7]]
    assert table.frame["label"].tolist() == [0, 1, 1]
    words = [str(tmp_path / name) for name in ("rows.npz", "list.csv", "better.npz")]
    assert main(["relabel", words[0], words[1], "--out", words[2]]) == 0
    with np.load(words[2]) as archive:
        assert archive["x"].shape == (3, 2) and archive["label"].tolist() == [0, 1, 1]


def test_the_command_writes_a_table_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(listed({"4": "x", "1": ""})).to_csv(tmp_path / "list.csv", index=False)
    words = ["relabel", str(tmp_path / "rows.csv"), str(tmp_path / "list.csv"), "--label", "kind"]
    assert main([*words, "--out", str(tmp_path / "better.csv")]) == 0
    assert "2 rows reviewed, 1 labels changed, 1 rows dropped: " in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "better.csv")["kind"].tolist() == ["x", "x", "y", "x", "z"]
    assert main([*words, "--out", str(tmp_path / "better.csv")]) == 2
    pd.DataFrame(listed({"4": "xx"})).to_csv(tmp_path / "list.csv", index=False)
    assert main([*words, "--out", str(tmp_path / "other.csv")]) == 2
    assert "(line 2)" in capsys.readouterr().err and not (tmp_path / "other.csv").exists()
