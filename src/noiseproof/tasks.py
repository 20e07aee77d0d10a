"""What a row is: how it is encoded into tensors, and how predictions on it are measured."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from noiseproof.errors import InputError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOKENISE_ROWS = 1000  # rows a call of the tokenizer and of the Arrow writer


class Encoded(ABC):
    """Encoded rows, ready to be cut into batches."""

    lengths: np.ndarray
    """(N,) cost of a row, by which batches are bucketed."""

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Model inputs of the rows (B,), padded to the longest of them; CPU tensors."""


class EncodedFeatures(Encoded):
    """Rows that are one vector each: cached features of a frozen encoder."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.lengths = np.ones(len(features), dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The features of the rows (B, ...)."""
        return {"features": self.features[torch.from_numpy(np.asarray(rows))]}


class EncodedTexts(Encoded):
    """Tokenised texts in a memory-mapped Arrow file; batches are padded on the fly.

    The attention mask is not stored: it follows from the lengths.
    """

    def __init__(self, tokens: datasets.Dataset, padding: dict[str, int], left: bool) -> None:
        self.padding = padding
        self.left = left
        self._tokens = tokens  # keeps the memory map open
        self._values: dict[str, list[np.ndarray]] = {}
        self._offsets: list[np.ndarray] = []
        for name in padding:
            chunks = [combined for combined in tokens.data.column(name).chunks if len(combined)]
            self._values[name] = [chunk.values.to_numpy() for chunk in chunks]  # no copy
            self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Token ids, attention mask and what else the tokenizer gives, each (B, T)."""
        rows = np.asarray(rows)
        width = int(self.lengths[rows].max())
        tables = {
            name: np.full((len(rows), width), pad, dtype=np.int64)
            for name, pad in self.padding.items()
        }
        mask = np.zeros((len(rows), width), dtype=np.int64)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for place, (chunk, row) in enumerate(zip(chunks, rows - self._starts[chunks], strict=True)):
            start, stop = self._offsets[chunk][row : row + 2]
            length = stop - start
            span = slice(width - length, width) if self.left else slice(0, length)
            mask[place, span] = 1
            for name, table in tables.items():
                table[place, span] = self._values[name][chunk][start:stop]
        tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
        return tensors | {"attention_mask": torch.from_numpy(mask)}


class Task(ABC):
    """What a row is. One object per run; it knows the classes and the encoding."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Encoded:
        """Encode rows, in order."""


@dataclass(frozen=True)
class TextClassification(Task):
    """Texts, or pairs of texts, with one label each.

    Attributes:
        tokenizer: A transformers tokenizer.
        max_length: Longer inputs are cut to this many tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 256

    name: ClassVar[str] = "text"

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> EncodedTexts:
        """Tokenise once into a memory-mapped Arrow file that later runs share.

        The file is keyed by texts, tokenizer and length; it lies under ``cache_folder()``.
        """
        limit = min(self.max_length, int(self.tokenizer.model_max_length))
        key = _key(texts, pairs, self.tokenizer, limit)
        tokens = _tokenised(cache_folder() / "tokens" / key, texts, pairs, self.tokenizer, limit)
        padding = {"input_ids": int(self.tokenizer.pad_token_id or 0)}
        if "token_type_ids" in tokens.column_names:
            padding["token_type_ids"] = int(self.tokenizer.pad_token_type_id)
        return EncodedTexts(tokens, padding, left=self.tokenizer.padding_side == "left")


def cache_folder() -> Path:
    """Where encodings are kept: ``$NOISEPROOF_CACHE``, else inside the cache of ``datasets``."""
    chosen = os.environ.get("NOISEPROOF_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "noiseproof"


def _key(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, limit: int) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = json.dumps(tokenizer.get_vocab())
    else:
        backend.no_truncation()  # what the last call left is no part of the tokenizer
        backend.no_padding()
        described = backend.to_str()
    digest.update(f"1 {type(tokenizer).__name__} {limit} {pairs is None}\n".encode())
    digest.update(f"{tokenizer.padding_side} {tokenizer.truncation_side}\n".encode())
    digest.update(described.encode("utf-8", "surrogatepass"))
    for column in (texts, pairs or ()):
        for text in column:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.hexdigest()[:32]


def _tokenised(
    folder: Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: Any,
    limit: int,
) -> datasets.Dataset:
    """The token table of these texts, written on first use and then memory-mapped."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    path = folder.with_suffix(".arrow")
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ArrowWriter(path=str(partial)) as writer:
                for start in range(0, len(texts), TOKENISE_ROWS):
                    stop = start + TOKENISE_ROWS
                    second = None if pairs is None else list(pairs[start:stop])
                    encoded = tokenizer(
                        list(texts[start:stop]), second, truncation=True, max_length=limit
                    )
                    writer.write_batch(
                        {name: ids for name, ids in encoded.items() if name != "attention_mask"}
                    )
                writer.finalize()
            os.replace(partial, path)
        except OSError as error:
            raise InputError(
                f"cannot write the token cache {path.parent}: {error.strerror or error}; "
                "set NOISEPROOF_CACHE to a folder that can be written"
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink()
    return datasets.Dataset.from_file(str(path))
