"""Images with one label each.

paths, bytes or arrays -> `Images` -> `Pixels`, decoded and resized once, on disk
-> (augmented in training) -> pixel values (B, 3, H, W) as the model's processor scales them
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from noiseproof.data import Examples, Inputs, Reader
from noiseproof.encoding import Encoded
from noiseproof.errors import InputError
from noiseproof.method import Method, require
from noiseproof.models import load_image_classifier, load_image_processor
from noiseproof.modules import (
    load_weights,
    module_is_missing,
    numbered_classes,
    without_adapters,
    wrap_module,
)
from noiseproof.saving import load_saved_model, save_model
from noiseproof.tables import Table
from noiseproof.tasks.augmentation import Change, augmented, parse_changes
from noiseproof.tasks.base import RowSettings, Task
from noiseproof.tasks.pixels import decode, scaling, stamp, target_size

OWN_SIZE = 224  # side of the images that a module without a processor gets
PATCH = 16  # side of what counts as a token when batches are made
INPUT = "pixel_values"
AUTO = "AutoModelForImageClassification"

Ints = npt.NDArray[np.int64]


class Images(Inputs):
    """Images that are not yet decoded: paths, bytes of files, arrays, images of Pillow."""

    def __init__(
        self, sources: Sequence[Any] | np.ndarray, rows: Ints, names: Sequence[str], where: str
    ) -> None:
        """Take some rows of many sources.

        Args:
            sources: M images, see `noiseproof.tasks.pixels.rgb_of`; paths are absolute, and None
                stands where there is no image.
            rows: Their places (N,) among the sources.
            names: What messages and lists call each of the M sources.
            where: What messages call the whole.
        """
        self.sources, self.rows, self.names, self.where = sources, rows, names, where

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.rows)

    def take(self, rows: Ints) -> Images:
        """Take the rows at these positions, in the order given."""
        return Images(self.sources, self.rows[rows], self.names, self.where)

    def replaced(self, rows: Ints, pool: Images, chosen: Ints) -> Images:
        """Put images of a pool in the place of these rows."""
        sources = [self.sources[row] for row in self.rows]
        names = [self.names[row] for row in self.rows]
        for row, other in zip(rows.tolist(), pool.rows[chosen].tolist(), strict=True):
            sources[row], names[row] = pool.sources[other], pool.names[other]
        return Images(sources, np.arange(len(self)), names, self.where)

    def content(self) -> Iterator[bytes]:
        """Give what tells the images apart."""
        yield b"images %d" % len(self)
        yield from map(stamp, self.chosen())

    def chosen(self) -> list[Any]:
        """The sources of the rows, in order."""
        return [self.sources[row] for row in self.rows.tolist()]

    def place(self, row: int) -> str:
        """Say which image a row is."""
        number = int(self.rows[row])
        return f"row {number + 1} of {self.where} ({self.names[number]})"

    def shown(self) -> Mapping[str, Sequence[str]]:
        """Give the names."""
        return {"image": [self.names[row] for row in self.rows.tolist()]}


class Pixels(Inputs):
    """Decoded images of one size, in one table after the other; what they hold is not copied."""

    def __init__(
        self,
        tables: Sequence[np.ndarray],
        rows: Ints,
        digests: np.ndarray,
        names: Sequence[str],
    ) -> None:
        """Take some rows of the tables.

        Args:
            tables: (M, H, W, 3) uint8 each.
            rows: Places (N,) of the rows, counted through all tables.
            digests: (N, 16) uint8, of the images before they were resized.
            names: N names.
        """
        self.tables, self.rows, self.digests, self.names = tables, rows, digests, names
        self._starts = np.cumsum([0, *map(len, tables)])

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(self.rows)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.tables[0].shape[1:3]
        return int(height), int(width)

    def block(self, places: Ints) -> np.ndarray:
        """The pixels at these places (B, H, W, 3) uint8."""
        rows = self.rows[places]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty((len(rows), *self.tables[0].shape[1:]), dtype=np.uint8)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self.tables[number][rows[here] - self._starts[number]]
        return found

    def take(self, rows: Ints) -> Pixels:
        """Take the rows at these positions, in the order given."""
        names = [self.names[row] for row in rows.tolist()]
        return Pixels(self.tables, self.rows[rows], self.digests[rows], names)

    def replaced(self, rows: Ints, pool: Pixels, chosen: Ints) -> Pixels:
        """Put images of a pool in the place of these rows."""
        places, digests, names = self.rows.copy(), self.digests.copy(), list(self.names)
        places[rows] = pool.rows[chosen] + self._starts[-1]
        digests[rows] = pool.digests[chosen]
        for row, other in zip(rows.tolist(), chosen.tolist(), strict=True):
            names[row] = pool.names[other]
        return Pixels([*self.tables, *pool.tables], places, digests, names)

    def content(self) -> Iterator[bytes]:
        """Give the digests of the images, whatever size they were brought to."""
        yield b"images %d" % len(self)
        yield np.ascontiguousarray(self.digests).tobytes()

    def shown(self) -> Mapping[str, Sequence[str]]:
        """Give the names."""
        return {"image": self.names}


@dataclass(frozen=True)
class ImageColumn(Reader):
    """A column of paths, of files as bytes, or an array of images.

    Attributes:
        image: Name of the column or array; paths are relative to the table.
    """

    image: str

    kind = "image"

    def columns(self, table: Table) -> tuple[str, ...]:
        """Name the column."""
        if self.image not in table.arrays:
            table.require(self.image, "image")
        return (self.image,)

    def read(self, table: Table, rows: Ints) -> Images:
        """Take the images of these rows; nothing is decoded yet."""
        (column,) = self.columns(table)
        if column in table.arrays:
            array = _checked_array(table.arrays[column], f"array {column!r} of {table.name}")
            names = [f"image {row}" for row in range(len(array))]
            return Images(array, rows, names, table.name)
        wanted = np.zeros(len(table), dtype=np.bool_)
        wanted[rows] = True
        sources: list[Any] = [None] * len(table)
        names = [""] * len(table)
        for row, cell in enumerate(table.cells(column)):
            if wanted[row]:
                place = f"{table.place(row)}, column {column!r},"
                sources[row], names[row] = _source(cell, row, place, table.base)
        return Images(sources, rows, names, table.name)

    def moved(self, table: Table, folder: Path) -> Table:
        """Make relative paths absolute, unless the table stays where it was."""
        (column,) = self.columns(table)
        if column in table.arrays or table.base is None or table.base.absolute() == folder:
            return table
        cells = [self.cell(table, column, row) for row in range(len(table))]
        return replace(table, frame=table.frame.assign(**{column: cells}), texts={})

    def cell(self, table: Table, column: str, row: int) -> Any:
        """A path that also holds from another table's folder."""
        cell = super().cell(table, column, row)
        named = isinstance(cell, str) and cell.strip()
        return str(_absolute(table.base, cell)) if named else cell


