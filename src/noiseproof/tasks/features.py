"""Precomputed features with one label each: there is no encoder, only a head.

an array, a column of lists or columns of numbers -> `Vectors` (N, D), of an array also (N, 2, D)
-> features (B, D) fp32, standardised inside the network, so that the scales are saved with it

Of two views of a row the second is for training alone, with a method that wants both; the first
gives the scales and is what is scored and measured.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from noiseproof.data import Examples, Inputs, Reader
from noiseproof.encoding import Encoded, no_second_view
from noiseproof.errors import InputError
from noiseproof.method import Method, require
from noiseproof.modules import (
    WEIGHTS,
    Logits,
    SplitModule,
    WholeModule,
    load_weights,
    module_is_missing,
    numbered_classes,
    without_adapters,
    wrap_module,
)
from noiseproof.saving import HEAD_FILE, save_model
from noiseproof.tables import Table, nearest, shorten
from noiseproof.tasks.base import RowSettings, Task

PIECE = 4096  # rows that are looked at or converted at a time
INPUT = "features"
LINEAR = "linear"  # name of the only network that needs no module

Ints = npt.NDArray[np.int64]


class Vectors(Inputs):
    """Rows of an array, which may be a memory map larger than memory; it is not copied."""

    def __init__(self, table: np.ndarray, rows: Ints | None = None) -> None:
        """Take the rows of a table (M, D) or (M, 2, D) at these positions (N,), or all of them."""
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Number of features, D."""
        return int(self.table.shape[-1])

    @property
    def views(self) -> int:
        """Number of views of a row."""
        return int(self.table.shape[1]) if self.table.ndim == 3 else 1

    def block(self, places: Ints, view: int = 0) -> np.ndarray:
        """The features at these places in one view (B, D) in fp32."""
        rows = self.rows[places]
        with np.errstate(over="ignore"):  # too large for fp32 is infinite, which is complained of
            found = self.table[rows, view] if self.table.ndim == 3 else self.table[rows]
            return np.asarray(found, dtype=np.float32)

    def blocks(self, view: int = 0) -> Iterator[np.ndarray]:
        """All features of a view in order, piece by piece."""
        for start in range(0, len(self), PIECE):
            yield self.block(np.arange(start, min(start + PIECE, len(self))), view)

    def take(self, rows: Ints) -> Vectors:
        """Take the rows at these positions, in the order given."""
        return Vectors(self.table, self.rows[rows])

    def replaced(self, rows: Ints, pool: Vectors, chosen: Ints) -> Vectors:
        """Put rows of a pool in the place of these rows."""
        if pool.width != self.width:
            raise InputError(f"the pool has {pool.width} features, the rows have {self.width}")
        if pool.views != self.views:
            raise InputError(f"the pool has {pool.views} views a row, the rows have {self.views}")
        tables = [np.concatenate([*self.blocks(view)]) for view in range(self.views)]
        for view, table in enumerate(tables):
            table[rows] = pool.block(chosen, view)
        return Vectors(np.stack(tables, axis=1))

    def content(self) -> Iterator[bytes]:
        """Give the features."""
        yield b"features %d %d" % (len(self), self.width)
        for view in range(self.views):
            for block in self.blocks(view):
                yield block.astype("<f4").tobytes()


