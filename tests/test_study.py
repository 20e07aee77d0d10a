"""Studies: the command end to end, and the analysis on records with known answers."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.report.runs import find_runs
from noiseproof.study import STUDIES, Asked, find_study, plan, write_pages
from noiseproof.study.peft_under_noise import RANDOM_LABELS, PeftUnderNoise
from noiseproof.study.peft_under_noise.analysis import Records, claim
from noiseproof.study.running import estimate
from reports import write_run
from tiny import environment, table

STUDY = find_study("peft-under-noise")
NOISE = "symmetric:0.4"
FULL = {"name": "CrossEntropy", "tune": "full"}


def lora(rank: int = 8, *, routing: str = "none") -> dict[str, Any]:
    weight = 0.0 if routing == "none" else 1.0
    return {"name": "CleaR", "peft": "lora", "rank": rank, "routing": routing,
            "lambda_consistency": weight}  # fmt: skip


def record(
    folder: Path,
    name: str,
    method: dict[str, Any],
    part: str,
    *,
    seed: int = 0,
    noise: str = NOISE,
    status: str = "done",
    **metrics: float,
) -> None:
    """A run as the grid of the study would leave it."""
    labels = {"grid": "PEFT under noise", "part": part, "data": "news", "model": "minilm",
              "noise": noise, "validation": "none", "method": name, "seed": str(seed)}  # fmt: skip
    control = part == "right rows alone"
    history = [{"stage": "train", "epoch": epoch, **metrics} for epoch in range(2)]
    write_run(folder / f"{part}-{name}-{noise}-{seed}".replace(":", "-"), method=method,
              noise=noise, seed=seed, labels=labels, metrics=metrics, history=history,
              found={"noise_rate": 0.4}, status=status,
              spec={"only_clean_rows": True} if control else None)  # fmt: skip


def write_study(folder: Path, seeds: Iterable[int] = (0, 1, 2), control: bool = True) -> Path:
    """Memorisation rises by 3 points a doubling (and by seed), interference by 4 more in LoRA."""
    for seed in seeds:
        for rank in (1, 8, 64):
            part = "under noise" if rank == 8 else "capacity"
            memory = 0.1 + 0.03 * math.log2(rank) + 0.001 * seed * math.log2(rank)
            name = "lora" if rank == 8 else f"lora rank {rank}"
            record(folder, name, lora(rank), part, seed=seed, memorization=memory,
                   clean_fit=0.80, test_accuracy=0.7, gradient_encoder_share=0.6)  # fmt: skip
        record(folder, "full", FULL, "under noise", seed=seed, memorization=0.5, clean_fit=0.90,
               test_accuracy=0.6)  # fmt: skip
        record(folder, "CleaR lora", lora(routing="bernoulli"), "under noise", seed=seed,
               memorization=0.05, clean_fit=0.9, test_accuracy=0.8)  # fmt: skip
        record(folder, "lora", lora(), "random labels", seed=seed, noise=RANDOM_LABELS,
               memorization=0.3)  # fmt: skip
        if control:
            fit = 0.86 + 0.002 * seed
            record(folder, "lora", lora(), "right rows alone", seed=seed, clean_fit=fit,
                   test_accuracy=0.85 + 0.001 * seed)  # fmt: skip
            record(folder, "full", FULL, "right rows alone", seed=seed, clean_fit=0.92,
                   test_accuracy=0.85)  # fmt: skip
    return folder


# --- analysis ------------------------------------------------------------------------------------


def test_the_slope_is_that_of_memorisation_over_doublings(tmp_path: Path) -> None:
    found = Records(find_runs([write_study(tmp_path)])).capacity_claim()
    assert found.verdict == "holds" and list(found.families) == ["lora"]
    slopes = found.families["lora"].difference.values
    assert slopes == pytest.approx([0.030, 0.031, 0.032])
    assert found.overall is not None
    assert (found.overall.summary.n, found.overall.settings) == (3, 1)
    assert found.overall.summary.mean == pytest.approx(0.031)


def test_interference_is_the_control_minus_the_noisy_run_and_paired(tmp_path: Path) -> None:
    """LoRA loses 6 points and a little by seed, full fine-tuning 2: a difference of 4."""
    records = Records(find_runs([write_study(tmp_path)]))
    costs = records.interference()
    assert list(costs["lora"].values()) == pytest.approx([0.060, 0.062, 0.064])
    assert list(costs["full"].values()) == pytest.approx([0.02] * 3)
    found = records.interference_claim()
    assert found.verdict == "holds" and found.overall is not None
    assert found.overall.summary.mean == pytest.approx(0.042)
    accuracy = records.interference("test_accuracy")
    assert list(accuracy["lora"].values()) == pytest.approx([0.150, 0.151, 0.152])
    assert records.interference_claim("test_accuracy").verdict == "contradicted"


def test_a_single_seed_claims_nothing(tmp_path: Path) -> None:
    records = Records(find_runs([write_study(tmp_path, seeds=[0])]))
    assert records.capacity_claim().verdict == "no claim"
    overall = records.interference_claim().overall
    assert overall is not None and overall.summary.interval is None


def test_an_interval_that_holds_0_leaves_the_claim_open() -> None:
    found = claim({"lora": {"0\tn": 0.1, "1\tn": -0.1}}, ["lora"])
    assert found.verdict == "open"
    assert claim({"lora": {"0\tn": -0.1, "1\tn": -0.11}}, ["lora"]).verdict == "contradicted"


def test_kinds_of_noise_of_one_seed_are_no_further_seeds() -> None:
    """Three kinds of noise share rows, order and initial weights: two seeds stay two values."""
    values = {f"{seed}\t{noise}": 0.05 + 0.04 * seed for seed in (0, 1) for noise in "abc"}
    found = claim({"lora": values}, ["lora"])
    assert found.overall is not None
    assert (found.overall.summary.n, found.overall.settings) == (2, 3)
    assert found.verdict == "open", "of six values it would have held"


def test_families_count_alike_and_what_one_lacks_is_left_out() -> None:
    table_of = {"lora": {"0\tn": 1.0, "1\tn": 1.0}, "bitfit": {"0\tn": 3.0}}
    found = claim(table_of, ["lora", "bitfit", "prompt"])
    assert found.overall is not None and found.overall.difference.values == (2.0,)
    assert found.missing == ("prompt",)


def test_routed_runs_and_controls_do_not_enter_the_plain_families(tmp_path: Path) -> None:
    records = Records(find_runs([write_study(tmp_path)]))
    assert [one.run.metric("memorization") for one in records.pick("lora", routed=True)] == [
        0.05, 0.05, 0.05,
    ]  # fmt: skip
    assert all(not one.control and not one.random for one in records.pick("lora"))
    assert records.closer == NOISE and records.noises == [NOISE]


# --- the page ------------------------------------------------------------------------------------


def test_the_page_says_the_verdicts_and_draws_what_they_rest_on(tmp_path: Path) -> None:
    paths = write_pages(STUDY, write_study(tmp_path))
    assert [path.name for path in paths] == ["study.html", "study.md", "study.csv"]
    markdown = paths[1].read_text(encoding="utf-8")
    assert "Smaller adapters memorise less. Wrong labels disturb adapters more" in markdown
    assert "+3.1" in markdown and "+4.2" in markdown
    assert "Which rows look wrong" not in markdown, "no run has such a metric"
    assert "| lora | +3.1 (" in markdown.split("### By family, in points")[1]
    html = paths[0].read_text(encoding="utf-8")
    for title in ("Memorised wrong labels, %", "Memorised, % at the same fit", "Cost of wrong"):
        assert title in html
    assert "<script src" not in html


def test_the_page_shows_what_newer_records_hold(tmp_path: Path) -> None:
    """Losses of right and wrong rows, gates by layer, the drop from the peak, the head's share."""
    points = [[0.1, 0.8, 0.1], [2.0, 0.2, 0.9]]
    model = {"trained_parameters": 200, "trained_head_parameters": 50}
    gates = {"gates": {"right": [0.8, 0.75], "wrong": [0.2, 0.25]}}
    for name, method in (("full", FULL), ("lora", lora()), ("CleaR lora", lora(routing="soft"))):
        labels = {"grid": "g", "part": "under noise", "data": "news", "model": "minilm",
                  "noise": NOISE, "validation": "none", "method": name, "seed": "0"}  # fmt: skip
        metrics = {"test_accuracy": 0.7, "test_accuracy_best": 0.82, "memorization": 0.2}
        write_run(tmp_path / name, method=method, noise=NOISE, labels=labels, metrics=metrics,
                  curves={"losses": points}, model=model,
                  findings=gates if name.startswith("CleaR") else {})  # fmt: skip
    paths = write_pages(STUDY, tmp_path)
    html, markdown = (path.read_text(encoding="utf-8") for path in paths[:2])
    for name in ("full", "lora", "CleaR lora"):
        assert f"{name}: rows by their loss, %" in html
    assert "| CleaR lora | right | 80.0 | 75.0 |" in markdown
    assert "| CleaR lora | wrong | 20.0 | 25.0 |" in markdown
    results = markdown.split("## All results")[1]
    assert "| Drop | Head's share |" in results and "| 12.0 | 25.0 |" in results