def _checked_array(array: np.ndarray, owner: str) -> np.ndarray:
    flat = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4))
    if not flat or array.dtype != np.uint8 or 0 in array.shape[1:3]:
        raise InputError(
            f"{owner} has shape {array.shape} and type {array.dtype}; expected uint8 images "
            "(rows, height, width, 3), or without the last dimension for grey ones"
        )
    return array


def _source(cell: Any, row: int, place: str, base: Path | None) -> tuple[Any, str]:
    """What to decode and its name: of a path, of bytes, or of what `datasets` makes of them.

    Args:
        cell: What is given; nothing gives None, which is no image that can be read.
        row: Its number.
        place: What messages call it.
        base: The folder that a path is relative to.
    """
    name = f"image {row}"
    if isinstance(cell, Mapping):
        name = str(cell.get("path") or name)
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, Path):
        cell = str(cell)
    if cell is None or (isinstance(cell, str | bytes) and not cell.strip()):
        return None, name
    if isinstance(cell, str):
        return str(_absolute(base, cell)), name if name != f"image {row}" else cell
    if isinstance(cell, np.ndarray):
        return _checked_array(cell[None], place)[0], name
    if isinstance(cell, bytes | Image.Image):
        return cell, name
    raise InputError(
        f"{place} has a value of type {type(cell).__name__}, expected an image: a path, the bytes "
        "of a file, or pixels"
    )


def _absolute(base: Path | None, cell: str) -> Path:
    path = Path(cell).expanduser()
    return (path if path.is_absolute() else (base or Path()) / path).absolute()


