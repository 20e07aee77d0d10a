"""Features of a frozen encoder on disk: computed once, then memory-mapped by every later run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.encoding import cache_folder
from noiseproof.models import encoder_of, is_head

MAX_BYTES = 2**31  # larger tables are not kept


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
