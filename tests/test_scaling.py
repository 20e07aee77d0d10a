"""The scaling benchmark measures what it says, and its page says what was measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import noiseproof
from noiseproof import finetune, loop
from noiseproof.tasks import TextClassification, base

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
needs_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the memory comes from /proc"
)


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_have_their_length_and_labels_are_wrong_as_often_as_asked(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "CHUNK", 300)
    size = scaling.write_texts(tmp_path / "t.csv", 1000, 9, wrong=0.2)
    table = pd.read_csv(tmp_path / "t.csv")
    assert len(table) == 1000 and size == table["text"].str.len().sum()
    assert set(table["text"].str.split().map(len)) == {9}
    topics = {name: set(words) for name, words in scaling.TOPICS.items()}
    said = [
        next(name for name, words in topics.items() if words & set(text.split()))
        for text in table["text"]
    ]
    assert 0.15 < (table["label"] != said).mean() < 0.25
    scaling.write_texts(tmp_path / "again.csv", 1000, 9, wrong=0.2)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def test_the_products_are_those_of_the_encoder(scaling: ModuleType) -> None:
    """Counted by hand: 2 (4 D^2 + 2 D F) a token, twice 2 D T for attention, LoRA on two."""
    size = {"rows": 3, "tokens": 5, "rank": 2}
    forward, backward = scaling.products(1, 8, 32, 2, **size)
    many, attention, lora = 15, 2 * 2 * 15 * 5 * 8, 2 * 2 * 2 * 15 * 8 * 2
    assert scaling.flops(forward) == 2 * many * (4 * 64 + 2 * 8 * 32) + attention + lora
    frozen = 2 * many * (64 + 2 * 8 * 32)  # output and both feed-forward parts
    adapters = 2 * 3 * 2 * many * 8 * 2
    assert scaling.flops(backward) == frozen + 1.5 * attention + adapters
    deep_forward, deep_backward = scaling.products(3, 8, 32, 2, **size)
    assert scaling.flops(deep_forward) == 3 * scaling.flops(forward)
    into_input = 0.5 * attention + 2 * many * 3 * 64 + 2 * 2 * many * 2 * 8
    assert scaling.flops(deep_backward) == 3 * scaling.flops(backward) + 2 * into_input
    scaling.runner(forward + backward)()


class Clock:
    """A clock that only `sleep` moves; the CPU runs half of the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scaling, "time", clock)
    return clock


def test_laps_give_the_median_of_each_name(scaling: ModuleType, clock: Clock) -> None:
    laps = scaling.Laps()
    for seconds in (1, 30, 2):
        laps.time("sleep", lambda seconds=seconds: clock.sleep(seconds))
        clock.sleep(100)
    assert laps.medians() == {"sleep": {"cpu_s": 1.0, "wall_s": 2.0, "laps": 3}}


@needs_linux
def test_no_second_of_a_job_counts_twice(scaling: ModuleType, clock: Clock) -> None:
    """Scoring lies inside training, a prediction inside scoring."""
    meter = scaling.Meter()

    class Job:
        def train(self) -> None:
            clock.sleep(10)
            self.score()
            self.predict()

        def score(self) -> None:
            clock.sleep(3)
            self.predict()

        def predict(self) -> None:
            clock.sleep(1)

    meter.wrap(Job, "train", "train")
    meter.wrap(Job, "score", "score")
    meter.wrap(Job, "predict", "predict", but_in="score")
    clock.sleep(5)
    meter.enter("rest")
    Job().train()
    clock.sleep(2)
    meter.enter("end")
    wall = {"imports": 5, "rest": 2, "train": 10, "score": 4, "predict": 1}
    assert meter.wall == wall
    assert meter.cpu == {name: seconds / 2 for name, seconds in wall.items()}
    assert set(meter.peak_mb) == set(wall)


