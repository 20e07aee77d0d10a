"""A mean over seeds, and what it says of a claim that it is above 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from noiseproof.statistics import Difference, Summary, mean_over

Verdict = Literal["holds", "contradicted", "open", "no claim"]
VERDICTS: dict[str, Verdict] = {
    "won": "holds", "lost": "contradicted", "open": "open", "no claim": "no claim",
}  # fmt: skip
Values = dict[str, float]
"""By seed and setting (kind of noise, data, model), with a tab between."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, of the mean over settings that each of them has.

    Attributes:
        difference: The mean over settings, seed by seed.
        settings: Kinds of noise (and data, and models) in each.
    """

    difference: Difference
    settings: int

    @property
    def summary(self) -> Summary:
        """Mean over seeds with its interval."""
        return self.difference.summary

    @property
    def verdict(self) -> Verdict:
        """Of the claim that it is above 0."""
        return VERDICTS[self.difference.verdict]


def estimate(values: Mapping[str, float], others: Mapping[str, float] | None = None) -> Estimate:
    """Mean of values minus others (0 without any), over what both have.

    Values of one seed share rows, order and initial weights: they are averaged first.

    Raises:
        ValueError: They have nothing in common.
    """
    settings: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        if others is None or key in others:
            seed, _, setting = key.partition("\t")
            settings.setdefault(setting, {})[seed] = value - (others[key] if others else 0.0)
    found = mean_over(list(settings.values()))
    if found is None:
        raise ValueError("nothing in common")
    return Estimate(*found)
