"""Spectra: closed forms, bounds, what does not change them, and rows that are read in blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from noiseproof import spectrum as module
from noiseproof.errors import InputError
from noiseproof.spectrum import entry_moments, principal_angles, spectrum


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def rotation(size: int) -> np.ndarray:
    return np.linalg.qr(draw(size, size, seed=9))[0]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_equal_directions_reach_the_logarithm_of_their_number(size: int) -> None:
    found = spectrum(np.eye(size), "none")
    assert found.sve == pytest.approx(np.log(size)) == found.lsvr
    assert found.rank == size and found.top_share(1) == pytest.approx(1 / size)


def test_one_direction_has_neither_entropy_nor_ratio() -> None:
    found = spectrum(draw(20, 1) @ draw(1, 6), "none")
    assert found.sve == pytest.approx(0, abs=1e-10) and found.lsvr == pytest.approx(0, abs=1e-10)
    assert found.rank == 1


def test_two_unequal_directions() -> None:
    found = spectrum(np.diag([3.0, 1.0]), "none")
    assert found.sve == pytest.approx(0.5623, abs=1e-4)
    assert found.lsvr == pytest.approx(0.2877, abs=1e-4)
    assert found.values.tolist() == pytest.approx([3, 1])


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9)])
@pytest.mark.parametrize("preprocess", module.PREPROCESS)
def test_the_ratio_lies_below_the_entropy_and_both_below_the_rank(
    shape: tuple[int, int], preprocess: str
) -> None:
    found = spectrum(draw(*shape), preprocess)
    assert 0 <= found.lsvr <= found.sve <= np.log(found.rank) + 1e-12
    assert len(found.values) == min(shape) and found.shares.sum() == pytest.approx(1)
    assert (np.diff(found.values) <= 0).all()


def test_what_each_preparation_feeds_to_the_decomposition() -> None:
    rows = draw(12, 5) + 2
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for preprocess, wanted in {
        "none": rows,
        "l2": unit,
        "code": unit - unit.mean(axis=1, keepdims=True),
        "column": rows - rows.mean(axis=0),
    }.items():
        values = np.linalg.svd(wanted, compute_uv=False)
        np.testing.assert_allclose(spectrum(rows, preprocess).values, values, atol=1e-12)


def test_what_changes_a_spectrum_and_what_does_not() -> None:
    """Removing the mean of each row depends on the axes: the step of the released code."""
    rows = np.abs(draw(30, 6))
    for preprocess in module.PREPROCESS:
        found = spectrum(rows, preprocess).values
        np.testing.assert_allclose(spectrum(rows[::-1], preprocess).values, found, atol=1e-12)
        turned = spectrum(rows @ rotation(6), preprocess).values
        assert np.allclose(turned, found) == (preprocess != "code")
    one, ten = spectrum(rows, "none"), spectrum(10 * rows, "none")
    assert one.sve == pytest.approx(ten.sve) and one.lsvr == pytest.approx(ten.lsvr)


@pytest.mark.parametrize("preprocess", module.PREPROCESS)
def test_rows_read_in_blocks_give_the_same_values(
    preprocess: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw(101, 6).astype(np.float32)
    whole = spectrum(rows, preprocess)
    monkeypatch.setattr(module, "LEAST_BLOCK", 10)  # blocks of 24 rows, the last of 5
    np.save(tmp_path / "rows.npy", rows)
    mapped = spectrum(np.load(tmp_path / "rows.npy", mmap_mode="r"), preprocess)
    np.testing.assert_allclose(mapped.values, whole.values, rtol=1e-12, atol=1e-12)


def test_the_rank_knows_the_precision_of_the_features() -> None:
    """In fp32 the zeros of a rank of 3 are rounding errors far above those of float64."""
    rows = (draw(50, 3) @ draw(3, 8)).astype(np.float32)
    assert spectrum(rows, "none").rank == 3
    assert spectrum(torch.from_numpy(rows), "none").rank == 3


def test_a_spectrum_goes_into_a_record() -> None:
    values = json.loads(json.dumps(spectrum(np.eye(6), "none").to_dict()))
    assert (values["M"], values["D"], values["rank"]) == (6, 6, 6)
    assert values["preprocess"] == "none" and len(values["s"]) == 6
    assert values["p1"] == pytest.approx(1 / 6) and values["topk"] == pytest.approx(5 / 6)


def test_angles_between_equal_turned_and_foreign_subspaces() -> None:
    rows = draw(30, 5)
    np.testing.assert_allclose(principal_angles(rows, rows @ rotation(5), k=5), 0, atol=1e-7)
    axes = np.eye(8)
    one = axes[:, :2] * [3, 2]
    np.testing.assert_allclose(principal_angles(one, axes[:, 4:6], k=2), np.pi / 2)
    tilt = np.cos(0.3) * axes[:, [0]] + np.sin(0.3) * axes[:, [7]]
    np.testing.assert_allclose(principal_angles(axes[:, [0]], tilt, k=1), [0.3])


def test_angles_are_those_of_the_definition() -> None:
    clean, noisy = draw(20, 6), draw(20, 4, seed=1)
    left, right = (np.linalg.svd(rows)[0][:, :3] for rows in (clean, noisy))
    cosines = np.linalg.svd(left.T @ right, compute_uv=False)
    np.testing.assert_allclose(np.cos(principal_angles(clean, noisy, k=3)), cosines)


def test_moments_of_entries() -> None:
    normal = entry_moments(draw(400, 50))
    assert normal["skewness"] == pytest.approx(0, abs=0.1)
    assert normal["kurtosis"] == pytest.approx(3, abs=0.1)
    two = entry_moments([[-1.0, 1.0], [1.0, -1.0]])
    assert two == {"skewness": 0.0, "kurtosis": 1.0}


def test_what_is_no_table_of_features_is_refused() -> None:
    bad = np.ones((5, 2))
    bad[3, 0] = np.nan
    with pytest.raises(InputError, match="row 3 is not"):
        spectrum(bad)
    for features in (np.ones(4), np.ones((0, 3)), [["a"]]):
        with pytest.raises(InputError, match=r"table \(M, D\)"):
            spectrum(features)
    with pytest.raises(InputError, match="all 0 after preprocess=column"):
        spectrum(np.ones((4, 3)), "column")
    with pytest.raises(InputError, match="one of none, l2, code, column"):
        spectrum(np.eye(3), "rows")
    with pytest.raises(InputError, match="same rows, got 4 and 5"):
        principal_angles(np.eye(4), np.eye(5), k=1)
    with pytest.raises(InputError, match=r"k must lie in \[1, 2\]"):
        principal_angles(np.eye(4)[:, :2], np.eye(4), k=3)
    with pytest.raises(InputError, match="constant"):
        entry_moments(np.ones((3, 3)))
