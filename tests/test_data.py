"""Reading tables and labels: every format, every kind of bad file, splits and samples."""

from __future__ import annotations

import doctest
import gzip
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import noiseproof.data.examples
import noiseproof.data.labels
import noiseproof.data.splits
import noiseproof.tables.reading
import noiseproof.tables.strings
import noiseproof.tables.table
import noiseproof.tables.writing
from noiseproof.data import (
    FOREIGN,
    Examples,
    check_classes,
    read_examples,
    read_label_names,
    read_labels,
    read_table,
    read_texts,
    stratified_sample,
    stratified_split,
    write_table,
)
from noiseproof.errors import InputError
from noiseproof.tables import Strings, array_column

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")

COLUMNS = {
    "id": ["x1", "x2", "x3", "x4"],
    "text": ['say "hi", now', "two\nlines\r\nthree", "NA", "naïve ☕ שלום"],
    "second": ["a", "null", "\ttab", "None"],
    "label": ["spam", "ham", "null", "spam"],
    "truth": ["spam", "spam", "null", "ham"],
}
READ = {
    "text": "text,second",
    "label": "label",
    "clean_label": "truth",
    "row_id": "id",
}


def same(one: Examples, other: Examples) -> bool:
    """Compare everything, the types of the arrays included."""
    assert one.labels.dtype == other.labels.dtype == np.int64
    arrays = (one.labels.tolist(), other.labels.tolist())
    clean = [None if e.clean_labels is None else e.clean_labels.tolist() for e in (one, other)]
    plain = [(e.row_ids, e.texts, e.inputs.pairs, e.label_names, e.dropped) for e in (one, other)]
    return arrays[0] == arrays[1] and clean[0] == clean[1] and plain[0] == plain[1]