@needs_linux
def test_a_point_runs_the_whole_job_and_meters_each_phase(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed function of the job would leave its phase empty."""
    for owner, name in (
        *((base, "read_examples"), (TextClassification, "encode"), (finetune, "train")),
        *((noiseproof.CleaR, "on_epoch_start"), (loop, "save_checkpoint")),
        *((loop._Loop, "_predict"), (finetune, "sample_table"), (finetune, "write_results")),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    scaling.write_texts(tmp_path / "t.csv", 40, 8)
    scaling.build_encoder(tmp_path / "encoder")
    words = ["point", "--data", str(tmp_path / "t.csv"), "--model", str(tmp_path / "encoder")]
    words += ["--folder", str(tmp_path / "run"), "--out", str(tmp_path / "found")]
    monkeypatch.delenv("RANK", raising=False)
    scaling.main([*words, "--batch-size", "8", "--threads", "1", "--dropout", "own"])
    found = json.loads((tmp_path / "found.0").read_text())
    assert found["rows"] == 40 and found["processes"] == 1
    assert all(found["wall_seconds"][name] > 0 for name in scaling.PHASES)
    assert (tmp_path / "run" / "suspects.csv").exists()
    assert found["peak_mb"] == max(found["peak_mb_by_phase"].values()) > 50


def made_up(scaling: ModuleType) -> dict[str, Any]:
    point = {
        "rows": 10_000,
        "batch_size": 128,
        "processes": 1,
        "tokens": 12,
        "cpu_seconds": dict.fromkeys((*scaling.PHASES, "rest"), 1.0),
        "wall_seconds": dict.fromkeys((*scaling.PHASES, "rest"), 2.0),
        "peak_mb": 600.0,
        "peak_mb_by_phase": {"imports": 500.0, "read": 510.0},
    }
    large = point | {"rows": 1_000_000, "peak_mb": 750.0}
    lap = {"cpu_s": 0.5, "wall_s": 1.0, "laps": 3}
    limit = {
        "tokens": 16,
        "batch_size": 32,
        "rows": 256,
        "scoring_batch": 128,
        "laps": dict.fromkeys(("step", "step_products", "scoring", "scoring_products"), lap),
        "limit_gigaflops_per_second": {"step_products": 50.0, "scoring_products": 60.0},
        "step_fraction": 0.75,
        "scoring_fraction": 0.8,
    }
    return {
        "rows": {"points": [point, large], "command": "python benchmarks/scaling.py rows"},
        "processes": {"points": [point, point | {"processes": 2}]},
        "length": {"points": [point], "model": "minilm"},
        "limit": {"points": [limit], "model": "minilm"},
    }


def test_the_page_holds_every_section_and_the_ratio_of_the_peaks(
    scaling: ModuleType, tmp_path: Path
) -> None:
    text = scaling.markdown(made_up(scaling))
    assert "| 1,000,000 | 1.0 | 1.0 | 0.5 |" in text  # training counts two epochs
    assert "Peak memory of 1,000,000 rows against 10,000: 1.25." in text
    assert "| step, 32 x 16 | 500 | 500 | 50 | 0.75 |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for block in tables:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    scaling.put_into(page, text)
    assert page.read_text() == f"before\n{scaling.BEGIN}\n{text}{scaling.END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="has no lines"):
        scaling.put_into(page, text)


def test_sections_are_added_to_the_file(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of measuring must not wipe out the hour before."""
    out = tmp_path / "new" / "scaling.json"

    def pretend(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
        return {"points": args.sizes}

    monkeypatch.setattr(scaling, "measure_rows", pretend)
    out.parent.mkdir()
    out.write_text('{"limit": {"points": []}}')
    scaling.main(["rows", "--sizes", "5", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["limit"] == {"points": []} and found["rows"]["points"] == [5]
    assert found["rows"]["command"].endswith(f"scaling.py rows --sizes 5 --out {out}")


def test_the_results_page_is_made_from_the_results(scaling: ModuleType) -> None:
    """Numbers typed by hand are numbers nobody measured."""
    results = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    page = (RESULTS / "scaling.md").read_text(encoding="utf-8")
    inside = page.split(scaling.BEGIN + "\n")[1].split(scaling.END)[0]
    assert inside == scaling.markdown(results)


def test_the_benchmark_itself_stays_small() -> None:
    """A process is born with the peak memory of its parent: the measuring one loads nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import scaling\n"
        "print(sorted({'torch', 'pandas', 'transformers', 'noiseproof'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_target_runs_both_forms_of_scoring_and_takes_the_number_of_rows() -> None:
    """The page has a million rows and both forms; a target that cannot repeat it proves less."""
    words = ["make", "-n", "bench-speed", "ROWS=1000000"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--sizes 1000 10000 1000000 " in told
    assert all(f"--variant {form} --out" in told for form in ("reuse", '"one pass"'))
