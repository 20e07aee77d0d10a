"""Records of runs that never ran, for the tests of reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noiseproof.record import RunRecord, write_history

ACCURACIES = {  # noise -> method -> test accuracy by seed
    "none": {"CrossEntropy": (0.95, 0.96, 0.97), "GCE": (0.94, 0.95, 0.97)},
    "symmetric:0.4": {"CrossEntropy": (0.70, 0.72, 0.74), "GCE": (0.85, 0.86, 0.90)},
}


def write_run(
    folder: Path,
    accuracy: float | None = 0.9,
    *,
    method: str | Mapping[str, Any] = "CrossEntropy",
    noise: str = "none",
    found: Mapping[str, Any] | None = None,
    seed: int = 0,
    epochs: int = 3,
    history: Sequence[Mapping[str, Any]] | None = None,
    spec: Mapping[str, Any] | None = None,
    **fields: Any,
) -> RunRecord:
    """Write a run's folder; `fields` replace those of the record, `found` its field ``noise``."""
    rate = float(noise.partition(":")[2] or 0)
    settings: dict[str, Any] = {
        "data": "data/news.csv",
        "noise": noise,
        "model": "minilm",
        "method": {"name": method} if isinstance(method, str) else dict(method),
        "train": {"epochs": epochs, "batch_size": 8, "seed": seed, "select": "last"},
    }
    values: dict[str, Any] = {
        "status": "done",
        "seeds": {"noise": seed, "init": seed, "order": seed},
        "data": {"rows": 100, "test_rows": 50, "classes": 2, "label_names": ["no", "yes"],
                 "validation": "none"},
        "noise": {"noise_rate": rate, "seed": seed,
                  "transition": [[1 - rate, rate], [rate, 1 - rate]]},
        "model": {"name": "minilm", "parameters": 1000, "trained_parameters": 100},
        "timings": {"train_s": 60.0, "total_s": 90.0, "cpu_s": 120.0},
        "peak_memory_mb": 512.0,
        "metrics": {"test_accuracy": accuracy, "test_accuracy_best": 0.99, "test_macro_f1": 0.5,
                    "suspicious": 7},
        "confusion": [[20, 5], [0, 25]],
        "curves": {"roc": [[0, 0], [0, 0.5], [1, 1]], "pr": [[0, 1], [1, 0.5]]},
        "versions": {"python": "3.11.7"},
    }  # fmt: skip
    if found is not None:
        values["noise"] = dict(found)
    folder.mkdir(parents=True)
    record = RunRecord(settings | dict(spec or {}), **(values | fields))
    record.write(folder)
    if history is None:
        history = [
            {"stage": "train", "epoch": epoch, "loss": 1 / (epoch + 1), "test_accuracy": 0.5}
            for epoch in range(epochs)
        ]
    if history:
        write_history(folder, history)
    return record


def write_grid(folder: Path) -> Path:
    """Write the runs of `ACCURACIES`."""
    for noise, methods in ACCURACIES.items():
        for method, accuracies in methods.items():
            for seed, accuracy in enumerate(accuracies):
                place = folder / noise.replace(":", "-") / method / f"seed-{seed}"
                write_run(place, accuracy, method=method, noise=noise, seed=seed)
    return folder
