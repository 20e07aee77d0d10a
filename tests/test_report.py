"""Reports say what the records say: the right numbers, no run lost, every text as text."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from noiseproof import cli
from noiseproof.errors import InputError
from noiseproof.report import report
from noiseproof.report.blocks import percent, quantity
from noiseproof.report.runs import find_runs
from reports import ACCURACIES, write_grid, write_run

EVIL = "<script>alert('x')</script>"


def made(paths: Any, out: Path, **options: Any) -> str:
    return report(paths, out, **options).read_text(encoding="utf-8")


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """Rows of every table, by the heading above it."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, names = "", []
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading, names = line.strip("# "), []
        elif line.startswith("| ") and not names:
            names = line.strip("| ").split(" | ")
        elif line.startswith("| "):
            cells = [re.sub(r"\*\*(.*?)\*\*", r"\1", c) for c in line.strip("| ").split(" | ")]
            found.setdefault(heading, []).append(dict(zip(names, cells, strict=True)))
    return found


def row(rows: list[dict[str, str]], method: str) -> dict[str, str]:
    (found,) = [row for row in rows if row["Method"] == method]
    return found


# --- numbers -------------------------------------------------------------------------------------


def test_runs_without_test_rows_show_validation_and_no_test_accuracy(tmp_path: Path) -> None:
    """Another measure under the name of the test accuracy would be a false result."""
    for noise in ("none", "symmetric:0.4"):
        for method, score in (("CrossEntropy", 0.4), ("GCE", 0.6)):
            write_run(
                tmp_path / "runs" / noise.replace(":", "-") / method,
                method=method,
                noise=noise,
                metrics={"validation_accuracy": score, "memorization": 0.25, "suspicious": 7},
                history=[],
            )
    text = made(tmp_path / "runs", tmp_path / "report.md")
    assert "test accuracy" not in text.lower()
    assert (
        "Best" not in text and "(+20.0 points of validation accuracy; one seed: no claim)" in text
    )
    found = row(tables(text)["news.csv · symmetric:0.4"], "GCE")
    assert (found["Validation"], found["Memorised"]) == ("60.0", "25.0")
    assert found["Minus CrossEntropy"] == "+20.0 (one seed)"
    assert "Recovered gap" not in found, "validation rows of other noise are another measure"


def test_the_numbers_of_a_grid_by_hand(tmp_path: Path) -> None:
    """Mean, spread, paired interval, recovered gap, cost: computed here once more."""
    text = made(write_grid(tmp_path / "runs"), tmp_path / "report.md")
    found = tables(text)
    gce = row(found["news.csv · symmetric:0.4"], "GCE")
    assert gce["Seeds"] == "3"
    assert gce["Last epoch"] == "87.0 ± 2.6"
    differences = [0.15, 0.14, 0.16]
    half = 4.302653 * statistics.stdev(differences) / 3**0.5
    low, high = 100 * (0.15 - half), 100 * (0.15 + half)
    assert gce["Minus CrossEntropy"] == f"+15.0 (+{low:.1f} to +{high:.1f})"
    assert gce["Recovered gap"] == f"{100 * (0.87 - 0.72) / (0.96 - 0.72):.1f}"
    assert gce["Best epoch (oracle)"] == "99.0 ± 0.0"
    plain = row(found["news.csv · symmetric:0.4"], "CrossEntropy")
    assert plain["Minus CrossEntropy"] == "0 baseline" and plain["Recovered gap"] == "0"
    (wins,) = found["Won, open, lost against CrossEntropy"]
    assert [wins[name] for name in ("Won", "Open", "Lost", "No claim")] == ["1", "1", "0", "0"]
    by_seed = [(0.15 - 0.01) / 2, (0.14 - 0.01) / 2, (0.16 + 0.0) / 2]
    mean, half = statistics.fmean(by_seed), 4.302653 * statistics.stdev(by_seed) / 3**0.5
    shown = [f"+{100 * value:.1f}" for value in (mean, mean - half, mean + half)]
    assert wins["Mean difference"] == "{} ({} to {})".format(*shown)
    assert (
        "Against CrossEntropy on average over 2 settings: GCE ({} points of test accuracy; "
        "95% interval {} to {}: ahead).".format(*shown)
    ) in text
    settings = row(found["Accuracy in all settings"], "GCE")
    assert settings["no added noise"] == "95.3 ± 1.5" and settings["symmetric:0.4"] == "87.0 ± 2.6"
    cost = row(found["Cost"], "GCE")
    assert (cost["Runs"], cost["Total s"], cost["CPU s"]) == ("6", "90", "120")


