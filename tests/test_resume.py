"""A run that is killed at any moment and resumed gives the result of the run that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forks import INTERRUPTED, Forks
from noiseproof.checkpoint import load_checkpoint
from noiseproof.method import Method
from noiseproof.methods import ELR, TURN, CleaR, CrossEntropy, LoPE
from noiseproof.mixture import LossMixture
from tiny import table, train_settings

SMALL = LossMixture(min_samples=4, min_gap=0.0)
EPOCHS, STEPS = 3, 4  # of 25 rows in batches of 8

METHODS: dict[str, Method] = {
    "CrossEntropy on LoRA": CrossEntropy(tune="lora"),
    "CleaR with scoring passes": CleaR(
        warmup_epochs=1, gamma=0.8, max_clean_loss=None, scoring_passes=2, mixture=SMALL
    ),
    "CleaR with reused logits": CleaR(
        warmup_epochs=1, max_clean_loss=None, scoring="reuse", mixture=SMALL
    ),
    "CleaR with bottlenecks": CleaR(
        peft="adapter", warmup_epochs=1, gamma=0.8, max_clean_loss=None, mixture=SMALL
    ),
    "TURN": TURN(  # all rows are kept, so that every epoch has as many steps
        tune="prompt",
        probe_epochs=1,
        probe_batch_size=8,
        mixture=dataclasses.replace(SMALL, scope="per_class"),
        min_class_fraction=1.0,
        balance="weight",
        precondition="off",
    ),
    "ELR": ELR(tune="lora"),
    "LoPE": LoPE(noise_rate=0.3, theta_examples=20),
}


def place(name: str, number: int) -> dict[str, Any]:
    """Where an epoch is, counted over all stages of a method: its stage and number there."""
    for stage in METHODS[name].stages(EPOCHS):
        if number < stage.epochs:
            return {"stage": stage.name, "epoch": number}
        number -= stage.epochs
    raise IndexError(number)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as running:
        yield running


@dataclasses.dataclass
class Case:
    """One method with the folder of its uninterrupted run."""

    fit: dict[str, Any]
    reference: Path
    log: Path

    def into(self, folder: Path, **more: Any) -> dict[str, Any]:
        return self.fit | {"out": str(folder)} | more


@pytest.fixture(scope="module")
def cases(
    forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("resume")
    table(25, wrong=0.2).to_csv(folder / "train.csv", index=False)
    table(10, seed=1).to_csv(folder / "test.csv", index=False)
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            fit = {
                "data": str(folder / "train.csv"),
                "test": str(folder / "test.csv"),
                "clean_label": "clean_label",
                "model": str(tiny_model),
                "method": METHODS[name].to_dict(),
                "train": dataclasses.asdict(train_settings(epochs=EPOCHS)),
            }
            made[name] = Case(fit, folder / name, folder / f"{name}.log")
            assert forks.run(made[name].log, made[name].into(folder / name)) == 0, tail(made[name])
        return made[name]

    return case


def tail(case: Case) -> str:
    return case.log.read_text(encoding="utf-8")[-3000:]


def weight_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


def assert_same_result(run: Path, reference: Path) -> None:
    assert weight_bytes(run) and weight_bytes(run) == weight_bytes(reference)
    assert (run / "history.csv").read_bytes() == (reference / "history.csv").read_bytes()
    one, two = (pd.read_parquet(folder / "samples.parquet") for folder in (run, reference))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    one, two = (json.loads((folder / "record.json").read_text()) for folder in (run, reference))
    assert one["status"] == two["status"] == "done"
    for key in ("metrics", "per_class", "modes", "findings"):
        assert one[key] == two[key], key
    assert not (run / "checkpoints").exists()


def moments(name: str, random: random.Random) -> dict[str, dict[str, Any]]:
    """Where to kill a run of a method, in the order of a run."""
    last = random.choice(
        [
            {"event": "open", "path": "model/adapter_config.json"},
            {"event": "os.rename", "path": "history.csv"},
            {"event": "os.rename", "path": "samples.parquet"},
            {"event": "os.rename", "path": "suspects.csv"},
        ]
    )
    return {
        "before the first record": {"event": "os.rename", "path": "record.json"},
        "in the first epoch": place(name, 0) | {"step": random.randrange(1, STEPS + 1)},
        "before the first checkpoint is there": {
            "event": "os.rename",
            "path": "000001.safetensors",
        },
        "between two checkpoints": {"event": "os.remove", "path": "000001.safetensors"},
        "in the last epoch": place(name, EPOCHS - 1) | {"step": random.randrange(1, STEPS + 1)},
        "while the results are written": last,
        "before the run is called done": {"event": "os.rename", "path": "record.json", "count": 2},
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_result(
    name: str, forks: Forks, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """A checkpoint without the moments of Adam, a column, a random state or the loss so far gives
    a run that looks whole and is another one. SIGKILL leaves no time to tidy up.
    """
    case, folder = cases(name), tmp_path / "run"
    for moment, at in moments(name, random.Random(name)).items():
        status = forks.run(case.log, case.into(folder, resume=True), at=at)
        assert status == -signal.SIGKILL, f"{moment} ({at}): ended with {status}\n{tail(case)}"
    assert forks.run(case.log, case.into(folder, resume=True)) == 0, tail(case)
    assert_same_result(folder, case.reference)


@pytest.mark.parametrize("name", ["CleaR with scoring passes"])
def test_a_run_that_is_killed_from_outside_by_the_clock_comes_to_the_same_result(
    name: str, forks: Forks, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """Moments that nobody thought of: whatever the process is doing then."""
    case, folder, draw = cases(name), tmp_path / "run", random.Random(7)
    timings = json.loads((case.reference / "record.json").read_text())["timings"]
    killed = 0
    for _ in range(5):
        pid = forks.start(case.log, case.into(folder, resume=True))
        time.sleep(draw.uniform(0.1, 0.9) * timings["total_s"])
        os.kill(pid, signal.SIGKILL)
        status = forks.wait(pid)
        killed += status == -signal.SIGKILL
        if finished(folder):
            break
    assert killed >= 1, tail(case)
    if not finished(folder):
        assert forks.run(case.log, case.into(folder, resume=True)) == 0, tail(case)
    assert weight_bytes(folder) == weight_bytes(case.reference)
    assert (folder / "history.csv").read_bytes() == (case.reference / "history.csv").read_bytes()


def finished(folder: Path) -> bool:
    record = folder / "record.json"
    return record.exists() and json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("step", [2, STEPS])
@pytest.mark.parametrize("name", METHODS)
def test_a_signal_in_an_epoch_leaves_a_checkpoint_inside_the_epoch(
    name: str, step: int, forks: Forks, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """A pre-empted job must not lose an epoch, nor end up with another result; the last step of an
    epoch is a place of its own, for then the resumed epoch has no step left.
    """
    case, folder = cases(name), tmp_path / "run"
    signum = signal.SIGTERM if step == 2 else signal.SIGINT
    at = place(name, 1) | {"step": step}
    status = forks.run(case.log, case.into(folder), at=at, signal=int(signum))
    assert status == INTERRUPTED, tail(case)
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "interrupted" and signum.name in record["error"]
    loaded = load_checkpoint(folder / "checkpoints")
    assert loaded is not None
    assert (loaded[1]["epoch"], loaded[1]["step"]) == (at["epoch"], step)
    assert len(loaded[1]["history"]) == 1
    assert forks.run(case.log, case.into(folder, resume=True)) == 0, tail(case)
    assert_same_result(folder, case.reference)
