"""Frozen features are computed once for all runs, and never those of other weights or rows."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noiseproof import features
from noiseproof.adapters import idle_parameters
from noiseproof.engine import Engine
from noiseproof.features import fingerprint, kept
from noiseproof.methods import TURN, CrossEntropy
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


def adapted(model: nn.Module, tune: str, seed: int) -> nn.Module:
    """The model with an adapter as it starts under a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TURN(tune=tune).prepare_model(copy.deepcopy(model))


def digest(model: nn.Module) -> str:
    return fingerprint(model, idle_parameters(model))


@pytest.mark.parametrize("tune", ["lora", "adapter", "bitfit"])
def test_adapters_that_have_not_trained_share_their_features(
    tiny_run: Tiny, cache: Path, tune: str
) -> None:
    """Their random half is multiplied by 0; else every seed would encode all rows anew."""
    one, two = (adapted(tiny_run.model, tune, seed) for seed in (0, 1))
    assert digest(one) == digest(two)
    last = [p for name, p in one.named_parameters() if "lora_B" in name or "parts." in name][-1]
    with torch.no_grad():
        last.view(-1)[0] += 1e-6
    assert digest(one) != digest(two)
    for seed in (0, 1):
        tiny_run.fit(TURN(tune=tune, probe_epochs=1, tune_epochs=0), epochs=1, init_seed=seed)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("tune", ["prompt", "prefix"])
def test_adapters_that_change_the_features_have_their_own(
    tiny_run: Tiny, cache: Path, tune: str
) -> None:
    """The probe of one seed must not learn from the prompts of another."""
    one, two = (adapted(tiny_run.model, tune, seed) for seed in (0, 1))
    assert digest(one) != digest(two)
    assert digest(one) == digest(adapted(tiny_run.model, tune, 0))
    for seed in (0, 1):
        tiny_run.fit(TURN(tune=tune, probe_epochs=1, tune_epochs=0), epochs=1, init_seed=seed)
    assert len(list(cache.iterdir())) == 2


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
