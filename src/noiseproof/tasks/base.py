"""What a row is: the contract between a kind of row and everything that runs on rows.

    table --reader--> Inputs (N rows) --load--> task and network
    Inputs --ready--> Inputs that can be used --encode--> Encoded
    Encoded.inputs(rows) -> {name: (B, ...)} -> model(**inputs).logits (B, C)

A kind is one class in one file of this package, named in `TASKS`; nothing outside asks which it is.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noiseproof.data import Examples, Inputs, Reader, read_examples
from noiseproof.encoding import Encoded
from noiseproof.errors import InputError, check_types
from noiseproof.method import Method, require
from noiseproof.noise import NoiseModel
from noiseproof.tables import Table
from noiseproof.tasks.augmentation import parse_changes
from noiseproof.tasks.measures import ClassMeasures, Measures

if TYPE_CHECKING:
    from typing_extensions import Self

    from noiseproof.tables import Source

Ints = npt.NDArray[np.int64]
CHOICE_SCORES = ("mean", "sum")
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
        template: How a prompt becomes what the model reads before its response; ``{prompt}`` stands
            for it. Chat messages have the tokenizer's template instead.
        max_new_tokens: Longest response that is generated.
        choice_score: How choices are compared: mean or sum of the log-probabilities of the tokens.
        answer_pattern: Regular expression that finds the answer in a response.
        answer_rows: Most rows of a test set that are answered by generating.
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
    template: str = "{prompt}\n"
    max_new_tokens: int = 64
    choice_score: str = "mean"
    answer_pattern: str | None = None
    answer_rows: int = 200

    def __post_init__(self) -> None:
        """Check every setting where it stands.

        Raises:
            InputError: A setting is out of its range.
        """
        check_types(self, "")
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

        require(
            self.template.count("{prompt}") == 1,
            f"template must hold {{prompt}} once, got {self.template!r}",
        )
        for name in ("max_new_tokens", "answer_rows"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.choice_score in CHOICE_SCORES,
            f"choice_score must be one of {', '.join(CHOICE_SCORES)}; got {self.choice_score!r}",
        )
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise InputError(
                    f"answer_pattern {self.answer_pattern!r} is no regular expression: {error}"
                ) from error

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RowSettings:
        """Take the settings out of a specification; what it leaves out has its default."""
        known = {item.name for item in dataclasses.fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        train = values.get("train")
        if isinstance(train, Mapping) and "max_length" in train:
            found["max_length"] = train["max_length"]
        return cls(**found)


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels of a table lie, see `read_examples`."""

    label: str
    clean_label: str | None = None
    row_id: str | None = None
    label_names: Sequence[str] | None = None
    drop_label: str | None = None


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

    most_views: ClassVar[int] = 1
    """In how many views a training step can have such a row."""
    text_labels: ClassVar[bool] = False
    """Whether a label is a text of its own, not one of C classes."""
    measures: ClassVar[Measures] = ClassMeasures()
    """What is measured of such rows."""
    answer_columns: ClassVar[tuple[str, ...]] = ("predicted_label", "confidence")
    """The columns that `answers` may give."""

    @classmethod
    @abstractmethod
    def reader(cls, settings: RowSettings) -> Reader:
        """Finds the inputs in a table."""

    @classmethod
    def reader_of_new(cls, settings: RowSettings, table: Table, label: str) -> Reader:
        """Finds the inputs in a table of new rows, with labels where they are part of the rows."""
        return cls.reader(settings)

    @classmethod
    def examples(
        cls, source: Source, settings: RowSettings, columns: LabelColumns, split: str, role: str
    ) -> Examples:
        """Read rows with their labels.

        Args:
            source: What `read_table` reads.
            settings: Of the rows.
            columns: Where the labels lie.
            split: The split to take where there are several.
            role: What messages call the data, see `read_examples`.
        """
        return read_examples(
            source,
            text=cls.reader(settings),
            split=split,
            role=role,
            **vars(columns),
        )

    @classmethod
    def check_noise(cls, noise: NoiseModel) -> None:
        """Refuse noise that such rows cannot have.

        Raises:
            InputError: They cannot; says what they can.
        """
        require(
            not noise.needs_responses,
            f"noise {noise.spec!r} exchanges the responses of task causal-lm; rows of task "
            f"{cls.name!r} have labels: use symmetric, pairflip, ...",
        )

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

    def answers(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs_of: Callable[[Encoded], Tensor],
        label_names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """What the model says of new rows: columns (N,) out of `answer_columns`.

        Args:
            model: The deployed model.
            inputs: The rows, ready.
            outputs_of: Gives the outputs (N, K) of encoded rows.
            label_names: Class names.
        """
        probabilities = torch.softmax(outputs_of(self.encode(inputs)), dim=1).numpy()
        names = np.asarray(label_names, dtype=object)
        best = probabilities.argmax(axis=1)
        return {"predicted_label": names[best], "confidence": probabilities.max(axis=1)}

    def answer_metrics(
        self, model: nn.Module, rows: Examples, outputs_of: Callable[[Encoded], Tensor]
    ) -> dict[str, float]:
        """What only such rows can be asked, with the deployed model; the rest is in `measures`."""
        return {}

    def with_settings(self, settings: RowSettings) -> Self:
        """The task with other settings of reading; the network stays as it is."""
        return self

    def learn(self, model: nn.Module, inputs: Inputs) -> None:  # noqa: B027
        """Take from the training rows what the network needs to know of them, such as scales."""

    def accept(self, inputs: Inputs, table: Table | None, trained: str) -> None:  # noqa: B027
        """Refuse new rows that the model cannot label.

        Args:
            inputs: The rows.
            table: Where they came from; None for rows that were given as Python objects.
            trained: Name of the columns that it was trained on.

        Raises:
            InputError: They have another form than those it was trained on.
        """
