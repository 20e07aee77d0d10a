"""The benchmark on images goes on where it stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.loop import Progress
from noiseproof.record import RunRecord
from rows import image_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with pictures of ours and a network without pre-training."""
    spec = importlib.util.spec_from_file_location("images", ROOT / "benchmarks" / "images.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 10)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(pixels.mean((2, 3)))

    def images(_: Path, __: str, rows: np.ndarray) -> list[np.ndarray]:
        return list(image_rows(len(rows))["image"])

    monkeypatch.setattr(module, "images", images)
    monkeypatch.setattr(module, "pretrained", lambda *_: Net())
    return module


def test_a_run_that_did_not_end_is_gone_on_with(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that failed would pass for a result, or stop the command that is to go on with it."""
    labels = np.arange(50_000) % 10
    np.savez(tmp_path / "cifar10n_labels.npz", worse_label=labels, clean_label=labels)
    np.savez(tmp_path / "cifar10_jpeg.npz", y_test=labels[:10_000])
    words = [str(tmp_path), "weights", "--rows", "40", "--test-rows", "10", "--image-size", "8",
             "--epochs", "3", "--out", str(tmp_path / "runs")]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["images.py", *words])
    original, calls = benchmark.run_job, []

    def breaks(job: Job, **settings: Any) -> Any:
        def report(progress: Progress) -> None:
            if progress.epoch == 1:
                raise InputError("the disk is full")

        calls.append(1)
        return original(job, report=report if len(calls) == 1 else None, **settings)

    monkeypatch.setattr(benchmark, "run_job", breaks)
    with pytest.raises(InputError, match="the disk is full"):
        benchmark.main()
    (run,) = (tmp_path / "runs").iterdir()
    assert RunRecord.read(run).status == "failed" and not benchmark.is_done(run)
    benchmark.main()
    assert RunRecord.read(run).status == "done" and benchmark.is_done(run)
    capsys.readouterr()
    benchmark.main()
    assert len(calls) == 2 and "there is a finished run" in capsys.readouterr().out
