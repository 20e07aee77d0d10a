"""Images brought to one size and kept on disk: decoded once, then mapped into memory by every run.

files, bytes or arrays -> RGB -> resized by the model's image processor -> (N, H, W, 3) uint8
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from noiseproof.encoding import cache_folder
from noiseproof.errors import InputError

PIECE = 32  # images that a process decodes at a time
DIGEST = 16  # bytes that tell two images apart
ANYTHING = (OSError, ValueError, SyntaxError, TypeError, EOFError, ArithmeticError, IndexError)


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
            uint8, or an image of Pillow.

    Raises:
        OSError, ValueError: It cannot be read; says why.
    """
    if isinstance(source, np.ndarray):
        array = source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata, large pictures: they can be read
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


def resized(image: Image.Image, processor: Any) -> np.ndarray:
    """An image as the processor resizes and crops it, not yet scaled.  -> (H, W, 3) uint8."""
    found = processor([image], do_rescale=False, do_normalize=False)["pixel_values"][0]
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


def decode(
    sources: Sequence[Any], stamps: Iterable[bytes], processor: Any, workers: int = 0
) -> PixelTable:
    """Decode and resize images, or take what an earlier run kept.

    Args:
        sources: N images, see `rgb_of`.
        stamps: What tells each source apart without decoding it.
        processor: An image processor of transformers.
        workers: Processes that decode; 0 decodes in this one.

    Raises:
        InputError: The cache cannot be written.
    """
    size = target_size(processor)
    digest = hashlib.sha256(f"1 {size} {processor.to_json_string()}\n".encode())
    for stamp in stamps:
        digest.update(hashlib.blake2b(stamp, digest_size=DIGEST).digest())
    folder = cache_folder() / "images"
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    kept = _kept(path, len(sources), size)
    if kept is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, sources, size, processor, workers)
    except OSError as error:
        raise InputError(
            f"cannot write the image cache {folder}: {error.strerror or error}; "
            "set NOISEPROOF_CACHE to a folder that can be written"
        ) from error
    made = _kept(path, len(sources), size)
    assert made is not None
    return made


def _kept(path: Path, rows: int, size: tuple[int, int]) -> PixelTable | None:
    with suppress(OSError, ValueError, EOFError):
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        digests = np.load(path.with_suffix(".digests"), allow_pickle=False)
        bad = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if pixels.shape == (rows, *size, 3) and len(digests) == rows:
            return PixelTable(pixels, digests, {int(row): str(why) for row, why in bad.items()})
    return None


def _write(
    path: Path, sources: Sequence[Any], size: tuple[int, int], processor: Any, workers: int
) -> None:
    """Write the files of a table; the pixels last, under their name only when they are whole."""
    part = path.with_suffix(f".{os.getpid()}.part")
    digests = np.zeros((len(sources), DIGEST), dtype=np.uint8)
    bad: dict[int, str] = {}
    try:
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(sources), *size, 3))
        for row, (found, mark) in enumerate(_decoded(sources, processor, workers)):
            digests[row] = np.frombuffer(mark, np.uint8)
            if isinstance(found, str):
                bad[row] = found
            else:
                pixels[row] = found
        pixels.flush()
        del pixels
        with path.with_suffix(".digests").open("wb") as file:
            np.save(file, digests, allow_pickle=False)
        path.with_suffix(".json").write_text(json.dumps(bad), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = []
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) >= 4 * workers:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def _decode_piece(sources: list[Any], processor: Any) -> list[Decoded]:
    return [_decode_one(source, processor) for source in sources]


def _decode_one(source: Any, processor: Any) -> Decoded:
    try:
        content = Path(source).read_bytes() if isinstance(source, str) else source
    except OSError as error:
        return _reason(error), bytes(DIGEST)
    raw = content
    if isinstance(content, Image.Image):
        raw = content.tobytes()
    elif isinstance(content, np.ndarray):
        raw = f"{content.shape}".encode() + np.ascontiguousarray(content).tobytes()
    mark = hashlib.blake2b(raw, digest_size=DIGEST).digest()
    try:
        return resized(rgb_of(content), processor), mark
    except (*ANYTHING, Image.DecompressionBombError) as error:
        return _reason(error), mark


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = "it is no image" if text.startswith("cannot identify image file") else text
    return " ".join(text.split())[:200] or type(error).__name__
