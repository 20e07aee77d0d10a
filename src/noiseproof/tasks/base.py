"""What a row is: the contract between a kind of row and everything that runs on rows.

    table --reader--> Inputs (N rows) --load--> task and network
    Inputs --ready--> Inputs that can be used --encode--> Encoded
    Encoded.inputs(rows) -> {name: (B, ...)} -> model(**inputs).logits (B, C)

A kind is one class in one file of this package, named in `TASKS`; nothing outside asks which it is.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import nn

from noiseproof.data import Examples, Inputs, Reader
from noiseproof.encoding import Encoded
from noiseproof.method import Method, require
from noiseproof.tables import Table
from noiseproof.tasks.augmentation import parse_changes

if TYPE_CHECKING:
    from typing_extensions import Self

Ints = npt.NDArray[np.int64]
BAD_IMAGE = ("error", "skip")
MOST_WORKERS = 64


@dataclass(frozen=True)
class RowSettings:
    """Where the rows lie in a table and how they are read; fields of a job and of its record.

    Attributes:
        text: Text column, or two of them as "first,second".
        features: Features: a column of lists, an array, or columns of numbers, see the docs.
        standardize: Whether every feature is shifted and scaled to mean 0, deviation 1.
        image: Column or array of images.
        image_size: Side of the squares that images are brought to; None is the processor's.
        augment: What is done to training images: none, or crop, flip and rand joined by +.
        on_bad_image: error, or skip (leave out images that cannot be read).
        image_workers: Processes that decode images; 0 decodes in this one.
        max_length: Longer texts are cut to this many tokens.
    """

    text: str = "text"
    features: str = "features"
    standardize: bool = True
    image: str = "image"
    image_size: int | None = None
    augment: str = "crop+flip"
    on_bad_image: str = "error"
    image_workers: int = 0
    max_length: int = 256

    def __post_init__(self) -> None:
        """Check every setting where it stands.

        Raises:
            InputError: A setting is out of its range.
        """
        parse_changes(self.augment)
        require(
            self.on_bad_image in BAD_IMAGE,
            f"on_bad_image must be one of {', '.join(BAD_IMAGE)}; got {self.on_bad_image!r}",
        )
        require(
            self.image_size is None or 1 <= self.image_size <= 10_000,
            f"image_size must lie in [1, 10000], got {self.image_size}",
        )
        require(
            0 <= self.image_workers <= MOST_WORKERS,
            f"image_workers must lie in [0, {MOST_WORKERS}], got {self.image_workers}",
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RowSettings:
        """Take the settings out of a specification; what it leaves out has its default."""
        known = {item.name for item in dataclasses.fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        train = values.get("train")
        if isinstance(train, Mapping) and "max_length" in train:
            found["max_length"] = train["max_length"]
        return cls(**found)


class Task(ABC):
    """What a row is. One object per run; it knows how to encode rows and how models are kept."""

    name: ClassVar[str]
    """The value of ``task``."""
    summary: ClassVar[str]
    """The rows, in a few words."""
    column: ClassVar[str]
    """The setting that names the column of the inputs."""
    default_model: ClassVar[str | None] = None
    """The model that is taken when none is named; None asks for one."""

    @classmethod
    @abstractmethod
    def reader(cls, settings: RowSettings) -> Reader:
        """Finds the inputs in a table."""

    @classmethod
    def fitted(cls, method: Method, model: Any) -> Method:
        """The method as it runs on such rows with such a model, see `load`.

        Raises:
            InputError: It cannot.
        """
        return method

    @classmethod
    @abstractmethod
    def load(
        cls, model: Any, data: Examples, settings: RowSettings, *, reserved_tokens: int = 0
    ) -> tuple[Self, nn.Module]:
        """Load a network with a fresh head, and what makes inputs for it.

        Args:
            model: Name, folder, or a torch module.
            data: The training rows, for their classes and their form.
            settings: Of the rows.
            reserved_tokens: Positions that a method takes away from every text.

        Raises:
            InputError: It cannot be loaded.
        """

    @classmethod
    @abstractmethod
    def load_saved(cls, folder: Path, model: Any, settings: RowSettings) -> tuple[Self, nn.Module]:
        """Load what `save` wrote, in eval mode.

        Args:
            folder: ``model/`` of a run.
            model: What the run was started from: a name, or a torch module of the same kind.
            settings: Of the rows.

        Raises:
            InputError: It cannot be loaded.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the deployed model and what makes inputs for it: safetensors and JSON."""

    @abstractmethod
    def inputs_of(self, rows: Any, second: Any = None) -> Inputs:
        """Inputs of rows that are given as Python objects."""

    @abstractmethod
    def encode(self, inputs: Any) -> Encoded:
        """Encode rows, in order."""

    def ready(self, inputs: Inputs) -> tuple[Inputs, Ints]:
        """The rows that can be used, in the form that `encode` takes, and which they are (M,).

        Raises:
            InputError: A row cannot be used, and the settings say that this is an error.
        """
        return inputs, np.arange(len(inputs))

    def with_settings(self, settings: RowSettings) -> Self:
        """The task with other settings of reading; the network stays as it is."""
        return self

    def learn(self, model: nn.Module, inputs: Inputs) -> None:  # noqa: B027
        """Take from the training rows what the network needs to know of them, such as scales."""

    def accept(self, inputs: Inputs, table: Table, trained: str) -> None:  # noqa: B027
        """Refuse new rows that the model cannot label.

        Args:
            inputs: The rows.
            table: Where they came from.
            trained: Name of the columns that it was trained on.
        """
