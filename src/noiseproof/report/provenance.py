"""What was run, and at what cost: data, models, noise, searches, versions, time, runs left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from noiseproof.report.blocks import (
    MISSING,
    Block,
    Cell,
    Column,
    Facts,
    Section,
    Table,
    percent,
    quantity,
)
from noiseproof.report.measures import Grid, noise_rate
from noiseproof.report.runs import Found, Group, Run, as_number, natural

NAMED = ("part", "data", "model", "noise", "validation", "method", "peft", "trial")
"""What names a cell of a grid, beside its seed."""


def seconds(name: str) -> Callable[[Run], float | None]:
    """Takes a timing from a run."""
    return lambda run: run.timing(name)


COSTS: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("Train s", "Seconds of training steps.", seconds("train_s")),
    ("Score s", "Seconds of scoring rows for the method.", seconds("score_s")),
    ("Eval s", "Seconds of measuring.", seconds("eval_s")),
    ("Total s", "Seconds of the whole run.", seconds("total_s")),
    ("CPU s", "Processor seconds of all threads.", seconds("cpu_s")),
    ("Peak MB", "Highest resident memory.", lambda run: as_number(run.record.peak_memory_mb)),
    ("Trained", "Parameters that training changes.",
     lambda run: as_number(run.record.model.get("trained_parameters"))),
    ("Parameters", "All parameters of the model.",
     lambda run: as_number(run.record.model.get("parameters"))),
)  # fmt: skip


def facts(grid: Grid, why: str) -> list[Block]:
    """What was run, in a few lines; ``why`` says where the baseline comes from."""
    runs = grid.found.runs
    states = Counter(left.status for left in grid.found.left_out)
    counts = ", ".join([f"{len(runs)} done", *(f"{n} {state}" for state, n in states.items())])
    kinds = sorted({run.names["validation"] for run in runs})
    settings = [("epochs", "train.epochs"), ("batch size", "train.batch_size")]
    training = [f"{name} {_span(run.setting(key) for run in runs)}" for name, key in settings
                if any(run.setting(key) is not None for run in runs)]  # fmt: skip
    items = [
        ("Runs", counts),
        ("Data", "; ".join(dict.fromkeys(map(_data, runs)))),
        ("Training", ", ".join(training)),
        ("Seeds", ", ".join(sorted({run.seed for run in runs}, key=natural))),
        ("Validation", ", ".join(map(_validation, kinds))),
        ("Tuning", _tuning(runs)),
        ("Baseline", f"{grid.baseline} ({why})" if grid.baseline else why or "none"),
    ]
    plan = [
        ("Model", "; ".join(dict.fromkeys(map(_model, runs)))),
        ("Grid", grid.found.grid.get("file", "")),
        ("Planned cost", grid.found.grid.get("cost", "")),
    ]
    return [
        Facts([(name, value) for name, value in items if value]),
        Facts([(name, value) for name, value in plan if value], folded="Model and grid"),
    ]


def cost(grid: Grid) -> Section:
    """Time, memory and size by data and method."""
    several = len({(run.names["data"], run.names["model"]) for run in grid.found.runs}) > 1
    columns = [Column("Method", numeric=False), Column("Runs")]
    if several:
        columns.insert(1, Column("Data and model", numeric=False))
    by: dict[tuple[str, str], list[Run]] = {}
    for run in grid.found.runs:
        place = f"{run.names['data']}, {run.names['model']}" if several else ""
        by.setdefault((run.row, place), []).append(run)
    names = sorted(by, key=lambda name: (grid.rows.index(name[0]), natural(name[1])))
    heads = [
        [*map(Cell, name[: 1 + several]), Cell(str(len(by[name])), value=len(by[name]))]
        for name in names
    ]
    columns += [Column(title, meaning) for title, meaning, _ in COSTS]
    table = [
        [*head, *(_mean_cell(by[name], of) for _, _, of in COSTS)]
        for head, name in zip(heads, names, strict=True)
    ]
    shown = [i for i in range(len(columns)) if any(row[i].text != MISSING for row in table)]
    total = sum(run.timing("total_s") or 0 for run in grid.found.runs) / 3600
    note = f"Means over runs. All finished runs together took {quantity(total)} hours."
    searches = {_settings(run.record.search): run.record.search for run in grid.found.runs}
    spent = sum(as_number(search.get("seconds")) or 0 for search in searches.values()) / 3600
    if spent:
        note += f" The trials of their searches, which runs share, took {quantity(spent)} more."
    return Section(
        "Cost",
        [Table([columns[i] for i in shown], [[row[i] for i in shown] for row in table], note)],
    )


def what_was_run(grid: Grid) -> Section:
    """Noise as it was realised, tuning by method, versions."""
    blocks: list[Block] = []
    noise = [row for group in grid.cells if (row := _noise(grid, group))]
    if noise:
        columns = [Column("Setting", numeric=False), Column("Realised rate, %"), Column("Range, %"),
                   Column("Noise seeds", numeric=False)]  # fmt: skip
        note = "Share of training rows whose label is wrong, as counted after the noise was made."
        blocks.append(Table(columns, noise, note, "Noise"))
    search = search_table(grid.found.runs)
    if search:
        blocks.append(search)
    blocks.append(Facts(versions(grid.found.runs)))
    return Section("What was run", blocks)


def search_table(runs: Sequence[Run]) -> Table | None:
    """How settings were searched, by method; None if none were."""
    if not any(run.record.search for run in runs):
        return None
    titles = ("Method", "Trials", "Chosen on", "Seconds", "Space", "Chosen")
    columns = [Column(title, numeric=title in ("Trials", "Seconds")) for title in titles]
    rows = []
    for row in dict.fromkeys(run.row for run in runs):
        found = [run.record.search for run in runs if run.row == row]
        chosen = Counter(_settings(search.get("best")) for search in found if search)
        best = "; ".join(
            f"{text} ({n} of {len(found)})" if len(chosen) > 1 else text
            for text, n in chosen.most_common()
        )
        spent = [s for search in found if (s := as_number(search.get("seconds"))) is not None]
        mean = fmean(spent) if spent else None
        rows.append(
            [
                Cell(row),
                Cell(_span(search.get("trials", 0) for search in found)),
                Cell(_span(search.get("split", MISSING) for search in found)),
                Cell(quantity(mean), value=mean),
                Cell("; ".join(dict.fromkeys(_settings(s.get("space")) for s in found))),
                Cell(best or MISSING),
            ]
        )
    return Table(columns, rows, "Trials per run.", "Search for settings")


def versions(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Versions that the runs were made with, all of them where they differ."""
    known: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.record.versions.items():
            known.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(found)) for name, found in known.items()]