def complaint(call: Any, *args: Any, **kwargs: Any) -> str:
    """Return the message of the error that this call must raise: one line, not too long."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# Bad files: name of the case, file, content, arguments that differ, expected message.
TEXT_LABEL = {"text": "text", "label": "label"}
GOOD = "text,label\na,x\nb,y\n"
LONG = ",".join(f"c{n}" for n in range(30))
BAD_FILES: list[tuple[str, str, str | bytes, dict[str, Any], str]] = [
    ("unsupported suffix", "t.xlsx", GOOD, {}, r"unsupported suffix '\.xlsx'; supported: \.csv, "),
    ("gz of parquet", "t.parquet.gz", b"x", {}, r"unsupported suffix '\.gz'; supported"),
    ("gz that is none", "t.csv.gz", GOOD, {}, r"cannot read .*t\.csv\.gz: .*gzipped"),
    ("cut gz", "t.csv.gz", gzip.compress(GOOD.encode())[:-9], {}, r"cannot read .*t\.csv\.gz"),
    ("empty file", "t.csv", "", {}, r"t\.csv is empty"),
    ("empty parquet", "t.parquet", b"", {}, r"t\.parquet is empty"),
    ("blank file", "t.jsonl", " \n\n", {}, r"t\.jsonl is empty"),
    ("mark only", "t.csv", b"\xef\xbb\xbf", {}, r"t\.csv is empty"),
    (
        "header only",
        "t.csv",
        "text,label\n",
        {},
        r"t\.csv has a header \(text, label\) but no rows",
    ),
    (
        "missing column",
        "t.csv",
        GOOD,
        {"label": "Lable"},
        r"t\.csv has no column 'Lable' \(label\); did you mean 'label'\?; columns: text, label$",
    ),
    (
        "a column that is the label is not proposed as the text",
        "t.csv",
        "message,intent\na,x\nb,y\n",
        {"label": "intent"},
        r"t\.csv has no column 'text' \(text\); columns: message, intent$",
    ),
    ("many columns", "t.csv", f"{LONG}\n{LONG}", {}, r"columns: c0, .*, c11 and 18 more$"),
    ("other separator", "t.csv", "text;label\na;x\n", {}, r"is ';' its separator\? expected ','"),
    ("missing clean", "t.csv", GOOD, {"clean_label": "gold"}, r"no column 'gold' \(clean label\)"),
    ("missing id", "t.csv", GOOD, {"row_id": "idx"}, r"no column 'idx' \(row id\)"),
    (
        "duplicate header",
        "t.csv",
        "text,label,text\na,x,b\n",
        {},
        r"t\.csv has several columns named 'text' \(2 times\); rename them",
    ),
    (
        "latin-1",
        "t.csv",
        "text,label\na,x\ncafé,y\n".encode("latin-1"),
        {},
        r"t\.csv is not UTF-8: byte 0xe9 at offset 18 \(line 3\); expected UTF-8",
    ),
    (
        "latin-1 behind a mark",
        "t.csv",
        b"\xef\xbb\xbf" + "text,label\ncafé,x\n".encode("latin-1"),
        {},
        r"byte 0xe9 at offset 17 \(line 2\)",
    ),
    ("utf-16", "t.csv", GOOD.encode("utf-16"), {}, r"t\.csv looks like UTF-16: byte 0xff at offs"),
    (
        "long row",
        "t.csv",
        'text,label\n"a\nb",x\n\nb,c,y\n',
        {},
        r"row 2 \(line 5\) of .*t\.csv has .* fields \(3\) than .* \(2\); .* contain ','",
    ),
    (
        "short row",
        "t.tsv",
        "text\tlabel\na\n",
        {},
        r"row 1 \(line 2\) of .*t\.tsv has .* fields \(1\) than .* \(2\)",
    ),
    (
        "open quote",
        "t.csv",
        'text,label\na,x\n"b,y\nc,x\n',
        {},
        r"row 2 \(line 3\) of .*t\.csv has a broken quote .*close each quote",
    ),
    (
        "semicolons and commas",
        "t.csv",
        "text;label\na, b;x\n",
        {},
        r"t\.csv looks separated by ';', expected ','; save it with commas as \.csv",
    ),
    (
        "name twice",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "label": "y"}\n',
        {},
        r"^line 2 of .*t\.jsonl has several values named 'label'; rename or remove all but one$",
    ),
    ("tabs", "t.csv", "text\tlabel\na, b\tx\n", {}, r"looks separated by '\\t', expected ','"),
    (
        "commas in tsv",
        "t.tsv",
        'text,label\n"a, b",x\n',
        {},
        r"looks separated by ',', expected '\\t'; .* with tabs as \.tsv",
    ),
    ("quoted header", "t.csv", '"text";"label"\n"a";"x"\n', {}, r"looks separated by ';'"),
    ("stray quote", "t.csv", 'text,label\n"b" c,y\n', {}, r"row 1 \(line 2\).*double a quote"),
    ("open quote in header", "t.csv", '"text,label\na,y\n', {}, r"the header of .*broken quote"),
    (
        "line that is no object",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n\n[1]\n',
        {},
        r"line 3 of .*t\.jsonl holds a list, expected one object per line",
    ),
    (
        "line that is no JSON",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "a" "label"}\n',
        {},
        r"line 2 of .*t\.jsonl is not JSON \(.* at character 14\); expected one object",
    ),
    ("one array", "t.json", '[\n{"text": "a"}\n]', {}, r"line 1 of .* looks like one JSON array"),
    ("array on a line", "t.json", '[{"text": "a"}]', {}, r"line 1 of .* holds a list"),
    ("deep line", "t.jsonl", "[" * 100_000, {}, r"line 1 of .*t\.jsonl is nested too deeply"),
    ("objects without fields", "t.jsonl", "{}\n{}\n", {}, r"t\.jsonl have no fields"),
    (
        "damaged parquet",
        "t.parquet",
        b"PAR1 not really",
        {},
        r"cannot read .*t\.parquet as Parquet",
    ),
    (
        "no label",
        "t.csv",
        "text,label\na,x\nb,\nc, \n",
        {},
        r"row 2 \(line 3\) of .*t\.csv has no label in column 'label' \(2 such .*drop_label=''",
    ),
    (
        "null label",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n{"text": "c"}',
        {},
        r"row 2 \(line 2\) of .*t\.jsonl has no label .*\(2 such rows\)",
    ),
    ("nan label", "t.jsonl", '{"text": "a", "label": NaN}', {}, r"row 1 .* has no label"),
    ("one class", "t.csv", "text,label\na,x\nb,x\n", {}, r"only one class .*'label' \('x'\)"),
    ("one class in two spellings", "t.csv", "text,label\na,1\nb,1.0\n", {}, r"only one class"),
    ("one row", "t.csv", "text,label\na,x\n", {}, r"t\.csv has 1 row to train on; .* at least 2"),
    (
        "all rows dropped",
        "t.csv",
        "text,label\na,-1\nb,-1.0\n",
        {"drop_label": "-1"},
        r"every row of .*t\.csv has the label '-1' to drop",
    ),
    (
        "unseen label",
        "test.csv",
        "text,label\na,spam\nb,hm\nc,spm\n",
        {"label_names": ["spam", "ham"], "role": "test"},
        r"label 'hm' of row 2 \(line 3\) of .*test\.csv was never seen in training "
        r"\(2 such rows\); did you mean 'ham'\?; known: spam, ham; ",
    ),
    (
        "position that is none",
        "test.csv",
        "text,label\na,0\nb,2\n",
        {"label_names": ["spam", "ham"], "role": "test"},
        r"label '2' of row 2 .* was never seen in training; known: spam, ham",
    ),
    (
        "unknown name",
        "t.csv",
        GOOD,
        {"label_names": ["x", "z"]},
        r"label 'y' of row 2 .* not in la",
    ),
    ("name twice", "t.csv", GOOD, {"label_names": ["x", "x", "y"]}, r"a name twice: x;"),
    ("names as text", "t.csv", GOOD, {"label_names": "xy"}, r"must be a list of names, got 'xy'"),
    (
        "clean label outside",
        "t.csv",
        "text,label,gold\na,x,y\nb,y,z\n",
        {"clean_label": "gold"},
        r"clean label 'z' of row 2 \(line 3\) of .* is not among the classes; known: x, y; .*names",
    ),
    (
        "no clean label",
        "t.csv",
        "text,label,gold\na,x,y\nb,y,\n",
        {"clean_label": "gold"},
        r"row 2 .* has no clean label in column 'gold' \(1 such row\)",
    ),
    (
        "clean number for a name",
        "t.csv",
        "text,label,gold\na,x,1\nb,y,0\n",
        {"clean_label": "gold"},
        r"clean label '1' of row 1 .* is not among the classes",
    ),
    (
        "number as text",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": 5, "label": "y"}\n',
        {},
        r"row 2 \(line 2\) of .*t\.jsonl holds a value of type int in column 'text', expected text",
    ),
    (
        "half a letter",
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "\\ud83d", "label": "y"}\n',
        {},
        r"row 2 .*half a surrogate pair",
    ),
    (
        "object as label",
        "t.jsonl",
        '{"text": "a", "label": {"x": 1}}\n',
        {},
        r"row 1 .* holds a value of type dict in column 'label', expected a label",
    ),
    (
        "empty text",
        "t.csv",
        'text,label\na,x\n"",y\n" \n",y\n',
        {},
        r"row 2 \(line 3\) of .*t\.csv has no text in column 'text' \(2 such rows\)",
    ),
    (
        "blank second text",
        "t.csv",
        "a,b,label\nx,y,0\nz, ,1\n",
        {"text": ("a", "b")},
        r"row 2 \(line 3\) of .* has no text in column 'b'",
    ),
    (
        "text is label",
        "t.csv",
        GOOD,
        {"text": "label"},
        r"'label' of .*t\.csv cannot be both text and label",
    ),
    (
        "text is clean label",
        "t.csv",
        GOOD,
        {"clean_label": "text"},
        r"'text' of .*t\.csv cannot be both text and clean label",
    ),
    (
        "three texts",
        "t.csv",
        GOOD,
        {"text": "text,label,text"},
        r"one column or two different ones",
    ),
    ("text twice", "t.csv", GOOD, {"text": ("text", "text")}, r"one column or two different ones"),
    (
        "regression",
        "t.csv",
        "text,label\na,0.5\nb,1.25\nc,2.0\n",
        {},
        r"the 3 labels in column 'label' of .* looks like regression",
    ),
    (
        "repeated id",
        "t.csv",
        "id,text,label\n7,a,x\n8,b,y\n7,c,x\n",
        {"row_id": "id"},
        r"column 'id' must be unique, but '7' stands in row 1 and in row 3 \(line 4\) of .*t\.csv",
    ),
    ("no id", "t.csv", "id,text,label\n,a,x\n8,b,y\n", {"row_id": "id"}, r"row 1 .* has no row id"),
]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [pytest.param(*case[1:], id=case[0].replace(" ", "-")) for case in BAD_FILES],
)
def test_each_bad_file_gets_one_line_that_says_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes, arguments: dict[str, Any], message: str
) -> None:
    """A traceback out of pandas, or a silent guess, is what users would get instead."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    got = complaint(read_examples, path, **{**TEXT_LABEL, **arguments})
    assert re.search(message, got), got
    assert name in got or got.startswith(("text must", "label_names"))