@dataclass(frozen=True)
class FeatureColumns(Reader):
    """Features of a table: an array, a column of lists, or columns of numbers.

    Attributes:
        features: Name of the array or column of lists; or names and patterns of columns of
            numbers, with commas between, such as ``e*`` or ``width,height``.
    """

    features: str

    kind = "features"

    def columns(self, table: Table) -> tuple[str, ...]:
        """Name the columns, in the order of the table where a pattern chose them."""
        if self.features in table.arrays:
            return (self.features,)
        names = [str(name) for name in table.frame.columns]
        if self.features in names:
            return (self.features,)
        found: list[str] = []
        for part in self.features.split(","):
            chosen = [name for name in names if name == part.strip()]
            chosen = chosen or fnmatch.filter(names, part.strip())
            if not chosen:
                wide = [f"{name} {array.shape}" for name, array in table.arrays.items()]
                known = [*table.arrays, *names]
                raise InputError(
                    f"{table.name} has no column {part.strip()!r} (features)"
                    f"{nearest(part.strip(), known)}; columns: {shorten([*wide, *names])}; name an "
                    "array, a column of lists, or columns of numbers such as 'e*'"
                )
            found += [name for name in chosen if name not in found]
        return tuple(found)

    def read(self, table: Table, rows: Ints) -> Vectors:
        """Read the features of these rows, and check that all of them are numbers."""
        names = self.columns(table)
        if names[0] in table.arrays:
            vectors = Vectors(_matrix(table, names[0]), rows)
        elif len(names) == 1 and _holds_lists(table, names[0], rows):
            vectors = Vectors(_stacked(table, names[0], rows))
        else:
            vectors = Vectors(np.stack([_numbers(table, name, rows) for name in names], axis=1))
        _check_finite(table, names, vectors, rows)
        return vectors


def _matrix(table: Table, name: str) -> np.ndarray:
    array = table.arrays[name]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[1] == 2)
    if not shaped or array.dtype.kind not in "fiub" or not array.shape[-1]:
        raise InputError(
            f"array {name!r} of {table.name} has shape {array.shape} and type {array.dtype}; "
            "expected numbers (rows, features), or (rows, 2, features) with two views of each row"
        )
    return array


def _holds_lists(table: Table, name: str, rows: Ints) -> bool:
    cell = table.frame[name].iloc[int(rows[0])]
    return isinstance(cell, list | tuple | np.ndarray)


def _stacked(table: Table, name: str, rows: Ints) -> np.ndarray:
    """A matrix of a column of lists, which must be equally long."""
    column = table.frame[name]
    matrix: np.ndarray | None = None
    for place, row in enumerate(rows.tolist()):
        cell = column.iloc[row]
        try:
            values = np.asarray(cell, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{table.place(row)} has no list of numbers in column {name!r}; repair it"
            ) from error
        if matrix is None:
            matrix = np.empty((len(rows), values.size), dtype=np.float32)
        if values.shape != matrix.shape[1:] or not values.size:
            found = f"{values.size} features" if values.ndim == 1 else f"shape {values.shape}"
            raise InputError(
                f"{table.place(row)} has {found} in column {name!r}, expected "
                f"{matrix.shape[1] or 'at least 1'} as in {table.place(int(rows[0]))}"
            )
        matrix[place] = values
    assert matrix is not None
    return matrix


def _numbers(table: Table, name: str, rows: Ints) -> np.ndarray:
    """A column of numbers (N,) in fp32; CSV holds them as text."""
    wanted = np.zeros(len(table), dtype=np.bool_)
    wanted[rows] = True
    values = np.empty(len(rows), dtype=np.float32)
    place = 0
    for row, cell in enumerate(table.cells(name)):
        if not wanted[row]:
            continue
        try:
            values[place] = float(cell)
        except (TypeError, ValueError) as error:
            shown = "nothing" if cell is None or cell == "" else repr(cell)[:40]
            raise InputError(
                f"{table.place(row)} has {shown} in column {name!r}, expected a number (features); "
                "repair it, or name other columns"
            ) from error
        place += 1
    return values


def _check_finite(table: Table, names: tuple[str, ...], vectors: Vectors, rows: Ints) -> None:
    for view in range(vectors.views):
        for start, block in zip(range(0, len(rows), PIECE), vectors.blocks(view), strict=True):
            bad = np.argwhere(~np.isfinite(block))
            if not len(bad):
                continue
            place, feature = (int(number) for number in bad[0])
            where = f"column {names[feature]!r}" if len(names) > 1 else f"feature {feature + 1}"
            where += f" of view {view + 1}" if vectors.views > 1 else ""
            raise InputError(
                f"{table.place(int(rows[start + place]))} has {block[place, feature]} in {where}, "
                "expected a finite number; fill or remove such rows"
            )


