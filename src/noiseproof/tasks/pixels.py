"""Images brought to one size and kept on disk: decoded once, then mapped into memory by every run.

files, bytes or arrays -> RGB -> resized by the model's image processor -> (N, H, W, 3) uint8
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from noiseproof.encoding import cache_folder
from noiseproof.errors import InputError

PIECE = 32  # images that a process decodes at a time
DIGEST = 16  # bytes that tell two images apart
UNREAD = bytes(DIGEST)  # in the place of the digest of an image of which nothing could be read
ABSENT = b"absent "  # how the stamp of a source without content begins
ANYTHING = (
    OSError, ValueError, SyntaxError, TypeError, EOFError, ArithmeticError, IndexError,
    Image.DecompressionBombError,
)  # fmt: skip
NO_RANGE = ("I", "F")  # whole and real numbers of 32 bits


@dataclass(frozen=True)
class PixelTable:
    """Decoded images.

    Attributes:
        pixels: (N, H, W, 3) uint8, mapped into memory; zero where an image could not be read.
        digests: (N, 16) uint8, of the content of each image before it was resized.
        bad: Row number -> why the image could not be read.
    """

    pixels: np.ndarray
    digests: np.ndarray
    bad: dict[int, str]


def rgb_of(source: Any) -> Image.Image:
    """An image as RGB, upright.

    Args:
        source: A path, the bytes of a file, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, or an image of Pillow. Grey values of 16 bits are brought to 8.

    Raises:
        OSError, ValueError: It cannot be read; says why.
    """
    if isinstance(source, np.ndarray):
        array = source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, large pictures: they can be read
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in NO_RANGE and not wide:  # before Pillow 11, a PNG of 16 bits has mode I
        raise ValueError(
            f"its pixels have the mode {image.mode}, which does not say what is white; convert it "
            "to L or RGB"
        )
    image = ImageOps.exif_transpose(image)
    if wide:  # convert would make white of all but the darkest
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def stamp(source: Any) -> bytes:
    """What tells a source from others without decoding it: of a file its state on the disk."""
    if source is None:
        return ABSENT
    if isinstance(source, str):
        try:
            state = os.stat(source)
        except (OSError, ValueError):  # such as a path with a null byte
            return ABSENT + source.encode("utf-8", "surrogatepass")
        told = f"{source} {state.st_size} {state.st_mtime_ns}"
        return told.encode("utf-8", "surrogatepass")
    if isinstance(source, Image.Image):
        try:
            source = rgb_of(source)
        except ANYTHING:
            return ABSENT + f"{source.mode} {source.size}".encode()
    return _content(source)


def _content(source: Any) -> bytes:
    """All that a source holds; an image of Pillow has been made RGB."""
    if isinstance(source, np.ndarray):
        return f"{source.shape}".encode() + np.ascontiguousarray(source).tobytes()
    if isinstance(source, Image.Image):
        return f"{source.size}".encode() + source.tobytes()
    return bytes(source)


def resized(image: Image.Image, processor: Any) -> np.ndarray:
    """An image as the processor resizes and crops it, not yet scaled.  -> (H, W, 3) uint8."""
    off = {"do_rescale": False, "do_normalize": False}
    if getattr(processor, "include_top", False):  # EfficientNet scales once more
        off["include_top"] = False
    found = processor([image], **off)["pixel_values"][0]
    array = np.moveaxis(np.asarray(found), 0, -1)  # (3, H, W) -> (H, W, 3)
    return np.ascontiguousarray(np.clip(np.rint(array), 0, 255).astype(np.uint8))


def target_size(processor: Any) -> tuple[int, int]:
    """Height and width that the processor brings every image to.

    Raises:
        InputError: It leaves images at sizes of their own.
    """
    blanks = [Image.new("RGB", size) for size in ((48, 48), (80, 48), (48, 80))]
    sizes = {resized(blank, processor).shape[:2] for blank in blanks}
    if len(sizes) > 1:
        raise InputError(
            "the image processor of this model leaves images at sizes of their own; give image_size"
        )
    return sizes.pop()


def scaling(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset (3,) that make pixel values of resized pixels, as the processor does.

    They are found by trying, on black and on white: processors have steps of their own.

    Raises:
        InputError: The processor gives other values than these for a random image.
    """
    height, width = target_size(processor)

    def values(image: Image.Image) -> np.ndarray:
        return np.asarray(processor([image])["pixel_values"][0], dtype=np.float64)  # (3, H, W)

    middle = (slice(None), height // 2, width // 2)
    black, white = (
        values(Image.new("RGB", (width, height), colour))[middle] for colour in ("black", "white")
    )
    slope = (white - black) / 255
    random = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(random)
    found = np.moveaxis(resized(image, processor) * slope + black, -1, 0)
    # the processor may round to whole pixels at another step
    if not (np.abs(found - values(image)) <= 0.6 * np.abs(slope)[:, None, None] + 1e-6).all():
        raise InputError(
            f"the image processor {type(processor).__name__} of this model changes pixels in a way "
            "that is not supported: the values of a pixel are no straight line; use another model"
        )
    return slope.astype(np.float32), black.astype(np.float32)


def decode(
    sources: Sequence[Any], stamps: Iterable[bytes], processor: Any, workers: int = 0
) -> PixelTable:
    """Decode and resize images, or take what an earlier run kept.

    A table is not kept where an image could not be read that was there: the next run may read it.

    Args:
        sources: N images, see `rgb_of`; None where there is none.
        stamps: What tells each source apart without decoding it, see `stamp`.
        processor: An image processor of transformers.
        workers: Processes that decode; 0 decodes in this one.

    Raises:
        InputError: The cache cannot be written, or the processes cannot be started.
    """
    size = target_size(processor)
    digest = hashlib.sha256(f"2 {size} {processor.to_json_string()}\n".encode())
    absent = set()
    for row, told in enumerate(stamps):
        digest.update(hashlib.blake2b(told, digest_size=DIGEST).digest())
        if told.startswith(ABSENT):
            absent.add(row)
    folder = cache_folder() / "images"
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    kept = _kept(path, len(sources), size)
    if kept is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            prefix=f"{path.stem}.", dir=folder, ignore_cleanup_errors=True
        ) as parts:
            table = _decode_into(Path(parts), sources, size, processor, workers)
            if {row for row in table.bad if table.digests[row].tobytes() == UNREAD} == absent:
                for suffix in (".digests", ".json", ".npy"):  # the pixels last: they are looked for
                    os.replace(Path(parts) / f"table{suffix}", path.with_suffix(suffix))
            return table
    except OSError as error:
        raise InputError(
            f"cannot write the image cache {folder}: {error.strerror or error}; "
            "set NOISEPROOF_CACHE to a folder that can be written"
        ) from error


