"""The precision is what this machine can do, found out once, whatever the child process suffers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from noiseproof import precision
from noiseproof.errors import InputError
from noiseproof.precision import choose_precision


class Child:
    """Stands in for `subprocess`: answers with a return code and counts the calls."""

    def __init__(self, code: int = 0, fp32: float = 1.0, bf16: float = 1.0) -> None:
        self.calls = 0
        self.code = code
        self.output = json.dumps({"fp32": fp32, "bf16": bf16})
        self.error: Exception | None = None

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[:2] == [sys.executable, "-c"] and options["timeout"] > 0
        if self.error is not None:
            raise self.error
        done = subprocess.CompletedProcess(command, self.code, self.output, "")
        if options["check"]:
            done.check_returncode()
        return done


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    """A machine that lists bf16 instructions, with an empty cache and a faked child process."""
    faked = Child()
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path / "cache"))
    lists(monkeypatch, amx=True, avx512=True)
    monkeypatch.setattr(precision, "_machine", lambda: "this")
    monkeypatch.setattr(precision.subprocess, "run", faked.run)
    return faked


def lists(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)


def test_an_illegal_instruction_means_fp32(child: Child) -> None:
    """Some virtual machines list AMX and kill the process that uses it: SIGILL in epoch 1."""
    child.code = -signal.SIGILL
    assert choose_precision("auto", "cpu") == "fp32"
    with pytest.raises(InputError, match="a bf16 product fails on this CPU"):
        choose_precision("bf16", "cpu")


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(4.0, 1.0, "bf16"), (1.2, 1.0, "fp32"), (1.0, 4.0, "fp32")]
)
def test_bf16_must_be_clearly_faster(child: Child, fp32: float, bf16: float, chosen: str) -> None:
    """A machine that runs bf16 slower loses time and digits; asked for, it gets it all the same."""
    child.output = json.dumps({"fp32": fp32, "bf16": bf16})
    assert choose_precision("auto", "cpu") == chosen
    assert choose_precision("bf16", "cpu") == "bf16"


@pytest.mark.parametrize("output", ["", "warning: no JSON", '{"fp32": 1}', "[]"])
def test_an_answer_that_is_none_means_fp32(child: Child, output: str) -> None:
    """A library that prints, or a child that answers half, must not end the run."""
    child.output = output
    assert choose_precision("auto", "cpu") == "fp32"


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("python", 120), PermissionError("no processes here")]
)
def test_a_child_that_hangs_or_cannot_start_means_fp32(child: Child, error: Exception) -> None:
    """`auto` never fails."""
    child.error = error
    assert choose_precision("auto", "cpu") == "fp32"


def test_the_machine_is_asked_once(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch in a child costs seconds, for every run of a grid."""
    child.output = json.dumps({"fp32": 4.0, "bf16": 1.0})
    assert [choose_precision("auto", "cpu") for _ in range(3)] == ["bf16"] * 3
    assert child.calls == 1
    monkeypatch.setattr(precision, "_machine", lambda: "another")
    choose_precision("auto", "cpu")
    assert child.calls == 2


def test_a_damaged_or_unwritable_memory_costs_a_second_probe(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else."""
    choose_precision("auto", "cpu")
    (path,) = (tmp_path / "cache" / "precision").iterdir()
    path.write_text("{")
    assert choose_precision("auto", "cpu") == "fp32" and child.calls == 2
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("NOISEPROOF_CACHE", str(blocked))
    assert choose_precision("auto", "cpu") == "fp32" and child.calls == 3


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True)])
def test_either_kind_of_instruction_is_worth_a_probe(
    child: Child, monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    """Server CPUs of one maker have AVX512-BF16 and no AMX: training would be half as fast."""
    lists(monkeypatch, amx=amx, avx512=avx512)
    child.output = json.dumps({"fp32": 2.0, "bf16": 1.0})
    assert choose_precision("auto", "cpu") == "bf16" and child.calls == 1


def test_without_the_instructions_nothing_is_probed(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most CPUs: no child process, no delay."""
    lists(monkeypatch, amx=False, avx512=False)
    assert choose_precision("auto", "cpu") == "fp32"
    assert choose_precision("fp32", "cpu") == "fp32"
    assert child.calls == 0


def test_names_and_devices_are_checked() -> None:
    """fp16 on a CPU is slow and underflows; an unknown name must not mean fp32."""
    with pytest.raises(InputError, match="unknown precision 'half'; available: auto, fp32"):
        choose_precision("half", "cpu")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        choose_precision("fp16", "cpu")
    assert choose_precision("fp16", "cuda") == "fp16"
    assert choose_precision("auto", "mps") == "fp32"


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_gets_bf16_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, chosen: str
) -> None:
    """Older GPUs emulate bf16, slowly."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: supported)
    assert choose_precision("auto", "cuda") == chosen


def test_the_probe_is_a_program_that_runs() -> None:
    """A typing error in its text would mean fp32 everywhere, for ever."""
    small = precision._PROBE.replace("512", "4").replace("1536", "4").replace("384", "4")
    small = small.replace("bfloat16", "float32")
    done = subprocess.run(
        [sys.executable, "-c", small], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout).keys() == {"fp32", "bf16"}
