"""Tokens are the tokenizer's own, batches are its padding, and the cache is shared and safe."""

from __future__ import annotations

import copy
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noiseproof.errors import InputError
from noiseproof.tasks import EncodedFeatures, EncodedTexts, TextClassification, cache_folder
from noiseproof.tasks import text as tasks
from tiny import TOPICS, table

TEXTS = table(12)["text"].tolist()
PAIRS = table(12)["context"].tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own, empty cache for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NOISEPROOF_CACHE", str(folder))
    return folder


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_model))


def ids(encoded: EncodedTexts, row: int) -> list[int]:
    return encoded.inputs(np.array([row]))["input_ids"][0].tolist()


def files(cache: Path) -> list[Path]:
    found = (path for path in cache.rglob("*") if path.is_file())
    return sorted(path for path in found if path.suffix != ".lock")


@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [64, 6])
def test_batches_equal_the_tokenizers_own(
    tokenizer: Any, pairs: list[str] | None, side: str, length: int
) -> None:
    """Our padding replaces `tokenizer.pad`; any difference is another input to the model."""
    tokenizer.padding_side = side
    encoded = TextClassification(tokenizer, length).encode(TEXTS, pairs)
    rows = np.array([7, 2, 11, 2, 0])
    wanted = tokenizer(
        [TEXTS[row] for row in rows],
        None if pairs is None else [pairs[row] for row in rows],
        truncation=True,
        max_length=length,
        padding=True,
        return_tensors="pt",
    )
    found = encoded.inputs(rows)
    assert found.keys() == wanted.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
        assert found[name].dtype == torch.int64
    assert (found["token_type_ids"].max() == 1) == (pairs is not None)
    again = tokenizer.pad(
        [{name: values[row].tolist() for name, values in wanted.items()} for row in range(5)],
        return_tensors="pt",
    )
    assert torch.equal(again["input_ids"], found["input_ids"])
    longest = found["attention_mask"].sum(dim=1)
    assert longest.tolist() == encoded.lengths[rows].tolist() and longest.max() <= length


def test_the_limit_is_the_smaller_of_ours_and_the_tokenizers(tokenizer: Any) -> None:
    """Beyond the model's positions the embedding fails with an index error."""
    long = " ".join(["rose"] * 200)
    encoded = TextClassification(tokenizer, 256).encode([long, "rose"])
    assert encoded.lengths.tolist() == [64, 3]


def test_truncation_leaves_a_part_of_both_texts(tokenizer: Any) -> None:
    """A pair whose second text is cut away is another task."""
    encoded = TextClassification(tokenizer, 10).encode(["rose " * 30], ["boat " * 30])
    words = tokenizer.convert_ids_to_tokens(ids(encoded, 0))
    assert words.count("rose") >= 3 and words.count("boat") >= 3 and len(words) == 10


def test_a_tokenizer_without_token_types_gives_none(tokenizer: Any) -> None:
    """DistilBERT's forward takes no token_type_ids."""
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoded = TextClassification(tokenizer).encode(TEXTS)
    assert encoded.inputs(np.arange(3)).keys() == {"input_ids", "attention_mask"}


def test_rows_lie_where_they_should_beyond_one_chunk(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow keeps 1000 rows a chunk; an offset too few shifts every later row by one."""
    words = [word for topic in TOPICS.values() for word in topic]
    texts = [" ".join([words[row % 18]] * (1 + row % 7)) for row in range(2345)]
    encoded = TextClassification(tokenizer).encode(texts)
    assert len(encoded) == 2345 and len(encoded._offsets) == 3
    rows = np.array([0, 999, 1000, 1001, 1999, 2000, 2344, 17])
    found = encoded.inputs(rows)
    wanted = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    assert encoded.lengths[rows].tolist() == [3 + row % 7 for row in rows]
    monkeypatch.setattr(tasks, "TOKENISE_ROWS", 7)
    other = TextClassification(tokenizer).encode([*texts[:50], "some more"])
    assert all(ids(other, row) == ids(encoded, row) for row in range(50))


def test_tokens_stay_in_the_memory_map(tokenizer: Any) -> None:
    """A copy of all tokens in memory is what the file is there to avoid."""
    encoded = TextClassification(tokenizer).encode(TEXTS)
    for chunks in encoded._values.values():
        for chunk in chunks:
            assert not chunk.flags.owndata and not chunk.flags.writeable
    before = encoded.inputs(np.arange(12))  # a pass: what was read is let go, and comes back
    after = encoded.inputs(np.arange(12))
    assert all(torch.equal(before[name], values) for name, values in after.items())
    batch = encoded.inputs(np.arange(4))["input_ids"]
    batch += 1  # a batch is a copy: the file must not change under others
    assert ids(encoded, 0) == tokenizer(TEXTS[0])["input_ids"]


def test_token_numbers_are_kept_as_narrow_as_the_vocabulary_allows(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes are half the file and half the memory; too few are other tokens."""
    small = TextClassification(tokenizer).encode(TEXTS)
    assert {chunk.dtype for chunk in small._values["input_ids"]} == {np.dtype(np.uint16)}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: {"a": 1, "far": 1 << 16})
    large = TextClassification(tokenizer).encode([*TEXTS, "one more"])
    assert {chunk.dtype for chunk in large._values["input_ids"]} == {np.dtype(np.int32)}
    assert all(ids(large, row) == ids(small, row) for row in range(12))


