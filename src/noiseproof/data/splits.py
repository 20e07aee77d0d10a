"""Splits and samples that keep the shares of the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from noiseproof.data.labels import Ints, whole_numbers
from noiseproof.errors import InputError


def stratified_split(labels: npt.ArrayLike, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Split rows so that both sides have every class of two rows or more.

    A class with a single row stays on the first side.

    Args:
        labels: (N,) class numbers.
        fraction: Share of the rows on the second side, between 0 and 1.
        seed: Seed of this split alone.

    Returns:
        Sorted row numbers of the rest and of the split.

    >>> rest, held_out = stratified_split([0, 0, 0, 0, 1, 1], fraction=0.34, seed=0)
    >>> len(rest), len(held_out)
    (4, 2)
    """
    classes = whole_numbers(labels, "labels")
    if not 0 < fraction < 1:  # NaN fails too
        raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
    counts = np.unique(classes, return_counts=True)[1]  # (C,)
    if not (counts > 1).any():
        raise InputError(
            f"cannot split {len(classes)} rows of {len(counts)} classes: no class has two rows"
        )
    sizes = _allocate(fraction * counts, np.minimum(1, counts - 1), counts - 1)
    split = _draw(classes, sizes, seed)
    return np.setdiff1d(np.arange(len(classes)), split), split


def stratified_sample(labels: npt.ArrayLike, size: int, seed: int) -> Ints:
    """Draw rows that keep the shares of the classes, by largest remainder.

    Every class gets a row where `size` is at least the number of classes.

    Args:
        labels: (N,) class numbers.
        size: How many rows to draw, 1 to N.
        seed: Seed of this sample alone.

    Returns:
        (size,) sorted row numbers.

    >>> stratified_sample([0, 1, 0, 0, 0, 1], size=3, seed=0).shape
    (3,)
    """
    classes = whole_numbers(labels, "labels")
    size = int(whole_numbers([size], "size")[0])
    if not 1 <= size <= len(classes):
        raise InputError(f"size must lie in 1 to {len(classes)} (the rows), got {size}")
    counts = np.unique(classes, return_counts=True)[1]  # (C,)
    low = np.ones_like(counts) if size >= len(counts) else np.zeros_like(counts)
    return _draw(classes, _allocate(size * counts / counts.sum(), low, counts), seed)


def _allocate(quota: npt.NDArray[np.floating[Any]], low: Ints, high: Ints) -> Ints:
    """Round quotas by largest remainder within bounds.  (C,) -> (C,), sum as near as they allow."""
    total = round(float(quota.sum()))
    sizes: Ints = np.clip(np.floor(quota).astype(np.int64), low, high)
    while sizes.sum() < total and (sizes < high).any():
        sizes[np.where(sizes < high, quota - sizes, -np.inf).argmax()] += 1
    while sizes.sum() > total and (sizes > low).any():
        sizes[np.where(sizes > low, quota - sizes, np.inf).argmin()] -= 1
    return sizes


def _draw(labels: Ints, sizes: Ints, seed: int) -> Ints:
    """Draw so many rows of each class.  (N,), (C,) -> sorted row numbers."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed must be a whole number from 0, got {seed!r}")
    generator = np.random.default_rng(seed)
    drawn = [
        generator.permutation(np.flatnonzero(labels == label))[:size]
        for label, size in zip(np.unique(labels), sizes, strict=True)
    ]
    rows: Ints = np.sort(np.concatenate(drawn))
    return rows
