"""What a study is, and what may be asked of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from noiseproof.demo import demo_job
from noiseproof.job import NO_MODEL
from noiseproof.method import require
from noiseproof.report.blocks import Report
from noiseproof.report.runs import Found
from noiseproof.tasks import find_task

SIZES = ("small", "default", "full")


@dataclass(frozen=True)
class Asked:
    """What a study is run on, and how much of it; None leaves it to the size.

    Attributes:
        data: Training rows, as for `Job`; None takes the customer messages of the demo.
        text: Text column, or two of them as "first,second".
        label: Column of the given labels.
        test: Test rows: a file, or a share that is split off.
        clean_label: Column of the true labels, where the data are noisy themselves.
        models: Pre-trained models; to look at spectra also folders of finished runs.
        size: One of `SIZES`.
        seeds: Seeds of the runs.
        noise: Kinds of noise; the first that is not ``none`` is the one of the closer looks.
        parts: What the study varies, by its own names; empty takes all.
        sample: Training rows.
        epochs: Epochs of a run.
        batch_size: Rows per step.
        device: auto or cpu.
        task: Kind of row.
        column: Column or array of images or features, where the rows are such; None takes the usual
            name.
        preprocess: What is done to features before their spectrum is taken.
    """

    data: str | None = None
    text: str = "text"
    label: str = "label"
    test: str | None = None
    clean_label: str | None = None
    models: tuple[str, ...] = (NO_MODEL,)
    size: str = "default"
    seeds: tuple[int, ...] = ()
    noise: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    sample: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    task: str = "text"
    column: str | None = None
    preprocess: str = "code"

    def __post_init__(self) -> None:
        """Check what no study can do without."""
        find_task(self.task)
        require(
            self.data is not None or self.task == "text",
            f"the messages of the demo are texts, got task={self.task!r}; give DATA",
        )
        require(
            self.task != "text" or self.column is None,
            f"column is for images and features, got {self.column!r}; name texts with text",
        )
        require(self.size in SIZES, f"size must be one of {', '.join(SIZES)}; got {self.size!r}")
        require(
            self.data is not None or (self.test, self.clean_label) == (None, None),
            "test and clean_label belong to data of your own; give DATA, or leave them out",
        )

    def rows(self) -> dict[str, Any]:
        """The data as a table of a grid: options of fit."""
        if self.data is None:
            demo = demo_job()
            return {"data": demo.data, "test": demo.test, "label": demo.label}
        found = {"data": self.data, "text": self.text, "label": self.label}
        found |= {} if self.task == "text" else {"task": self.task, **self.where}
        more = {"test": self.test, "clean_label": self.clean_label}
        return found | {name: value for name, value in more.items() if value is not None}

    @property
    def where(self) -> dict[str, str]:
        """The setting that names the column of the inputs, where one was given."""
        return {} if self.column is None else {find_task(self.task).column: self.column}

    @property
    def data_name(self) -> str:
        """What the data are called."""
        return "customer messages" if self.data is None else Path(self.data).stem or self.data


class Named:
    """What every study is called.

    Attributes:
        name: On the command line.
        title: Of its page.
        summary: One line on what it asks.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]


class Study(Named, ABC):
    """A claim about fine-tuning on noisy labels, tested on a grid of runs."""

    @abstractmethod
    def grid(self, asked: Asked) -> dict[str, Any]:
        """The runs, as the values of a grid file; see `noiseproof.grid`."""

    @abstractmethod
    def report(self, found: Found) -> Report:
        """The page, from the records alone; what is missing is said there."""


class Survey(Named, ABC):
    """A study that is no grid: it measures what it needs itself, and shows what it found."""

    @abstractmethod
    def measure(self, asked: Asked, folder: Path) -> None:
        """Measure, and write a record of it into a folder."""

    @abstractmethod
    def pages(self, folder: Path) -> list[Path]:
        """Write the pages from the record in a folder.

        Raises:
            InputError: There is none.
        """


def common(
    study: Study,
    asked: Asked,
    *,
    rows: int,
    epochs: int,
    seeds: Sequence[int],
    noise: Sequence[str],
) -> dict[str, Any]:
    """What the grids of all studies have in common; the numbers are those of the size.

    Args:
        study: Gives title and description.
        asked: Goes first wherever it says something.
        rows: Training rows, where the data have clearly more.
        epochs: Of a run.
        seeds: Of the runs.
        noise: Kinds of noise.
    """
    train: Mapping[str, Any] = {"epochs": asked.epochs or epochs, "device": asked.device}
    if asked.batch_size is not None:
        train = {**train, "batch_size": asked.batch_size}
    table = asked.rows()
    sample = asked.sample or (rows if rows < 0.9 * available(table) else None)
    return {
        "title": study.title,
        "description": study.summary,
        "models": list(asked.models),
        "noise": list(asked.noise or noise),
        "seeds": list(asked.seeds or seeds),
        "job": {} if sample is None else {"sample": sample},
        "train": dict(train),
        "data": {asked.data_name: table},
    }


def available(table: Mapping[str, Any]) -> int:
    """Training rows of the data, those that are split off for the test left out."""
    from noiseproof.tables import read_table

    count = len(read_table(table["data"], "train"))
    try:
        return int(count * (1 - float(table.get("test", 0))))
    except ValueError:  # a file
        return count