def test_missing_controls_are_said_and_not_guessed(tmp_path: Path) -> None:
    text = write_pages(STUDY, write_study(tmp_path, control=False))[1].read_text(encoding="utf-8")
    assert "nothing to compare for lora" in text
    assert "Interference: too few runs for a claim" in text


# --- the grid and the command --------------------------------------------------------------------


def test_every_size_is_a_grid_whose_cells_are_right() -> None:
    for size in ("small", "default", "full"):
        grid = plan(STUDY, Asked(size=size))
        parts = {cell.labels["part"] for cell in grid.cells}
        assert {"under noise", "right rows alone", "random labels", "capacity"} <= parts
        assert "of one core a cell" in grid.cost
        assert estimate(grid.cells, 900) > 12 * len(grid.cells)
        alone = [cell.made()[0] for cell in grid.cells if cell.labels["part"][0] == "r"]
        assert any(job.only_clean_rows for job in alone)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="unknown study 'peft-under'; did you mean"):
        find_study("peft-under")
    with pytest.raises(InputError, match="unknown family 'lor'"):
        plan(STUDY, Asked(parts=("lor",)))
    with pytest.raises(InputError, match="wrong labels that are known"):
        plan(STUDY, Asked(noise=("none",)))
    with pytest.raises(InputError, match="size must be one of small"):
        Asked(size="huge")
    with pytest.raises(InputError, match="data of your own"):
        Asked(test="0.2")