def test_a_numeric_parquet_column_is_no_text(tmp_path: Path) -> None:
    pd.DataFrame({"text": [1.5, 2.5], "label": [0, 1]}).to_parquet(tmp_path / "t.parquet")
    message = complaint(read_examples, tmp_path / "t.parquet", **TEXT_LABEL)
    assert re.search(r"row 1 of .*t\.parquet holds a value of type float in column 'text'", message)


def test_places_that_do_not_exist_are_named_with_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    assert "does not exist; did you mean 'train.csv'?" in complaint(
        read_table, tmp_path / "trian.csv"
    )
    assert "does not exist; check the path" in complaint(read_table, "no/such/folder/file")
    assert "does not exist; did you mean" in complaint(read_table, f"{tmp_path}/train")
    assert re.search("not a path|does not exist", complaint(read_table, "a\0b"))
    assert re.search("not a path|does not exist", complaint(read_table, "/" + "x" * 400))
    assert "does not exist" in complaint(read_label_names, tmp_path / "names.txt")
    assert "got list" in complaint(read_table, [1, 2])


def test_a_plain_folder_is_no_data_set_and_its_tables_are_listed(tmp_path: Path) -> None:
    assert complaint(read_table, tmp_path).endswith("is no data set written by save_to_disk")
    (tmp_path / "train.csv").write_text(GOOD)
    assert "give one of its files: train.csv" in complaint(read_table, tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    assert "cannot read the data set in" in complaint(read_table, tmp_path)


def test_a_hub_name_that_fails_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_split: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = complaint(read_table, "someone/some-data", split="test")
    assert "'someone/some-data' does not exist here" in message
    assert "(split 'test') it could not be reached or is no such data set: Couldn't" in message


def test_a_hub_data_set_keeps_its_class_names_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    columns = {"text": ["one", "two", "three"], "label": [1, 0, -1]}
    data = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, **_split: data)
    train = read_examples("someone/data", **TEXT_LABEL, drop_label="-1")  # -1: the hub's "none"
    assert train.label_names == ("z", "a", "m")
    assert train.labels.tolist() == [1, 0]
    assert read_table("someone/data")["label"].tolist() == ["a", "z", "-1"]


