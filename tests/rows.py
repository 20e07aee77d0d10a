"""Tiny rows of every kind with their labels, for tests that run once per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tiny import LABELS


def labels_of(rows: int, wrong: float, seed: int) -> tuple[list[str], list[str]]:
    """Given and true labels; the classes take turns."""
    random = np.random.default_rng([seed, 1])
    clean = [LABELS[row % 3] for row in range(rows)]
    given = list(clean)
    for row in random.permutation(rows)[: round(wrong * rows)]:
        given[row] = LABELS[(LABELS.index(given[row]) + 1) % 3]
    return given, clean


def feature_rows(
    rows: int = 25, *, wrong: float = 0.2, seed: int = 0, width: int = 6
) -> dict[str, Any]:
    """Vectors around a centre per class, each feature at a scale of its own."""
    given, clean = labels_of(rows, wrong, seed)
    random = np.random.default_rng(seed)
    centres = 3 * np.eye(3, width)
    table = centres[[LABELS.index(name) for name in clean]] + random.normal(size=(rows, width))
    table = table * 10.0 ** np.arange(-2, width - 2) + np.arange(width)
    return {"features": table.astype(np.float32), "label": given, "clean_label": clean}


SOURCES: dict[str, Callable[..., dict[str, Any]]] = {"features": feature_rows}
"""Task -> rows as `fit` takes them."""

SETTINGS: dict[str, dict[str, Any]] = {"features": {}}
"""Task -> further settings of a job on them."""
