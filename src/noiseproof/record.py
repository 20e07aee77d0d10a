"""The record of a run: what was asked, what was done, what came out.

`record.json` is written when a run starts and again when it ends; reports read records only. The
identifier is computed from the specification alone, so it is the same before and after the run.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noiseproof.errors import InputError

SCHEMA_VERSION = 1
PACKAGES = ("noiseproof", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


@dataclass
class RunRecord:
    """One run. Every field is plain JSON.

    Attributes:
        spec: All settings that decide the result: data, columns, noise, model, method, training.
        id: Digest of ``spec``.
        status: running, done, failed or interrupted.
        error: One line, when failed.
        seeds: Seeds of noise, initialisation and order, as they were resolved.
        data: Rows and classes, fingerprint, label names, split sizes, validation kind.
        noise: Injected noise: spec, seed, realised rate and matrix; realised rate against the truth
            where it is known.
        model: Name, parameters, trained parameters, precision, device, processes.
        timings: train_s, score_s, eval_s, total_s; cpu_s is processor time, all threads together.
        peak_memory_mb: Highest resident memory of the process.
        metrics: Last epoch unless the name says otherwise.
        ood: Test sets from elsewhere by name: rows, accuracy, macro_f1, mcc, ece and nll.
        per_class: Precision, recall, F1 and support of each class on the test set.
        confusion: Test rows by true (row) and predicted (column) class (C, C).
        modes: The test set in other ways in which the deployed model can answer, by name.
        findings: What the method found out about its model.
        curves: How well wrong rows are found: ``roc`` and ``pr``, lists of points; and ``losses``:
            points of loss, share of the right rows, share of the wrong rows.
        labels: Names that a grid gave this cell: grid, data, noise, method, ...
        search: How the settings were found: trials, failed, seconds, space, split, metric, score,
            best.
        versions: Python, packages, platform, git revision.
        schema_version: Of this file.
    """

    spec: dict[str, Any]
    id: str = ""
    status: str = "running"
    error: str | None = None
    seeds: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    ood: dict[str, dict[str, Any]] = field(default_factory=dict)
    modes: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    per_class: dict[str, Any] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Fill in the identifier."""
        self.id = self.id or spec_id(self.spec)

    def write(self, folder: Path) -> None:
        """Write ``record.json`` into the run's folder, atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        # Rows of numbers stay on one line; a raw line break is never inside a JSON string.
        text = re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda found: " ".join(found[0].split()), text)
        write_atomic(folder / "record.json", text + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the record of a run.

        Raises:
            InputError: There is no record, or it is of another schema.
        """
        path = Path(folder) / "record.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a run: record.json is missing; give the folder that "
                "'noiseproof fit --out' wrote"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is no record: expected names and values")
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {version}, this noiseproof reads {SCHEMA_VERSION}"
            )
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def spec_id(spec: Mapping[str, Any]) -> str:
    """Digest of a specification, independent of the order of its keys.

    >>> spec_id({"a": 1, "b": [2]}) == spec_id({"b": [2], "a": 1})
    True
    """
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(asked: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings in which two specifications differ, nested names with dots."""
    names: list[str] = []
    for name in sorted({*asked, *found}):
        one, two = asked.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            names += differences(one, two, f"{prefix}{name}.")
        elif one != two:
            names.append(f"{prefix}{name} ({two!r} then, {one!r} now)")
    return names


def prepare_folder(
    folder: Path, record: RunRecord, *, resume: bool, overwrite: bool
) -> RunRecord | None:
    """Make the run's folder, or check that what is there may be continued or replaced.

    Returns:
        The record of the run to continue, if there is one.

    Raises:
        InputError: It cannot be written, holds something, or holds a run of another specification.
    """
    if resume and (folder / "record.json").exists():
        found = RunRecord.read(folder)
        if found.id != record.id:
            changed = ", ".join(differences(record.spec, found.spec)) or "unknown"
            raise InputError(f"cannot resume {folder}: its settings differ in {changed}")
        if found.status == "done":
            raise InputError(f"{folder} is finished; nothing is left to resume")
        return found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite and not (resume and folder.is_dir() and _only_leftovers(folder)):
            raise InputError(
                f"{folder} exists; choose another --out, --resume it, or give --overwrite"
            )
        if overwrite:
            _require_run(folder)
    make_writable(folder)
    return None


def make_writable(folder: Path) -> None:
    """Make a folder, and try that it can be written to.

    Raises:
        InputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


@contextmanager
def empty_folders_removed(folders: Sequence[Path]) -> Iterator[None]:
    """What is refused leaves none of these folders behind empty, the innermost first."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something is in it, or in those around it
            for folder in folders:
                folder.rmdir()
        raise


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those around it that do not exist yet, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def same_data(earlier: RunRecord, record: RunRecord, folder: Path | None) -> None:
    """Refuse to continue a run on rows that have changed since.

    Raises:
        InputError: The fingerprints differ.
    """
    then, now = earlier.data.get("fingerprint"), record.data["fingerprint"]
    if then is not None and then != now:
        raise InputError(
            f"cannot resume {folder}: the training rows have changed since it started; "
            "choose another --out, or give --overwrite"
        )


def _only_leftovers(folder: Path) -> bool:
    """Whether a run was killed before it wrote its first record."""
    return all(path.name.startswith(".") for path in folder.iterdir())


RUN_FILES = ("record.json", "history.csv", "samples.parquet", "suspects.csv", "transition.json")


def _require_run(folder: Path) -> None:
    """Refuse to overwrite what is no run."""
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    if any(folder.iterdir()) and not (folder / "record.json").exists():
        raise InputError(
            f"{folder} holds files but no run; --overwrite replaces runs only, choose another --out"
        )


def clear_run(folder: Path) -> None:
    """Remove what a run leaves behind, and nothing else."""
    import shutil

    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write ``history.csv``: one row per stage and epoch, the union of all columns."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(folder / "history.csv", text.getvalue())


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Versions of Python, of the packages a result may depend on, and of this code."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if revision.returncode == 0:
        found["git"] = revision.stdout.strip()
    return found


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)
