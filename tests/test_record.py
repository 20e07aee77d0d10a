"""The record says what was asked and what came out, under one identifier, whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from noiseproof.errors import InputError
from noiseproof.record import (
    SCHEMA_VERSION,
    RunRecord,
    differences,
    peak_memory_mb,
    spec_id,
    versions,
    write_atomic,
    write_history,
)

SPEC = {"data": "a.csv", "train": {"seed": 0, "epochs": 3}, "noise": None}


def test_the_identifier_depends_on_the_settings_alone() -> None:
    """A report that joins runs by it must not see an order of keys, a time or a result."""
    swapped = {"noise": None, "train": {"epochs": 3, "seed": 0}, "data": "a.csv"}
    assert spec_id(SPEC) == spec_id(swapped) == RunRecord(SPEC).id
    assert spec_id(json.loads(json.dumps(SPEC))) == spec_id(SPEC)
    assert spec_id(SPEC | {"noise": "none"}) != spec_id(SPEC)
    assert spec_id({"train": {"seed": 1}}) != spec_id({"train": {"seed": 1.5}})
    done = RunRecord(SPEC, status="done", metrics={"test_accuracy": 0.5})
    assert done.id == spec_id(SPEC) and re.fullmatch("[0-9a-f]{16}", done.id)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Names in other alphabets, missing numbers and the status survive."""
    record = RunRecord(SPEC, status="failed", error="zu wenig für «é»", metrics={"auroc": None})
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    written = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert written["schema_version"] == SCHEMA_VERSION


def test_rows_of_numbers_stand_on_one_line(tmp_path: Path) -> None:
    """A matrix is readable and a diff of records short; texts that look alike stay as they are."""
    record = RunRecord(
        {"label": "[1,  2]"},
        confusion=[[10, 2], [0, 31]],
        curves={"roc": [[0.0, 0.0], [1e-05, -1.5], [1.0, 1.0]]},
        metrics={"texts": ["[\n 3,\n 4]", "x"], "none": []},
    )
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert "[ 10, 2 ]" in text
    assert "[ 1e-05, -1.5 ]" in text


def test_a_record_of_a_later_release_with_more_fields_is_read(tmp_path: Path) -> None:
    """Fields that are added do not need a new schema."""
    RunRecord(SPEC).write(tmp_path)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert RunRecord.read(tmp_path).spec == SPEC


def test_a_folder_without_a_readable_record_is_one_line(tmp_path: Path) -> None:
    """Missing, damaged, of another schema."""
    with pytest.raises(InputError, match=r"is not a run: record\.json is missing"):
        RunRecord.read(tmp_path / "absent")
    path = tmp_path / "record.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*record\.json"):
        RunRecord.read(tmp_path)
    path.write_text(json.dumps(dataclasses.asdict(RunRecord(SPEC)) | {"schema_version": 99}))
    with pytest.raises(InputError, match="has schema version 99, this noiseproof reads 1"):
        RunRecord.read(tmp_path)


def test_differences_name_the_setting_with_both_values() -> None:
    """`its settings differ` without a name sends the user through the whole file."""
    asked = {"data": "b.csv", "train": {"seed": 0, "epochs": 4}, "new": 1}
    assert differences(asked, SPEC) == [
        "data ('a.csv' then, 'b.csv' now)",
        "new (None then, 1 now)",
        "train.epochs (3 then, 4 now)",
    ]
    assert differences(SPEC, SPEC) == []


def test_history_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    """Methods log numbers from the second stage on; the first stage has blanks."""
    write_history(tmp_path, [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": 0.25, "extra": 2}])
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "0", "loss": "0.5", "extra": ""},
        {"epoch": "1", "loss": "0.25", "extra": "2"},
    ]


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not leave half a record in the place of a good one."""
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_versions_and_memory_are_there() -> None:
    """What a result may depend on."""
    found = versions()
    assert {"python", "platform", "torch", "transformers", "peft", "noiseproof"} <= set(found)
    assert found["torch"].startswith(__import__("torch").__version__.split("+")[0])
    memory = peak_memory_mb()
    assert memory is None or 50 < memory < 500_000
