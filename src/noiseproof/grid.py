"""A grid of fine-tunings, from its TOML file to its cells.

    title = "..."              # also: description, cost, baseline (a label of [methods])
    noise = ["none", "symmetric:0.4"]        # axes: data, models, noise, methods, peft,
    seeds = [0, 1, 2]                        # validation, seeds
    [job]  sample = 2000                     # fields of Job for every cell
    [train]  epochs = 10                     # fields of TrainSettings for every cell
    [data.trec]  data = "train.csv"  test = "test.csv"
    [methods.GCE]  name = "GCE"  q = 0.7     # a method, METHOD:PRESET or a peer, and settings
    [[part]]  noise = ["pairflip:0.4"]       # a product of its own; axes not named are as above
    [tune]  trials = 8                       # search settings on noisy rows first
    [tune.space.GCE]  learning_rate = { low = 1e-4, high = 1e-2, log = true }

A cell is one value of each axis. The same file gives the same cells in the same order.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError, check_type, path_of, unknown_name
from noiseproof.job import OPT_IN, Job
from noiseproof.method import Method, require
from noiseproof.methods import METHODS
from noiseproof.peers import PEERS, Peer, find_peer
from noiseproof.record import spec_id
from noiseproof.tables import is_missing
from noiseproof.tasks import find_task

AXES = ("data", "models", "noise", "methods", "peft", "validation", "seeds")
WORDS = ("title", "description", "cost", "baseline")
TABLES = ("job", "train", "data", "methods", "part", "tune")
TUNE = ("trials", "share", "seed", "metric", "space", "train")
BUDGET = {"seed": 1000, "trials": 8, "share": 0.1}
HIDDEN = {
    "test",
    "test_ood",
    "test_noise",
    "clean_label",
    "validation",
    "validation_labels",
    *OPT_IN,
}
"""Fields of a job that trials do without."""
AS_METHOD = "as the method says"  # the peft axis left alone


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of a grid.

    Attributes:
        labels: Value of each axis, by name; how reports call the cell.
        job: Fields of `Job`, as the grid gives them; the settings of training are under ``train``.
        method: Name of a method, METHOD:PRESET, or name of a peer.
        settings: Settings of the method that differ from its preset.
        search: How ``settings`` were found, for the record.
    """

    labels: dict[str, str]
    job: dict[str, Any]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    def made(self) -> tuple[Job, Peer | None]:
        """The job, checked, and the peer that runs it in the place of our own loop.

        Raises:
            InputError: A name or a value is wrong; the line begins with the cell.
        """
        try:
            fields = dict(self.job)
            train = typed(TrainSettings(), fields.pop("train", {}), "train")
            method, peer = method_of(self.method, self.settings)
            return Job(method=method, train=train, **checked(Job, fields, "job")), peer
        except InputError as error:
            raise InputError(f"{self.title}: {error}") from error

    @property
    def title(self) -> str:
        """The cell in a line."""
        silent = ["grid", "seed"]
        if self.labels["validation"] == "none":
            silent.append("validation")
        shown = [value for name, value in self.labels.items() if name not in silent]
        return " ".join([*shown, f"seed {self.labels['seed']}"])

    def id(self) -> str:
        """Identifier of the run, from the specification alone."""
        return self._id

    @cached_property
    def _id(self) -> str:
        return spec_id(self.spec())

    def spec(self) -> dict[str, Any]:
        """The specification that the record of the run holds."""
        job, peer = self.made()
        return job.spec() | ({} if peer is None else {"method": peer.to_dict()})

    def folder(self) -> str:
        """Name of the run's folder: readable, and another one for other settings."""
        names = ("data", "noise", "method", "peft", "validation", "trial")
        words = [self.labels[name] for name in names if self.labels.get(name, "none") != "none"]
        readable = re.sub(r"[^\w.]+", "-", "_".join([*words, f"seed{self.labels['seed']}"]))
        return f"{readable[:96]}_{self.id()[:8]}"