def _kept(path: Path, rows: int, size: tuple[int, int]) -> PixelTable | None:
    with suppress(OSError, ValueError, EOFError):
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        digests = np.load(path.with_suffix(".digests"), allow_pickle=False)
        bad = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if pixels.shape == (rows, *size, 3) and len(digests) == rows:
            return PixelTable(pixels, digests, {int(row): str(why) for row, why in bad.items()})
    return None


def _decode_into(
    folder: Path, sources: Sequence[Any], size: tuple[int, int], processor: Any, workers: int
) -> PixelTable:
    """Write the files of a table; its pixels stay mapped, wherever they go.

    They are written one after the other, not through the map: on a full disk that is an error,
    where a page that finds no place ends the process.
    """
    digests = np.zeros((len(sources), DIGEST), dtype=np.uint8)
    bad: dict[int, str] = {}
    shape = (len(sources), *size, 3)
    with (folder / "table.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row, (found, mark) in enumerate(_decoded(sources, processor, workers)):
            digests[row] = np.frombuffer(mark, np.uint8)
            if isinstance(found, str):
                bad[row] = found
            file.write(bytes(math.prod(shape[1:])) if isinstance(found, str) else found.tobytes())
    with (folder / "table.digests").open("wb") as file:
        np.save(file, digests, allow_pickle=False)
    (folder / "table.json").write_text(json.dumps(bad), encoding="utf-8")
    pixels = np.load(folder / "table.npy", mmap_mode="r", allow_pickle=False)
    return PixelTable(pixels, digests, bad)


Decoded = tuple[np.ndarray | str, bytes]
"""Pixels, or why there are none, and the digest of the source."""


def _decoded(sources: Sequence[Any], processor: Any, workers: int) -> Iterator[Decoded]:
    pieces = (
        [sources[row] for row in range(start, min(start + PIECE, len(sources)))]
        for start in range(0, len(sources), PIECE)
    )
    work = partial(_decode_piece, processor=processor)
    if workers == 0 or len(sources) <= PIECE:
        for piece in pieces:
            yield from work(piece)
        return
    # Fresh processes: a fork of one with threads may hang. At most a few pieces wait in memory.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting = []
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) >= 4 * workers:
                    yield from waiting.pop(0).result()
            for future in waiting:
                yield from future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process that decodes images ended early: each starts by running the script anew, so "
            'guard what the script does with if __name__ == "__main__":; or use image_workers=0, '
            "which needs no script file and less memory"
        ) from error


def _decode_piece(sources: list[Any], processor: Any) -> list[Decoded]:
    return [_decode_one(source, processor) for source in sources]


def _decode_one(source: Any, processor: Any) -> Decoded:
    if source is None:
        return "the cell is empty", UNREAD
    try:
        content = Path(source).read_bytes() if isinstance(source, str) else source
        if isinstance(content, Image.Image):  # whose file may not have been read yet
            content = rgb_of(content)
    except ANYTHING as error:
        return _reason(error), UNREAD
    mark = hashlib.blake2b(_content(content), digest_size=DIGEST).digest()
    try:
        image = content if isinstance(content, Image.Image) else rgb_of(content)
        return resized(image, processor), mark
    except ANYTHING as error:
        return _reason(error), mark


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = "it is no image" if text.startswith("cannot identify image file") else text
    return " ".join(text.split())[:200] or type(error).__name__