def test_the_best_of_a_column_is_marked_the_oracle_is_not(tmp_path: Path) -> None:
    text = made(write_grid(tmp_path / "runs"), tmp_path / "report.md")
    part = text.split("## news.csv · symmetric:0.4")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if "| GCE |" in line or "| CrossEntropy |" in line]
    assert [line.split(" | ")[2] for line in lines] == ["**87.0** ± 2.6", "72.0 ± 2.0"]
    assert not any(re.search(r"\*\*99", line) for line in lines)


def test_one_seed_has_no_spread_no_interval_and_no_claim(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.7)
    write_run(tmp_path / "b", 0.9, method="GCE")
    text = made(tmp_path, tmp_path / "report.md")
    found = tables(text)
    gce = row(found["news.csv · no added noise"], "GCE")
    assert gce["Last epoch"] == "90.0" and gce["Minus CrossEntropy"] == "+20.0 (one seed)"
    (wins,) = found["Won, open, lost against CrossEntropy"]
    assert [wins[name] for name in ("Won", "Open", "Lost", "No claim")] == ["0", "0", "0", "1"]
    assert "±" not in text and "one seed, so no spread" in text


def test_one_seed_in_many_settings_is_still_no_claim(tmp_path: Path) -> None:
    """Settings of one seed share its rows; an interval over them would be a claim."""
    for rate in range(1, 7):
        for method, accuracy in (("CrossEntropy", 0.5), ("GCE", 0.6 + rate / 100)):
            noise = f"symmetric:0.{rate}"
            write_run(tmp_path / f"{method}{rate}", accuracy, method=method, noise=noise)
    text = made(tmp_path, tmp_path / "report.md")
    assert "6 settings: GCE (+13.5 points of test accuracy; one seed: no claim)." in text
    (wins,) = tables(text)["Won, open, lost against CrossEntropy"]
    assert wins["Mean difference"] == "+13.5 (one seed)" and wins["No claim"] == "6"


def test_means_are_over_the_settings_that_all_methods_share(tmp_path: Path) -> None:
    """A method that was run where it is easy must not lead by that."""
    for noise, accuracies in (
        ("symmetric:0.2", {"CrossEntropy": 0.8, "GCE": 0.9, "ELR": 0.85}),
        ("symmetric:0.6", {"CrossEntropy": 0.1, "GCE": 0.2}),
    ):
        for method, accuracy in accuracies.items():
            write_run(tmp_path / f"{method}{noise[-1]}", accuracy, method=method, noise=noise)
    text = made(tmp_path, tmp_path / "report.md")
    overview = tables(text)["Accuracy in all settings"]
    assert [(r["Method"], r["Mean"]) for r in overview] == [
        ("GCE", "90.0"), ("ELR", "85.0"), ("CrossEntropy", "80.0"),
    ]  # fmt: skip
    wins = tables(text)["Won, open, lost against CrossEntropy"]
    assert [(r["Method"], r["Mean difference"], r["No claim"]) for r in wins] == [
        ("GCE", "+10.0 (one seed)", "2"), ("ELR", "+5.0 (one seed)", "1"),
    ]  # fmt: skip
    assert "The mean is over the setting in which every method has a result." in text
    assert "against CrossEntropy under symmetric:0.2, which all methods share: GCE (+10.0" in text


def test_without_a_common_setting_the_report_says_so(tmp_path: Path) -> None:
    for noise, methods in (("symmetric:0.2", ("GCE", "CrossEntropy")),
                           ("symmetric:0.6", ("ELR", "CrossEntropy"))):  # fmt: skip
        for seed, method in enumerate(methods):
            write_run(
                tmp_path / f"{method}{noise[-1]}", 0.5 + seed / 10, method=method, noise=noise
            )
    write_run(tmp_path / "other", 0.3, method="SCE", noise="symmetric:0.8")
    text = made(tmp_path, tmp_path / "report.md")
    assert "each method over its own settings" in text
    assert "Mean" not in tables(text)["Accuracy in all settings"][0]
    wins = row(tables(text)["Won, open, lost against CrossEntropy"], "GCE")
    assert wins["Mean difference"].endswith("(one seed), 1 setting")


def test_the_late_mean_stands_between_the_last_and_the_best_epoch(tmp_path: Path) -> None:
    """Between runs that end high by luck and those that stay there only the late mean tells."""
    for method in ("CrossEntropy", "GCE"):
        metrics = {"test_accuracy": 0.8, "test_accuracy_late": 0.7, "test_accuracy_best": 0.9}
        write_run(tmp_path / method, method=method, metrics=metrics)
    text = made(tmp_path, tmp_path / "report.md")
    found = list(row(tables(text)["news.csv · no added noise"], "GCE").items())
    assert found[2:5] == [("Last epoch", "80.0"), ("Late mean", "70.0"),
                          ("Best epoch (oracle)", "90.0")]  # fmt: skip


