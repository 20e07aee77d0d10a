"""Encoded rows, ready to be cut into batches, and the folder in which encodings are kept."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.losses import cross_entropy

RowChange = Callable[[tuple[str, ...], int], tuple[str, ...]]
"""The texts of a row and its number -> as many texts."""


def no_second_view(rows: str) -> str:
    """A line on rows of which a method wants two views."""
    return (
        f"views=2 needs images, or features of the shape (rows, 2, features), got {rows}; "
        "leave views out"
    )


class Encoded(ABC):
    """Encoded rows, ready to be cut into batches."""

    lengths: np.ndarray
    """(N,) cost of a row, by which batches are bucketed."""

    key: str = ""
    """Digest of what the rows were encoded from; empty where there is none."""

    counts: Mapping[str, int] = MappingProxyType({})
    """What the record has to say of the rows: name -> how many."""

    one_output: bool = True
    """Whether the model gives one vector per row, so that a head can run on cached features."""

    redrawn: bool = False
    """Whether `training_inputs` change from epoch to epoch, as those of augmented images do."""

    source: tuple[Any, Callable[[Any], Encoded]] | None = None
    """The inputs that the rows were encoded from, and what encodes such."""

    def __len__(self) -> int:
        return len(self.lengths)

    def changed(
        self, change: RowChange, rows: np.ndarray | None = None
    ) -> tuple[Encoded, np.ndarray]:
        """The rows with other texts, encoded anew, and which of them differ (M,) bool.

        Args:
            change: What is done to the texts of a row.
            rows: Numbers of the rows (M,); None takes all.

        Raises:
            InputError: These rows were not encoded from texts.
        """
        if self.source is None:
            raise InputError("only rows of text can be changed before they are encoded")
        inputs, encode = self.source
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        inputs = inputs.take(chosen)
        given = inputs.as_texts()
        texts = [change(some, int(row)) for some, row in zip(given, chosen, strict=True)]
        differs = np.array([one != other for one, other in zip(given, texts, strict=True)])
        return encode(inputs.with_texts(texts)), differs

    @abstractmethod
    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Model inputs of the rows (B,), padded to the longest of them; CPU tensors."""

    def views(self, asked: int | None) -> int:
        """How many views of a row a training step has: 1, or 2.

        Args:
            asked: How many a method wants; None takes those that the rows hold.

        Raises:
            InputError: The rows have fewer.
        """
        if asked not in (None, 1):
            raise InputError(no_second_view("rows of one view"))
        return 1

    def training_inputs(self, rows: np.ndarray, seed: int, view: int = 0) -> dict[str, Tensor]:
        """Model inputs of the rows (B,) of a training step: `inputs`, augmented where a task does.

        Args:
            rows: Row numbers (B,).
            seed: Of this epoch; what happens to a row depends on it, on the row's number and on the
                view alone.
            view: Number of the view, less than what `views` gives.
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


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock of a file in the cache while it is made: who waited finds it there.

    Where there can be no lock, as in a folder that cannot be written, nobody waits.
    """
    from filelock import FileLock

    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            lock = cache_folder() / "locks" / f"{path.name}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
        yield


def cache_folder() -> Path:
    """Where encodings are kept: ``$NOISEPROOF_CACHE``, else inside the cache of ``datasets``."""
    chosen = os.environ.get("NOISEPROOF_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "noiseproof"
