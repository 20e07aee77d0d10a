"""Checkpoints of a run: one safetensors file each, written atomically, never pickled.

Tensors (weights, optimizer moments, columns, random state) are the file's tensors; everything else
(position, history, timings) is JSON in its header. A file appears under its name only when it is
complete, so a process killed at any moment leaves the last complete checkpoint behind.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

SUFFIX = ".safetensors"


class Interrupted(Exception):
    """Training stopped on a signal, after a checkpoint was written.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """While entered, SIGINT and SIGTERM set `received` instead of ending the process.

    A second signal of the same kind has its usual effect. Outside the main thread, where Python
    does not deliver signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._old[signum])

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


class Stopwatch:
    """Seconds of a run over all its legs, since it was made and before that.

    What a killed process did after its last checkpoint is done again and counts once.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()
        self._before = {"total_s": 0.0, "cpu_s": 0.0}

    def seconds(self) -> dict[str, float]:
        """``total_s`` by the clock, ``cpu_s`` of the processor, all threads together."""
        wall, processor = self._started
        return {
            "total_s": self._before["total_s"] + time.perf_counter() - wall,
            "cpu_s": self._before["cpu_s"] + time.process_time() - processor,
        }

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Count the earlier legs of a resumed run, from its checkpoint."""
        self._before = {name: float(seconds.get(name, 0.0)) for name in self._before}


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the next checkpoint and then remove the older ones.

    Args:
        folder: Made when missing.
        tensors: Any names and shapes.
        state: JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = _complete(folder)
    number = int(older[-1].stem) + 1 if older else 1
    path = folder / f"{number:06d}{SUFFIX}"
    partial = folder / f"{number:06d}.part"
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(flat, partial, metadata={"state": json.dumps(state)})
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
    for old in older:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest complete checkpoint; None when there is none."""
    found = _complete(folder) if folder.is_dir() else []
    if not found:
        return None
    with safe_open(found[-1], framework="pt", device="cpu") as opened:
        state = json.loads(opened.metadata()["state"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, state


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors ``optimizer.<parameter>.<name>``."""
    return {
        f"optimizer.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors` on a fresh optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix.``, under the rest of their names."""
    start = f"{prefix}."
    return {
        name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)
    }
