"""Frozen features are computed once for all runs, and never those of other weights or rows."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from families import classifier
from noiseproof import fit
from noiseproof.adapters import idle_parameters, set_adapters
from noiseproof.distortion import look_at
from noiseproof.engine import Engine
from noiseproof.features import Allocate, fingerprint, kept
from noiseproof.frozen import encode_batch
from noiseproof.job import Job
from noiseproof.methods import TURN, CrossEntropy
from noiseproof.models import encoder_of
from noiseproof.preparation import Prepared, frozen_features
from rows import image_model, image_rows
from tiny import Tiny, same_weights, table, train_settings


def made(table: torch.Tensor) -> Callable[[Allocate], torch.Tensor]:
    """What computes this table into the place that it is given."""
    return lambda allocate: allocate(tuple(table.shape)).copy_(table)


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


def test_all_heads_and_precisions_share_a_table_with_the_audit(
    tiny_run: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are computed in fp32 whatever the run trains in: one table is enough for all."""
    mean = TURN(probe_features="mean", probe_epochs=1, tune_epochs=0)
    first = tiny_run.fit(mean)
    (file,) = cache.iterdir()
    found = torch.from_numpy(np.load(file))
    assert found.shape == (25, 32, 2)

    def encode(*arguments: object) -> torch.Tensor:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Engine, "encode", encode)
    audited = frozen_features(tiny_run.model, tiny_run.encoded, train_settings())
    assert np.array_equal(audited, found[:, :, 0].numpy())
    monkeypatch.setattr("noiseproof.engine.choose_precision", lambda *asked: "bf16")
    again = tiny_run.fit(mean, precision="bf16")
    assert first.precision == "fp32" and again.precision == "bf16"
    monkeypatch.undo()
    monkeypatch.setenv("NOISEPROOF_CACHE", str(cache.parent / "empty"))
    monkeypatch.setattr("noiseproof.engine.choose_precision", lambda *asked: "bf16")
    tiny_run.fit(mean, precision="bf16")
    (low,) = (cache.parent / "empty" / "features").iterdir()
    assert low.name == file.name and torch.equal(torch.from_numpy(np.load(low)), found)


