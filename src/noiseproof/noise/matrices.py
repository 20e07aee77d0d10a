"""Transition matrices T[i, j] = P(given j | true i): counted, written and read."""

from __future__ import annotations

import json
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def estimate_transition_from_labels(
    clean: npt.ArrayLike, given: npt.ArrayLike, num_classes: int
) -> Floats:
    """Count how true classes became given classes.  (N,), (N,) -> (C, C), rows sum to 1.

    A class without rows gets an identity row.

    >>> estimate_transition_from_labels([0, 0, 1], [0, 1, 1], num_classes=3).tolist()
    [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    clean, given = np.asarray(clean), np.asarray(given)
    check_labels(clean, num_classes)
    check_labels(given, num_classes)
    if len(clean) != len(given):
        raise InputError(f"{len(clean)} clean labels do not pair with {len(given)} given labels")
    counts: Floats = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean, given), 1)
    counts[np.diag_indices(num_classes)] += counts.sum(axis=1) == 0
    counts /= counts.sum(axis=1, keepdims=True)
    return counts


def save_transition(path: str | Path, matrix: npt.ArrayLike) -> None:
    """Write a transition matrix as JSON, a list of rows; `load_transition` reads it unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_transition(f"{folder}/matrix.json", [[0.9, 0.1], [0.2, 0.8]])
    ...     load_transition(f"{folder}/matrix.json").tolist()
    [[0.9, 0.1], [0.2, 0.8]]
    """
    rows = [json.dumps(row) for row in check_matrix(matrix, "the transition matrix").tolist()]
    Path(path).write_text("[\n  " + ",\n  ".join(rows) + "\n]\n", encoding="utf-8")


def load_transition(path: str | Path) -> Floats:
    """Read a row-stochastic (C, C) matrix from .json (a list of rows), .csv (no header) or .npy."""
    path = Path(path)
    if path.suffix.lower() not in (".json", ".csv", ".npy"):
        raise InputError(f"{path}: a transition matrix is a .json, .csv or .npy file")
    try:
        if path.suffix.lower() == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".csv":
            matrix = np.loadtxt(path, delimiter=",", ndmin=2)
        else:
            matrix = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: is not a matrix of numbers ({error})") from None
    return check_matrix(matrix, str(path))


def check_matrix(matrix: object, where: str) -> Floats:
    """A matrix as numbers (C, C) whose rows sum to 1, or an `InputError` that says where."""
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: is not a matrix of numbers with rows of one length") from None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < 2:
        raise InputError(f"{where}: must be C x C with C >= 2, got shape {array.shape}")
    bad = np.argwhere(~(array >= 0))
    if len(bad):
        row, column = bad[0]
        cell = f"row {row + 1}, column {column + 1} of the matrix"
        raise InputError(f"{where}: {cell} must be at least 0, got {array[row, column]}")
    sums = array.sum(axis=1)
    if (wrong := np.flatnonzero(~(np.abs(sums - 1) <= 1e-6))).size:
        raise InputError(
            f"{where}: row {wrong[0] + 1} of the matrix must sum to 1, got {sums[wrong[0]]:.6g}"
        )
    return array


def check_labels(labels: npt.NDArray[Any], num_classes: int, least: int = 2) -> None:
    """Labels (N,) are whole numbers in [0, C), or an `InputError` names the row."""
    if not isinstance(num_classes, Integral) or num_classes < least:
        raise InputError(f"num_classes must be an integer of at least {least}, got {num_classes!r}")
    if labels.ndim != 1 or not labels.size:
        raise InputError(f"labels must have shape (N,) with N >= 1, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be integers, got {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        row = outside[0]
        raise InputError(f"labels must lie in [0, {num_classes}), got {labels[row]} in row {row}")
