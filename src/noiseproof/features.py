"""Features of a frozen encoder on disk: computed once, then memory-mapped by every later run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.encoding import cache_folder
from noiseproof.models import encoder_of

MAX_BYTES = 2**31  # larger tables are not kept


def fingerprint(model: nn.Module) -> str:
    """Digest of the encoder of a classifier: configuration, names, shapes and values of weights.

    Empty for a module that nothing else describes: its weights do not say what it computes.
    """
    _, encoder = encoder_of(model)
    digest = hashlib.sha256()
    described = getattr(getattr(encoder, "config", None), "to_json_string", None)
    description = "" if described is None else described(use_diff=False)
    if not description:
        return ""
    digest.update(description.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept(key: str, rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """A table (N, ...) from the disk, or computed and put there.

    A table that cannot be read or written is computed; the cache is a convenience.

    Args:
        key: Names what the table depends on.
        rows: N, against a table that was cut short.
        compute: Makes the table.
    """
    path = cache_folder() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):
        table = np.load(path, mmap_mode="c", allow_pickle=False)  # c: pages are read on use
        if len(table) == rows:
            return torch.from_numpy(table)
    computed = compute()
    if computed.nbytes <= MAX_BYTES:
        partial = path.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.save(file, computed.numpy(), allow_pickle=False)
            os.replace(partial, path)
        with suppress(OSError):
            partial.unlink()
    return computed
