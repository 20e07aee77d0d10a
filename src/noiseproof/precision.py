"""Which floating-point precision this machine really runs.

A CPU may list AMX or AVX512-BF16 and still kill the process with an illegal instruction (some
virtual machines do), and where the instructions are missing bf16 is slower than fp32. So where a
CPU lists either, ``auto`` asks a child process to multiply two matrices of an encoder's size in
both precisions, once per machine and version of torch, and believes what it sees.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from noiseproof.encoding import cache_folder
from noiseproof.errors import InputError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_PROBE = """
import json, time, torch
def best(dtype):
    x = torch.randn(512, 384).to(dtype); w = torch.randn(1536, 384).to(dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter(); torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return min(times)
print(json.dumps({"fp32": best(torch.float32), "bf16": best(torch.bfloat16)}))
"""
_SPEED_UP = 1.3  # below this, casting costs more than the faster product gives


def choose_precision(asked: str, device: str) -> str:
    """Resolve ``auto`` to ``bf16`` or ``fp32``; refuse what the device cannot do.

    Args:
        asked: One of `PRECISIONS`.
        device: ``cpu``, ``cuda``, ``mps``.

    Raises:
        InputError: Unknown name, or a precision that the device does not run.
    """
    if asked not in PRECISIONS:
        raise InputError(f"unknown precision {asked!r}; available: {', '.join(PRECISIONS)}")
    if asked == "fp16" and device == "cpu":
        raise InputError("precision fp16 needs a GPU; on a CPU use auto, fp32 or bf16")
    if asked == "bf16" and device == "cpu" and not _probe_cpu()["runs"]:
        raise InputError(
            "precision bf16 was asked for, but a bf16 product fails on this CPU; use auto or fp32"
        )
    if asked != "auto":
        return asked
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device == "cpu" and _lists_bf16() and _probe_cpu()["faster"]:
        return "bf16"
    return "fp32"


def _lists_bf16() -> bool:
    """Whether the CPU names instructions for bf16 products; without them no probe is worth it."""
    listed = (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    return any(bool(ask()) for ask in listed)


def _probe_cpu() -> dict[str, bool]:
    """Whether bf16 products run on this CPU, and clearly faster than fp32; remembered on disk."""
    path = cache_folder() / "precision" / f"{_machine()}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {"runs": bool(known["runs"]), "faster": bool(known["faster"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = {"runs": False, "faster": False}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True
        )
        seconds = json.loads(done.stdout)
        found = {"runs": True, "faster": seconds["fp32"] > _SPEED_UP * seconds["bf16"]}
    except (subprocess.SubprocessError, OSError, ValueError, KeyError, TypeError):
        pass  # killed by a signal, too slow, no child process can be had, or it talks nonsense
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        pass  # an unwritable cache costs a second probe, nothing else
    return found


def _machine() -> str:
    """A name for this kind of machine: CPU model, kernel and torch version."""
    import hashlib

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    except OSError:
        model = platform.processor()
    words = [model, platform.platform(), torch.__version__]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
