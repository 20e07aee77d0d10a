"""Test sets from elsewhere: each measured on its own, never part of an average, in every report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import noiseproof
from noiseproof import metrics
from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.grid import parse_grid
from noiseproof.job import Job
from noiseproof.methods import CrossEntropy
from noiseproof.record import RunRecord
from noiseproof.report import report
from reports import write_run
from rows import SOURCES, settings_of
from tiny import table, train_settings

KEYS = {"rows", "accuracy", "macro_f1", "mcc", "ece", "nll"}


@pytest.fixture(params=["text", *(task for task in SOURCES if task != "causal-lm")])
def settings(request: pytest.FixtureRequest, tiny_model: Path) -> dict[str, Any]:
    """A job of each task, with its own rows, and a maker of further rows."""
    task = str(request.param)
    more = {"model": str(tiny_model)} if task == "text" else settings_of(task)
    make = table if task == "text" else SOURCES[task]
    return {"task": task, "make": make, "method": CrossEntropy(tune="head"), **more}


def test_every_set_is_measured_on_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    """By its own rows, with the deployed model, after every epoch; for every kind of row."""
    make = settings.pop("make")
    sets = {"near": make(12, seed=5, wrong=0.0), "far-2": make(9, seed=6, wrong=0.0)}
    result = noiseproof.fit(
        make(24, seed=1), test=make(9, seed=2), test_ood=sets, train=train_settings(epochs=2),
        out=tmp_path / "run", **settings,
    )  # fmt: skip
    record = RunRecord.read(tmp_path / "run")
    assert set(record.ood) == set(sets) and all(set(found) == KEYS for found in record.ood.values())
    column = "text" if settings["task"] == "text" else settings["task"]
    for name, rows in sets.items():
        inputs = list(rows[column]) if settings["task"] == "text" else rows[column]
        predicted = result.predictor.predict(inputs)
        hit = np.array(predicted) == np.array(rows["label"])
        assert record.ood[name]["accuracy"] == pytest.approx(hit.mean())
        assert record.ood[name]["rows"] == len(hit)
        curve = [row[f"ood_{name}_accuracy"] for row in result.history]
        assert len(curve) == 2 and curve[-1] == record.ood[name]["accuracy"]
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert {"ood_near_macro_f1", "ood_far-2_accuracy", "test_accuracy"} <= set(history)
    assert not [name for name in record.metrics if "ood" in name or "near" in name]
    assert record.data["test_rows"] == 9 and "ood_near_rows" not in record.data


def test_responses_are_measured_set_by_set_too(tmp_path: Path) -> None:
    make, method = SOURCES["causal-lm"], CrossEntropy(tune="lora", rank=2)
    result = noiseproof.fit(
        make(12, seed=1), test=make(9, seed=2), test_ood={"far": make(8, seed=6, wrong=0.0)},
        task="causal-lm", method=method, train=train_settings(epochs=1), **settings_of("causal-lm"),
    )  # fmt: skip
    found = result.record.ood["far"]
    assert set(found) == {"rows", "loss", "perplexity", "token_accuracy"} and found["rows"] == 8
    assert found["loss"] == result.history[-1]["ood_far_loss"] != result.history[-1]["test_loss"]
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_the_test_metrics_do_not_depend_on_other_sets(tiny_model: Path) -> None:
    """A mean over both would hide exactly what the sets are there to show."""
    common: dict[str, Any] = {
        "test": table(9, seed=2), "model": str(tiny_model), "method": CrossEntropy(tune="head"),
        "train": train_settings(epochs=1),
    }  # fmt: skip
    alone = noiseproof.fit(table(12), **common)
    beside = noiseproof.fit(table(12), test_ood={"far": table(9, seed=7)}, **common)
    assert alone.record.metrics == beside.record.metrics
    only = noiseproof.fit(
        table(12), **(common | {"test": None}), test_ood={"far": table(9, seed=7)}
    )
    assert only.record.ood["far"] == beside.record.ood["far"]
    assert "test_accuracy" not in only.record.metrics


def test_a_set_counts_by_its_true_labels_where_it_has_them(tiny_model: Path) -> None:
    """Wrong labels in a test set would measure agreement with the mistakes."""
    far = table(12, seed=7, wrong=0.5)
    runs = [
        noiseproof.fit(table(12), model=str(tiny_model), method=CrossEntropy(tune="head"),
                       train=train_settings(epochs=1), clean_label="clean_label",
                       test_ood={"far": rows})
        for rows in (far, far.assign(label=far["clean_label"]))
    ]  # fmt: skip
    assert runs[0].record.ood == runs[1].record.ood


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("far.csv", "test_ood must be a mapping of names to rows, got str"),
        ({}, "test_ood must be a mapping of names to rows, got dict"),
        ({"a b": "x.csv"}, "letters, digits, '.', '_' and '-', got 'a b'"),
        ({"far": 0.2}, "test_ood 'far' must be rows of its own, such as a file; got 0.2"),
        ({"far": None}, "test_ood 'far' must be rows of its own, such as a file; got None"),
    ],
)
def test_what_is_no_named_set_is_refused(sets: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        Job("x.csv", test_ood=sets)
    assert message in str(refusal.value)


def test_the_identifier_knows_the_sets_only_where_there_are_some() -> None:
    """Runs from before keep theirs; runs with other sets are others."""
    plain = Job("x.csv").spec()
    assert "test_ood" not in plain
    spec = Job("x.csv", test_ood={"far": Path("far.csv"), "here": table(3)}).spec()
    assert spec["test_ood"] == {"far": "far.csv", "here": "<DataFrame>"}


def test_the_command_line_takes_any_number_of_sets(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run can be repeated from its record."""
    for name, seed in (("train", 0), ("near", 1), ("far", 2)):
        table(12, seed=seed).to_csv(tmp_path / f"{name}.csv", index=False)
    quick = ["--model", str(tiny_model), "--method", "CrossEntropy", "--train.epochs", "1",
             "--train.device", "cpu"]  # fmt: skip
    near, far = (f"{name}={tmp_path / name}.csv" for name in ("near", "far"))
    run = str(tmp_path / "run")
    fit = ["fit", str(tmp_path / "train.csv"), *quick]
    assert main([*fit, "--test-ood", near, f"--test-ood={far}", "--out", run]) == 0
    record = RunRecord.read(tmp_path / "run")
    assert list(record.ood) == ["near", "far"]
    again = ["fit", "--config", f"{run}/record.json", "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert RunRecord.read(tmp_path / "again").id == record.id
    assert RunRecord.read(tmp_path / "again").ood == record.ood
    capsys.readouterr()
    for given, message in (
        ("far.csv", "--test-ood: expected NAME=FILE, got 'far.csv'"),
        ("=far.csv", "--test-ood: expected NAME=FILE, got '=far.csv'"),
        (f"far={tmp_path}/fur.csv", "fur.csv does not exist; did you mean 'far.csv'"),
    ):
        assert main([*fit, "--test-ood", given, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_command_line_takes_noise_on_test_texts_as_often_as_wanted(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run can be repeated from its record, with other noise if that is typed."""
    for name, seed in (("train", 0), ("test", 1)):
        table(12, seed=seed).to_csv(tmp_path / f"{name}.csv", index=False)
    quick = ["--model", str(tiny_model), "--method", "CrossEntropy", "--train.epochs", "1",
             "--train.device", "cpu", "--test", str(tmp_path / "test.csv")]  # fmt: skip
    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    fit = ["fit", str(tmp_path / "train.csv"), *quick]
    noises = ["--test-noise", "text:0.1", "--test-noise=text:0.9"]
    assert main([*fit, *noises, "--out", run]) == 0
    record = RunRecord.read(tmp_path / "run")
    assert list(record.ood) == ["corrupted-text-0.1", "corrupted-text-0.9"]
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert {f"ood_{name}_accuracy" for name in record.ood} <= {*history.columns}
    config = ["fit", "--config", f"{run}/record.json", "--out", again]
    assert main(config) == 0
    assert RunRecord.read(tmp_path / "again").id == record.id
    assert main([*config, "--test-noise", "text:0.9", "--overwrite"]) == 0
    typed = RunRecord.read(tmp_path / "again")
    assert typed.spec["test_noise"] == "text:0.9"
    assert typed.ood == {"corrupted": record.ood["corrupted-text-0.9"]}
    capsys.readouterr()
    assert main([*fit, *noises, "--test-noise", "pairflip:0.1", "--out", again]) == 2
    error = capsys.readouterr().err
    assert "--test-noise must be text noise" in error and error.count("\n") == 1


def test_a_grid_takes_noise_on_test_texts_as_a_list() -> None:
    """One noise or several; a cell with one has the identifier that it always had."""

    def cell(noise: Any) -> Any:
        values = {
            "data": {"a": {"data": "a.csv", "test": "t.csv"}},
            "methods": {"CE": {"name": "CrossEntropy"}},
            "job": {"test_noise": noise},
        }
        return parse_grid(values).cells[0]

    both = cell(["text:0.05", "text:0.3"])
    assert both.made()[0].test_noise == ("text:0.05", "text:0.3")
    assert both.id() != cell("text:0.3").id() == cell(["text:0.3"]).id()


def test_a_grid_sets_them_and_its_search_does_not_know_them() -> None:
    """Settings that were chosen by a test set are no result on it."""
    grid = parse_grid({
        "data": {"a": {"data": "a.csv", "test": "t.csv", "test_ood": {"far": "f.csv"}}},
        "methods": {"CE": {"name": "CrossEntropy"}},
        "tune": {"trials": 1, "space": {"CE": {"learning_rate": [1e-3]}}},
    })  # fmt: skip
    assert grid.cells[0].made()[0].test_ood == {"far": "f.csv"}
    assert all(trial.made()[0].test_ood is None for trial in grid.searches[0].trials)


def found(accuracy: float, mcc: float | None = 0.25) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(KEYS, 0.5)
    return values | {"rows": 40, "accuracy": accuracy, "mcc": mcc}


def test_the_report_on_one_run_has_a_table_of_them(tmp_path: Path) -> None:
    """With the test set in the first row, to compare with."""
    write_run(tmp_path / "run", 0.9, ood={"far": found(0.625), "<b>": found(0.5, None)})
    text = report(tmp_path / "run", tmp_path / "r.md").read_text(encoding="utf-8")
    part = text.partition("## Test sets from elsewhere")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| Test set | Rows | Accuracy |")
    assert lines[2].startswith("| the test set | 50 | 90.0 |")
    assert lines[3].startswith("| far | 40 | 62.5 | 50.0 | 25.0 |")
    assert "&lt;b>" in lines[4] and "none counts in the measures of the test set" in part
    write_run(tmp_path / "plain" / "run", 0.9)
    plain = report(tmp_path / "plain", tmp_path / "p.md").read_text(encoding="utf-8")
    assert "elsewhere" not in plain


def test_the_report_on_several_runs_compares_on_each_set(tmp_path: Path) -> None:
    """Means over seeds of one set, not over sets."""
    accuracies = {"CrossEntropy": (0.5, 0.6), "GCE": (0.7, 0.8)}
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            write_run(tmp_path / "runs" / f"{method}{seed}", 0.9, method=method, seed=seed,
                      ood={"far": found(value), "near": found(1.0)},
                      spec={"test_ood": {"far": "f.csv", "near": "n.csv"}})  # fmt: skip
    text = report(tmp_path / "runs", tmp_path / "r.md").read_text(encoding="utf-8")
    part = text.partition("### Test sets from elsewhere")[2].partition("\n#")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in part.splitlines() if "| " in line}
    assert rows["Method"].startswith("| Method | far | far: MCC | near | near: MCC |")
    assert "55.0 ± 7.1" in rows["CrossEntropy"] and "**75.0** ± 7.1" in rows["GCE"]
    head = text.partition("### Test sets from elsewhere")[0]
    assert "| GCE | 2 | **90.0** ± 0.0" in head or "| GCE | 2 |" in head
    assert "far" not in head.partition("## ")[2]
    csv = pd.read_csv(report(tmp_path / "runs", tmp_path / "r.csv"))
    assert csv["ood.far.accuracy"].tolist() == [0.5, 0.6, 0.7, 0.8]
    assert csv["method"].tolist() == ["CrossEntropy"] * 2 + ["GCE"] * 2


@pytest.mark.parametrize(
    ("sets", "together"),
    [
        ({"test_ood": {"far": "f.csv"}}, True),
        ({"test_noise": "text:0.3"}, True),
        ({"test_ood": {"far": "other.csv"}}, False),
        ({"test_noise": "text:0.1"}, False),
        ({"test_noise": ["text:0.1", "text:0.3"]}, True),
    ],
    ids=str,
)
def test_a_further_test_set_does_not_part_runs_unless_its_rows_differ(
    sets: dict[str, Any], together: bool, tmp_path: Path
) -> None:
    """What is measured besides changes nothing of a run; one name for two sets would mix them."""
    alike = "test_noise" if "test_noise" in sets else "test_ood"
    given = {"test_ood": {"far": "f.csv"}, "test_noise": "text:0.3"}[alike]
    write_run(tmp_path / "runs" / "plain", 0.5, method="CrossEntropy")
    write_run(tmp_path / "runs" / "first", 0.6, method="GCE", spec={alike: given})
    write_run(tmp_path / "runs" / "second", 0.7, method="ELR", spec=sets)
    csv = pd.read_csv(report(tmp_path / "runs", tmp_path / "r.csv"))
    assert (csv["data"].nunique() == 1) == together
    assert sorted(csv["method"]) == ["CrossEntropy", "ELR", "GCE"]


def test_matthews_correlation_by_hand() -> None:
    """On unequal classes accuracy praises the constant answer; this does not."""
    truth, constant = [1] * 7 + [0] * 3, [1] * 10
    assert metrics.matthews(constant, truth) == 0.0
    guess = [1] * 6 + [0] + [0, 0, 1]
    # (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)) with 6, 2, 1, 1
    assert metrics.matthews(guess, truth) == pytest.approx((12 - 1) / (7 * 7 * 3 * 3) ** 0.5)
    assert metrics.matthews([1 - g for g in guess], truth) == pytest.approx(-11 / 21)
