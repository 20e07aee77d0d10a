"""Pictures for the study: drawn by code or the user's own, their wrong labels, their corruptions.

All pictures are (N, S, S, 3) uint8. Wrong labels are nested: those of a lower rate are among those
of a higher one, with the same wrong label, so that networks differ by the rate alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from noiseproof.errors import InputError

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two coordinates (N, S, S) each -> what is inside (N, S, S) bool."""


def _polar(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(u, v), np.arctan2(v, u)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.hypot(u, v) < 0.9
    return found


SHAPES: dict[str, Shape] = {
    "disc": _disc,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.25) & (np.maximum(abs(u), abs(v)) < 0.9),
    "triangle": lambda u, v: (v > -0.6) & (v < 0.9 - 1.7 * abs(u)),
    "bar": lambda u, v: (abs(u) < 0.25) & (abs(v) < 1),
    "star": lambda u, v: _polar(u, v)[0] < 0.6 + 0.4 * np.cos(5 * _polar(u, v)[1]),
    "stripes": lambda u, v: _disc(u, v) & (np.sin(9 * u) > 0),
    "angle": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.8) & ((u < -0.2) | (v < -0.2)),
    "ring": lambda u, v: (np.hypot(u, v) < 0.95) & (np.hypot(u, v) > 0.5),
    "half": lambda u, v: _disc(u, v) & (u > 0),
    "flower": lambda u, v: _polar(u, v)[0] < 0.6 + 0.35 * np.cos(3 * _polar(u, v)[1]),
    "checks": lambda u, v: _disc(u, v) & (np.sin(6 * u) * np.sin(6 * v) > 0),
}
"""The first two thirds are for pre-training, the others for transfer."""


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures.

    Attributes:
        pixels: (N, S, S, 3) uint8.
        labels: True labels (N,).
        names: Class names.
    """

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Count the pictures, N."""
        return len(self.labels)

    def of_classes(self, classes: range) -> Pictures:
        """Those of some neighbouring classes, numbered from 0."""
        rows = np.isin(self.labels, classes)
        names = tuple(self.names[number] for number in classes)
        return Pictures(self.pixels[rows], self.labels[rows] - classes.start, names)

    def take(self, rows: np.ndarray) -> Pictures:
        """The pictures at these places."""
        return Pictures(self.pixels[rows], self.labels[rows], self.names)

    def some(self, rows: int, seed: int) -> np.ndarray:
        """Places of as many of each class, ``rows`` in all at most, at least one of each.

        Of the same seed the fewer are among the more.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        each = max(1, rows // len(self.names))
        parts = [order[self.labels[order] == label][:each] for label in range(len(self.names))]
        return np.sort(np.concatenate(parts))

    def few(self, rows: int, seed: int) -> Pictures:
        """The pictures at these places."""
        return self.take(self.some(rows, seed))


def draw(rows: int, seed: int, side: int = 24) -> Pictures:
    """Draw light shapes on dark ground at random places, sizes, angles and colours, with noise.

    Args:
        rows: N; the classes take turns.
        seed: The same seed, the same pictures.
        side: S.

    >>> found = draw(24, seed=0)
    >>> found.pixels.shape, len(found.names)
    ((24, 24, 24, 3), 12)
    """
    random = np.random.default_rng([seed, 77])
    labels = np.arange(rows) % len(SHAPES)
    axis = np.linspace(-1, 1, side)
    x, y = np.meshgrid(axis, axis)
    where = random.uniform(-0.2, 0.2, (2, rows, 1, 1))
    size = random.uniform(0.55, 0.8, (rows, 1, 1))
    turn = random.uniform(-0.3, 0.3, (rows, 1, 1))
    right, down = (x - where[0]) / size, (y - where[1]) / size  # (N, S, S)
    u = np.cos(turn) * right + np.sin(turn) * down
    v = np.cos(turn) * down - np.sin(turn) * right
    inside = np.zeros((rows, side, side), dtype=bool)
    for label, shape in enumerate(SHAPES.values()):
        inside[labels == label] = shape(u[labels == label], v[labels == label])
    back = random.uniform(0, 90, (rows, 1, 1, 3))
    front = random.uniform(120, 255, (rows, 1, 1, 3))
    pixels = np.where(inside[..., None], front, back) + random.normal(0, 25, (*inside.shape, 3))
    return Pictures(np.clip(pixels, 0, 255).astype(np.uint8), labels, tuple(SHAPES))


def nested_noise(
    labels: np.ndarray, num_classes: int, rates: tuple[float, ...], seed: int
) -> dict[float, np.ndarray]:
    """Labels (N,) with wrong ones, by rate; those of a rate are wrong at every higher one too.

    Of each class the same share is given one of the other classes, each as likely.

    >>> found = nested_noise(np.zeros(10, dtype=int), 2, (0.1, 0.3), seed=0)
    >>> [int(noisy.sum()) for noisy in found.values()]
    [1, 3]
    """
    if num_classes < 2 or not all(0 <= rate < 1 for rate in rates):
        raise InputError(f"needs two classes and rates in [0, 1), got {num_classes} and {rates}")
    random = np.random.default_rng([seed, 78])
    others = (labels + random.integers(1, num_classes, len(labels))) % num_classes
    place = np.empty(len(labels))  # of a row in the order of its class, from 0 to 1
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        place[random.permutation(rows)] = (np.arange(len(rows)) + 0.5) / max(1, len(rows))
    return {rate: np.where(place < rate, others, labels) for rate in rates}


def _noise(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    found: np.ndarray = pixels + random.normal(0, 40, pixels.shape)
    return found


def _blur(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    found: np.ndarray = gaussian_filter(pixels, (0, 1.2, 1.2, 0))
    return found


def _contrast(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    mean = pixels.mean(axis=(1, 2, 3), keepdims=True)
    found: np.ndarray = mean + 0.3 * (pixels - mean)
    return found


def _occlusion(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    side = pixels.shape[1]
    corner = random.integers(0, side - side // 3, (2, len(pixels)))
    rows, columns = np.arange(side)[None, :, None], np.arange(side)[None, None, :]
    top, left = corner[0][:, None, None], corner[1][:, None, None]
    size = side // 3
    hidden = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    found: np.ndarray = np.where(hidden[..., None], 127.0, pixels)
    return found


CORRUPTIONS = {"noise": _noise, "blur": _blur, "contrast": _contrast, "occlusion": _occlusion}
"""Shifted domains: pixel noise (deviation 40), blur (1.2 pixels), 30 % contrast, a grey square."""


def corrupted(pixels: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Pictures (N, S, S, 3) under one of `CORRUPTIONS`.

    >>> corrupted(np.zeros((1, 4, 4, 3), dtype=np.uint8), "contrast", seed=0).max()
    np.uint8(0)
    """
    random = np.random.default_rng([seed, 79])
    changed = CORRUPTIONS[name](pixels.astype(np.float64), random)
    found: np.ndarray = np.clip(changed.round(), 0, 255).astype(np.uint8)
    return found