class EncodedVectors(Encoded):
    """Features, converted batch by batch."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.lengths = np.ones(len(vectors), dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Features (B, D) in fp32."""
        return self.training_inputs(rows, 0)

    def views(self, asked: int | None) -> int:
        """At most those of the table."""
        held = self.vectors.views
        shape = (len(self), self.vectors.width)
        require(asked is None or asked <= held, no_second_view(f"features {shape}"))
        return asked or held

    def training_inputs(self, rows: np.ndarray, seed: int, view: int = 0) -> dict[str, Tensor]:
        """Features of one view (B, D) in fp32."""
        return {INPUT: torch.from_numpy(self.vectors.block(np.asarray(rows), view))}


# --- the network ---------------------------------------------------------------------------------


@dataclass
class FeatureConfig:
    """What a network on features is made of; ``config.json`` of a saved one.

    Attributes:
        hidden_size: Number of features, D.
        id2label: Class names by number.
        standardize: Whether the features are standardised.
        model_type: Says what the file describes.
    """

    hidden_size: int
    id2label: dict[int, str]
    standardize: bool = True
    model_type: str = "noiseproof-features"

    @property
    def num_labels(self) -> int:
        """Number of classes, C."""
        return len(self.id2label)


class Standardize(nn.Module):
    """(x - mean) / scale, by the training rows; stands where other models have an encoder."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("scale", torch.ones(config.hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.mean) / self.scale

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the scales and ``config.json``."""
        _write(self.config, {f"encoder.{n}": t for n, t in self.state_dict().items()}, Path(folder))