def test_the_same_texts_are_tokenised_once(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run, or the test set of another method, reads the file."""
    first = TextClassification(tokenizer).encode(TEXTS)
    (path,) = files(cache)
    stamp = path.stat().st_mtime_ns

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    second = TextClassification(tokenizer).encode(TEXTS)
    assert files(cache) == [path] and path.stat().st_mtime_ns == stamp
    assert all(ids(first, row) == ids(second, row) for row in range(12))


def test_runs_that_start_together_tokenise_once(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker of a grid used to tokenise the same texts at the same time."""
    tokenise, calls = tasks._tokenise, []

    def slow(path: Path, *given: Any) -> None:
        calls.append(path)
        time.sleep(0.3)  # the other comes meanwhile
        tokenise(path, *given)

    monkeypatch.setattr(tasks, "_tokenise", slow)
    kinds = [TextClassification(copy.deepcopy(tokenizer)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(kind.encode, TEXTS) for kind in kinds]
        one, other = (found.result(timeout=60) for found in both)
    assert files(cache) == calls
    assert all(ids(one, row) == ids(other, row) for row in range(12))


def test_whatever_changes_the_tokens_changes_the_key(tokenizer: Any, cache: Path) -> None:
    """A stale cache answers with the tokens of other texts or of another tokenizer."""

    def encode(texts: list[str], pairs: list[str] | None = None, length: int = 64) -> None:
        TextClassification(tokenizer, length).encode(texts, pairs)

    encode(["rose boat", "tide"])
    encode(["rose", "boat tide"])  # the same letters, cut elsewhere
    encode(["tide", "rose boat"])
    encode(["rose boat", "tide"], ["", ""])
    encode(["rose boat", "tide"], ["a", "the"])
    encode(["rose boat", "tide"], length=3)
    tokenizer.padding_side = "left"
    encode(["rose boat", "tide"])
    tokenizer.truncation_side = "left"
    encode(["rose boat", "tide"])
    tokenizer.add_tokens(["boattide"])
    encode(["rose boat", "tide"])
    assert len(files(cache)) == 9


def test_odd_texts_can_be_keyed(tokenizer: Any, cache: Path) -> None:
    """Empty texts, half a surrogate, a null: all came from real files."""
    texts = ["", "\ud83d"[:0] + "x", "a\0b", "é", "e\u0301"]
    encoded = TextClassification(tokenizer).encode(texts)
    assert len(encoded) == 5 and encoded.lengths.min() >= 2
    assert tasks._key(["\ud83d"], None, tokenizer, 8) != tasks._key(["\ud83e"], None, tokenizer, 8)


def test_a_half_written_file_is_never_read(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed while it tokenises must not leave a shorter data set behind."""
    original, calls = type(tokenizer).__call__, []

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tasks, "TOKENISE_ROWS", 5)
    monkeypatch.setattr(type(tokenizer), "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        TextClassification(tokenizer).encode(TEXTS)
    assert files(cache) == []
    encoded = TextClassification(tokenizer).encode(TEXTS)
    assert len(encoded) == 12 and len(files(cache)) == 1


def test_a_cache_that_cannot_be_written_is_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message must name the folder and the variable that moves it."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("NOISEPROOF_CACHE", str(blocked))
    with pytest.raises(InputError, match=r"cannot write the token cache .*NOISEPROOF_CACHE"):
        TextClassification(tokenizer).encode(TEXTS)
    if os.geteuid() == 0:
        return  # root writes anywhere
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("NOISEPROOF_CACHE", str(locked))
    with pytest.raises(InputError, match="cannot write the token cache"):
        TextClassification(tokenizer).encode(TEXTS)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial file would fill what is left."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        TextClassification(tokenizer).encode(TEXTS)
    assert files(cache) == []


def test_the_cache_lies_where_the_variable_says(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else inside the cache of datasets, never in the working folder."""
    assert cache_folder() == cache
    monkeypatch.setenv("NOISEPROOF_CACHE", "~/there")
    assert cache_folder() == Path("~/there").expanduser()
    monkeypatch.delenv("NOISEPROOF_CACHE")
    import datasets

    assert cache_folder() == Path(datasets.config.HF_DATASETS_CACHE) / "noiseproof"


def test_features_come_back_row_by_row() -> None:
    """Cached features are indexed as texts are."""
    features = torch.randn(6, 4, 2)
    encoded = EncodedFeatures(features)
    assert len(encoded) == 6 and encoded.lengths.tolist() == [1] * 6
    rows = np.array([5, 0, 5])
    assert torch.equal(encoded.inputs(rows)["features"], features[rows])