def test_a_run_that_was_tested_once_has_no_late_mean(tmp_path: Path) -> None:
    metrics = {"test_accuracy": 0.8, "test_accuracy_late": 0.8}
    for method in ("CrossEntropy", "GCE"):
        history = [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5, "test_accuracy": 0.8}]
        write_run(tmp_path / method, method=method, metrics=metrics, history=history)
    assert "Late mean" not in made(tmp_path, tmp_path / "report.md")


def test_differences_use_common_seeds_only(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.6), (9, 0.1)):
        write_run(tmp_path / f"plain-{seed}", accuracy, seed=seed)
    for seed, accuracy in ((0, 0.6), (1, 0.7), (5, 1.0)):
        write_run(tmp_path / f"gce-{seed}", accuracy, seed=seed, method="GCE")
    found = tables(made(tmp_path, tmp_path / "report.md"))
    assert row(found["news.csv · no added noise"], "GCE")["Minus CrossEntropy"].startswith("+10.0 ")


def test_without_noise_known_to_be_absent_there_is_no_recovered_gap(tmp_path: Path) -> None:
    """Data with wrong labels of their own are no clean reference, even without added noise."""
    for method, accuracy in (("CrossEntropy", 0.5), ("GCE", 0.6)):
        write_run(tmp_path / f"{method}-n", accuracy, method=method, noise="symmetric:0.4")
        write_run(tmp_path / f"{method}-o", 0.9, method=method, found={"noise_rate": 0.2})
    text = made(tmp_path, tmp_path / "report.md")
    assert "Recovered gap" not in text


@pytest.mark.parametrize("rows", [100, 50])
def test_the_clean_reference_has_as_many_rows(tmp_path: Path, rows: int) -> None:
    write_run(tmp_path / "clean", 0.9, data={"rows": rows, "validation": "none"})
    write_run(tmp_path / "plain", 0.5, noise="symmetric:0.4")
    write_run(tmp_path / "gce", 0.6, noise="symmetric:0.4", method="GCE")
    text = made(tmp_path, tmp_path / "report.md")
    assert ("| 25.0 |" in text) == ("Recovered gap" in text) == (rows == 100)


def test_an_epoch_chosen_by_validation_is_told_apart_from_the_last(tmp_path: Path) -> None:
    train = {"epochs": 2, "seed": 0, "select": "best"}
    history = [{"epoch": 0, "test_accuracy": 0.8}, {"epoch": 1, "test_accuracy": 0.6}]
    data = {"rows": 10, "validation": "clean"}
    for method in ("CrossEntropy", "GCE"):
        write_run(tmp_path / method, 0.8, method=method, spec={"train": train}, history=history,
                  data=data)  # fmt: skip
    text = made(tmp_path, tmp_path / "report.md")
    found = tables(text)["news.csv · no added noise · clean validation"]
    gce = row(found, "GCE")
    assert gce["Deployed"] == "80.0" and gce["Last epoch"] == "60.0"
    assert "The validation rows had right labels." in text


def test_the_csv_has_one_row_per_run_and_its_numbers(tmp_path: Path) -> None:
    runs = write_grid(tmp_path / "runs")
    write_run(runs / "broken", None, seed=9, status="failed", error="loss, is\nnan", metrics={})
    rows = list(csv.DictReader(io.StringIO(made(runs, tmp_path / "report.csv"))))
    assert len(rows) == 13
    done = {(r["noise"], r["method"], r["seed"]): r for r in rows if r["status"] == "done"}
    for noise, methods in ACCURACIES.items():
        for method, accuracies in methods.items():
            for seed, accuracy in enumerate(accuracies):
                found = done[noise, method, str(seed)]
                assert float(found["test_accuracy"]) == accuracy
                assert found["spec.method.name"] == method and float(found["cpu_s"]) == 120
    (failed,) = [r for r in rows if r["status"] == "failed"]
    assert failed["error"] == "loss, is\nnan" and failed["test_accuracy"] == ""


# --- which runs, under which names ---------------------------------------------------------------