class FeatureClassifier(nn.Module):
    """A linear classifier on standardised features, with the parts that methods ask a model for."""

    base_model_prefix = "encoder"
    main_input_name = INPUT
    encoder_gives_tensor = True

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Standardize(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.name_or_path = ""

    def forward(self, features: Tensor) -> Logits:
        """(B, D) -> logits (B, C)."""
        return Logits(self.classifier(self.encoder(features)))

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write weights and ``config.json``."""
        _write(self.config, self.state_dict(), Path(folder))


def _example(width: int) -> Tensor:
    """Two rows of noise, always the same, to try a module on (2, D)."""
    return torch.randn(2, width, generator=torch.Generator().manual_seed(0))


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} holds no model of features ({error})") from error


def _write(config: FeatureConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, str(folder / WEIGHTS))
    text = json.dumps(dataclasses.asdict(config), indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


# --- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureClassification(Task):
    """Precomputed features with one label each.

    Attributes:
        width: Number of features, D.
        standardize: Whether mean and deviation are taken from the training rows.
    """

    width: int
    standardize: bool = True

    name: ClassVar[str] = "features"
    summary: ClassVar[str] = "precomputed features, one vector a row"
    column: ClassVar[str] = "features"
    most_views: ClassVar[int] = 2
    default_model: ClassVar[str | None] = LINEAR

    @classmethod
    def reader(cls, settings: RowSettings) -> FeatureColumns:
        """Reads an array, a column of lists or columns of numbers."""
        return FeatureColumns(settings.features)

    @classmethod
    def fitted(cls, method: Method, model: Any) -> Method:
        """Tunes the head, as there is nothing else; a module of one's own is tuned as asked.

        What tunes the whole model unless told otherwise becomes a probe; to ask for it where a
        method does something else by default is a mistake.
        """
        tune = getattr(method, "tune", "head")
        if isinstance(model, nn.Module) or tune == "head":
            return method
        if tune != "full" or getattr(type(method), "tune", None) != "full":  # its default
            raise InputError(
                f"{method.name}.tune={tune} adapts an encoder, and features have none; leave tune "
                "out, which trains the head"
            )
        return dataclasses.replace(method, tune="head")  # type: ignore[call-arg]

    @classmethod
    def load(
        cls, model: Any, data: Examples, settings: RowSettings, *, reserved_tokens: int = 0
    ) -> tuple[FeatureClassification, nn.Module]:
        """A fresh linear classifier, or a torch module that takes features (B, D)."""
        vectors = data.inputs
        assert isinstance(vectors, Vectors)
        task, names = cls(vectors.width, settings.standardize), list(data.label_names)
        config = FeatureConfig(vectors.width, dict(enumerate(names)), task.standardize)
        if isinstance(model, nn.Module):
            return task, task._wrapped(nn.Sequential(Standardize(config), model), names)
        if model != LINEAR:
            raise InputError(
                f"features have no encoder to load, got model={model!r}; leave model out"
            )
        return task, FeatureClassifier(config)

    def _wrapped(self, module: nn.Module, names: list[str]) -> SplitModule | WholeModule:
        """A module behind the scales, with the parts that methods ask for."""
        return wrap_module(module, names, INPUT, _example(self.width))

    @classmethod
    def load_saved(
        cls, folder: Path, model: Any, settings: RowSettings
    ) -> tuple[FeatureClassification, nn.Module]:
        """Load what `save` wrote; a head of its own is put on by the method."""
        if isinstance(model, nn.Module):
            return cls._load_module(folder, model, settings)
        if str(model).startswith("<"):
            raise InputError(module_is_missing(str(model), folder))
        tensors = _tensors(folder)
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            values["id2label"] = {int(key): name for key, name in values["id2label"].items()}
            config = FeatureConfig(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder} holds no model of features ({reason})") from error
        classifier = FeatureClassifier(config)
        classifier.load_state_dict(tensors, strict=not (folder / HEAD_FILE).exists())
        classifier.name_or_path = str(folder)
        return cls(config.hidden_size, config.standardize), classifier.eval()

    @classmethod
    def _load_module(
        cls, folder: Path, module: nn.Module, settings: RowSettings
    ) -> tuple[FeatureClassification, nn.Module]:
        width = len(_tensors(folder).get("0.mean", torch.zeros(0)))
        task = cls(width, settings.standardize)
        whole = nn.Sequential(Standardize(FeatureConfig(width, {})), module)
        loaded = load_weights(whole, folder)
        wrapped = task._wrapped(loaded, numbered_classes(loaded, _example(width)))
        wrapped.name_or_path = str(folder)
        return task, wrapped.eval()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights, scales and classes."""
        save_model(without_adapters(model), None, folder)

    def inputs_of(self, rows: Any, second: Any = None) -> Vectors:
        """Features (N, D) of anything that NumPy makes a matrix of."""
        table = np.asarray(rows)
        if second is not None or table.ndim != 2 or table.dtype.kind not in "fiub":
            raise InputError(
                f"features must be one matrix of numbers (rows, {self.width}), "
                f"got shape {table.shape}"
            )
        self._check_width(table.shape[1])
        return Vectors(table)

    def learn(self, model: nn.Module, inputs: Inputs) -> None:
        """Mean and deviation of every feature, in float64; a constant one is only shifted."""
        scales = [part for part in model.modules() if isinstance(part, Standardize)]
        if not self.standardize or not scales:
            return
        assert isinstance(inputs, Vectors)
        mean = sum(block.sum(axis=0, dtype=np.float64) for block in inputs.blocks()) / len(inputs)
        squares = sum(
            np.square(block - mean, dtype=np.float64).sum(axis=0) for block in inputs.blocks()
        )
        deviation = np.sqrt(squares / len(inputs))
        varies = deviation > 1e-6 * np.abs(mean)  # else it is rounding
        for part in scales:
            part.mean.copy_(torch.from_numpy(mean))
            part.scale.copy_(torch.from_numpy(np.where(varies, deviation, 1.0)))

    def accept(self, inputs: Inputs, table: Table | None, trained: str) -> None:
        """Refuse rows with another number of features."""
        assert isinstance(inputs, Vectors)
        self._check_width(inputs.width, "the rows have" if table is None else f"{table.name} has")

    def encode(self, inputs: Any) -> EncodedVectors:
        """Nothing to do until batches are made."""
        vectors = inputs if isinstance(inputs, Vectors) else self.inputs_of(inputs)
        self._check_width(vectors.width)
        return EncodedVectors(vectors)

    def _check_width(self, width: int, owner: str = "the rows have") -> None:
        if width != self.width:
            raise InputError(f"{owner} {width} features, the model takes {self.width}")
