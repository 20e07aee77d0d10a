"""Frozen features are computed once for all runs, and never those of other weights or rows."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from noiseproof import features
from noiseproof.engine import Engine
from noiseproof.features import fingerprint, kept
from noiseproof.methods import CrossEntropy
from noiseproof.models import encoder_of
from tiny import Tiny, same_weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path))
    return tmp_path / "features"


def test_a_second_run_does_not_encode_again(
    tiny_run: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the same weights and history, bit for bit."""
    first = tiny_run.fit(CrossEntropy(tune="head"))
    files = sorted(cache.iterdir())
    assert [path.suffix for path in files] == [".npy"]

    def encode(*arguments: object) -> torch.Tensor:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Engine, "encode", encode)
    second = tiny_run.fit(CrossEntropy(tune="head"))
    assert same_weights(first.model, second.model)
    assert first.history == second.history
    assert sorted(cache.iterdir()) == files


def test_other_weights_rows_or_precision_have_other_features(tiny_run: Tiny, cache: Path) -> None:
    """A stale table would train a head for another encoder without a word."""
    tiny_run.fit(CrossEntropy(tune="head"))
    tiny_run.fit(CrossEntropy(tune="head"), encoded=tiny_run.task.encode(["a rose"] * 25))
    assert len(list(cache.iterdir())) == 2
    changed = copy.deepcopy(tiny_run.model)
    _, encoder = encoder_of(changed)
    before = fingerprint(changed)
    assert before == fingerprint(tiny_run.model)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(changed) != before


def test_the_head_is_no_part_of_the_fingerprint(tiny_run: Tiny) -> None:
    """Every seed has another head; the features are shared by all."""
    changed = copy.deepcopy(tiny_run.model)
    torch.nn.init.normal_(changed.classifier.weight)
    assert fingerprint(changed) == fingerprint(tiny_run.model)


def test_a_damaged_table_is_made_anew(cache: Path) -> None:
    table = torch.arange(6.0).view(3, 2)
    assert torch.equal(kept("x", 3, lambda: table), table)
    (path,) = cache.iterdir()
    assert torch.equal(kept("x", 3, lambda: table + 1), table)  # from the disk
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(kept("x", 3, lambda: table + 1), table + 1)
    np.save(path, np.zeros((2, 2), dtype=np.float32))
    assert torch.equal(kept("x", 3, lambda: table + 2), table + 2)
    assert torch.equal(kept("x", 3, lambda: table), table + 2)


def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.ones(3, 2)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the way")
    assert torch.equal(kept("x", 3, lambda: table), table)
    cache.unlink()
    monkeypatch.setattr(features, "MAX_BYTES", 8)
    assert torch.equal(kept("x", 3, lambda: table), table)
    assert not cache.exists()


def test_a_table_may_be_changed_without_changing_the_file(cache: Path) -> None:
    """Training writes nothing into it, but nothing may reach the disk if it did."""
    table = torch.ones(3, 2)
    kept("x", 3, lambda: table)
    found = kept("x", 3, lambda: table)
    found += 1
    assert torch.equal(kept("x", 3, lambda: table), table)
