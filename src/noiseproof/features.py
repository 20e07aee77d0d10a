"""Features of a frozen encoder on disk: computed once, then memory-mapped by every later run."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.encoding import cache_folder, one_at_a_time
from noiseproof.models import encoder_of, is_head

Allocate = Callable[[tuple[int, ...]], Tensor]
"""Makes a table of zeros of this shape, fp32."""

FileTable = np.memmap[Any, np.dtype[np.float32]]


def fingerprint(model: nn.Module, idle: Iterable[nn.Parameter] = ()) -> str:
    """Digest of all that a classifier's head reads from: configuration and weights of the encoder.

    Adapters are part of it, also those that stand outside the encoder, such as prompts.
    Empty for a module that nothing else describes: its weights do not say what it computes.

    Args:
        model: The classifier.
        idle: Parameters that change nothing, see `noiseproof.adapters.idle_parameters`.
    """
    _, encoder = encoder_of(model)
    described = getattr(getattr(encoder, "config", None), "to_json_string", None)
    description = "" if described is None else described(use_diff=False)
    if not description:
        return ""
    digest = hashlib.sha256(description.encode())
    head, left_out = is_head(model), set(map(id, idle))
    read = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not head(name) and id(parameter) not in left_out
    }
    for name, tensor in (*read.items(), *encoder.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept(key: str, rows: int, compute: Callable[[Allocate], Tensor]) -> Tensor:
    """A table (N, ...) from the disk, or computed and put there.

    The rows are computed into the file, batch by batch, so that a table may be larger than the
    memory. A table that cannot be read is computed; one that cannot be written stays in memory, and
    a warning says so. Processes that ask for one table at a time compute it once.

    Args:
        key: Names what the table depends on.
        rows: N, against a table that was cut short.
        compute: Makes the table, in what it is given for it.
    """
    path = cache_folder() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):
        return _mapped(path, rows)
    with one_at_a_time(path):
        with suppress(OSError, ValueError, EOFError):
            return _mapped(path, rows)
        return _computed(path, rows, compute)


def _computed(path: Path, rows: int, compute: Callable[[Allocate], Tensor]) -> Tensor:
    """A table that is not on the disk, see `kept`."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    tables: list[FileTable] = []

    def allocate(shape: tuple[int, ...]) -> Tensor:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tables.append(_new_table(partial, shape))
        except OSError as error:
            size = 4 * math.prod(shape) / 1e6
            warnings.warn(
                f"features of the frozen encoder ({size:.0f} MB) stay in memory and are not kept: "
                f"{error.strerror or error}; NOISEPROOF_CACHE names another folder",
                UserWarning,
                stacklevel=2,
            )
            return torch.zeros(shape)
        return torch.from_numpy(tables[-1])

    try:
        computed = compute(allocate)
        if not tables:
            return computed
        tables[-1].flush()
        with suppress(OSError, ValueError):
            os.replace(partial, path)
            return _mapped(path, rows)
        return computed
    finally:
        with suppress(OSError):
            partial.unlink()


def _mapped(path: Path, rows: int) -> Tensor:
    """A table of the disk; its pages are read on use, and what is written to it stays in memory."""
    table = np.load(path, mmap_mode="c", allow_pickle=False)
    if len(table) != rows:
        raise ValueError(f"{path} has {len(table)} rows, expected {rows}")
    return torch.from_numpy(table)


def _new_table(path: Path, shape: tuple[int, ...]) -> FileTable:
    """A table of zeros in a file. Its place on the disk is taken: a full disk must not fail later.

    Raises:
        OSError: There is no room for it.
    """
    table: FileTable = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None:  # macOS, Windows
        if shutil.disk_usage(path.parent).free < table.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return table
    with open(path, "r+b") as file:
        reserve(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return table