def called(*words: object) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


def test_without_a_name_the_command_lists_the_studies() -> None:
    code, said = called("study")
    assert code == 0 and all(name in said for name in STUDIES)
    code, said = called("study", "peft")
    assert code == 2 and "unknown study" in said


class Few(PeftUnderNoise):
    """Three cells of it."""

    def grid(self, asked: Asked) -> dict[str, Any]:
        values = super().grid(asked)
        noisy, alone = values["part"][:2]
        return values | {
            "part": [noisy | {"methods": ["full", "lora"]}, alone | {"methods": ["lora"]}]
        }


def test_a_study_runs_from_the_command_line_and_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr("noiseproof.study.peft_under_noise.PROBED_ROWS", 4)
    monkeypatch.setitem(STUDIES, Few.name, Few())
    table(24).to_csv(tmp_path / "train.csv", index=False)
    words = (
        *("study", "peft-under-noise", tmp_path / "train.csv", "--model", tiny_model),
        *("--size", "small", "--seeds", "0", "--epochs", "2", "--batch-size", "8"),
        *("--device", "cpu", "--parts", "lora", "--out", tmp_path / "out"),
    )
    code, said = called(*words, "--list")
    assert code == 0 and "3 cells" in said and not (tmp_path / "out").exists()
    code, said = called(*words, "--workers", "2")
    assert code == 0, said
    assert "3 of 3 cells done" in said
    text = (tmp_path / "out/study.md").read_text(encoding="utf-8")
    html = (tmp_path / "out/study.html").read_text(encoding="utf-8")
    assert "lora: rows by their loss, %" in html and "| Drop | Head's share |" in text
    assert "too few runs for a claim" in text and "| lora, right rows alone |" in text
    before = (tmp_path / "out/study.md").read_bytes()
    code, said = called(*words, "--pages")
    assert code == 0 and (tmp_path / "out/study.md").read_bytes() == before