def test_no_run_is_dropped_in_silence(tmp_path: Path) -> None:
    """Failed, unfinished, damaged and doubled ones are listed with the reason."""
    runs = write_grid(tmp_path / "runs")
    write_run(runs / "f", None, method="GCE", noise="symmetric:0.4", seed=3, status="failed",
              error="loss is not finite", metrics={})  # fmt: skip
    write_run(runs / "r", None, seed=4, status="running", metrics={})
    write_run(runs / "twice", 0.95)
    (runs / "damaged").mkdir()
    (runs / "damaged/record.json").write_text("{")
    for values in ({"spec": [], "schema_version": 1}, {"schema_version": 1}):
        folder = runs / f"odd-{len(values)}"
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(values))
    text = made(runs, tmp_path / "report.md")
    left = {Path(r["Run"]).name: r for r in tables(text)["Runs left out"]}
    assert {name: r["Status"] for name, r in left.items()} == {
        "f": "failed", "r": "running", "twice": "copy", "damaged": "damaged", "odd-1": "damaged",
        "odd-2": "damaged",
    }  # fmt: skip
    assert left["f"]["Reason"] == "loss is not finite"
    assert "the same run as" in left["twice"]["Reason"]
    assert row(tables(text)["news.csv · symmetric:0.4"], "GCE")["Seeds"] == "3 of 4"


def test_a_method_without_a_finished_run_keeps_its_row(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1)
    write_run(tmp_path / "c", None, method="GCE", status="failed", error="no", metrics={}, data={})
    found = tables(made(tmp_path, tmp_path / "report.md"))
    gce = row(found["news.csv · no added noise"], "GCE")
    assert gce["Seeds"] == "0 of 1" and gce["Last epoch"] == "\N{EN DASH}"


def test_names_grow_only_as_far_as_they_must(tmp_path: Path) -> None:
    plain = {"name": "CrossEntropy", "tune": "lora", "rank": 8}
    write_run(tmp_path / "1", method=plain, spec={"data": "x/trec/train.csv"})
    write_run(tmp_path / "2", method=plain | {"tune": "full"}, spec={"data": "x/trec/train.csv"})
    write_run(tmp_path / "3", method=plain, spec={"data": "x/news/train.csv"})
    write_run(tmp_path / "4", method="GCE", spec={"data": "x/news/train.csv"})
    names = {(run.names["data"], run.row) for run in find_runs([tmp_path]).runs}
    assert names == {
        ("trec/train.csv", "CrossEntropy (tune=lora)"),
        ("trec/train.csv", "CrossEntropy (tune=full)"),
        ("news/train.csv", "CrossEntropy (tune=lora)"),
        ("news/train.csv", "GCE"),
    }


def test_runs_that_differ_in_a_setting_are_never_averaged(tmp_path: Path) -> None:
    """Two seeds at three epochs and one at thirty are no three seeds."""
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed)
    write_run(tmp_path / "2", seed=2, epochs=30)
    rows = {run.row for run in find_runs([tmp_path]).runs}
    assert rows == {"CrossEntropy (train.epochs=3)", "CrossEntropy (train.epochs=30)"}


def test_a_grid_names_its_cells(tmp_path: Path) -> None:
    """Also where searched settings differ between seeds; PEFT families are told apart."""
    for seed in (0, 1):
        for peft in ("lora", "ia3"):
            labels = {"grid": "g", "data": "trec", "noise": "n", "method": "plain LoRA",
                      "peft": peft, "model": "m", "validation": "noisy:0.1",
                      "seed": str(seed)}  # fmt: skip
            write_run(tmp_path / f"{seed}{peft}", method={"name": "CrossEntropy", "rate": seed},
                      seed=seed, labels=labels)  # fmt: skip
    runs = find_runs([tmp_path]).runs
    assert {run.row for run in runs} == {"plain LoRA · lora", "plain LoRA · ia3"}
    assert {run.group for run in runs} == {("g", "", "trec", "n", "m", "noisy:0.1")}


def test_only_the_cells_of_a_grid_count(tmp_path: Path) -> None:
    """Not the trials of its search, not cells of an earlier version, nothing outside."""
    outside = tmp_path / "outside"
    write_run(outside)
    grid = tmp_path / "grid"
    for name in ("cells/a", "cells/old", "trials/t"):
        write_run(grid / name)
    folders = ["cells/a", "cells/never", "../outside"]
    values = {"title": "My grid", "baseline": "GCE", "cost": "two hours",
              "cells": [{"folder": folder} for folder in folders]}  # fmt: skip
    (grid / "grid.json").write_text(json.dumps(values))
    found = find_runs([grid])
    assert [run.folder.name for run in found.runs] == ["a"]
    states = {left.folder.name: left.status for left in found.left_out}
    assert states == {"never": "not started", "old": "not in grid"}
    assert found.grid["title"] == "My grid" and found.grid["cost"] == "two hours"


def test_the_same_folder_twice_is_read_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    found = find_runs([tmp_path, tmp_path / "a", tmp_path / "a/record.json"])
    assert len(found.runs) == 1 and not found.left_out


