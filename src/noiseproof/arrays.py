"""Arrays of a NumPy archive (.npz): mapped into memory, never unpickled.

An array that is not compressed is mapped where it lies. One that is compressed is unpacked piece by
piece into a temporary file, which is mapped: either way an array larger than memory will do.
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from noiseproof.errors import InputError

SMALL = 1 << 23  # bytes up to which an array is simply read
CHUNK = 1 << 22  # bytes that are unpacked at a time
_HEADER = 30  # bytes of a zip entry before its name


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an archive by name.

    Raises:
        InputError: It is no archive of arrays, is damaged, or holds Python objects.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", x=np.zeros((3, 2)), y=np.arange(3))
    ...     {name: array.shape for name, array in read_npz(Path(folder, "a.npz")).items()}
    {'x': (3, 2), 'y': (3,)}
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {
                entry.filename.removesuffix(".npy"): _read(path, file, archive, entry)
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"cannot read {path} as a NumPy archive: {reason}; expected what numpy.savez writes"
        ) from error


def arrays_of_split(arrays: Mapping[str, np.ndarray], split: str) -> dict[str, np.ndarray]:
    """Choose the arrays of a split, under names without it; all arrays where no name has one.

    An array belongs to a split as ``x_train`` or ``train_x``. What belongs to no split, such as
    labels of another kind for the training rows alone, is kept where it has as many rows.

    >>> names = {"x_train": np.zeros((3, 2)), "x_test": np.zeros((1, 2)), "crowd": np.zeros(3)}
    >>> sorted(arrays_of_split(names, "train")), sorted(arrays_of_split(names, "test"))
    (['crowd', 'x'], ['x'])
    """
    chosen = {
        name.removesuffix(f"_{split}").removeprefix(f"{split}_"): array
        for name, array in arrays.items()
        if name.endswith(f"_{split}") or name.startswith(f"{split}_")
    }
    if not chosen:
        return dict(arrays)
    rows = {len(array) for array in chosen.values() if array.ndim}
    marked = ("train", "test", "validation", "val", "dev")
    others = {
        name: array
        for name, array in arrays.items()
        if array.ndim
        and len(array) in rows
        and not any(name.endswith(f"_{m}") or name.startswith(f"{m}_") for m in (split, *marked))
    }
    return others | chosen


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an archive without compression, so that its arrays can be mapped.

    Raises:
        InputError: An array holds Python objects.
    """
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise InputError(f"cannot write {path}: array {objects[0]!r} holds Python objects")
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> np.ndarray:
    name = entry.filename.removesuffix(".npy")
    with archive.open(entry) as member:
        shape, order, kind = _header(member)
        if kind.hasobject:
            raise InputError(
                f"array {name!r} of {path} holds Python objects, which are never unpickled; "
                "save it as numbers or fixed-width text"
            )
        start = member.tell()
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if entry.file_size < start + size:
            raise InputError(f"array {name!r} of {path} is cut short; write the file again")
        if size <= SMALL or not shape:
            return np.frombuffer(member.read(size), kind).reshape(shape, order=order)
        if entry.compress_type != zipfile.ZIP_STORED:
            return _unpacked(member, size, kind, shape, order)
    file.seek(entry.header_offset)
    local = file.read(_HEADER)  # its name and extra field may be longer than in the directory
    offset = (
        _HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    )
    return np.memmap(path, kind, "r", entry.header_offset + offset + start, shape, order)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    """Read shape, order and type of an array; the file then stands at its numbers."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran, kind = np.lib.format.read_array_header_1_0(member)
    else:
        shape, fortran, kind = np.lib.format.read_array_header_2_0(member)
    return shape, "F" if fortran else "C", kind


def _unpacked(
    member: IO[bytes], size: int, kind: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> np.ndarray:
    """Unpack into a temporary file that has no name; it goes with the array."""
    try:
        with tempfile.TemporaryFile(prefix="noiseproof-") as copy:
            left = size
            while left:
                piece = member.read(min(CHUNK, left))
                if not piece:
                    raise EOFError("the compressed data end early")
                copy.write(piece)
                left -= len(piece)
            copy.flush()
            return np.memmap(copy, kind, "r", 0, shape, order)
    except OSError as error:
        raise InputError(
            f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror or error}; "
            "make room, or set TMPDIR to a folder that has some"
        ) from error
