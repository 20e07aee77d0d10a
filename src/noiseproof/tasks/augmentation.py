"""Changes to training images that leave their class as it is, on pixels (H, W, 3) uint8.

What happens to a row depends on its generator alone, so an interrupted epoch goes on as it began.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from noiseproof.errors import InputError

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]

CROP_MARGIN = 8  # a random crop moves the picture by at most this part of its side
ROTATION, ENHANCEMENT = 15.0, 0.4  # the most that a light RandAugment does


def random_crop(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Move the picture by up to an eighth of its side; its edge is mirrored into the gap.

    >>> random_crop(np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 3)
    """
    height, width, _ = pixels.shape
    down, right = height // CROP_MARGIN, width // CROP_MARGIN
    padded = np.pad(pixels, ((down, down), (right, right), (0, 0)), mode="reflect")
    top, left = random.integers(0, [2 * down + 1, 2 * right + 1])
    return padded[top : top + height, left : left + width]


def random_flip(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Mirror left and right, in half of the cases."""
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def light_rand_augment(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One operation of RandAugment, drawn evenly, at a low strength (arXiv:1909.13719)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    name = OPERATIONS[int(random.integers(len(OPERATIONS)))]
    strength = float(random.uniform(-1, 1))
    if name == "autocontrast":
        image = ImageOps.autocontrast(image)
    elif name == "equalize":
        image = ImageOps.equalize(image)
    elif name == "rotate":
        image = image.rotate(ROTATION * strength, resample=Image.Resampling.BILINEAR)
    elif name != "identity":
        image = ENHANCERS[name](image).enhance(1 + ENHANCEMENT * strength)
    return np.asarray(image)


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
OPERATIONS = ("identity", "autocontrast", "equalize", "rotate", *ENHANCERS)

CHANGES: dict[str, Change] = {
    "crop": random_crop,
    "flip": random_flip,
    "rand": light_rand_augment,
}


def parse_changes(spec: str) -> tuple[Change, ...]:
    """The changes that a setting names, in this order: ``none``, or names joined by ``+``.

    Raises:
        InputError: An unknown name.

    >>> [change.__name__ for change in parse_changes("crop+flip")], parse_changes("none")
    (['random_crop', 'random_flip'], ())
    """
    names = [] if spec == "none" else [name.strip() for name in spec.split("+")]
    for name in names:
        if name not in CHANGES:
            raise InputError(
                f"augment must be none, or some of {', '.join(CHANGES)} joined by +; got {spec!r}"
            )
    return tuple(CHANGES[name] for name in names)


def augmented(
    pixels: np.ndarray, changes: tuple[Change, ...], seed: int, row: int, view: int = 0
) -> np.ndarray:
    """One row, changed as its seed and number say, another view otherwise.  (H, W, 3) -> same."""
    random = np.random.default_rng([seed, row, view] if view else [seed, row])
    for change in changes:
        pixels = change(pixels, random)
    return pixels
