"""Spectra of features: how many directions they use, and how far two sets of them are turned.

Singular value entropy (SVE) and largest singular value ratio (LSVR) are the two measures with which
Chen et al. (ICLR 2024, arXiv:2309.17002) follow label noise from pre-training into the features.
Their formulas are our reading of what others write about the paper. Letters: M rows, D features.
Arrays may be memory maps: rows are read in blocks. Values are computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from noiseproof.errors import InputError

PREPROCESS = ("none", "l2", "code", "column")
LEAST_BLOCK = 2048  # rows that are read at once; four times as many as features, if that is more


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a set of features, and what follows from them.

    Two spectra can be compared if M, D and the pre-processing agree.

    Attributes:
        values: All min(M, D) singular values, largest first.
        rows: M.
        width: D.
        preprocess: What was done to the features before.
        precision: Machine precision of the features as they came, for the rank.
    """

    values: np.ndarray
    rows: int
    width: int
    preprocess: str
    precision: float = float(np.finfo(np.float64).eps)

    @property
    def shares(self) -> np.ndarray:
        """Each singular value over the sum of all; not of their squares."""
        return np.asarray(self.values / self.values.sum())

    @property
    def sve(self) -> float:
        """Singular value entropy, -sum_j p_j log p_j: 0 for one direction, at most log rank."""
        shares = self.shares[self.values > 0]
        return float(abs(np.sum(shares * np.log(shares))))

    @property
    def lsvr(self) -> float:
        """Largest singular value ratio, -log p_1: 0 for one direction, never above the entropy."""
        return float(abs(np.log(self.shares[0])))

    @property
    def rank(self) -> int:
        """Singular values above rounding, numpy's rule."""
        least = self.values[0] * max(self.rows, self.width) * self.precision
        return int((self.values > least).sum())

    def top_share(self, k: int) -> float:
        """Share of the k leading singular values."""
        return float(self.shares[:k].sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record: s, sve, lsvr, p1, topk (k = 5), rank, M, D, preprocess."""
        return {
            "s": [float(value) for value in self.values],
            "sve": self.sve,
            "lsvr": self.lsvr,
            "p1": self.top_share(1),
            "topk": self.top_share(5),
            "rank": self.rank,
            "M": self.rows,
            "D": self.width,
            "preprocess": self.preprocess,
        }


def spectrum(features: Any, preprocess: str = "code") -> Spectrum:
    """Singular values of features (M, D), with both measures.

    Args:
        features: An array, a memory map or a CPU tensor.
        preprocess: none; l2 (rows of length 1); code (l2, then minus the mean over the features of
            each row, as the released code does); column (minus the mean of each column). Centring
            moves LSVR of non-negative features by more than a nat: never mix them.

    Raises:
        InputError: Not a table of finite numbers, or all of them are 0.

    >>> found = spectrum([[3.0, 0.0], [0.0, 1.0]], preprocess="none")
    >>> round(found.sve, 4), round(found.lsvr, 4), found.rank
    (0.5623, 0.2877, 2)
    """
    table = _table(features, preprocess)
    rows, width = table.shape
    triangle: np.ndarray | None = None  # R of the QR decomposition of the rows so far
    for block in _blocks(table, preprocess):
        stacked = block if triangle is None else np.vstack([triangle, block])
        triangle = np.asarray(np.linalg.qr(stacked, mode="r")) if rows > width else stacked
    assert triangle is not None
    values = np.linalg.svd(triangle, compute_uv=False)
    if not values[0] > 0:
        raise InputError(f"features {table.shape} are all 0 after preprocess={preprocess}")
    kind = table.dtype if np.issubdtype(table.dtype, np.floating) else np.dtype(np.float64)
    return Spectrum(values, rows, width, preprocess, float(np.finfo(kind).eps))


def principal_angles(clean: Any, noisy: Any, k: int, preprocess: str = "none") -> np.ndarray:
    """Angles between the leading left subspaces of two feature tables of the same rows.

    The cosines are the singular values of U_c[:, :k]' U_n[:, :k]: 0 means that both networks spread
    these rows along the same k directions, pi / 2 that one of them is new.

    Args:
        clean: Features (M, D) of one network.
        noisy: Features (M, D') of another, of the same rows in the same order.
        k: Dimensions of the subspaces.
        preprocess: As for `spectrum`.

    Returns:
        k angles in radians, smallest first.

    Raises:
        InputError: Other rows, or k is larger than a rank.

    >>> left, right = np.diag([2.0, 1.0, 0.0]), np.diag([2.0, 0.0, 1.0])
    >>> principal_angles(left, right, k=2).round(4)
    array([0.    , 1.5708])
    """
    from scipy.linalg import subspace_angles

    sides: list[np.ndarray] = []
    for features in (clean, noisy):
        table = _table(features, preprocess)
        if sides and len(table) != len(sides[0]):
            raise InputError(
                f"both tables must hold the same rows, got {len(sides[0])} and {len(table)}"
            )
        whole = np.vstack(list(_blocks(table, preprocess)))
        left, values, _ = np.linalg.svd(whole, full_matrices=False)
        rank = int((values > values[0] * max(whole.shape) * np.finfo(np.float64).eps).sum())
        if not 1 <= k <= rank:
            raise InputError(f"k must lie in [1, {rank}], the rank of the features; got {k}")
        sides.append(left[:, :k])
    return np.asarray(subspace_angles(sides[0], sides[1])[::-1])


def entry_moments(features: Any) -> dict[str, float]:
    """Skewness and kurtosis of all entries of the features (M, D), each a single number.

    m_3 / m_2^1.5 and m_4 / m_2^2 (3 for a normal distribution), over the M D entries.

    >>> entry_moments([[0.0, 0.0], [0.0, 4.0]])["skewness"]  # doctest: +ELLIPSIS
    1.154...
    """
    table = _table(features, "none")
    mean = float(sum(block.sum() for block in _blocks(table, "none")) / table.size)
    moments = np.zeros(3)
    for block in _blocks(table, "none"):
        away = block - mean
        moments += [np.sum(away**power) / table.size for power in (2, 3, 4)]
    if not moments[0] > 0:
        raise InputError("the features are constant, so they have no skewness")
    return {
        "skewness": float(moments[1] / moments[0] ** 1.5),
        "kurtosis": float(moments[2] / moments[0] ** 2),
    }


def _table(features: Any, preprocess: str) -> np.ndarray:
    if preprocess not in PREPROCESS:
        raise InputError(f"preprocess must be one of {', '.join(PREPROCESS)}; got {preprocess!r}")
    table = np.asarray(features)
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.number):
        raise InputError(
            f"features must be a table (M, D) of numbers, got shape {table.shape}, {table.dtype}"
        )
    return table


def _blocks(table: np.ndarray, preprocess: str) -> Iterator[np.ndarray]:
    """Rows in blocks, pre-processed, in float64."""
    size = max(LEAST_BLOCK, 4 * table.shape[1])
    if len(table) <= table.shape[1]:
        size = len(table)
    starts = range(0, len(table), size)
    mean = np.zeros(table.shape[1])
    if preprocess == "column":
        for start in starts:
            mean += table[start : start + size].sum(axis=0, dtype=np.float64)
        mean /= len(table)
    for start in starts:
        block = table[start : start + size].astype(np.float64)
        if not np.isfinite(block).all():
            first = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise InputError(f"features must be finite numbers; row {first} is not")
        if preprocess in ("l2", "code"):
            length = np.linalg.norm(block, axis=1, keepdims=True)
            block /= np.where(length > 0, length, 1.0)
        if preprocess == "code":
            block -= block.mean(axis=1, keepdims=True)
        yield block - mean if preprocess == "column" else block
