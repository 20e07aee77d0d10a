"""Texts, or pairs of texts, with one label each.

columns of text -> `Texts` -> tokens in a file that is mapped into memory
-> token ids and attention mask (B, T), padded batch by batch
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.data import Examples, Inputs, TextColumns, Texts
from noiseproof.encoding import Encoded, cache_folder, one_at_a_time
from noiseproof.errors import InputError
from noiseproof.models import load_text_classifier
from noiseproof.saving import load_saved_model, save_model
from noiseproof.tables import Table, let_go, map_table
from noiseproof.tasks.base import RowSettings, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISE_ROWS = 1000  # rows a call of the tokenizer and of the Arrow writer


class EncodedTexts(Encoded):
    """Tokenised texts in a memory-mapped Arrow file; batches are padded on the fly.

    The attention mask is not stored: it follows from the lengths. After as many rows as there are,
    a pass, the pages that were read are let go.
    """

    def __init__(self, path: Path, padding: dict[str, int], left: bool) -> None:
        with path.open("rb") as file:
            tokens, self._mapped = map_table(file)
        padding = {name: pad for name, pad in padding.items() if name in tokens.column_names}
        self.padding = padding
        self.left = left
        self._read = 0  # rows since pages were let go
        self._values: dict[str, list[np.ndarray]] = {}
        self._offsets: list[np.ndarray] = []
        for name in padding:
            chunks = [chunk for chunk in tokens.column(name).chunks if len(chunk)]
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
        self._read += len(rows)
        if self._read >= len(self):
            self._read = 0
            let_go(self._mapped)
        tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
        return tensors | {"attention_mask": torch.from_numpy(mask)}


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
    summary: ClassVar[str] = "texts or pairs of texts"
    column: ClassVar[str] = "text"
    default_model: ClassVar[str | None] = "minilm"

    @classmethod
    def reader(cls, settings: RowSettings) -> TextColumns:
        """Reads one or two text columns."""
        return TextColumns(settings.text)

    @classmethod
    def load(
        cls, model: Any, data: Examples, settings: RowSettings, *, reserved_tokens: int = 0
    ) -> tuple[TextClassification, nn.Module]:
        """Load an encoder with its tokenizer."""
        if not isinstance(model, str | Path):
            raise InputError(
                f"a model for texts must be a name or a folder, got a {type(model).__name__}; its "
                "tokenizer lies there too"
            )
        classifier, tokenizer = load_text_classifier(
            str(model), data.label_names, reserved_tokens=reserved_tokens
        )
        return cls(tokenizer, settings.max_length), classifier

    @classmethod
    def load_saved(
        cls, folder: Path, model: Any, settings: RowSettings
    ) -> tuple[TextClassification, nn.Module]:
        """Load what `save` wrote."""
        classifier, tokenizer = load_saved_model(folder, model)
        return cls(tokenizer, settings.max_length), classifier

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write model and tokenizer as transformers and peft do."""
        save_model(model, self.tokenizer, folder)

    def inputs_of(self, rows: Any, second: Any = None) -> Texts:
        """Texts, and second texts where the rows are pairs."""
        return Texts(rows, second)

    def accept(self, inputs: Inputs, table: Table | None, trained: str) -> None:
        """Refuse pairs where single texts were trained on, and the other way round."""
        assert isinstance(inputs, Texts)
        single = "," not in trained or (table is not None and trained in table.frame.columns)
        if (inputs.pairs is None) != single:
            given = "one" if inputs.pairs is None else "two"
            raise InputError(
                f"the model was trained on the text columns {trained!r}; give as many of them, "
                f"got {given}"
            )

    def encode(
        self, inputs: Inputs | Sequence[str], pairs: Sequence[str] | None = None
    ) -> EncodedTexts:
        """Tokenise once into a memory-mapped Arrow file that later runs share.

        The file is keyed by texts, tokenizer and length; it lies under ``cache_folder()``.
        """
        if isinstance(inputs, Texts):
            texts, pairs = inputs.texts, inputs.pairs
        else:
            texts = cast("Sequence[str]", inputs)
        limit = min(self.max_length, int(self.tokenizer.model_max_length))
        special = int(self.tokenizer.num_special_tokens_to_add(pair=pairs is not None))
        if limit <= special:
            raise InputError(
                f"train.max_length must be more than {special}, the tokens that the tokenizer puts "
                f"around a text, got {self.max_length}"
            )
        key = _key(texts, pairs, self.tokenizer, limit)
        path = cache_folder() / "tokens" / f"{key}.arrow"
        if not path.exists():
            with one_at_a_time(path):
                if not path.exists():
                    _tokenise(path, texts, pairs, self.tokenizer, limit)
        padding = {
            "input_ids": int(self.tokenizer.pad_token_id or 0),
            "token_type_ids": int(self.tokenizer.pad_token_type_id),
        }
        encoded = EncodedTexts(path, padding, left=self.tokenizer.padding_side == "left")
        encoded.key = key
        encoded.source = (Texts(texts, pairs), self.encode)
        return encoded


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


def _tokenise(
    path: Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: Any,
    limit: int,
) -> None:
    """Write the token table of these texts as an Arrow stream, whole or not at all."""
    import pyarrow

    largest = max(tokenizer.get_vocab().values(), default=0)
    kinds = {"input_ids": pyarrow.uint16() if largest < 1 << 16 else pyarrow.int32()}
    if "token_type_ids" in tokenizer(texts[0], None if pairs is None else pairs[0]):
        kinds["token_type_ids"] = pyarrow.uint8()
    schema = pyarrow.schema({name: pyarrow.list_(kind) for name, kind in kinds.items()})
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for start in range(0, len(texts), TOKENISE_ROWS):
                stop = start + TOKENISE_ROWS
                second = None if pairs is None else list(pairs[start:stop])
                encoded = tokenizer(
                    list(texts[start:stop]), second, truncation=True, max_length=limit
                )
                columns = [_lists(encoded[name], kind) for name, kind in kinds.items()]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {path.parent}: {error.strerror or error}; "
            "set NOISEPROOF_CACHE to a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _lists(rows: list[list[int]], kind: Any) -> Any:
    """Make an Arrow column of lists of numbers of this Arrow type."""
    import pyarrow

    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(rows), np.int64, ends[-1])
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(ends), pyarrow.array(values.astype(kind.to_pandas_dtype()))
    )