class EncodedImages(Encoded):
    """Pixels, scaled as the processor would, batch by batch."""

    def __init__(
        self,
        pixels: Pixels,
        processor: Any,
        scale: tuple[np.ndarray, np.ndarray],
        changes: tuple[Change, ...],
    ) -> None:
        """Take pixels of the size that the processor asks for.

        Args:
            pixels: N images.
            processor: Of the model.
            scale: Slope and offset (3,) of its pixel values, see `scaling`.
            changes: What is done to training images.
        """
        self.pixels, self.changes = pixels, changes
        self.redrawn = len(changes) > 0
        height, width = pixels.size
        cost = max(1, height // PATCH) * max(1, width // PATCH)
        self.lengths = np.full(len(pixels), cost, dtype=np.int64)
        digest = hashlib.sha256(f"{pixels.size} {processor.to_json_string()}".encode())
        for part in (pixels.digests, *scale):
            digest.update(np.ascontiguousarray(part).tobytes())
        self.key = digest.hexdigest()[:32]
        self.slope, self.offset = map(torch.from_numpy, scale)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Pixel values (B, 3, H, W)."""
        return self._scaled(self.pixels.block(np.asarray(rows)))

    def views(self, asked: int | None) -> int:
        """As many as asked: each is drawn anew."""
        require(
            asked != 2 or len(self.changes) > 0,
            "views=2 draws two changes of every image, and augment=none changes nothing: both "
            "views would be equal; use augment=crop+flip, or leave views out",
        )
        return asked or 1

    def training_inputs(self, rows: np.ndarray, seed: int, view: int = 0) -> dict[str, Tensor]:
        """Pixel values (B, 3, H, W), each row changed as seed, its number and the view say."""
        block = self.pixels.block(np.asarray(rows))
        for place, row in enumerate(np.asarray(rows).tolist() if self.changes else ()):
            block[place] = augmented(block[place], self.changes, seed, row, view)
        return self._scaled(block)

    def _scaled(self, block: np.ndarray) -> dict[str, Tensor]:
        """(B, H, W, 3) uint8 -> pixel values (B, 3, H, W)."""
        values = torch.from_numpy(block).float() * self.slope + self.offset
        return {INPUT: values.permute(0, 3, 1, 2).contiguous()}


@dataclass(frozen=True)
class ImageClassification(Task):
    """Images with one label each.

    Attributes:
        processor: An image processor of transformers, in its form on Pillow.
        augment: What is done to training images.
        on_bad_image: error, or skip.
        workers: Processes that decode.
    """

    processor: Any
    augment: str = "none"
    on_bad_image: str = "error"
    workers: int = 0

    name: ClassVar[str] = "image"
    summary: ClassVar[str] = "images"
    column: ClassVar[str] = "image"
    most_views: ClassVar[int] = 2

    @classmethod
    def reader(cls, settings: RowSettings) -> ImageColumn:
        """Reads a column of paths or bytes, or an array."""
        return ImageColumn(settings.image)

    @cached_property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Slope and offset (3,) of the processor's pixel values."""
        return scaling(self.processor)

    @classmethod
    def fitted(cls, method: Method, model: Any) -> Method:
        """The method as it is, with any model but the default encoder of texts."""
        require(
            model != "minilm",
            f"task {cls.name!r} needs a model of images: give model (minilm, which is taken where "
            "none is named, reads texts)",
        )
        return method

    @classmethod
    def load(
        cls, model: Any, data: Examples, settings: RowSettings, *, reserved_tokens: int = 0
    ) -> tuple[ImageClassification, nn.Module]:
        """Load an image classifier with its processor, or take a torch module."""
        names = list(data.label_names)
        network: Any
        if isinstance(model, nn.Module):
            processor = own_processor(settings.image_size or OWN_SIZE)
            example = _example(processor)
            network = wrap_module(model, names, INPUT, example)
        else:
            network, processor = load_image_classifier(str(model), names)
            if settings.image_size is not None:
                processor = with_size(processor, settings.image_size)
            _check_size(network, target_size(processor), str(model))
            scaling(processor)  # what it refuses is refused before anything is decoded
        return cls._made(processor, settings), network

    @classmethod
    def load_saved(
        cls, folder: Path, model: Any, settings: RowSettings
    ) -> tuple[ImageClassification, nn.Module]:
        """Load what `save` wrote; the weights of a torch module go into a copy of the one given."""
        if isinstance(model, nn.Module):
            processor = load_image_processor(str(folder))
            network = load_weights(model, folder)
            example = _example(processor)
            wrapped = wrap_module(network, numbered_classes(network, example), INPUT, example)
            wrapped.name_or_path = str(folder)
            return cls._made(processor, settings), wrapped.eval()
        if str(model).startswith("<"):
            raise InputError(module_is_missing(str(model), folder))
        network, processor = load_saved_model(folder, str(model), AUTO, load_image_processor)
        return cls._made(processor, settings), network

    @classmethod
    def _made(cls, processor: Any, settings: RowSettings) -> ImageClassification:
        return cls(processor, settings.augment, settings.on_bad_image, settings.image_workers)

    def with_settings(self, settings: RowSettings) -> ImageClassification:
        """Another fate of images that cannot be read."""
        return self._made(self.processor, settings)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write model and processor as transformers and peft do; of a module its own weights."""
        save_model(without_adapters(model), self.processor, folder)

    def inputs_of(self, rows: Any, second: Any = None) -> Images:
        """Images: a list of paths, bytes, arrays or images of Pillow, or an array of all.

        A single path, file or image of Pillow is a list of one.
        """
        if second is not None:
            raise InputError("images have no second column; give them alone")
        if isinstance(rows, np.ndarray):
            array = _checked_array(rows, "the array")
            return Images(array, np.arange(len(array)), _numbered(len(array)), "the images")
        if isinstance(rows, str | bytes | Path | Image.Image):
            rows = [rows]
        if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
            raise InputError(
                f"expected a list of images, got a value of type {type(rows).__name__}; give "
                "paths, bytes of files, or pixels"
            )
        found = [
            _source(cell, row, f"row {row + 1} of the images", None)
            for row, cell in enumerate(rows)
        ]
        sources, names = [source for source, _ in found], [name for _, name in found]
        return Images(sources, np.arange(len(sources)), names, "the images")

    def ready(self, inputs: Inputs) -> tuple[Inputs, Ints]:
        """Decode and resize; images that cannot be read raise, or are left out."""
        if isinstance(inputs, Pixels):
            return inputs, np.arange(len(inputs))
        assert isinstance(inputs, Images)
        chosen = inputs.chosen()
        table = decode(chosen, map(stamp, chosen), self.processor, self.workers)
        if table.bad and (self.on_bad_image == "error" or len(table.bad) == len(inputs)):
            row, why = min(table.bad.items())
            more = f" ({len(table.bad)} such images)" if len(table.bad) > 1 else ""
            raise InputError(
                f"cannot read {inputs.place(row)}: {why}{more}; repair or remove it, or leave such "
                "images out with on_bad_image=skip"
            )
        names = inputs.shown()["image"]
        pixels = Pixels([table.pixels], np.arange(len(inputs)), table.digests, names)
        good = np.setdiff1d(np.arange(len(inputs)), np.fromiter(table.bad, np.int64))
        return (pixels, good) if not table.bad else (pixels.take(good), good)

    def encode(self, inputs: Any) -> EncodedImages:
        """Decode what is not decoded yet; batches are scaled, and in training augmented."""
        found = inputs if isinstance(inputs, Inputs) else self.inputs_of(inputs)
        pixels, good = self.ready(found)
        assert isinstance(pixels, Pixels)
        if len(good) < len(found):
            raise InputError(
                f"{len(found) - len(good)} of {len(found)} images cannot be read; leave them out"
            )
        return EncodedImages(pixels, self.processor, self.scale, parse_changes(self.augment))


def _example(processor: Any) -> Tensor:
    """Two rows of noise, always the same, to try a module on (2, 3, H, W)."""
    random = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, *target_size(processor), generator=random)


def own_processor(size: int) -> Any:
    """The processor of a module without one: squares of this side, values from 0 to 1, RGB."""
    from importlib import import_module

    squares: Any
    try:
        place = import_module("transformers.models.vit.image_processing_pil_vit")
        squares = place.ViTImageProcessorPil
    except ImportError:  # before transformers 5
        squares = import_module("transformers").ViTImageProcessor
    return squares(size={"height": size, "width": size}, do_normalize=False)


def with_size(processor: Any, size: int) -> Any:
    """The processor with another side of its squares."""
    values = processor.to_dict()
    for name in ("size", "crop_size"):
        if values.get(name):
            values[name] = dict.fromkeys(values[name], size)
    return type(processor).from_dict(values)


def _check_size(model: nn.Module, size: tuple[int, int], name: str) -> None:
    """Try a model on a blank image: some take one size alone."""
    try:
        with torch.no_grad():
            model.eval()(**{INPUT: torch.zeros(1, 3, *size)})
    except Exception as error:  # each architecture has its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {name!r} does not take images of {size[0]} x {size[1]}: {reason}; choose "
            "another image_size"
        ) from error


def _numbered(rows: int) -> list[str]:
    return [f"image {row}" for row in range(rows)]