@pytest.mark.filterwarnings("ignore:.* which is taken as a class")
def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    frame = pd.DataFrame(COLUMNS)
    expected = read_examples(dict(COLUMNS), **READ)
    assert expected.texts == COLUMNS["text"]
    assert expected.inputs.pairs == COLUMNS["second"]
    assert expected.row_ids == tuple(COLUMNS["id"])
    assert expected.label_names == ("ham", "null", "spam")
    assert expected.labels.tolist() == [2, 0, 1, 2]
    sources: list[Any] = [frame, frame.set_index(pd.Index([5, 5, 5, 5]))]
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        write_table(frame, tmp_path / f"t.{suffix}")
        sources += [tmp_path / f"t.{suffix}", f"{tmp_path}/t.{suffix}"]
    for suffix in ("csv", "tsv", "jsonl"):
        zipped = tmp_path / f"zipped.{suffix}.gz"
        zipped.write_bytes(gzip.compress((tmp_path / f"t.{suffix}").read_bytes()))
        sources.append(zipped)
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.csv").read_bytes())
    pandas_made = tmp_path / "pandas.csv"
    frame.to_csv(pandas_made)  # with an index column that has no name
    data = datasets.Dataset.from_dict(COLUMNS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    sources += [marked, pandas_made, data, tmp_path / "one", tmp_path / "two"]
    for source in sources:
        got = read_examples(source, **READ)
        assert same(got, expected), source
        assert got.fingerprint == expected.fingerprint
    assert len(read_table(tmp_path / "two", split="test")) == 1
    assert "no split 'dev'; splits: train, test" in complaint(read_table, tmp_path / "two", "dev")


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # csv of Python 3.10
special = st.sampled_from(
    ["NA", "null", '"', '""', ",", "\t", "\r", "a\r\nb", "\u2028", "👩‍🔬", "أ,"]
)
texts = st.one_of(special.map(lambda t: t + "."), st.text(letters, min_size=1)).filter(str.strip)
label_texts = st.sampled_from(["NA", "nan", "ja, gewiss", '"so"', "Ünique", "0", "01", "-3", "👍"])


@pytest.mark.filterwarnings("ignore:.* which is taken as a class")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(texts, texts, label_texts), min_size=2, max_size=8).filter(
        lambda rows: len({label for _, _, label in rows}) > 1
    ),
    ids=st.permutations([f"id {n}, é" for n in range(8)]),
)
def test_any_unicode_table_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], ids: list[str]
) -> None:
    """A text cut at a quote or a line end would train on something nobody labelled."""
    first, second, labels = map(list, zip(*rows, strict=True))
    columns = {"id": ids[: len(rows)], "text": first, "second": second, "label": labels}
    arguments = {"text": ("text", "second"), "label": "label", "row_id": "id"}
    expected = read_examples(columns, **arguments)
    assert expected.texts == first
    assert expected.inputs.pairs == second
    assert [expected.label_names[label] for label in expected.labels] == labels
    folder = tmp_path_factory.mktemp("any")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        write_table(pd.DataFrame(columns), folder / f"t.{suffix}")
        assert same(read_examples(folder / f"t.{suffix}", **arguments), expected)


@pytest.mark.filterwarnings("ignore:.* which is taken as a class")
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([10, 9, 10, -1], ("-1", "9", "10"), [2, 1, 2, 0]),
        (["10", "9", "2.0", "2"], ("2", "9", "10"), [2, 1, 0, 0]),
        ([3.0, 1.0, 3.0, 1.0], ("1", "3"), [1, 0, 1, 0]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        (["10", "9", "b", " b "], ("10", "9", "b"), [0, 1, 2, 2]),
        (["007", "7", "7", "7"], ("007", "7"), [0, 1, 1, 1]),
        ([0.5, 1.0, 0.5, 1.0], ("0.5", "1.0"), [0, 1, 0, 1]),
        (["nan", "NA", "None", "nan"], ("NA", "None", "nan"), [2, 0, 1, 2]),
    ],
)
def test_classes_are_sorted_by_number_or_by_name(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...], numbers: list[int]
) -> None:
    frame = pd.DataFrame({"text": list("abcd"), "label": labels})
    for suffix in ("csv", "jsonl", "parquet"):
        write_table(frame, tmp_path / f"t.{suffix}")
        got = read_examples(tmp_path / f"t.{suffix}", **TEXT_LABEL)
        assert (got.label_names, got.labels.tolist()) == (names, numbers)


def test_given_names_fix_the_order_and_numbers_are_positions_in_them() -> None:
    names = ["spam", "ham", "eggs"]
    for labels in (["ham", "spam"], [1, 0], ["1.0", "0"]):
        got = read_examples({"text": ["a", "b"], "label": labels}, **TEXT_LABEL, label_names=names)
        assert (got.labels.tolist(), got.label_names) == ([1, 0], ("spam", "ham", "eggs"))
    digits = read_examples(
        {"text": ["a", "b"], "label": [1, 0]}, **TEXT_LABEL, label_names=["1", "0"]
    )
    assert digits.labels.tolist() == [0, 1]  # names win over positions


def test_unseen_labels_become_minus_one_when_allowed() -> None:
    table = {"text": ["a", "b"], "label": ["ham", "eggs"]}
    got = read_examples(table, **TEXT_LABEL, label_names=["spam", "ham"], allow_unseen=True)
    assert got.labels.tolist() == [1, -1]


def test_test_data_may_have_one_row_and_one_class() -> None:
    table = {"text": ["a"], "label": ["ham"]}
    assert len(read_examples(table, **TEXT_LABEL, label_names=["spam", "ham"], role="test")) == 1


def test_dropped_rows_are_counted_and_ids_stay_positions_in_the_file(tmp_path: Path) -> None:
    """Ids counted after dropping would point at the wrong rows of the user's file."""
    path = tmp_path / "t.csv"
    path.write_text('text,label\na,1\n"",-1\nb,-1\nc,0\n')
    got = read_examples(path, **TEXT_LABEL, drop_label="-1")
    assert got.row_ids == ("0", "3")
    assert got.dropped == 2
    assert got.label_names == ("0", "1")
    with_gaps = pd.DataFrame({"text": list("abc"), "label": [1.0, float("nan"), 0.0]})
    assert read_examples(with_gaps, **TEXT_LABEL, drop_label="").row_ids == ("0", "2")


