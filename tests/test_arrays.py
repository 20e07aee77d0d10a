"""Archives of arrays: whatever was written is read, mapped where it is large, never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from noiseproof import arrays
from noiseproof.arrays import arrays_of_split, read_npz, write_npz
from noiseproof.errors import InputError

KINDS = st.sampled_from(["<f4", ">f8", "<i2", "|u1", "|b1", "<U3"])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(
    KINDS.flatmap(lambda kind: SHAPES.flatmap(lambda shape: arrays_of.arrays(kind, shape))),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1 << 23]),
)
@settings(max_examples=60)
def test_an_array_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    array: np.ndarray,
    packed: bool,
    columns_first: bool,
    small: int,
) -> None:
    """Packed or not, mapped or read, in either order of its numbers."""
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    stored = array.copy(order="F" if columns_first else "C")
    (np.savez_compressed if packed else np.savez)(path, first=np.arange(3), array=stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SMALL", small)
        patch.setattr(arrays, "CHUNK", 5)
        found = read_npz(path)
    assert list(found) == ["first", "array"]
    assert found["array"].dtype == array.dtype and found["array"].shape == array.shape
    assert found["array"].tobytes() == array.tobytes()


def test_what_is_written_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that we made must not need unpacking."""
    monkeypatch.setattr(arrays, "SMALL", 0)
    table = np.arange(12.0).reshape(3, 4)
    write_npz(tmp_path / "a.npz", {"x": table, "y": np.array(["a", "b", "c"])})
    found = read_npz(tmp_path / "a.npz")
    assert isinstance(found["x"], np.memmap) and found["x"].filename == tmp_path / "a.npz"
    np.testing.assert_array_equal(found["x"], table)
    assert found["y"].tolist() == ["a", "b", "c"]
    with pytest.raises(InputError, match="array 'z' holds Python objects"):
        write_npz(tmp_path / "b.npz", {"z": np.array([{}], dtype=object)})


@pytest.mark.parametrize("keep", [0, 10, 100, 200, 300])
def test_a_damaged_archive_is_one_line(tmp_path: Path, keep: int) -> None:
    """A download that broke off, at any place."""
    np.savez(tmp_path / "a.npz", x=np.arange(50.0))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cannot read .*a\.npz as a NumPy archive") as refusal:
        read_npz(tmp_path / "a.npz")
    assert "\n" not in str(refusal.value)


def test_an_array_that_is_cut_short_is_named(tmp_path: Path) -> None:
    """The header of the array says more rows than follow."""
    np.save(tmp_path / "x.npy", np.arange(50.0))
    content = (tmp_path / "x.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content[:-80])
    with pytest.raises(InputError, match=r"array 'x' of .* is cut short"):
        read_npz(tmp_path / "a.npz")


def test_names_choose_the_split() -> None:
    """Both usual forms; what belongs to another split never slips in, whatever its length."""
    table = np.zeros((3, 2))
    whole = {"train_x": table, "y_train": np.zeros(3), "x_test": table, "y_val": np.zeros(3),
             "crowd": np.zeros(3), "names": np.zeros(7)}  # fmt: skip
    assert list(arrays_of_split(whole, "train")) == ["crowd", "x", "y"]
    assert list(arrays_of_split(whole, "test")) == ["crowd", "x"]
    assert list(arrays_of_split(whole, "other")) == list(whole)
