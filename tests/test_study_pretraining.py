"""Noisy pre-training: nested labels, pictures, correlations, and the whole study, tiny."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from noiseproof.errors import InputError
from noiseproof.study import Asked
from noiseproof.study.noisy_pretraining import SIZES, scaled
from noiseproof.study.noisy_pretraining.network import fresh
from noiseproof.study.noisy_pretraining.pictures import (
    CORRUPTIONS,
    SHAPES,
    corrupted,
    draw,
    nested_noise,
)
from noiseproof.study.noisy_pretraining.records import Records, correlations
from noiseproof.study.noisy_pretraining.working import Scale, split
from test_study import called
from tiny import same_weights

RATES = (0.0, 0.05, 0.1, 0.2, 0.3)
TINY = Scale(64, 32, 32, 1, 1, (0,), (0.0, 0.3), fractions=(0.5, 1.0), tasks=("new",))


def test_the_wrong_rows_of_a_rate_are_among_those_of_the_next() -> None:
    labels = np.arange(800) % 8
    found = nested_noise(labels, 8, RATES, seed=3)
    assert (found[0.0] == labels).all()
    for low, high in pairwise(RATES):
        wrong = found[low] != labels
        assert (found[high][wrong] == found[low][wrong]).all()
        assert (found[high] != labels).mean() == pytest.approx(high)
    for label in range(8):  # the same share of every class
        assert (found[0.2][labels == label] != label).mean() == pytest.approx(0.2)
    with pytest.raises(InputError, match="two classes"):
        nested_noise(labels, 1, RATES, seed=0)


def test_pictures_are_the_same_for_the_same_seed_and_show_their_class() -> None:
    one, two = draw(48, seed=1), draw(48, seed=1)
    assert (one.pixels == two.pixels).all() and one.names == tuple(SHAPES)
    assert not (one.pixels == draw(48, seed=2).pixels).all()
    assert one.of_classes(range(8, 12)).labels.max() == 3
    few, more = one.some(12, seed=0), one.some(24, seed=0)
    assert set(few) <= set(more) and len(few) == 12


def test_every_corruption_changes_pictures_and_none_changes_them_twice_alike() -> None:
    pixels = draw(12, seed=0).pixels
    for name in CORRUPTIONS:
        changed = corrupted(pixels, name, seed=0)
        assert changed.shape == pixels.shape and changed.dtype == np.uint8
        assert (changed != pixels).any()
        assert (changed == corrupted(pixels, name, seed=0)).all()
    assert corrupted(pixels, "contrast", 0).std() < pixels.std()


def test_transfer_rows_are_not_pre_trained_on_and_new_classes_are_new() -> None:
    data = split(draw(480, seed=0), draw(120, seed=1), TINY, seed=0)
    assert set(data.pretrain.names) & set(data.train["new"].names) == set()
    seen = {row.tobytes() for row in data.pretrain.pixels}
    assert not seen & {row.tobytes() for row in data.train["old"].pixels}
    with pytest.raises(InputError, match="four classes"):
        split(draw(36, 0).of_classes(range(3)), draw(36, 0), TINY, seed=0)


def test_networks_start_alike_for_a_seed() -> None:
    assert same_weights(fresh(8, seed=1), fresh(8, seed=1))
    assert not same_weights(fresh(8, seed=1), fresh(8, seed=2))


def test_correlations_of_too_little_are_none() -> None:
    assert correlations([1, 2, 3], [5, 2, 1]) == (-1, pytest.approx(-0.960769, abs=1e-6))
    assert correlations([1, 2], [1, 2]) is None
    assert correlations([1, 2, 3], [1, 1, 1]) is None


def test_what_the_study_has_no_use_for_is_refused() -> None:
    with pytest.raises(InputError, match="with --task image"):
        scaled(Asked(data="texts.csv"))
    with pytest.raises(InputError, match="leave --parts"):
        scaled(Asked(noise=("symmetric:0.2",)))
    assert scaled(Asked(size="small", seeds=(7,), epochs=2)).seeds == (7,)


def test_the_study_runs_goes_on_where_it_stopped_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "small", TINY)
    words = ("study", "noisy-pretraining", "--size", "small", "--device", "cpu",
             "--out", tmp_path)  # fmt: skip
    code, said = called(*words)
    assert code == 0, said
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "NMTune is better than its control MLP in" in text and "hardly better than" in text
    records = Records(tmp_path)
    assert len(records.tuned) == 2 * 2 * 4
    first = records.before("new", 0.0)["0"]
    assert first["angles"]["5"] == pytest.approx([0.0] * 5, abs=1e-5) and first["D"] > 5
    assert set(first["spectra"]) == {"none", "l2", "code", "column"}
    assert first["sve"] == first["spectra"]["code"]["sve"] and first["preprocess"] == "code"
    assert "Angle, k = 5" in text and "Order of all rates" in text
    assert all(one.after["preprocess"] == "code" for one in records.tuned)
    assert all(set(one.run.record.ood) == set(CORRUPTIONS) for one in records.tuned)
    lines = (tmp_path / "study.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 17 and lines[0].startswith("rate,task,fraction,method,seed,id,ood,")
    code, said = called(*words)
    assert code == 0 and "pre-training with" not in said  # all is there
    assert (tmp_path / "study.md").read_text(encoding="utf-8") == text
    code, said = called(*words, "--seeds", "1")
    assert code == 2 and "choose another --out" in said


def test_own_pictures_are_read_like_images_of_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Scale(48, 16, 16, 1, 1, (0,), (0.0, 0.3), tasks=("new",))
    monkeypatch.setitem(SIZES, "small", small)
    rows = draw(240, seed=0)
    names = np.array(rows.names)[rows.labels]
    np.savez(tmp_path / "own.npz", image=rows.pixels, label=names)
    code, said = called("study", "noisy-pretraining", tmp_path / "own.npz", "--task", "image",
                        "--size", "small", "--device", "cpu",
                        "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, said
    assert "own" in (tmp_path / "out/study.md").read_text(encoding="utf-8")
