"""Encoded rows, ready to be cut into batches, and the folder in which encodings are kept."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.losses import cross_entropy


class Encoded(ABC):
    """Encoded rows, ready to be cut into batches."""

    lengths: np.ndarray
    """(N,) cost of a row, by which batches are bucketed."""

    key: str = ""
    """Digest of what the rows were encoded from; empty where there is none."""

    one_output: bool = True
    """Whether the model gives one vector per row, so that a head can run on cached features."""

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Model inputs of the rows (B,), padded to the longest of them; CPU tensors."""

    def training_inputs(self, rows: np.ndarray, seed: int) -> dict[str, Tensor]:
        """Model inputs of the rows (B,) of a training step: `inputs`, augmented where a task does.

        Args:
            rows: Row numbers (B,).
            seed: Of this epoch; what happens to a row depends on it and on the row's number alone.
        """
        return self.inputs(rows)

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """What a scoring pass keeps of a batch (B, K): the logits, so K = C."""
        logits: Tensor = model(**inputs).logits
        return logits

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of every row (N,) from its outputs (N, K) and its given label (N,)."""
        return cross_entropy(outputs, labels)


class EncodedFeatures(Encoded):
    """Rows that are one vector each: cached features of a frozen encoder."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.lengths = np.ones(len(features), dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The features of the rows (B, ...)."""
        return {"features": self.features[torch.from_numpy(np.asarray(rows))]}


def cache_folder() -> Path:
    """Where encodings are kept: ``$NOISEPROOF_CACHE``, else inside the cache of ``datasets``."""
    chosen = os.environ.get("NOISEPROOF_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "noiseproof"
