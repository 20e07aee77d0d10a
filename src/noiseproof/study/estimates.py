"""A mean over seeds and kinds of noise, and what it says of a claim that it is above 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from noiseproof.statistics import Difference, Interval, compare

Verdict = Literal["holds", "contradicted", "open", "no claim"]
VERDICTS: dict[str, Verdict] = {"won": "holds", "lost": "contradicted", "tied": "open"}
Values = dict[str, float]
"""By seed and noise, with a tab between."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and kinds of noise.

    Attributes:
        difference: What it is the mean of.
        seeds: Different seeds in it; from a single one nothing is claimed.
        settings: Different kinds of noise (and data, and models) in it.
    """

    difference: Difference
    seeds: int
    settings: int

    @property
    def mean(self) -> float:
        """Of all differences."""
        return self.difference.summary.mean

    @property
    def interval(self) -> Interval | None:
        """T interval of the mean; None from a single seed."""
        return self.difference.summary.interval if self.seeds > 1 else None

    @property
    def verdict(self) -> Verdict:
        """Of the claim that it is above 0."""
        if self.interval is None:
            return "no claim"
        return VERDICTS[self.difference.verdict]


def estimate(values: Mapping[str, float], others: Mapping[str, float] | None = None) -> Estimate:
    """Mean of values minus others (0 without any), over what both have.

    Raises:
        ValueError: They have nothing in common.
    """
    difference = compare(values, dict.fromkeys(values, 0.0) if others is None else others)
    if difference is None:
        raise ValueError("nothing in common")
    keys = [key.partition("\t") for key in difference.seeds]
    return Estimate(difference, len({key[0] for key in keys}), len({key[2] for key in keys}))