def test_the_audit_leaves_the_table_that_a_head_on_means_reads(
    tiny_run: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_features(tiny_run.model, tiny_run.encoded, train_settings())
    monkeypatch.setattr(Engine, "encode", lambda *arguments: pytest.fail("encoded again"))
    tiny_run.fit(TURN(probe_features="mean", probe_epochs=1, tune_epochs=0))


def test_the_look_at_an_encoder_as_loaded_reads_the_table(
    tiny_run: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study looks at it in every run; the look after training is at other weights."""
    rows = (tiny_run.encoded, tiny_run.encoded, train_settings())
    plain = look_at(tiny_run.model, *rows)
    assert not cache.exists()
    first = look_at(tiny_run.model, *rows, keep=True)
    assert torch.equal(first.train, plain.train)
    monkeypatch.setattr(Engine, "encode", lambda *arguments: pytest.fail("encoded again"))
    assert torch.equal(look_at(tiny_run.model, *rows, keep=True).held_out, plain.held_out)


def test_a_job_that_measures_distortion_looks_at_the_loaded_encoder_by_the_cache(
    tiny_model: Path, cache: Path
) -> None:
    settings: dict[str, Any] = {
        "model": str(tiny_model), "test": table(12, seed=3), "clean_label": "clean_label",
        "train": train_settings(epochs=1), "measure_distortion": True,
    }  # fmt: skip
    fit(table(24, wrong=0.25), method=CrossEntropy(), **settings)
    assert len(list(cache.iterdir())) == 2  # training and test rows, before and not after


def test_an_encoder_without_a_pooler_stores_no_second_half(cache: Path) -> None:
    """It would be zeros, as large as what is needed."""
    model, inputs = classifier("distilbert")
    with torch.no_grad():
        assert encode_batch(model.eval(), inputs, "first").shape == (4, 16, 1)
        assert encode_batch(classifier("bert")[0].eval(), inputs, "first").shape == (4, 16, 2)


def test_other_weights_rows_types_or_transforms_have_other_features(
    tiny_run: Tiny, cache: Path
) -> None:
    """A stale table would train a head for another encoder without a word."""
    texts = ["a rose near the old wharf"] * 25
    tiny_run.fit(CrossEntropy(tune="head"))
    tiny_run.fit(CrossEntropy(tune="head"), encoded=tiny_run.task.encode(texts))
    assert len(list(cache.iterdir())) == 2
    short = dataclasses.replace(tiny_run.task, max_length=4)
    tiny_run.fit(CrossEntropy(tune="head"), encoded=short.encode(texts))
    assert len(list(cache.iterdir())) == 3
    assert fingerprint(copy.deepcopy(tiny_run.model).half()) != fingerprint(tiny_run.model)
    asked: dict[str, Any] = {"task": "image", "model": image_model("resnet"), "method": TURN()}
    sizes = {Prepared(Job(image_rows(), image_size=size, **asked)).encoded.key for size in (8, 12)}
    assert len(sizes) == 2 and "" not in sizes
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


ALL: dict[str, Any] = {"cleanse": False, "precondition": "off"}


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
        tiny_run.fit(TURN(tune=tune, probe_epochs=1, **ALL), epochs=1, init_seed=seed)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("tune", ["prompt", "prefix"])
def test_adapters_that_change_the_features_have_their_own(
    tiny_run: Tiny, cache: Path, tune: str
) -> None:
    """The probe of one seed must not learn from the prompts of another."""
    one, two = (adapted(tiny_run.model, tune, seed) for seed in (0, 1))
    assert digest(one) != digest(two)
    assert digest(one) == digest(adapted(tiny_run.model, tune, 0))


@pytest.mark.parametrize("tune", ["lora", "fourierft", "prompt", "prefix", "prompt_tuning"])
def test_adapters_that_are_left_out_share_the_features_of_the_bare_encoder(
    tiny_run: Tiny, cache: Path, tune: str
) -> None:
    """A probe sees the encoder alone, of every seed, and no table that adapters have changed."""
    for seed in (0, 1):
        tiny_run.fit(TURN(tune=tune, probe_epochs=1, **ALL), epochs=1, init_seed=seed)
    (file,) = cache.iterdir()
    model = tiny_run.model.eval()
    wanted = encode_batch(model, tiny_run.encoded.inputs(np.arange(25)), "first").detach()
    torch.testing.assert_close(torch.from_numpy(np.load(file)), wanted, rtol=1e-4, atol=1e-5)
    one = adapted(model, tune, 0)
    acting = digest(one)
    set_adapters(one, on=False)
    left_out = digest(one)
    set_adapters(one, on=True)
    assert digest(one) == acting != left_out


def test_a_damaged_table_is_made_anew(cache: Path) -> None:
    table = torch.arange(6.0).view(3, 2)
    assert torch.equal(kept("x", 3, made(table)), table)
    (path,) = cache.iterdir()
    assert torch.equal(kept("x", 3, made(table + 1)), table)  # from the disk
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(kept("x", 3, made(table + 1)), table + 1)
    np.save(path, np.zeros((2, 2), dtype=np.float32))
    assert torch.equal(kept("x", 3, made(table + 2)), table + 2)
    assert torch.equal(kept("x", 3, made(table)), table + 2)


def test_runs_that_start_together_compute_one_table(cache: Path) -> None:
    """Every worker of a grid used to encode the same rows at the same time."""
    table, times = torch.arange(6.0).view(3, 2), []

    def compute(allocate: Allocate) -> torch.Tensor:
        times.append(time.monotonic())
        time.sleep(0.3)  # the other comes meanwhile
        return made(table)(allocate)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(kept, "x", 3, compute) for _ in range(2)]
        assert all(torch.equal(one.result(timeout=60), table) for one in both)
    assert len(times) == 1


def test_batches_go_to_the_disk_as_they_come(cache: Path) -> None:
    """A table larger than the memory must not be gathered in memory first."""
    seen: list[list[float]] = []

    def compute(allocate: Allocate) -> torch.Tensor:
        table = allocate((3, 2))
        (part,) = cache.iterdir()
        assert part.suffix == ".part" and part.stat().st_blocks * 512 >= 24  # its place is taken
        for row in range(3):
            table[row] = row + 1.0
            seen.append(np.load(part)[:, 0].tolist())
        return table

    found = kept("x", 3, compute)
    assert seen == [[1, 0, 0], [1, 2, 0], [1, 2, 3]]
    assert found[:, 1].tolist() == [1, 2, 3]
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_what_breaks_off_leaves_no_file(cache: Path) -> None:
    def compute(allocate: Allocate) -> torch.Tensor:
        allocate((3, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept("x", 3, compute)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.ones(3, 2)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the way")
    with pytest.warns(UserWarning, match=r"stay in memory.*NOISEPROOF_CACHE names another"):
        assert torch.equal(kept("x", 3, made(table)), table)
    cache.unlink()

    def full(*place: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.warns(UserWarning, match=r"\(0 MB\) stay in memory.*No space left on device"):
        assert torch.equal(kept("x", 3, made(table)), table)
    assert list(cache.iterdir()) == []
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8))
    with pytest.warns(UserWarning, match="stay in memory"):
        assert torch.equal(kept("x", 3, made(table)), table)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert torch.equal(kept("x", 3, made(table)), table) and len(list(cache.iterdir())) == 1


def test_a_table_may_be_changed_without_changing_the_file(cache: Path) -> None:
    """Training writes nothing into it, but nothing may reach the disk if it did."""
    table = torch.ones(3, 2)
    for _ in range(2):  # as computed, and as read
        found = kept("x", 3, made(table))
        found += 1
    assert torch.equal(kept("x", 3, made(table)), table)