def test_names_come_from_a_json_list_or_one_per_line(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('["b", "a"]')
    assert read_label_names(path) == ("b", "a")
    path = tmp_path / "names.txt"
    path.write_text("b\r\na\n\n")
    assert read_label_names(str(path)) == ("b", "a")
    for content, message in (
        ("", "must be a list of names, got []"),
        ("a\na\n", "a name twice: a"),
        ('["a", 1.5]', "name 2 of .* must be text, got 1.5"),
        ('["a", ', "is not JSON"),
    ):
        path.write_text(content)
        got = complaint(read_label_names, path)
        assert message in got or re.search(message, got), got
    (tmp_path / "names.json").write_text('{"a": 0}')
    assert "holds a dict, expected a list" in complaint(read_label_names, tmp_path / "names.json")


def test_texts_are_read_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text('text\nfirst\n\n"second, longer"\n5\n')
    assert read_texts(path, "text") == (["first", "second, longer", "5"], None)
    assert read_texts({"a": ["x"], "b": ["y"]}, ("a", "b")) == (["x"], ["y"])
    assert read_texts({"a, b": ["x"]}, "a, b") == (["x"], None)  # a name with a comma
    assert read_texts({"a": ["x"], "b": ["y"]}, "a, b") == (["x"], ["y"])


@pytest.mark.filterwarnings("ignore:.* which is taken as a class")
def test_examples_select_relabel_and_compare() -> None:
    all_rows = read_examples(dict(COLUMNS), **READ)
    some = all_rows.select([3, 0])
    assert (some.row_ids, some.labels.tolist()) == (("x4", "x1"), [2, 2])
    assert some.inputs.pairs == ["None", "a"]
    assert some.clean_labels is not None
    assert some.clean_labels.tolist() == [0, 2]
    assert same(all_rows.select(np.array([True, False, False, True])), all_rows.select([0, 3]))
    assert len(all_rows.select([])) == 0
    assert "rows must lie in 0 to 3, got -1 to 4" in complaint(all_rows.select, [-1, 4])
    assert "whole numbers" in complaint(all_rows.select, [True])
    relabelled = all_rows.with_labels([0, 0, 0, 0], old_are_clean=True)
    assert relabelled.clean_labels is all_rows.clean_labels or np.array_equal(
        relabelled.clean_labels, all_rows.clean_labels
    )
    assert relabelled.fingerprint != all_rows.fingerprint
    plain = read_examples(dict(COLUMNS), text="text", label="label")
    assert plain.with_labels([0, 0, 0, 0]).clean_labels is None
    noisy = plain.with_labels([0, 0, 0, 0], old_are_clean=True)
    assert noisy.clean_labels is not None
    assert noisy.clean_labels.tolist() == plain.labels.tolist()
    assert "labels has 1 rows, there are 4 inputs" in complaint(plain.with_labels, [0])
    assert "labels must lie in 0 to 2" in complaint(plain.with_labels, [0, 0, 0, 3])
    assert "whole numbers" in complaint(plain.with_labels, [0.0, 0.0, 0.0, 0.0])


def test_the_fingerprint_is_the_same_in_every_process_and_sees_every_part() -> None:
    table = {"text": ["ab", "c"], "label": ["x", "y"]}
    code = (
        "from noiseproof.data import read_examples\n"
        f"print(read_examples({table!r}, text='text', label='label').fingerprint)"
    )
    mine = read_examples(table, **TEXT_LABEL).fingerprint
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == mine
    for change in (
        {"text": ["a", "bc"]},
        {"label": ["y", "x"]},
        {"label": ["x", "z"]},
    ):
        assert read_examples({**table, **change}, **TEXT_LABEL).fingerprint != mine
    pair = read_examples({**table, "b": ["", ""]} | {"b": ["d", "e"]}, text="text,b", label="label")
    assert pair.fingerprint != mine


TEXTS = ["a", "naïve ☕", "", "two\nlines", "שלום", *(f"text {n}" for n in range(9))]


@pytest.mark.parametrize("mapped", [0, 1 << 30], ids=["in a file", "in memory"])
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_strings_read_like_a_list(piece: int, mapped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of a neighbouring row is a wrong label that nobody made."""
    monkeypatch.setattr(noiseproof.tables.strings, "PIECE", piece)
    monkeypatch.setattr(noiseproof.tables.strings, "MAPPED", mapped)
    strings = Strings.of(iter(TEXTS))
    assert (strings._mapped is not None) == (mapped == 0)
    assert [*strings] == TEXTS and len(strings) == len(TEXTS) and Strings.of(strings) is strings
    assert strings == TEXTS and strings == tuple(TEXTS) and strings != [*TEXTS[:-1], "other"]
    assert strings != TEXTS[:-1] and strings != "a" and Strings.of("ab") == ["a", "b"]
    assert [strings[row] for row in range(-len(TEXTS), len(TEXTS))] == TEXTS + TEXTS
    for row in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            strings[row]
    ends = [None, 0, 1, 3, 4, 5, 13, 14, 99, -1, -4, -99]
    for part in (slice(a, b, c) for a in ends for b in ends for c in (None, 2, -1)):
        assert strings[part] == TEXTS[part], part
    assert strings[2:9][1:4] == TEXTS[3:6]
    for rows in ([], [3], [13, 0, 0, 7], range(14), np.arange(13, -1, -1)):
        assert strings.take(rows) == [TEXTS[row] for row in rows]
    assert strings.series().tolist() == TEXTS
    assert "שלום" in strings
    assert "☕" not in strings
    assert strings.index("text 3") == 8
    assert TEXTS[-1] in repr(strings[-2:])
    assert Strings.of([]) == [] and len(Strings.of([]).series()) == 0


def test_texts_in_a_file_leave_no_file_and_need_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noiseproof.tables.strings, "MAPPED", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    strings = Strings.of(TEXTS)
    assert list(tmp_path.iterdir()) == [] and strings == TEXTS

    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    message = complaint(read_examples, dict(COLUMNS), **READ)
    assert f"cannot write a temporary file in {tmp_path}: No space left on device" in message


@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_make_no_difference(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns must not shift where one piece ends and the next begins."""
    rows = range(11)
    columns = {
        "name": [f"row {row}" for row in rows],
        "text": [f"text {row}, naïve" for row in rows],
        "second": [f"line\n{row}" for row in rows],
        "label": [("x", "y", "")[row % 3] for row in rows],
        "truth": [("x", "y")[row % 2] for row in rows],
        "number": list(rows),
    }
    frame = pd.DataFrame(columns)
    arguments = READ | {"row_id": "name", "drop_label": ""}
    expected = read_examples(dict(columns), **arguments)
    assert expected.dropped == 3 and expected.row_ids[2] == "row 3"
    whole = {}
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        write_table(frame, tmp_path / f"whole.{suffix}")
        whole[suffix] = (tmp_path / f"whole.{suffix}").read_bytes()
    monkeypatch.setattr(noiseproof.tables.strings, "PIECE", piece)
    monkeypatch.setattr(noiseproof.tables.strings, "MAPPED", 0)
    monkeypatch.setattr(noiseproof.tables.writing, "ROW_GROUP", piece)
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        path = tmp_path / f"t.{suffix}"
        write_table(frame, path)
        assert suffix == "parquet" or path.read_bytes() == whole[suffix]
        got = read_examples(path, **arguments)
        assert same(got, expected) and got.fingerprint == expected.fingerprint
        assert same(got.select([7, 2]), expected.select([7, 2]))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), frame)
    lines = ["name,text,label", *(f"{row},text {row},{'xy'[row % 2]}" for row in rows)]
    for row, line, message in (
        (8, "8,text,x,more", r"row 9 \(line 10\) of .* another number of fields"),
        (8, '8,"te"xt,x', r"row 9 \(line 10\) of .* broken quote"),
        (8, "8, ,x", r"row 9 \(line 10\) of .* no text .* \(1 such row\)"),
        (8, "8,text,", r"row 9 \(line 10\) of .* no label"),
        (8, "2,text,x", r"'2' stands in row 3 and in row 9 \(line 10\) of"),
    ):
        bad = [*lines[: row + 1], line, *lines[row + 2 :]]
        (tmp_path / "bad.csv").write_text("\n".join(bad) + "\n")
        got_message = complaint(read_examples, tmp_path / "bad.csv", **TEXT_LABEL, row_id="name")
        assert re.search(message, got_message), got_message


