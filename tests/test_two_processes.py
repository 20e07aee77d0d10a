"""Two processes train as one does: they select the same rows and come to the same weights."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import noiseproof
from noiseproof import engine
from noiseproof.method import Method
from noiseproof.methods import ELR, METHODS, TURN, CleaR, LoPE, NMTune, SmallLoss
from noiseproof.mixture import LossMixture
from tiny import python, table, train_settings
from two_processes import PREDICT_ROWS

SMALL = LossMixture(min_samples=4, min_gap=0.0)

ROUTED: dict[str, Any] = {
    "warmup_epochs": 1,
    "gamma": 0.8,
    "max_clean_loss": None,
    "mixture": SMALL,
    "dropout": 0.0,
}

CASES: dict[str, Method] = {
    "SmallLoss": SmallLoss(tune="lora", warmup_epochs=1, mixture=SMALL, dropout=0.0),
    "TURN": TURN(
        tune="lora",
        probe_epochs=2,
        mixture=dataclasses.replace(SMALL, scope="per_class"),
        precondition="off",
        dropout=0.0,
    ),
    "CleaR": CleaR(**ROUTED, scoring_passes=2),
    "CleaR by batch": CleaR(**ROUTED, scoring_passes=2, free_gate="batch"),
    "CleaR with reused logits": CleaR(**ROUTED, scoring="reuse"),
    "CleaR with open gates": CleaR(**ROUTED | {"gamma": 1.0}),
    "CleaR with bottlenecks": CleaR(**ROUTED, peft="adapter"),
    "ELR": ELR(tune="lora", dropout=0.0),
    "ELR on cached features": ELR(tune="head", dropout=0.0),
    "LoPE": LoPE(noise_rate=0.3, theta_examples=20, lora_dropout=0.0, dropout=0.0),
    "NMTune": NMTune(feature_scale="rms", mlp_norm="none", lambda_cov=0.0, lambda_svd=0.0),
}
INTERRUPTED = {"ELR", "CleaR with reused logits", "LoPE", "NMTune"}
"""Run a second time, with a signal to one process in the second epoch: written columns, or
sums over the rows of the epoch, differ between the processes at that moment."""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@dataclasses.dataclass
class Runs:
    """Folders of the same fits, by one process and by two."""

    one: Path
    two: Path
    resumed: Path


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    table(25, wrong=0.2).to_csv(folder / "train.csv", index=False)  # the last batch is one row
    table(13, seed=1).to_csv(folder / "test.csv", index=False)

    def fit(name: str, out: Path) -> dict[str, Any]:
        return {
            "data": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "clean_label": "clean_label",
            "model": str(tiny_model),
            "method": CASES[name].to_dict(),
            "train": dataclasses.asdict(train_settings(max_grad_norm=0)),  # clipping hides scale
            "out": str(out / name),
        }

    runs = Runs(folder / "one", folder / "two", folder / "resumed")
    fits = [fit(name, runs.two) for name in CASES]
    at = {"rank": 1, "step": 6}
    fits += [fit(name, runs.resumed) | {"at": at} for name in sorted(INTERRUPTED)]
    (folder / "fits.json").write_text(json.dumps(fits), encoding="utf-8")
    done = python(  # `accelerate launch --cpu --num_processes 2` starts one process without MPI
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        str(Path(__file__).with_name("two_processes.py")),
        str(folder / "fits.json"),
        timeout=150,
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr[-6000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PREDICT_ROWS", PREDICT_ROWS)
        for name in CASES:
            alone = fit(name, runs.one)
            method = METHODS[alone["method"]["name"]].from_dict(alone.pop("method"))
            train = noiseproof.TrainSettings(**alone.pop("train"))
            noiseproof.fit(method=method, train=train, **alone)
    return runs


def samples(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "samples.parquet")


def saved_weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in (run / "model").glob("*.safetensors"):
        found |= load_file(path)
    assert found
    return found


def record(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "record.json").read_text(encoding="utf-8"))
    return read


def assert_close(found: Any, wanted: Any) -> None:
    """Equal JSON values, but for the last digits of numbers."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_close(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            assert_close(one, two)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", CASES)
def test_two_processes_select_the_rows_that_one_selects(name: str, runs: Runs) -> None:
    """Processes that score only what they saw fit two mixtures, and drift apart unnoticed."""
    one, two = samples(runs.one / name), samples(runs.two / name)
    assert list(one.columns) == list(two.columns) and list(one["row_id"]) == list(two["row_id"])
    selected = one["keep"] if "keep" in one else one["clean_prob"] > 0.5
    again = two["keep"] if "keep" in two else two["clean_prob"] > 0.5
    assert selected.tolist() == again.tolist()
    assert one["suspicious"].tolist() == two["suspicious"].tolist()
    if name != "ELR on cached features":
        assert 0 < selected.sum() < len(selected)  # something was selected, and something was not
    for column in one.columns:
        if column not in ("row_id", "label", "clean_label", "suggested_label"):
            first, second = (np.stack(frame[column].to_numpy()) for frame in (one, two))
            np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4, err_msg=column)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_come_to_the_weights_of_one(name: str, runs: Runs) -> None:
    """A gradient that is averaged over processes, not over rows, weighs the rows of a short batch
    double; a process without a row in the last batch must not add its own.
    """
    one, two = saved_weights(runs.one / name), saved_weights(runs.two / name)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_measure_what_one_measures(name: str, runs: Runs) -> None:
    """Rows that both processes evaluate, or none, move every number a little."""
    one, two = record(runs.one / name), record(runs.two / name)
    assert one["metrics"].keys() == two["metrics"].keys()
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key
    assert (one["model"]["processes"], two["model"]["processes"]) == (1, 2)
    for key in ("modes", "findings"):
        assert_close(two[key], one[key])
    history, again = (pd.read_csv(x / name / "history.csv") for x in (runs.one, runs.two))
    pd.testing.assert_frame_equal(history, again, check_exact=False, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(INTERRUPTED))
def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_the_same(
    name: str, runs: Runs
) -> None:
    """A process that goes on alone waits for the other for ever; a checkpoint that holds the
    columns of one process only loses what the other wrote.
    """
    whole, resumed = runs.two / name, runs.resumed / name
    one, two = saved_weights(whole), saved_weights(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (whole / "history.csv").read_bytes() == (resumed / "history.csv").read_bytes()
    pd.testing.assert_frame_equal(samples(whole), samples(resumed), check_exact=True)


def test_the_fixture_would_notice_processes_that_disagree(runs: Runs) -> None:
    """The comparisons above are only worth something if their runs differ from each other."""
    names = [name for name in CASES if "cached" not in name]
    losses: Callable[[str], tuple[float, ...]] = lambda name: tuple(  # noqa: E731
        pd.read_csv(runs.two / name / "history.csv")["loss"].round(4)
    )
    assert len({losses(name) for name in names}) == len(names)
