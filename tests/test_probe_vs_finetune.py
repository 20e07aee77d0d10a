"""The study of probes and fine-tuning: analysis and page on records with known answers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.report.runs import find_runs
from noiseproof.study import STUDIES, Asked, find_study, plan, write_pages
from noiseproof.study.probe_vs_finetune import SIZES, ProbeVsFinetune
from noiseproof.study.probe_vs_finetune.analysis import (
    APPROACHES,
    Passes,
    Records,
    crossing,
    passes,
)
from reports import write_run
from tiny import environment, table

STUDY = find_study("probe-vs-finetune")
RATES = (0.0, 0.4, 0.8)


def record(folder: Path, method: str, rate: float, seed: int, accuracy: float, **more: Any) -> None:
    """A run as the grid of the study would leave it: 100 rows, two epochs of fine-tuning."""
    noise = f"symmetric:{rate:g}"
    labels = {"part": "", "data": "news", "model": "minilm", "noise": noise,
              "validation": "none", "method": method, "seed": str(seed)}  # fmt: skip
    probe = [{"stage": "probe", "epoch": 0, "rows": 100}]
    tune: list[dict[str, Any]] = [{"stage": "tune", "epoch": epoch, "rows": 100}
                                  for epoch in range(2)]  # fmt: skip
    if method == "TURN":
        for row in tune:
            row |= {"rows": 50, "kept_share": 0.5, "selection_precision": 0.9,
                    "selection_recall": 0.75, "selected_min": 11, "selected_median": 22,
                    "selected_max": 33}  # fmt: skip
        tune[0]["balance_cap"] = 99
        tune[1]["balance_cap"] = 11
        for epoch, row in enumerate(tune):
            row["memorization"] = 0.1 + 0.1 * epoch
        tune[1]["kept_again"] = 0.625
    history = {"LP": probe, "FT": tune}.get(method[:2], probe + tune)
    history = probe + tune if method == "LP-FT" else history
    settings = dict(APPROACHES[method].method)
    settings["name"] = settings["name"].partition(":")[0]
    metrics = {"test_accuracy": accuracy, "distortion_probe_before": 0.8,
               "detection_ap": 0.85 if rate else None,
               "detection_auroc": 0.9 if rate else None,
               "detection_auroc_by_class": 0.95 if rate else None, **more}  # fmt: skip
    place = folder / f"{method}-{rate}-{seed}"
    write_run(place, method=settings, noise=noise, seed=seed, labels=labels, metrics=metrics,
              history=history, found={"noise_rate": rate},
              curves={"losses": [[0.5, 0.75, 0.25], [1.5, 0.25, 0.75]]} if rate else {},
              timings={"total_s": 90.0, "stage_tune_s": 40.0,
                       **({"stage_probe_s": 2.5} if method != "FT-CE" else {})})  # fmt: skip


def write_study(folder: Path, seeds: Iterable[int] = (0, 1, 2)) -> Path:
    """Fine-tuning leads by 10 points, then 5, then trails by 15 and one more a seed."""
    for seed in seeds:
        for rate, ahead in zip(RATES, (0.10, 0.05, -0.15 - 0.01 * seed), strict=True):
            record(folder, "LP-GCE", rate, seed, 0.7, distortion_probe=0.8,
                   distortion_parameters=0.0, distortion_cka=1.0)  # fmt: skip
            record(folder, "FT-CE", rate, seed, 0.7 + ahead,
                   distortion_probe=0.82 - 0.2 * rate - 0.001 * seed, distortion_parameters=0.1,
                   distortion_cka=0.9)  # fmt: skip
            record(folder, "TURN", rate, seed, 0.85, distortion_probe=0.81)
    return folder


# --- analysis ------------------------------------------------------------------------------------


def test_the_crossing_lies_on_the_line_between_two_rates() -> None:
    assert crossing([0.8, 0.0, 0.4], [-0.15, 0.1, 0.05]) == pytest.approx(0.5)
    assert crossing([0.0, 0.4, 0.8], [0.1, 0.0, -0.1]) == 0.4
    assert crossing([0.0, 0.2, 0.4, 0.6], [0.1, -0.1, 0.1, -0.1]) == pytest.approx(0.5)  # the last
    assert crossing([0.0, 0.4], [-0.1, 0.0]) is None and crossing([], []) is None


def test_the_crossing_is_that_of_every_seed_with_an_interval(tmp_path: Path) -> None:
    records = Records(find_runs([write_study(tmp_path)]))
    assert list(records.kinds) == ["symmetric"] and len(records.kinds["symmetric"]) == 3
    found = records.crossing("LP-GCE", "FT-CE", "symmetric")
    assert found is not None and found.summary is not None
    wanted = [0.4 + 0.4 * 0.05 / (0.20 + 0.01 * seed) for seed in range(3)]
    assert list(found.rates.values()) == pytest.approx(wanted)
    assert found.summary.interval is not None and wanted[1] in found.summary.interval
    assert (found.seeds, found.probe_ahead, found.tuning_ahead) == (3, 0, 0)
    assert records.crossing("LP-CE", "FT-CE", "symmetric") is None  # was not run


def test_seeds_that_do_not_cross_are_counted_and_not_averaged(tmp_path: Path) -> None:
    for seed, accuracies in enumerate([(0.6, 0.5), (0.9, 0.8)]):
        for rate, accuracy in zip((0.0, 0.8), accuracies, strict=True):
            record(tmp_path, "LP-GCE", rate, seed, 0.7)
            record(tmp_path, "FT-CE", rate, seed, accuracy)
    found = Records(find_runs([tmp_path])).crossing("LP-GCE", "FT-CE", "symmetric")
    assert found is not None and found.summary is None
    assert (found.probe_ahead, found.tuning_ahead) == (1, 1)
    text = write_pages(STUDY, tmp_path)[1].read_text(encoding="utf-8")
    assert "do not cross: LP-GCE is at least as good at every rate in 1 and FT-CE is still" in text


def test_passes_are_counted_from_the_history() -> None:
    """The card of TURN: 1 + (epochs - 1) + 3 epochs |kept| / N, against 3 epochs."""
    probe = [{"stage": "probe", "rows": 100}] * 20
    tune = [{"stage": "tune", "rows": 40, "kept_share": 0.4}] * 4
    assert passes(probe + tune, 100).equivalent == pytest.approx(1 + 3 + 3 * 4 * 0.4)
    plain = [{"stage": "train", "rows": 100}] * 4
    assert passes(plain, 100) == Passes(4, 4) and passes(plain, 100).equivalent == 12
    assert passes(plain, 100, "head") == passes(probe, 100) == Passes(1, 0)
    assert passes(probe + [{"stage": "tune", "rows": 100}] * 4, 100) == Passes(5, 4)
    assert passes(tune, 100).forward == pytest.approx(4 + 1.6)  # without a probe none is free
    kept = [tune[0], {"stage": "tune", "rows": 40, "kept_share": ""}]  # one selection for both
    assert passes(probe + kept, 100).forward == pytest.approx(1 + 0.8)


# --- the page ------------------------------------------------------------------------------------


def test_every_sentence_of_the_page_is_a_number_of_the_records(tmp_path: Path) -> None:
    paths = write_pages(STUDY, write_study(tmp_path))
    text = paths[1].read_text(encoding="utf-8")
    assert "LP-GCE and FT-CE cross at 49.5 % of wrong labels" in text
    assert "Re-probe after FT-CE against the pre-trained features: +1.9 points" in text
    assert "\N{MINUS SIGN}14.1 points" in text and "at 80.0 % of wrong labels." in text
    assert "Of 40.0 % wrong labels 10.0 % are left in the rows of the last epoch, 50.0 %" in text
    assert "AUROC of the losses, mean over classes, mean over the rates: LP-GCE 95.0" in text
    assert "| TURN | 3 | 1 | 5 | 0.83 | 2.50 | 40 |" in text  # 1 + 1 + 3 * 2 * 0.5 against 6
    assert "Average precision of the losses, all rows, mean over the rates: LP-GCE 85.0" in text
    assert "| 81.8 | 81.8 | 11 | 22 | 33 | 11 |" in text  # 2 * 0.9 * 0.75 / 1.65; the last epoch
    html = paths[0].read_text(encoding="utf-8")
    for title in ("Test accuracy, %", "Linear CKA to the", "Right labels among", "Passes over the",
                  "Overlap with the rows", "FT-CE: rows by their loss", "TURN: rows by their loss",
                  "Memorised at 40.0 % of wrong labels", "Memorised at 80.0 %"):  # fmt: skip
        assert title in html
    assert "nan" not in text and "None" not in text


def test_a_single_seed_has_a_crossing_and_no_interval(tmp_path: Path) -> None:
    text = write_pages(STUDY, write_study(tmp_path, seeds=[0]))[1].read_text(encoding="utf-8")
    assert "LP-GCE and FT-CE cross at 50.0 % of wrong labels (one seed)" in text


# --- the grid and the command --------------------------------------------------------------------


def test_every_size_is_a_grid_whose_cells_are_right() -> None:
    for size in ("small", "default", "full"):
        grid = plan(STUDY, Asked(size=size))
        assert len(grid.cells) == 6 * 6 * len(SIZES[size].seeds)
        jobs = {cell.labels["method"]: cell.made()[0] for cell in grid.cells}
        assert set(jobs) == set(APPROACHES)
        assert all(job.measure_distortion and job.test for job in jobs.values())
        assert len({cell.folder() for cell in grid.cells}) == len(grid.cells)


def test_no_noise_still_knows_that_its_labels_are_right() -> None:
    grid = plan(STUDY, Asked(size="small", noise=("none", "pairflip:0.4"), parts=("LP-CE",)))
    assert {cell.labels["noise"] for cell in grid.cells} == {"symmetric:0", "pairflip:0.4"}


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown approach 'LP'"):
        plan(STUDY, Asked(parts=("LP",)))
    table(24).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(InputError, match="give --test"):
        plan(STUDY, Asked(data=str(tmp_path / "train.csv")))


class Few(ProbeVsFinetune):
    """Its cells, with fewer epochs of the probes."""

    def grid(self, asked: Asked) -> dict[str, Any]:
        values = super().grid(asked)
        for settings in values["methods"].values():
            if settings["name"].startswith("TURN"):
                settings["probe_epochs"] = 2
        return values


def test_the_study_runs_from_the_command_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setitem(STUDIES, Few.name, Few())
    table(24).to_csv(tmp_path / "train.csv", index=False)
    table(12, seed=2).to_csv(tmp_path / "test.csv", index=False)
    words = ["study", "probe-vs-finetune", tmp_path / "train.csv", "--test", tmp_path / "test.csv",
             "--model", tiny_model, "--size", "small", "--seeds", "0", "--epochs", "2",
             "--batch-size", "8", "--device", "cpu", "--parts", "LP-GCE", "FT-CE", "TURN",
             "--noise", "symmetric:0.5", "--workers", "2", "--out", tmp_path / "out"]  # fmt: skip
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    assert code == 0, out.getvalue()
    assert "3 of 3 cells done" in out.getvalue()
    text = (tmp_path / "out/study.md").read_text(encoding="utf-8")
    assert "Too few runs under symmetric noise" in text
    assert "## What becomes of the features" in text and "## What TURN selects" in text
    records = Records(find_runs([tmp_path / "out"]))
    (probe,) = records.pick("LP-GCE", "symmetric:0.5")
    assert probe.metric("distortion_parameters") == 0.0
    (turn,) = records.pick("TURN", "symmetric:0.5")
    assert turn.metric("distortion_parameters") and "selection_precision" in turn.history[-1]