def test_json_columns_may_come_late_or_change_their_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noiseproof.tables.strings, "PIECE", 2)
    monkeypatch.setattr(noiseproof.tables.strings, "MAPPED", 0)
    path = tmp_path / "t.jsonl"
    records = [{"a": "x", "b": "\ud83d"}, {"a": "y"}, {"a": "z", "late": "w"}, {"a": 5}, {}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    table = read_table(path)
    assert table.columns.tolist() == ["a", "b", "late"]
    assert table["a"].tolist() == ["x", "y", "z", 5, None]
    assert table["b"].tolist() == ["\ud83d", None, None, None, None]
    assert table["late"].tolist() == [None, None, "w", None, None]


def test_reading_a_table_holds_few_rows_as_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A str, a list and an id for each of ten million rows fill a machine."""
    monkeypatch.setattr(noiseproof.tables.strings, "PIECE", 500)
    monkeypatch.setattr(noiseproof.tables.strings, "MAPPED", 0)
    path, rows = tmp_path / "t.csv", 20_000
    lines = (
        f"the sixty bytes of a short text as number {row:09},{'xy'[row % 2]}\n"
        for row in range(rows)
    )
    path.write_text("text,label\n" + "".join(lines))
    read_examples(path, **TEXT_LABEL)  # imports
    tracemalloc.start()
    examples = read_examples(path, **TEXT_LABEL)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == rows
    assert peak / rows < 100, f"{peak / rows:.0f} bytes a row"


def test_the_rows_of_a_matrix_are_cells_that_parquet_keeps(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    frame = pd.DataFrame({"n": [1, 2, 3], "m": array_column(values[::-1])})
    assert frame["m"].tolist() == values[::-1].tolist()
    write_table(frame, tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    assert np.array_equal(np.stack(back["m"]), values[::-1])
    assert back["m"][0].dtype == np.float32
    assert len(array_column(np.zeros((0, 2)))) == 0


def test_importing_the_module_loads_no_heavy_package() -> None:
    code = (
        "import sys, noiseproof.data\n"
        "print(sorted({'pandas', 'pyarrow', 'datasets', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class_numbers = st.lists(st.integers(0, 5), min_size=2, max_size=80)


@settings(deadline=None)
@given(labels=class_numbers, fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_a_split_has_every_larger_class_on_both_sides(
    labels: list[int], fraction: float, seed: int
) -> None:
    counts = {label: labels.count(label) for label in labels}
    if max(counts.values()) < 2:
        assert "no class has two rows" in complaint(stratified_split, labels, fraction, seed)
        return
    rest, split = stratified_split(labels, fraction, seed)
    assert sorted([*rest, *split]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(split) > 0).all()
    array = np.array(labels)
    for label, count in counts.items():
        assert (array[rest] == label).any()
        assert (array[split] == label).any() == (count > 1)
    again = stratified_split(array, fraction, seed)
    assert all(map(np.array_equal, again, (rest, split)))


@settings(deadline=None)
@given(labels=class_numbers, share=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_sample_has_its_size_and_keeps_the_class_shares(
    labels: list[int], share: float, seed: int
) -> None:
    size = max(1, round(share * len(labels)))
    rows = stratified_sample(labels, size, seed)
    assert len(set(rows.tolist())) == len(rows) == size
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(labels, minlength=6)
    drawn = np.bincount(np.array(labels)[rows], minlength=6)
    quota = size * counts / counts.sum()
    if size >= (counts > 0).sum():
        assert (drawn[counts > 0] > 0).all()
    if (quota[counts > 0] >= 1).all():  # nothing is forced: the largest remainder
        assert (abs(drawn - quota) < 1).all()
    assert np.array_equal(stratified_sample(labels, size, seed), rows)


def test_a_split_is_close_to_the_fraction_and_depends_on_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    rest, split = stratified_split(labels, 0.1, seed=0)
    assert np.bincount(labels[split]).tolist() == [50, 30, 20]
    assert len(rest) == 900
    assert not np.array_equal(split, stratified_split(labels, 0.1, seed=1)[1])
    assert not np.array_equal(
        stratified_sample(labels, 10, seed=0), stratified_sample(labels, 10, seed=1)
    )


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (stratified_split, ([0, 0], 0.0, 0), r"fraction must lie between 0 and 1, got 0\.0"),
        (stratified_split, ([0, 0], float("nan"), 0), r"fraction .* got nan"),
        (stratified_split, ([], 0.5, 0), r"no class has two rows"),
        (stratified_split, ([0.5, 1.5], 0.5, 0), r"labels must be whole numbers"),
        (stratified_split, ([0, 0], 0.5, -1), r"seed must be a whole number from 0, got -1"),
        (stratified_sample, ([0, 1], 3, 0), r"size must lie in 1 to 2 \(the rows\), got 3"),
        (stratified_sample, ([0, 1], 0, 0), r"size must lie in 1 to 2"),
        (stratified_sample, ([0, 1], 1.5, 0), r"size must be whole numbers"),
        (stratified_sample, ([0, 1], 1, 0.5), r"seed must be a whole number"),
    ],
)
def test_absurd_splits_and_samples_are_refused(
    call: Any, arguments: tuple[Any, ...], message: str
) -> None:
    assert re.search(message, complaint(call, *arguments))


def test_nothing_is_overwritten_unless_asked_and_nothing_is_left_half_written(
    tmp_path: Path,
) -> None:
    frame = pd.DataFrame({"text": ["a"], "n": [1], "x": [0.5], "gap": [None]})
    path = tmp_path / "t.csv"
    write_table(frame, path)
    assert path.read_bytes() == b"text,n,x,gap\na,1,0.5,\n"
    assert "exists; choose another name or give --overwrite" in complaint(write_table, frame, path)
    write_table(frame.assign(text="b"), path, overwrite=True)
    assert path.read_text().endswith("b,1,0.5,\n")
    for suffix in ("csv", "jsonl", "parquet"):
        broken = pd.DataFrame({"x": pd.Series(["\ud800", 1], dtype=object)})
        message = complaint(write_table, broken, tmp_path / f"new.{suffix}")
        assert f"cannot write {tmp_path}/new.{suffix}" in message
    assert "unsupported suffix '.xlsx'" in complaint(write_table, frame, tmp_path / "t.xlsx")
    assert "no/t.csv: the folder" in complaint(write_table, frame, tmp_path / "no" / "t.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "it is a folder" in complaint(write_table, frame, tmp_path / "folder.csv")
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert "several columns named 'a'" in complaint(write_table, twice, tmp_path / "u.csv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.csv", "t.csv"]


def test_json_lines_keep_numbers_lists_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    frame = pd.DataFrame({"n": [1, 2], "x": [0.5, float("nan")], "l": [[1], [2, 3]]})
    write_table(frame, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"n": 1, "x": 0.5, "l": [1]},
        {"n": 2, "x": None, "l": [2, 3]},
    ]
    assert read_table(path)["x"].tolist() == [0.5, None]


def test_bad_columns_in_memory_are_named() -> None:
    assert "must have one length, got a 1, b 2" in complaint(read_table, {"a": [1], "b": [1, 2]})
    assert "column 'a' of the table must be a list" in complaint(read_table, {"a": "abc"})
    assert "the table has no rows" in complaint(read_table, {"a": []})
    message = complaint(read_examples, pd.DataFrame({"text": ["a", "b"]}), **TEXT_LABEL)
    assert "the training table has no column 'label'" in message
    shifted = {"text": pd.Series(["a", "b"], index=[7, 8]), "label": np.array([1, 0])}
    assert read_examples(shifted, **TEXT_LABEL).texts == ["a", "b"]


def test_reading_leaves_the_frame_of_the_caller_alone() -> None:
    frame = pd.DataFrame({0: ["a", "b"], 1: [0, 1]}, index=[5, 6])
    assert read_examples(frame, text="0", label="1").texts == ["a", "b"]
    assert frame.columns.tolist() == [0, 1]
    assert frame.index.tolist() == [5, 6]


def test_a_text_longer_than_the_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    write_table(pd.DataFrame({"text": ["word " * 50_000]}), tmp_path / "t.csv")
    assert len(read_table(tmp_path / "t.csv")["text"][0]) == 250_000


def test_the_docstring_examples_are_true() -> None:
    data, tables = noiseproof.data, noiseproof.tables
    for module in (
        *(data.examples, data.labels, data.splits),
        *(tables.strings, tables.table, tables.reading, tables.writing),
    ):
        done = doctest.testmod(module)
        assert done.attempted and not done.failed, module.__name__


def test_a_foreign_row_has_no_true_class_and_is_no_mistake() -> None:
    """Open-set noise; beside numbers that are positions in label_names as well."""
    table = {"t": ["a", "b", "c"], "y": ["0", "1", "0"], "gold": ["0", FOREIGN, "1"]}
    common = {"text": "t", "label": "y", "clean_label": "gold"}
    for names in (None, ["no", "yes"]):
        rows = read_examples(table, label_names=names, **common)
        assert rows.clean_labels is not None
        assert (rows.labels.tolist(), rows.clean_labels.tolist()) == ([0, 1, 0], [0, -1, 1])
    wrong = complaint(read_examples, table | {"y": ["0", "1", FOREIGN]}, label_names=["0", "1"],
                      text="t", label="y")  # fmt: skip
    assert f"label {FOREIGN!r} of row 3" in wrong  # only a true label can be that


def test_labels_alone_are_read_like_those_beside_texts() -> None:
    table = {"t": ["a", "b", "c"], "y": ["10", " 9", "10"]}
    labels, names = read_labels(table, label="y")
    rows = read_examples(table, text="t", label="y")
    assert (labels.tolist(), names) == (rows.labels.tolist(), rows.label_names)
    assert names == ("9", "10")
    assert "no column 'z' (label)" in complaint(read_labels, table, label="z")
    gap = complaint(read_labels, {"y": ["a", "", "b"]}, label="y")
    assert gap.endswith("(1 such row); fill or remove them")


@needs_shared
def test_trec6_is_read_with_its_names() -> None:
    names = read_label_names(SHARED / "trec6" / "labels.json")
    train = read_examples(SHARED / "trec6" / "train.csv", **TEXT_LABEL, label_names=names)
    assert (len(train), train.label_names) == (5452, names)
    assert train.labels[:2].tolist() == [1, 2]
    assert (train.labels == names.index("ABBR")).sum() == 86
    plain = read_examples(SHARED / "trec6" / "train.csv", **TEXT_LABEL)
    assert np.array_equal(plain.labels, train.labels)
    assert plain.label_names == tuple("012345")


@needs_shared
def test_weak_trec_drops_abstentions_and_has_its_published_noise() -> None:
    train = read_examples(
        SHARED / "weak_trec" / "train.csv",
        text="text",
        label="noisy_label",
        clean_label="label",
        drop_label="-1",
        label_names=read_label_names(SHARED / "weak_trec" / "labels.json"),
    )
    assert len(train) + train.dropped == 5033
    assert len(train) / 5033 == pytest.approx(0.952, abs=5e-4)
    assert (train.labels != train.clean_labels).mean() == pytest.approx(0.458, abs=5e-4)


@needs_shared
def test_snow_rte_crowd_has_two_texts_and_its_published_noise() -> None:
    train = read_examples(
        str(SHARED / "snow_rte_crowd" / "train.csv"),
        text="text,text2",
        label="noisy_label",
        clean_label="label",
        row_id="item_id",
    )
    assert len(train) == 800
    assert train.inputs.pairs is not None
    assert train.inputs.pairs[1] == "Satomi Mitarai bled to death."
    assert train.row_ids[0] == "754"
    assert (train.labels != train.clean_labels).mean() == pytest.approx(0.278, abs=1e-3)


@needs_shared
def test_every_shared_text_file_is_read() -> None:
    for path in sorted(SHARED.glob("*/train.csv")):
        assert len(read_table(path)) > 100
    assert "give one of its files" in complaint(read_table, SHARED / "trec6")


# --- labels that look like a mistake -------------------------------------------------------------


def classes_of(*labels: str) -> None:
    """Check rows of these classes."""
    names = sorted(set(labels))
    check_classes(np.array([names.index(label) for label in labels]), names, "topic")


def test_a_class_for_every_row_is_refused() -> None:
    """The column of ids or of the texts, given as labels, would train for hours."""
    with pytest.raises(InputError, match=r"each of the 3 rows has a class of its own in .*'topic'"):
        classes_of("a", "b", "c")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a", "a", "b", "c"), r"2 of 3 classes in column 'topic' have a single row"),
        (("spam", "Spam", "spam", "Spam"), r"'Spam' and 'spam' differ in their case alone"),
        (("a", "a", "b", "b", "3", "3"), r"the class '3' is a number and all others are names"),
    ],
)
def test_labels_that_look_like_a_mistake_are_warned_of(
    labels: tuple[str, ...], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        classes_of(*labels)


@pytest.mark.parametrize("name", ["nan", "NaN", "NA", "n/a", "null", "None", "<NA>"])
@pytest.mark.parametrize("others", ["01", "xy"])
def test_a_class_that_stands_for_no_label_elsewhere_is_warned_of(
    tmp_path: Path, name: str, others: str
) -> None:
    """What pandas writes for a missing label became a class of its own, without a word."""
    path, (one, two) = tmp_path / "t.csv", others
    path.write_text(f"text,label\na,{one}\nb,{two}\nc,{name}\nd,{name}\n")
    message = (
        rf"^row 3 \(line 4\) of .*t\.csv has the label '{name}' in column 'label' \(2 such rows\), "
        "which is taken as a class; if it stands for no label, remove such rows"
    )
    message += "$" if name == "null" else f", or let fit leave them out with --drop-label '{name}'$"
    with pytest.warns(UserWarning, match=message):
        assert len(read_examples(path, **TEXT_LABEL).label_names) == 3
    assert read_examples(path, **TEXT_LABEL, drop_label=name).label_names == (one, two)
    assert len(read_examples(path, **TEXT_LABEL, label_names=[one, two, name])) == 4


def test_ordinary_labels_are_taken_without_a_word() -> None:
    classes_of("a", "b", "a", "b", "c")
    classes_of("1", "2", "1", "2")
    classes_of("1", "spam", "1", "spam")


def test_texts_that_are_bare_numbers_are_warned_of() -> None:
    """Such as the column of ids, which stands first in many tables."""
    table = {"text": ["12", "13.5", " -7"], "label": ["x", "y", "x"]}
    with pytest.warns(UserWarning, match=r"column 'text' of .* bare numbers; is it the column of"):
        read_examples(table, text="text", label="label")
    read_examples(table | {"text": ["12", "13", "room 7"]}, text="text", label="label")
