"""Find runs in folders, and give each its place: setting, method, seed.

A grid names its cells in `RunRecord.labels`. Where a record has no such names they come from its
settings, made longer only as far as two different settings would otherwise share a name.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from noiseproof.errors import InputError, path_of
from noiseproof.record import RunRecord, differences

PLACES = ("grid", "part", "data", "noise", "model", "validation")
"""What makes a setting in which methods are compared."""
FACETS = {
    "data": (
        "data", "test", "text", "label", "clean_label", "label_names", "drop_label", "row_id",
        "sample", "split", "features", "image", "on_bad_image",
    ),
    "noise": ("noise", "noise_pool"),
    "model": ("model", "task"),
    "validation": ("validation", "validation_labels"),
}  # fmt: skip
"""Which settings decide which name; all others, seeds apart, belong to the method."""
SEEDS = ("noise_seed", "train.seed", "train.init_seed", "train.order_seed")
NEUTRAL = (
    "train.device", "train.precision", "train.micro_batch_size", "train.tracker", "probe_gradients",
    "measure_distortion", "image_workers",
)  # fmt: skip
"""Settings that say how a run is done and not what is done."""
Group = tuple[str, ...]
"""Names in the order of `PLACES`."""


@dataclass(frozen=True)
class Run:
    """One run with its place in the report.

    Attributes:
        folder: Where it lies, as it was given.
        record: Its record.
        history: Rows of ``history.csv``; numbers where they are numbers.
        names: grid, part, data, noise, model, validation, method, peft and seed.
        row: The method as the tables name it.
    """

    folder: Path
    record: RunRecord
    history: tuple[Mapping[str, float | str], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    row: str = ""

    @property
    def group(self) -> Group:
        """The setting in which it is compared."""
        return tuple(self.names[place] for place in PLACES)

    @property
    def seed(self) -> str:
        """What pairs it with runs of other methods."""
        return self.names["seed"]

    def metric(self, name: str) -> float | None:
        """A metric of the record, None where it has none."""
        return as_number(self.record.metrics.get(name))

    def timing(self, name: str) -> float | None:
        """A timing of the record in seconds, None where it has none."""
        return as_number(self.record.timings.get(name))

    def curve(self, name: str) -> list[float]:
        """A column of the history (epochs,), NaN where it has no number; empty without any."""
        values = [as_number(row.get(name)) for row in self.history]
        if not any(value is not None for value in values):
            return []
        return [math.nan if value is None else value for value in values]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its name with dots, such as ``train.epochs``."""
        return flat(self.record.spec).get(name, default)


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no table, and why; ``labels`` are what its grid calls it, where it does."""

    folder: Path
    status: str
    reason: str
    run: Run | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """All runs below some folders.

    Attributes:
        runs: Finished runs, in the order of their folders.
        left_out: Runs that are failed, unfinished, damaged, or twice there.
        grid: Title, description, cost, baseline and file, as ``grid.json`` has them.
    """

    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    grid: Mapping[str, str]


def find_runs(paths: Iterable[str | Path]) -> Found:
    """Read every run below some folders.

    Raises:
        InputError: A folder does not exist, or there is no record that can be read.
    """
    roots = [_root(path) for path in paths]
    if not roots:
        raise InputError("no folder given; give folders of runs, such as runs/grid")
    grids = [_grid(root) for root in roots]
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen: set[Path] = set()
    for root, grid in zip(roots, grids, strict=True):
        folders, outside = _folders(root, grid.get("cells"))
        left_out += outside
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                record = _read(folder)
            except InputError as error:
                left_out.append(LeftOut(folder, "damaged", str(error)))
            else:
                runs.append(Run(folder, record, _history(folder)))
    if not seen:
        where = ", ".join(map(str, roots))
        raise InputError(f"no record.json in {where}; give folders that 'noiseproof fit' wrote")
    if not runs:
        raise InputError(f"none of {len(left_out)} records can be read; {left_out[0].reason}")
    done: dict[tuple[object, ...], Run] = {}
    for run in _placed(runs):
        if run.record.status != "done":
            reason = run.record.error or "not finished"
            left_out.append(LeftOut(run.folder, run.record.status, reason, run))
            continue
        key = (run.group, run.row, run.seed)
        if key in done:
            left_out.append(_copy(run, done[key]))
        else:
            done[key] = run
    words: dict[str, str] = {}
    for grid in grids:  # of several grids the first that says it
        told = ("title", "description", "cost", "baseline", "file")
        words = {name: str(grid[name]) for name in told if grid.get(name)} | words
    return Found(tuple(done.values()), tuple(left_out), words)


def as_number(value: object) -> float | None:
    """A finite number as float, anything else as None.

    >>> as_number(1), as_number("0.5"), as_number(True), as_number(float("nan"))
    (1.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dots in their names.

    >>> flat({"train": {"seed": 1}, "data": "a.csv"})
    {'train.seed': 1, 'data': 'a.csv'}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def natural(text: object) -> list[Any]:
    """Key that sorts numbers inside names by value: seed-2 before seed-10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(text))
    return [part if index % 2 == 0 else float(part) for index, part in enumerate(parts)]


# --- reading -------------------------------------------------------------------------------------


def _root(path: str | Path) -> Path:
    root = path_of(path)
    if root.name == "record.json" and root.is_file():
        root = root.parent
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}; give folders of runs, such as runs/grid")
    return root


def _folders(root: Path, cells: object) -> tuple[list[Path], list[LeftOut]]:
    """The runs below a folder; of a grid its cells alone.

    So no trial of a search, and no cell of an earlier grid, is taken for a result.
    """
    every = [file.parent for file in sorted(root.rglob("record.json"), key=natural)]
    if not isinstance(cells, list):
        return every, []
    known = [cell for cell in cells if isinstance(cell, dict)]
    theirs = {
        root / name: cell.get("labels")
        for cell in known
        if ".." not in Path(name := str(cell.get("folder"))).parts
    }
    there = [folder for folder in theirs if (folder / "record.json").is_file()]
    out = [
        LeftOut(
            folder,
            "not started",
            "a cell of the grid without a record",
            labels={str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else {},
        )
        for folder, labels in theirs.items()
        if folder not in there
    ]
    out += [
        LeftOut(folder, "not in grid", "grid.json does not name it")
        for folder in every
        if folder not in there and folder.relative_to(root).parts[0] != "trials"
    ]
    return there, out


def _read(folder: Path) -> RunRecord:
    """A record whose fields are of the kind that they should be."""
    try:
        record = RunRecord.read(folder)
    except TypeError as error:
        raise InputError(f"{folder / 'record.json'} is no record: it has no spec") from error
    for item in fields(RunRecord):
        value, model = getattr(record, item.name), getattr(RunRecord({}), item.name)
        if isinstance(model, dict | list | str) and not isinstance(value, type(model)):
            kind = {dict: "names and values", list: "a list", str: "text"}[type(model)]
            path = folder / "record.json"
            raise InputError(f"{path} is damaged: expected {item.name} to be {kind}")
    return record


def _history(folder: Path) -> tuple[Mapping[str, float | str], ...]:
    """Rows of ``history.csv``; nothing where it is missing or no table."""
    try:
        with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return ()
    return tuple(
        {
            name: _value(value)
            for name, value in row.items()
            if isinstance(name, str) and isinstance(value, str) and value
        }
        for row in rows
    )


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _grid(root: Path) -> dict[str, Any]:
    """What a grid says of itself; nothing where there is none."""
    try:
        values = json.loads((root / "grid.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _copy(run: Run, other: Run) -> LeftOut:
    """A run whose place another one has."""
    changed = differences(other.record.spec, run.record.spec)
    if not changed:
        return LeftOut(run.folder, "copy", f"the same run as {other.folder}", run)
    reason = f"the names and seed of {other.folder}, but other settings: {', '.join(changed)}"
    return LeftOut(run.folder, "clash", reason, run)


# --- naming --------------------------------------------------------------------------------------


def _placed(runs: Sequence[Run]) -> list[Run]:
    """The runs with all names."""
    labels = [{name: str(value) for name, value in run.record.labels.items()} for run in runs]
    specs = [flat(run.record.spec) for run in runs]
    sets = _ambiguous(specs)
    facets: dict[str, list[str]] = {}
    for facet in (*FACETS, "method"):
        given = [label.get(facet) for label in labels]
        short = [_short(run, facet) for run in runs]
        decisive = [_decisive(spec, facet, sets) for spec in specs]
        open_ = [index for index, name in enumerate(given) if name is None]
        derived = _distinct([short[i] for i in open_], [decisive[i] for i in open_])
        names = dict(zip(open_, derived, strict=True))
        facets[facet] = [name or names[index] for index, name in enumerate(given)]
    placed = []
    for index, run in enumerate(runs):
        names_ = {facet: found[index] for facet, found in facets.items()}
        for facet in ("grid", "part", "peft"):
            names_[facet] = labels[index].get(facet, "")
        names_["seed"] = labels[index].get("seed") or _seed(specs[index])
        if "trial" in labels[index]:  # of a search for settings
            names_["method"] += f" trial {labels[index]['trial']}"
        placed.append(replace(run, names=names_, row=names_["method"]))
    return _with_peft(placed)


def _with_peft(runs: list[Run]) -> list[Run]:
    """Add the PEFT family to the name of a method that was run with several."""
    families: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        families[run.row].add(run.names["peft"])
    return [
        replace(run, row=f"{run.row} · {run.names['peft']}")
        if len(families[run.row]) > 1 and run.names["peft"]
        else run
        for run in runs
    ]


def _short(run: Run, facet: str) -> str:
    """The short name of a facet, from the settings."""
    spec = run.record.spec
    if facet == "data":
        return os.path.basename(str(spec.get("data", "")).rstrip("/")) or "data"
    if facet == "validation":
        return str(run.record.data.get("validation") or _validation(spec))
    if facet == "method":
        method = spec.get("method", "")
        return str(method.get("name", "") if isinstance(method, dict) else method) or "method"
    value = spec.get(facet)
    if facet == "model":
        value = os.path.basename(str(value or run.record.model.get("name") or "").rstrip("/"))
    return str(value or "none")


def _validation(spec: Mapping[str, Any]) -> str:
    """The kind of the validation rows, of a run that ended before it read them."""
    given = spec.get("validation")
    if given is None:
        return "none"
    try:
        float(given)  # a share of the training rows
    except (TypeError, ValueError):
        return str(spec.get("validation_labels") or "none")
    return "noisy"


def _is_other_set(name: str) -> bool:
    return name == "test_noise" or name.startswith("test_ood.")


def _ambiguous(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Further test sets that are not the same rows in all runs that measure them.

    Further test sets change nothing of a run: with and without one it is compared with the others.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for spec in specs:
        for name, value in spec.items():
            if _is_other_set(name) and not isinstance(value, list):  # whose names tell the noise
                sources[name].add(str(value))
    return [name for name, found in sources.items() if len(found) > 1]


def _decisive(spec: Mapping[str, Any], facet: str, sets: Sequence[str]) -> dict[str, Any]:
    """The settings that decide a facet; these test sets belong to the data."""
    if facet != "method":
        names = [*FACETS[facet], *(sets if facet == "data" else ())]
        return {name: spec.get(name) for name in names}
    others = {name for names in FACETS.values() for name in names} | {*SEEDS, *NEUTRAL}
    return {
        name: value
        for name, value in spec.items()
        if name not in others and not _is_other_set(name)
    }


def _distinct(short: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that differ where the settings do, by as few settings as possible.  (n,), (n,) -> (n,).

    >>> _distinct(["a", "a", "b"], [{"x": 1, "y": 0}, {"x": 2, "y": 5}, {"x": 3}])
    ['a (x=1)', 'a (x=2)', 'b']
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(short):
        alike[name].append(index)
    names = list(short)
    for indices in alike.values():
        chosen: list[str] = []
        for key in dict.fromkeys(key for index in indices for key in settings[index]):
            if _kinds(settings, indices, [*chosen, key]) > _kinds(settings, indices, chosen):
                chosen.append(key)
        for index in indices:
            told = []
            for key in chosen:
                value = settings[index].get(key)
                if key in ("data", "model"):
                    others = [str(settings[other].get(key)) for other in indices]
                    names[index] = _tail(str(value), others)
                else:
                    told.append(f"{key.removeprefix('method.')}={_told(value)}")
            names[index] += f" ({', '.join(told)})" if told else ""
    return names


def _kinds(
    settings: Sequence[Mapping[str, Any]], indices: Sequence[int], keys: Sequence[str]
) -> int:
    """How many different values some settings have."""
    return len({json.dumps([settings[index].get(key) for key in keys]) for index in indices})


def _told(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _tail(path: str, paths: Iterable[str]) -> str:
    """The end of a path that no other path shares.

    >>> _tail("x/trec/train.csv", ["x/trec/train.csv", "x/news/train.csv"])
    'trec/train.csv'
    """
    others = [other.split("/") for other in set(paths) - {path}]
    parts = path.split("/")
    for size in range(1, len(parts)):
        if all(other[-size:] != parts[-size:] for other in others):
            return "/".join(parts[-size:])
    return path


def _seed(spec: Mapping[str, Any]) -> str:
    """The seed of a run, with the seeds that were given apart from it."""
    apart = [
        f"{name.removeprefix('train.').removesuffix('_seed')} {spec[name]}"
        for name in SEEDS
        if name != "train.seed" and spec.get(name) is not None
    ]
    return ", ".join([str(spec.get("train.seed", "")), *apart])