@dataclass(frozen=True)
class Search:
    """Trials of one method on one data set: the same number for every method.

    Attributes:
        trials: Cells to run; each is measured on rows held out of its training rows.
        metric: Number of the held-out rows in the record of a trial, the higher the better.
        space: As the grid gives it.
        share: Of the training rows that is held out, with their noisy labels.
    """

    trials: tuple[Cell, ...]
    metric: str
    space: dict[str, Any]
    share: float


@dataclass(frozen=True)
class Grid:
    """What a grid file says.

    Attributes:
        title: A line.
        description: A paragraph.
        cost: What the whole grid is estimated to cost.
        baseline: Label of the method that the others are compared with.
        cells: Cells to run, seeds outermost; settings that are searched are not in them yet.
        searches: By place in ``cells``: the search whose best settings the cell takes.
        file: Where it was read from.
        whole: The grid of all parts, where only some are to run.
    """

    title: str
    description: str
    cost: str
    baseline: str | None
    cells: tuple[Cell, ...]
    searches: dict[int, Search]
    file: str = ""
    whole: Grid | None = None


def read_grid(path: str | Path, only: Sequence[str] = ()) -> Grid:
    """Read a grid file.

    Args:
        path: A TOML file.
        only: Names of parts; the others are not to run.

    Raises:
        InputError: It cannot be read, or names what does not exist.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    path = path_of(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"the grid {path} does not exist; expected a TOML file") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read the grid {path}: {reason or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the grid {path} is not valid TOML: {error}") from error
    try:
        return dataclasses.replace(parse_grid(values, only), file=str(path))
    except InputError as error:
        raise InputError(f"grid {path}: {error}") from error


def parse_grid(values: Mapping[str, Any], only: Sequence[str] = ()) -> Grid:
    """Make the cells of a grid from its values; see `read_grid`."""
    # At the top, "data" and "methods" are tables; in a part they choose from these by name.
    _known("setting", values, (*WORDS, *TABLES, *AXES))
    for name in TABLES:
        expected = list if name == "part" else dict
        require(
            isinstance(values.get(name, expected()), expected),
            f"{name} must be {'[[part]] tables' if name == 'part' else 'a table'}",
        )
    for name in ("data", "methods"):
        require(bool(values.get(name)), f"give at least one [{name}.NAME] table")
        _tables(values[name], name)
    baseline = values.get("baseline")
    if baseline is not None:
        check_type("baseline", baseline, str)
        _known("baseline", [baseline], values["methods"])
    parts = values.get("part", [{}])
    for part in parts:
        require(isinstance(part, dict), f"part must be [[part]] tables, got {part!r} among them")
        _tables({name: part[name] for name in ("job", "train") if name in part}, "part")
    names = [str(part.get("name", number + 1)) for number, part in enumerate(parts)]
    for name in only:
        _known("part", [name], names)
    cells: list[Cell] = []
    searches: dict[int, Search] = {}
    found: dict[str, Cell] = {}
    for name, part in zip(names, parts, strict=True):
        if only and name not in only:
            continue  # `whole` has it
        for cell in _product(values, part, str(part.get("name", ""))):
            other = found.setdefault(cell.id(), cell)
            if other is not cell:  # parts may overlap, but one run cannot have two names
                same = other.labels == cell.labels
                require(same, f"{cell.title} and {other.title} are the same run")
                continue
            search = _search(values.get("tune"), cell)
            if search is not None:
                searches[len(cells)] = search
            cells.append(cell)
    require(bool(cells), "has no cells")
    return Grid(
        title=str(values.get("title", "Benchmark")),
        description=str(values.get("description", "")),
        cost=str(values.get("cost", "")),
        baseline=baseline,
        cells=tuple(cells),
        searches=searches,
        whole=parse_grid(values) if only else None,
    )


def _product(values: Mapping[str, Any], part: Mapping[str, Any], name: str) -> Iterator[Cell]:
    """Cells of one part, seeds outermost, so that an unfinished grid shows every method."""
    _known("setting of a part", part, ("name", "job", "train", *AXES))
    defaults: dict[str, Any] = {
        "data": list(values["data"]),
        "methods": list(values["methods"]),
        "models": ["minilm"],
        "noise": ["none"],
        "peft": [AS_METHOD],
        "validation": ["none"],
        "seeds": [0],
    }
    axes: dict[str, list[Any]] = {}
    for axis in AXES:
        top = values.get(axis) if axis not in ("data", "methods") else None
        chosen = part.get(axis, top)
        axes[axis] = defaults[axis] if chosen is None else chosen
        require(
            isinstance(axes[axis], list) and len(axes[axis]) > 0,
            f"{axis} must be a list of one or more values, got {axes[axis]!r}",
        )
        for value in axes[axis]:
            check_type(f"each value of {axis}", value, int if axis == "seeds" else str)
    for axis in ("data", "methods"):
        _known(axis, axes[axis], values[axis])
    for seed in axes["seeds"]:
        for data in axes["data"]:
            for model in axes["models"]:
                for noise in axes["noise"]:
                    for validation in axes["validation"]:
                        for method in axes["methods"]:
                            for peft in axes["peft"]:
                                chosen = (data, model, noise, validation, method, peft, seed)
                                labels = dict(zip(
                                    ("data", "model", "noise", "validation", "method", "peft",
                                     "seed"), map(str, chosen), strict=True))  # fmt: skip
                                yield _cell(values, part, name, labels)


def _tables(given: Mapping[str, Any], owner: str) -> None:
    """Refuse a plain value where a table of settings belongs."""
    for name, value in given.items():
        require(
            isinstance(value, dict),
            f"{owner}.{name} must be a table of settings, got {value!r}; write [{owner}.{name}] "
            "and the settings under it",
        )


def _cell(
    values: Mapping[str, Any], part: Mapping[str, Any], name: str, labels: dict[str, str]
) -> Cell:
    settings = dict(values["methods"][labels["method"]])
    require("name" in settings, f"[methods.{labels['method']}] needs a name")
    method = str(settings.pop("name"))
    if labels["peft"] == AS_METHOD:
        labels["peft"] = ""
    else:
        settings[_peft_field(method)] = labels["peft"]
    train = {**values.get("train", {}), **part.get("train", {})}
    train["seed"] = int(labels["seed"])
    job = {**values.get("job", {}), **values["data"][labels["data"]], **part.get("job", {})}
    file = job.pop("validation", None)
    if labels["validation"] != "none":
        kind, _, share = labels["validation"].partition(":")
        train.setdefault("select", "best")
        require(
            kind in ("clean", "noisy"),
            f"validation must be none, clean, noisy or noisy:SHARE, got {labels['validation']!r}",
        )
        require(
            bool(share) or file is not None,
            f"validation {kind!r} needs a file: give 'validation' in [data.{labels['data']}]",
        )
        job |= {"validation": share or file, "validation_labels": kind}
    job |= {"model": labels["model"], "noise": labels["noise"], "train": train}
    title = {"grid": str(values.get("title", "")), "part": name}
    shown = {n: v for n, v in (title | labels).items() if v}
    return Cell(shown, job, method, settings)


def _peft_field(method: str) -> str:
    """The setting that holds the adapter family of a method."""
    chosen = METHODS.get(method.partition(":")[0])
    names = [item.name for item in dataclasses.fields(chosen)] if chosen else []
    for name in ("tune", "peft"):
        if name in names:
            return name
    raise InputError(f"the axis 'peft' does not fit {method}: it has no adapter setting")


def missing_files(grid: Grid) -> list[str]:
    """Files of rows that the grid names and that do not exist, each once."""
    named: dict[str, None] = {}
    for cell in grid.cells:
        for name in ("data", "test", "test_ood", "validation", "noise_pool"):
            given = cell.job.get(name)
            places = given.values() if isinstance(given, Mapping) else [given]
            named |= dict.fromkeys(place for place in places if isinstance(place, str))
    return [place for place in named if is_missing(place)]


# --- settings ------------------------------------------------------------------------------------


def method_of(name: str, settings: Mapping[str, Any]) -> tuple[Method, Peer | None]:
    """A method with its settings, or a peer with plain cross-entropy in the method's place.

    Raises:
        InputError: Unknown name, preset or setting, or a value of the wrong type.
    """
    base, _, preset = name.partition(":")
    if base in METHODS:
        made: Method = typed(METHODS[base].preset(preset or "default"), settings, base)
        return made, None
    if base not in PEERS:
        raise InputError(unknown_name("method", base, [*METHODS, *PEERS]))
    require(not preset, f"the peer {base} has no presets, got {name!r}")
    return METHODS["CrossEntropy"](), typed(find_peer(base)(), settings, base)


def typed(base: Any, changes: Mapping[str, Any], owner: str) -> Any:
    """A copy of a settings object with changes, each checked against the type of its field.

    Raises:
        InputError: Unknown field or wrong type.
    """
    plain = dict(changes)
    nested = {}
    for name, value in changes.items():
        current = getattr(base, name, None)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            nested[name] = typed(current, plain.pop(name), f"{owner}.{name}")
    return dataclasses.replace(base, **nested, **checked(type(base), plain, owner))


def checked(kind: type[Any], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Values for fields of a dataclass, in the types of the fields.

    The string "null" stands for None, which TOML lacks.

    Raises:
        InputError: Unknown field or wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    hints = get_type_hints(kind)
    _known(f"setting of {owner}", values, [item.name for item in dataclasses.fields(kind)])
    made: dict[str, Any] = {}
    for name, value in values.items():
        if hints[name] is Any:
            made[name] = value
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=hints[name])
        try:
            parsed = parser.parse_object({"value": None if value == "null" else value})
        except (ArgumentError, TypeError, ValueError) as error:
            hint = getattr(hints[name], "__name__", None) or str(hints[name])
            raise InputError(f"{owner}.{name}: expected {hint}, got {value!r}") from error
        made[name] = parsed["value"]
    return made


def _known(what: str, given: Any, known: Any) -> None:
    """Refuse the first name that is not known."""
    for name in given:
        if name not in known:
            raise InputError(unknown_name(what, str(name), dict.fromkeys(map(str, known))))


# --- search --------------------------------------------------------------------------------------


def _search(tune: Mapping[str, Any] | None, cell: Cell) -> Search | None:
    """The trials whose best settings a cell takes; they know neither test rows nor clean labels."""
    if tune is None:
        return None
    label, seed, trials, share = cell.labels["method"], *_budget(tune, cell)
    space, metric = tune["space"][label], _metric(tune, cell)
    job = {name: value for name, value in cell.job.items() if name not in HIDDEN}
    train = {**job["train"], **tune.get("train", {}), "seed": seed, "select": "last"}
    job |= {"validation": str(share), "validation_labels": "noisy", "train": train}
    chosen = draw(space, trials, seed)
    if len(chosen) < trials:
        warnings.warn(
            f"[tune.space.{label}] holds {len(chosen)} settings, so {label} has {len(chosen)} "
            f"trials and not {trials} as the others; widen it, or lower tune.trials",
            UserWarning,
            stacklevel=2,
        )
    drawn = tuple(
        Cell(
            {**cell.labels, "validation": f"noisy:{share}", "seed": str(seed),
             "trial": str(number)},
            job, cell.method, {**cell.settings, **settings},
        )
        for number, settings in enumerate(chosen)
    )  # fmt: skip
    return Search(drawn, metric, dict(space), float(share))


def _budget(tune: Mapping[str, Any], cell: Cell) -> tuple[int, int, float]:
    """Seed, number of trials and share held out, checked."""
    _known("setting of [tune]", tune, TUNE)
    _tables({name: tune[name] for name in ("space", "train") if name in tune}, "tune")
    label = cell.labels["method"]
    space = tune.get("space", {}).get(label)
    require(
        isinstance(space, dict) and len(space) > 0,
        f"[tune] searches every method with the same number of trials: give [tune.space.{label}]",
    )
    seed, trials, share = (tune.get(name, value) for name, value in BUDGET.items())
    for name, value in BUDGET.items():
        check_type(f"tune.{name}", tune.get(name, value), type(value))
    require(0 <= seed < 2**32, f"tune.seed must lie in [0, 2^32), got {seed}")
    require(trials >= 1, f"tune.trials must be 1 or more, got {trials}")
    require(0 < share < 1, f"tune.share must lie between 0 and 1, got {share}")
    return seed, trials, share


def _metric(tune: Mapping[str, Any], cell: Cell) -> str:
    """What trials are judged by; refuses what would be measured on rows that they train on."""
    asked, _ = cell.made()
    require(
        asked.test_share is None,  # the seeds share the search, and each splits off other rows
        f"[tune] cannot go with test = {asked.test!r} of {cell.labels['data']}: trials would train "
        "on rows that the cells split off for the test; give a file of test rows",
    )
    kept = find_task(asked.task).measures.kept
    known = [name for name in kept if not name.endswith("_loss")]
    metric: str = tune.get("metric", known[0])
    require(
        metric in known,
        f"tune.metric must be {' or '.join(known)}, of the rows held out; got {metric!r}",
    )
    return metric


def draw(space: Mapping[str, Any], trials: int, seed: int) -> list[dict[str, Any]]:
    """Settings of the trials, by scikit-learn's sampler.

    Args:
        space: By setting: a list of choices, or ``{low, high, log}`` for a number.
        trials: How many; fewer where all choices are used up.
        seed: The same seed, the same settings.

    Raises:
        InputError: A range is wrong.
    """
    from scipy.stats import loguniform, uniform
    from sklearn.model_selection import ParameterSampler

    ranges: dict[str, Any] = {}
    for name, given in space.items():
        if isinstance(given, list) and given:
            ranges[name] = given
            continue
        require(isinstance(given, Mapping), f"tune.space {name}: expected a list or low and high")
        _known(f"setting of the range {name!r}", given, ("low", "high", "log"))
        low, high = given.get("low"), given.get("high")
        numbers = isinstance(low, int | float) and isinstance(high, int | float)
        right = numbers and -math.inf < low < high < math.inf
        require(
            bool(right) and (low > 0 or not given.get("log")),
            f"tune.space {name}: expected low < high (both positive with log), got {dict(given)}",
        )
        ranges[name] = loguniform(low, high) if given.get("log") else uniform(low, high - low)
    size = 1
    for given in ranges.values():
        size *= len(given) if isinstance(given, list) else trials
    found = list(ParameterSampler(ranges, min(trials, size), random_state=seed))
    return [
        {name: float(f"{value:.4g}") if isinstance(value, float) else value
         for name, value in one.items()}
        for one in found
    ]  # fmt: skip


def with_best(cell: Cell, search: Search, scores: Sequence[float | None], seconds: float) -> Cell:
    """The cell with the settings of its best trial; of equals the first.

    Args:
        cell: A cell of the grid.
        search: Its search.
        scores: Of the trials, None where one failed.
        seconds: What all trials took.

    Raises:
        InputError: All trials failed.
    """
    valid = [(score, -place) for place, score in enumerate(scores) if score is not None]
    require(bool(valid), f"{cell.title}: no trial of its search succeeded")
    score, place = max(valid)
    best = search.trials[-place].settings
    found = {
        "trials": len(search.trials),
        "failed": len(scores) - len(valid),
        "seconds": seconds,
        "space": search.space,
        "split": f"noisy, {search.share:g} of the training rows",
        "metric": search.metric,
        "score": score,
        "best": {name: best[name] for name in search.space},
    }
    return dataclasses.replace(cell, settings={**cell.settings, **best}, search=found)