def test_baselines(tmp_path: Path) -> None:
    """Asked for, told by the grid, else plain fine-tuning; a wrong name lists the right ones."""
    runs = write_grid(tmp_path / "runs")
    assert "Minus CrossEntropy" in made(runs, tmp_path / "a.md")
    assert "Minus GCE" in made(runs, tmp_path / "b.md", baseline="GCE")
    (runs / "grid.json").write_text(json.dumps({"baseline": "GCE", "title": "T", "cells": None}))
    text = made(runs, tmp_path / "c.md")
    assert "Minus GCE" in text and text.splitlines()[1] == "# T"
    with pytest.raises(InputError, match="unknown baseline 'gcee'; did you mean 'GCE'"):
        report(runs, tmp_path / "d.md", baseline="gcee")
    (runs / "grid.json").write_text(json.dumps({"baseline": "gone"}))
    assert "gone, the baseline of the grid, has no finished run" in made(runs, tmp_path / "e.md")


def write_families(folder: Path) -> Path:
    """Two methods on two families of adapters: GCE gains 10 points on one, loses 5 on one."""
    accuracies = {("plain", "lora"): 0.5, ("plain", "ia3"): 0.7, ("GCE", "lora"): 0.6,
                  ("GCE", "ia3"): 0.65}  # fmt: skip
    for (method, peft), accuracy in accuracies.items():
        for seed in (0, 1):
            labels = {"data": "trec", "noise": "none", "method": method, "peft": peft,
                      "seed": str(seed)}  # fmt: skip
            write_run(folder / f"{method}{peft}{seed}", accuracy + seed / 100 * (method == "GCE"),
                      method=method, seed=seed, labels=labels)  # fmt: skip
    return folder


@pytest.mark.parametrize("told", [True, False])
def test_a_baseline_of_several_families_meets_each_method_with_its_own(
    tmp_path: Path, told: bool
) -> None:
    """The rows of such a grid are `plain · lora`, so `plain` would name none of them."""
    runs = write_families(tmp_path / "runs")
    if told:
        (runs / "grid.json").write_text(json.dumps({"baseline": "plain"}))
    text = made(runs, tmp_path / "report.md", baseline=None if told else "plain")
    found = tables(text)["trec · no added noise"]
    assert row(found, "GCE · lora")["Minus plain"].startswith("+10.5 (")
    assert row(found, "GCE · ia3")["Minus plain"].startswith("\N{MINUS SIGN}4.5 (")
    assert row(found, "plain · lora")["Minus plain"] == "0 baseline"
    assert [r["Method"] for r in tables(text)["Won, open, lost against plain"]] == [
        "GCE · lora", "GCE · ia3",
    ]  # fmt: skip
    assert "Largest gain over plain with the same adapters: GCE · lora (+10.5 points" in text


def test_one_family_of_the_baseline_can_be_asked_for(tmp_path: Path) -> None:
    text = made(write_families(tmp_path / "runs"), tmp_path / "r.md", baseline="plain · ia3")
    found = tables(text)["trec · no added noise"]
    assert row(found, "GCE · lora")["Minus plain · ia3"].startswith("\N{MINUS SIGN}9.5 (")
    assert row(found, "plain · lora")["Minus plain · ia3"] == "\N{MINUS SIGN}20.0 (no spread)"


