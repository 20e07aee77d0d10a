"""Checkpoints: complete or absent, exact, and never pickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import noiseproof
from noiseproof import checkpoint
from noiseproof.checkpoint import (
    Interrupted,
    StopSignals,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    with_prefix,
)
from noiseproof.methods import SmallLoss
from noiseproof.mixture import LossMixture
from tiny import Tiny, python, train_settings

TENSORS: dict[str, Tensor] = {
    "model.weight": torch.tensor([[1.0, -0.0], [math.pi, 1e-38]]),
    "model.half": torch.tensor([1.5], dtype=torch.bfloat16),
    "column.keep": torch.tensor([True, False]),
    "column.long": torch.tensor([2**62, -1]),
    "optimizer.0.step": torch.tensor(7.0),  # no dimension
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,  # not contiguous
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    """A rounded loss or a lost dimension is another run from there on."""
    state = {"loss_sum": 0.1 + 0.2, "best_score": -math.inf, "history": [{"stage": "ä", "rows": 3}]}
    save_checkpoint(tmp_path / "new", TENSORS, state)
    loaded = load_checkpoint(tmp_path / "new")
    assert loaded is not None
    tensors, read = loaded
    assert read == state
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert math.copysign(1, float(tensors["model.weight"][0, 1])) == -1


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path) -> None:
    """safetensors refuses them, and tied weights are common."""
    one = torch.arange(4.0)
    save_checkpoint(tmp_path, {"a": one, "b": one, "c": one[1:]}, {})
    tensors, _ = load_checkpoint(tmp_path) or ({}, {})
    assert torch.equal(tensors["b"], one) and torch.equal(tensors["c"], one[1:])


def test_there_is_no_checkpoint_where_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None
    (tmp_path / "000001.part").write_bytes(b"half")
    (tmp_path / "notes.safetensors").write_bytes(b"not ours")
    assert load_checkpoint(tmp_path) is None


def test_the_newest_checkpoint_replaces_the_older_ones(tmp_path: Path) -> None:
    """Disks fill up with checkpoints that nobody will read."""
    for number in range(1, 4):
        path = save_checkpoint(tmp_path, {"x": torch.tensor(float(number))}, {"n": number})
        assert names(tmp_path) == [path.name]
    assert path.name == "000003.safetensors"
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1] == {"n": 3} and float(loaded[0]["x"]) == 3.0


def test_files_that_a_killed_process_left_are_ignored(tmp_path: Path) -> None:
    """A half-written file under a good name would be loaded, or stop the run from resuming."""
    save_checkpoint(tmp_path, {"x": torch.tensor(2.0)}, {"n": 2})
    (tmp_path / "000000.safetensors").write_bytes(b"an older one, broken")
    (tmp_path / "000002.part").write_bytes(b"a newer one, half-written")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1] == {"n": 2}
    save_checkpoint(tmp_path, {"x": torch.tensor(3.0)}, {"n": 3})
    assert names(tmp_path) == ["000002.safetensors"]


@pytest.mark.parametrize("place", ["save_file", "replace", "fsync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not cost the checkpoint that is already there."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, {"x": torch.tensor(1.0)}, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if place == "save_file" else os, place, full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, {"x": torch.tensor(2.0)}, {"n": 2})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1] == {"n": 1} and float(loaded[0]["x"]) == 1.0


def test_the_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this order a power cut leaves an empty file under a good name."""
    calls: list[str] = []
    original = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    monkeypatch.setattr(
        os, "replace", lambda *paths: (calls.append("replace"), original(*paths))[1]
    )
    save_checkpoint(tmp_path, {"x": torch.tensor(1.0)}, {})
    assert calls == ["fsync", "replace"]


def test_a_run_pickles_nothing(
    tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loads a pickle from a stranger runs the stranger's code."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was pickled")

    method = SmallLoss(warmup_epochs=1, mixture=LossMixture(min_samples=4, min_gap=0.0))
    seen: set[str] = set()

    def look(progress: Any) -> None:
        for path in (tmp_path / "run" / "checkpoints").glob("*"):
            raw = path.read_bytes()
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            seen.update(header)
            assert set(header["__metadata__"]) == {"state"}

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads"),
                         (torch, "save"), (torch, "load")):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    noiseproof.fit(
        tiny_table, method=method, model=str(tiny_model), train=train_settings(epochs=2),
        out=tmp_path / "run", report=look,
    )  # fmt: skip
    assert {"random", "model.classifier.weight", "optimizer.0.exp_avg"} <= seen
    noiseproof.load(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or path.read_bytes()[:2] not in (b"\x80\x04", b"PK"), path


# --- the optimizer -------------------------------------------------------------------------------


def train_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(step + 1))).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimizer_goes_on_where_the_other_stopped(fused: bool, tmp_path: Path) -> None:
    """Adam without its moments takes steps of the full rate in any direction."""

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=0.1, fused=fused)

    model, optimizer = fresh()
    train_steps(model, optimizer, 3)
    tensors = optimizer_tensors(optimizer)
    assert "optimizer.1.exp_avg_sq" in tensors and "optimizer.0.step" in tensors
    save_checkpoint(tmp_path, tensors, {})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    other, restored = fresh()
    other.load_state_dict(model.state_dict())
    restore_optimizer(restored, loaded[0] | {"model.x": torch.zeros(1)})
    train_steps(model, optimizer, 2)
    train_steps(other, restored, 2)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_a_prefix_is_a_whole_word() -> None:
    tensors = {"best.x.y": torch.ones(1), "bestx.y": torch.ones(1), "model.best.x": torch.ones(1)}
    assert list(with_prefix("best", tensors)) == ["x.y"]


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_the_handlers_come_back(signum: signal.Signals) -> None:
    """A library that keeps Ctrl-C for itself after training is a nuisance in every notebook."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signum)
        assert stop.received == signum
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_second_ctrl_c_stops_at_once(request: pytest.FixtureRequest) -> None:
    """A run that hangs between two steps could not be stopped otherwise."""
    started_with = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # or ignored, under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, started_with))
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


def test_the_second_sigterm_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from noiseproof.checkpoint import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('second', flush=True)\n"
    )
    done = python("-c", code)
    assert done.returncode == -signal.SIGTERM and done.stdout == "first\n", done.stderr


def test_outside_the_main_thread_signals_are_left_alone(tiny_run: Tiny) -> None:
    """Python refuses handlers there; a server that trains in a thread must work all the same."""
    before = signal.getsignal(signal.SIGINT)
    found: list[Any] = []

    def train() -> None:
        with StopSignals() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGINT)))
        found.append(tiny_run.fit(SmallLoss(warmup_epochs=0), epochs=1).history)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0] == (0, before) and len(found[1]) == 1
    assert signal.getsignal(signal.SIGINT) == before


def test_an_interruption_names_its_signal() -> None:
    error = Interrupted(signal.SIGTERM)
    assert str(error) == "interrupted by SIGTERM" and error.signum == signal.SIGTERM
    assert not isinstance(error, InterruptedError | KeyboardInterrupt | ValueError)
