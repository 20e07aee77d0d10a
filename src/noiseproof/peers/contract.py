"""What a peer is given, what it gives back, and what is measured meanwhile."""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from noiseproof.checkpoint import Interrupted, StopSignals
from noiseproof.encoding import Encoded
from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError
from noiseproof.method import Columns
from noiseproof.preparation import Prepared, frozen_features
from noiseproof.results import (
    set_metrics,
    truth_metrics,
)

Predict = Callable[[Encoded], Tensor]
"""Logits (N, C) of any encoded rows, fp32 on the CPU."""


@dataclass(frozen=True)
class Work:
    """What a peer is given. It holds no true labels.

    Attributes:
        model: The pre-trained classifier with the fresh head that our methods start from.
        tokenizer: Its tokenizer, which pads batches.
        encoded: The training rows.
        labels: Their given labels (N,).
        num_classes: C.
        settings: Epochs, batch size, device; what else a peer reads stands in its docstring.
        seeds: ``init`` for new weights, ``order`` for order, dropout and folds.
        scratch: Folder for files that a library insists on; removed afterwards.
        measure: To be called after every epoch; answers whether to keep the weights.
        stop: Set on SIGINT and SIGTERM.
    """

    model: nn.Module
    tokenizer: Any
    encoded: Encoded
    labels: np.ndarray
    num_classes: int
    settings: TrainSettings
    seeds: dict[str, int]
    scratch: Path
    measure: Measure
    stop: StopSignals

    def features(self, encoded: Encoded) -> np.ndarray:
        """Mean-pooled features of the frozen encoder (N, D)."""
        return frozen_features(self.model, encoded, self.settings)

    def check_stop(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.stop.received:
            raise Interrupted(self.stop.received)


@dataclass
class Fitted:
    """What a peer leaves behind.

    Attributes:
        predict: Scores any encoded rows.
        kind: Class name of what was trained.
        trained: Number of trained parameters.
        precision: fp32, bf16 or fp16.
        seconds: ``train_s`` and ``score_s``, without what `Work.measure` took.
        columns: What the peer found out about each training row (N, ...).
        suspicious: Its own verdict (N,) bool; None leaves it to ``clean_prob`` below 0.5.
        model: The network to save, if there is one.
    """

    predict: Predict
    kind: str
    trained: int
    precision: str
    seconds: dict[str, float]
    columns: Columns = field(default_factory=dict)
    suspicious: np.ndarray | None = None
    model: nn.Module | None = None


class Measure:
    """Measures after every epoch, with what peers must not see.

    Attributes:
        history: One row per epoch.
        best_epoch: Row of the highest validation accuracy, the first of equals, where the job
            selects by it.
        seconds: Spent here.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._sets = {name: prepared.encode(rows) for name, rows in prepared.sets.items()}
        self._logits: dict[str, Tensor] = {}  # of the last epoch measured
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.seconds = 0.0

    def __call__(
        self, predict: Predict, columns: Columns, *, last: bool, **numbers: float | None
    ) -> bool:
        """Add a row to the history.

        Args:
            predict: The network as it is now.
            columns: What the peer knows of the rows.
            last: No epoch follows.
            **numbers: ``steps``, ``rows``, ``loss``, ``learning_rate``.

        Returns:
            Whether these weights are to be deployed unless better ones come.
        """
        started = time.perf_counter()
        row: dict[str, Any] = {"stage": "train", "epoch": len(self.history), **numbers}
        if last or self._prepared.job.train.evaluate == "epoch":
            self._logits = {name: predict(rows) for name, rows in self._sets.items()}
            row |= set_metrics(self._prepared, self._logits)
            if last or self._prepared.wrong is not None:
                train = self._logits["train"] = predict(self._prepared.encoded)
                row |= truth_metrics(self._prepared, train, columns)
        better = self._prepared.job.train.select == "best" and self._is_best(row)
        if better:
            self.best_epoch = len(self.history)
        self.history.append(row)
        self.seconds += time.perf_counter() - started
        return better

    def _is_best(self, row: dict[str, Any]) -> bool:
        score = row.get("validation_accuracy")
        if score is None or self.best_epoch is None:
            return score is not None
        return bool(score > self.history[self.best_epoch]["validation_accuracy"])

    def deployed(self, predict: Predict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """History row of the deployed weights, and their logits: name of the set -> (N, C)."""
        if self.best_epoch in (None, len(self.history) - 1):
            return self.history[-1], self._logits
        started = time.perf_counter()
        sets = self._sets | {"train": self._prepared.encoded}
        logits = {name: predict(rows) for name, rows in sets.items()}
        self.seconds += time.perf_counter() - started
        assert self.best_epoch is not None
        return self.history[self.best_epoch], logits


@dataclass(frozen=True)
class Peer(ABC):
    """Another library at the same job: a frozen bundle of settings and one hook.

    Attributes:
        name: The class name.
        needs: Packages of the extra ``peers`` that it imports; their versions are recorded.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """The class name is the name everywhere."""
        cls.name = cls.__name__

    @abstractmethod
    def fit(self, work: Work) -> Fitted:
        """Train with the library, calling ``work.measure`` after every epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record: ``{"name": ..., field: value, ...}``."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"name": self.name, **values}

    def check_installed(self) -> None:
        """Refuse to run without the library.

        Raises:
            InputError: It is not installed; says how to install it.
        """
        for package in self.needs:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InputError(
                    f"{self.name} needs {package} ({error}): pip install 'noiseproof[peers]'"
                ) from error