def test_cells_that_were_not_started_share_a_line_under_their_name(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    write_run(grid / "cells/a")
    labels = {"data": "trec", "noise": "none", "method": "GCE", "peft": "lora"}
    cells = [{"folder": f"cells/{n}", "labels": labels | {"seed": str(n)}} for n in range(3)]
    cells.append({"folder": "cells/a"})
    (grid / "grid.json").write_text(json.dumps({"cells": cells}))
    text = made(grid, tmp_path / "report.md")
    assert "<summary>3 not started</summary>" in text
    (left,) = tables(text)["Runs left out"]
    assert left["Run"] == "trec · GCE · lora, seed 0, 1, 2"
    page = made(grid, tmp_path / "report.html")
    assert "<details><summary>3 not started</summary>" in page


def test_what_comes_out_stands_before_what_was_run(tmp_path: Path) -> None:
    runs = write_grid(tmp_path / "runs")
    write_run(runs / "r", None, seed=4, status="running", metrics={})
    text = made(runs, tmp_path / "report.md")
    assert text.splitlines()[3].startswith("**Against CrossEntropy on average over 2 settings: GCE")
    assert text.splitlines()[3].endswith("12 of 13 runs are done.**")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Overview" and headings.index("## Runs") == len(headings) - 4
    assert "<details><summary>Model and grid</summary>" in text.split("## Runs")[1]


def test_unequal_numbers_of_trials_are_told(tmp_path: Path) -> None:
    for method, trials in (("CrossEntropy", 4), ("GCE", 8)):
        search = {"trials": trials, "split": "noisy", "space": {"q": [0.5, 0.7]},
                  "best": {"q": 0.7}}  # fmt: skip
        write_run(tmp_path / method, method=method, search=search)
    text = made(tmp_path, tmp_path / "report.md")
    assert "unequal numbers of trials (4: CrossEntropy; 8: GCE)" in text
    assert row(tables(text)["Search for settings"], "GCE")["Space"] == "q 0.5 or 0.7"


def test_the_seeds_share_the_trials(tmp_path: Path) -> None:
    """Trials for every seed would be another, dearer search."""
    for seed in (0, 1):
        search = {"trials": 4, "split": "noisy", "space": {"q": [0.5, 0.7]}, "best": {"q": 0.7},
                  "seconds": 90.0}  # fmt: skip
        write_run(tmp_path / str(seed), method="GCE", seed=seed, search=search)
    text = made(tmp_path, tmp_path / "report.md")
    assert "4 trials for every method, shared by its seeds" in text
    assert row(tables(text)["Search for settings"], "GCE")["Seconds"] == "90"
    assert "their searches, which runs share, took 0.03 more." in text  # once, not for every seed


# --- the page ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_alone_and_lets_no_other_script_run(tmp_path: Path) -> None:
    text = made(write_grid(tmp_path / "runs"), tmp_path / "report.html")
    page = Page(text)
    (policy,) = [a["content"] for tag, a in page.tags
                 if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)
    for _, attributes in page.tags:
        assert not {"src", "style", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert [tag for tag, _ in page.tags].count("svg") >= 6


def evil_run(folder: Path, **more: Any) -> None:
    values: dict[str, Any] = {
        "method": {"name": EVIL, EVIL: EVIL},
        "found": {"noise_rate": 0.1, "transition": [[0.9, 0.1], [0.1, 0.9]]},
        "data": {"rows": 10, "classes": 2, "label_names": [EVIL, EVIL], "validation": EVIL},
        "per_class": {EVIL: {"precision": 1.0, EVIL: EVIL}},
        "metrics": {"test_accuracy": 0.5, EVIL: EVIL, "test_ece": EVIL, "suspicious": 1},
        "versions": {EVIL: EVIL},
        "search": {"trials": EVIL, "split": EVIL, "space": {EVIL: EVIL}, "best": EVIL},
        "model": {"name": EVIL, "precision": EVIL},
        "timings": {EVIL: EVIL, "total_s": EVIL},
        "spec": {"data": f"{EVIL}.csv", "model": EVIL, "noise": EVIL},
    }
    write_run(folder, **(values | more))
    (folder / "suspects.csv").write_text(f"row_id,text,{EVIL}\n1,{EVIL},{EVIL}\n")
    (folder / "history.csv").write_text(f"stage,test_accuracy,{EVIL}\n{EVIL},{EVIL},1\nx,0.5,2\n")


@pytest.mark.parametrize("count", [1, 3])
def test_texts_from_records_and_data_are_text(tmp_path: Path, count: int) -> None:
    """Names, labels, versions, errors, folders, suspects: all of it may come from a stranger."""
    runs = tmp_path / "<script>alert(1)<"
    for number in range(count):
        evil_run(runs / f"<img onerror=x>{number}", seed=number)
    write_run(runs / "f", None, status="failed", error=EVIL, metrics={}, method=EVIL)
    (runs / "grid.json").write_text(json.dumps(dict.fromkeys(("title", "description", "cost",
                                                              "file"), EVIL)))  # fmt: skip
    page = Page(made(runs, tmp_path / "report.html"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert sum(EVIL in text for text in page.texts) > 5
    text = made(runs, tmp_path / "report.md")
    assert "<script" not in text and "<img" not in text and "&lt;script>" in text


def test_markdown_shows_names_as_they_stand(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="a|b *c* [d](e) `f`")
    text = made(tmp_path, tmp_path / "report.md")
    assert r"| a\|b \*c\* \[d\](e) \`f\` |" in text


@pytest.mark.parametrize("suffix", ["html", "md", "csv"])
def test_a_record_with_next_to_nothing_in_it(tmp_path: Path, suffix: str) -> None:
    """Old records, other programs' records: what is missing is left out."""
    (tmp_path / "runs/a").mkdir(parents=True)
    least = {"spec": {}, "status": "done", "schema_version": 1}
    (tmp_path / "runs/a/record.json").write_text(json.dumps(least))
    assert made(tmp_path / "runs", tmp_path / f"one.{suffix}")
    write_run(tmp_path / "runs/b", history=[])
    write_run(tmp_path / "runs/c", spec={"method": "text", "train": None}, confusion=[[1], [2, 3]],
              curves={"roc": "x", "pr": [[1]]}, found={"transition": [["a"]]},
              timings={"total_s": None}, per_class={"a": 1})  # fmt: skip
    text = made(tmp_path / "runs", tmp_path / f"three.{suffix}")
    shown = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL).lower()
    assert not re.search(r"\bnan\b", shown)


def test_only_unfinished_runs_still_make_a_report(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, status="running", metrics={})
    text = made(tmp_path, tmp_path / "report.md")
    assert "0 done, 1 running" in text and "not finished" in text


def test_one_run(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run",
        0.875,
        noise="symmetric:0.4",
        per_class={"no": {"precision": 0.5, "recall": 0.25, "f1": 0.333, "support": 4.0}},
    )
    rows = "".join(f"{n},text {n},0.12345\n" for n in range(30))
    (tmp_path / "run/suspects.csv").write_text(f"row_id,text,loss\n{rows}")
    text = made(tmp_path / "run", tmp_path / "one.md")
    found = tables(text)
    measures = {r["Measure"]: r["Value"] for r in found["Overview"]}
    assert measures["Last epoch"] == "87.5 %" and measures["Best epoch (oracle)"] == "99.0 %"
    assert found["By class"] == [
        {"Class": "no", "Precision": "50.0", "Recall": "25.0", "F1": "33.3", "Test rows": "4"}
    ]
    assert "7 of 100 training rows look wrongly labelled (7.0 %)" in text
    suspects = found["The first 20"]
    assert len(suspects) == 20 and suspects[0] == {
        "row_id": "0", "text": "text 0", "loss": "0.123",
    }  # fmt: skip
    page = made(tmp_path / "run", tmp_path / "one.html")
    for title in ("Shares, %", "Training loss", "Wrong labels found (ROC), %", "Precision, %",
                  "Test set", "What noise made of the labels"):  # fmt: skip
        assert f">{title}</text>" in page


def test_charts_of_a_grid(tmp_path: Path) -> None:
    page = made(write_grid(tmp_path / "runs"), tmp_path / "report.html")
    for title in ("Accuracy minus CrossEntropy, points", "Test accuracy, %: symmetric",
                  "Wrong labels found (ROC), %", "Test set, GCE", "Test accuracy, %"):  # fmt: skip
        assert f">{title}</text>" in page
    # 3 seeds of 25 rows each: shares over all of them
    assert page.count("no → yes: 20.0 %") >= 2


def test_of_many_methods_the_baseline_and_the_best_are_named_in_a_chart(tmp_path: Path) -> None:
    for index in range(12):
        method = f"method {index}" if index else "CrossEntropy"
        write_run(tmp_path / str(index), 0.5 + index / 100, method=method)
    page = made(tmp_path, tmp_path / "report.html")
    chart = page.split(">Test accuracy, %</text>")[1].split("</svg>")[0]
    named = re.findall(r'class="name" text-anchor="start">([^<]*)<', chart)
    assert set(named) == {"CrossEntropy", *(f"method {index}" for index in range(7, 12))}
    assert chart.count('class="series quiet"') == 6
    assert "Lines without a name are the other methods." in page


def test_unequal_numbers_of_epochs_are_drawn_over_the_share_of_the_training(tmp_path: Path) -> None:
    """A probe of twenty epochs would press the four of the others into a corner."""
    write_run(tmp_path / "a", epochs=4)
    assert "share of the training" not in made(tmp_path, tmp_path / "one.html")
    write_run(tmp_path / "b", method="TURN", epochs=20)
    assert ">share of the training, %</text>" in made(tmp_path, tmp_path / "two.html")


@pytest.mark.parametrize(("seeds", "drawn"), [(2, False), (3, True)])
def test_an_interval_of_two_seeds_is_not_drawn_over_noise_rates(
    tmp_path: Path, seeds: int, drawn: bool
) -> None:
    for seed in range(seeds):
        for noise in ("none", "symmetric:0.2", "symmetric:0.4"):
            write_run(tmp_path / f"{noise[-1]}{seed}", 0.7 + seed / 100, noise=noise, seed=seed)
    page = made(tmp_path, tmp_path / "report.html")
    assert ('<path class="whisker"' in page) is drawn


@pytest.mark.parametrize(("seeds", "label"), [(1, "without interval"), (2, "with 95% interval")])
def test_differences_without_intervals_are_not_called_so(
    tmp_path: Path, seeds: int, label: str
) -> None:
    for seed in range(seeds):
        write_run(tmp_path / f"a{seed}", 0.7, seed=seed)
        write_run(tmp_path / f"b{seed}", 0.8 + seed / 100, method="GCE", seed=seed)
    assert label in made(tmp_path, tmp_path / "report.html")


def test_the_end_of_the_warm_up_is_marked_and_the_loss_explained(tmp_path: Path) -> None:
    """The loss of CleaR jumps where its second term starts: that is no divergence."""
    write_run(tmp_path / "a", method={"name": "CleaR", "warmup_epochs": 2})
    page = made(tmp_path / "a", tmp_path / "one.html")
    assert "end of the warm-up of 2 epochs" in page and 'class="grid dashed"' in page
    assert "The training loss is what the method minimises" in page
    write_run(tmp_path / "b", method={"name": "CleaR", "warmup_epochs": 3})
    assert "warm-up of" not in made(tmp_path / "b", tmp_path / "two.html"), "three epochs in all"


def test_the_maps_of_a_setting_show_the_same_classes(tmp_path: Path) -> None:
    size = 60
    plain = [[10 * (a == b) for b in range(size)] for a in range(size)]
    for method, (true, given) in {"CrossEntropy": (7, 50), "GCE": (31, 40)}.items():
        confusion = [list(values) for values in plain]
        confusion[true][given] = 9
        write_run(tmp_path / method, 0.5, method=method, confusion=confusion, found={},
                  data={"rows": 9, "label_names": [f"c{n}" for n in range(size)]})  # fmt: skip
    page = made(tmp_path, tmp_path / "report.html")
    maps = [chart.split("</svg>")[0] for chart in page.split('<svg class="chart map"')[1:]]
    names = [re.findall(r'class="name" text-anchor="end">([^<]*)<', chart) for chart in maps]
    assert len(maps) == 2 and names[0] == names[1] and {"c7", "c50", "c31", "c40"} <= set(names[0])


def test_many_classes_are_cut_to_the_most_confused(tmp_path: Path) -> None:
    size = 60
    confusion = [[10 * (a == b) for b in range(size)] for a in range(size)]
    confusion[7][50] = 9
    write_run(tmp_path / "run", confusion=confusion, found={},
              data={"label_names": [f"c{n}" for n in range(size)]})  # fmt: skip
    page = made(tmp_path / "run", tmp_path / "one.html")
    assert "Of 60 classes the 24 that are confused most are shown." in page
    assert page.count('class="heat"') == 24 * 24 and "c7 → c50: 47.4 %" in page


# --- bad input -----------------------------------------------------------------------------------


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "folder.html").mkdir()
    for paths, out, message in (
        ("runs", "x.pdf", r"unsupported suffix '\.pdf'; supported: \.html, \.md, \.csv"),
        ("runs", "old.html", "exists; choose another name or give --overwrite"),
        ("runs", "folder.html", "it is a folder"),
        ("runs", "no/x.html", "does not exist"),
        ("empty", "x.html", r"no record\.json in .*empty"),
        ("absent", "x.html", r"absent does not exist"),
        ("old.html", "x.html", r"old\.html is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            report(tmp_path / paths, tmp_path / out)
    assert (tmp_path / "old.html").read_text() == "old"
    with pytest.raises(InputError, match="no folder given"):
        report([], tmp_path / "x.html")
    (tmp_path / "empty/record.json").write_text("[]")
    with pytest.raises(InputError, match="none of 1 records can be read"):
        report(tmp_path / "empty", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(tmp_path / "runs")
    words = ["report", str(tmp_path / "runs/none"), str(tmp_path / "runs/symmetric-0.4")]
    words += ["--out", str(tmp_path / "out.html"), "--baseline", "GCE", "--title", "A & B"]
    assert cli.main(words) == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<h1>A &amp; B</h1>" in text and "Minus GCE" in text
    assert cli.main(words) == 2
    assert cli.main([*words, "--overwrite"]) == 0
    assert cli.main([*words[:-3], "nothing", "--overwrite"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[1].startswith("noiseproof: unknown baseline 'nothing'")


def test_reports_load_no_model_library() -> None:
    """A report of a finished grid must not take the seconds that torch takes to load."""
    from tiny import last_json, python

    code = "import noiseproof.report, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "pandas", "sklearn"} & set(last_json(done.stdout))


def test_numbers_as_text() -> None:
    assert percent(None) == "\N{EN DASH}" and percent(-0.0001, signed=True) == "0.0"
    assert percent(-0.25) == "\N{MINUS SIGN}25.0" and percent(0.25, signed=True) == "+25.0"
    assert quantity(1234567) == "1,234,567" and quantity(0.123) == "0.12"