def left_out(found: Found) -> Section:
    """Runs that are in no table, each with its reason; seeds of a cell share a line."""
    section = Section("Runs left out")
    if found.left_out:
        states = Counter(left.status for left in found.left_out)
        seeds: dict[tuple[str, str, str], list[str]] = {}
        for left in found.left_out:
            told = (left.labels.get(name, "") for name in NAMED)
            names = [label for label in told if label not in ("", "none")]
            name = " · ".join(names) or str(left.folder)
            known = seeds.setdefault((name, left.status, left.reason), [])
            known += [left.labels["seed"]] if names and "seed" in left.labels else []
        columns = [Column(name, numeric=False) for name in ("Run", "Status", "Reason")]
        rows = [
            [Cell(f"{name}, seed {', '.join(own)}" if own else name), Cell(status), Cell(reason)]
            for (name, status, reason), own in seeds.items()
        ]
        counts = ", ".join(f"{number} {state}" for state, number in states.items())
        section.blocks.append(Table(columns, rows, folded=counts))
    return section


def _noise(grid: Grid, group: Group) -> list[Cell] | None:
    runs = grid.runs(group)
    rates = [rate for run in runs if (rate := noise_rate(run)) is not None]
    if not rates:
        return None
    mean = fmean(rates)
    seeds = sorted({str(run.record.seeds.get("noise", MISSING)) for run in runs}, key=natural)
    return [
        Cell(grid.name(group)),
        Cell(percent(mean), value=mean),
        Cell(f"{percent(min(rates))} to {percent(max(rates))}", value=max(rates) - min(rates)),
        Cell(", ".join(seeds)),
    ]


def _mean_cell(runs: Sequence[Run], of: Callable[[Run], float | None]) -> Cell:
    values = [value for run in runs if (value := of(run)) is not None]
    mean = fmean(values) if values else None
    return Cell(quantity(mean), value=mean)


def _data(run: Run) -> str:
    data = run.record.data
    names = (("rows", "training"), ("validation_rows", "validation"), ("test_rows", "test"))
    parts = [f"{quantity(size)} {name}" for key, name in names
             if (size := as_number(data.get(key)))]  # fmt: skip
    classes = as_number(data.get("classes"))
    rows = f": {', '.join(parts)} rows" if parts else ""
    return f"{run.names['data']}{rows}" + (
        f", {quantity(classes)} classes" if classes and classes > 1 else ""
    )


def _model(run: Run) -> str:
    model = run.record.model
    size = as_number(model.get("parameters"))
    parts = [f"{quantity(size)} parameters" if size else "", str(model.get("precision") or ""),
             str(model.get("device") or "")]  # fmt: skip
    told = ", ".join(part for part in parts if part)
    return f"{run.names['model']} ({told})" if told else run.names["model"]


def _validation(kind: str) -> str:
    name, _, share = kind.partition(":")
    words = {"clean": "rows with right labels", "noisy": "rows with noisy labels"}.get(name, name)
    return f"{words} ({share} of the training rows)" if share else words


def _tuning(runs: Sequence[Run]) -> str:
    found = [run for run in runs if run.record.search]
    if not found:
        return "none recorded: settings as given"
    trials: dict[str, set[str]] = {}
    for run in runs:
        trials.setdefault(str(run.record.search.get("trials", 0)), set()).add(run.row)
    if len(trials) == 1:
        return f"{next(iter(trials))} trials for every method, shared by its seeds"
    unequal = "; ".join(f"{n}: {', '.join(sorted(rows))}" for n, rows in trials.items())
    return f"unequal numbers of trials ({unequal})"


def _settings(values: object) -> str:
    """Settings, or a space of them, in words.

    >>> _settings({"rate": {"low": 0.1, "high": 1, "log": True}, "q": [0.5, 0.7]})
    'rate 0.1 to 1 (log), q 0.5 or 0.7'
    """
    if not isinstance(values, dict):
        return MISSING if values in (None, "", []) else str(values)
    words = []
    for name, value in values.items():
        if isinstance(value, dict) and {"low", "high"} <= set(value):
            log = " (log)" if value.get("log") else ""
            words.append(f"{name} {value['low']} to {value['high']}{log}")
        elif isinstance(value, list):
            words.append(f"{name} {' or '.join(map(str, value))}")
        else:
            words.append(f"{name} {value}")
    return ", ".join(words) or MISSING


def _span(values: Iterable[object]) -> str:
    """Different values in their order."""
    return ", ".join(sorted({str(value) for value in values if value is not None}, key=natural))
