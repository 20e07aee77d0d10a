"""What the records of the study say: accuracies, spectra, angles, and how they go together."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from noiseproof.report.runs import Found, Run, as_number, find_runs
from noiseproof.statistics import Difference, Summary, compare, summarize
from noiseproof.study.noisy_pretraining.working import ANGLES, METHODS

Of = Callable[["Tuned"], "float | None"]


@dataclass(frozen=True)
class Tuned:
    """One tuning.

    Attributes:
        run: As the report found it.
        after: SVE and LSVR of the reshaped test features.
    """

    run: Run
    after: dict[str, float]

    @property
    def rate(self) -> float:
        """Share of wrong labels in pre-training."""
        return float(self.run.names["noise"].rstrip("%")) / 100

    @property
    def fraction(self) -> float:
        """Share of the rows that were tuned on."""
        return float(self.run.names["data"].rstrip("%")) / 100

    @property
    def task(self) -> str:
        """Which classes: new or old."""
        return self.run.names["part"]

    @property
    def id(self) -> float | None:
        """Accuracy on rows like those it was tuned on."""
        return self.run.metric("test_accuracy")

    @property
    def ood(self) -> float | None:
        """Mean accuracy on the shifted rows; no row of the usual test is in it."""
        found = [as_number(one.get("accuracy")) for one in self.run.record.ood.values()]
        known = [value for value in found if value is not None]
        return fmean(known) if known else None


def correlations(one: Sequence[float], two: Sequence[float]) -> tuple[float, float] | None:
    """Spearman's and Pearson's; None of fewer than three pairs or of equal values.

    >>> correlations([1, 2, 3], [10, 30, 20])
    (0.5, 0.5)
    """
    from scipy import stats

    if len(one) < 3 or len(set(one)) < 2 or len(set(two)) < 2:
        return None
    spearman, pearson = stats.spearmanr(one, two).statistic, stats.pearsonr(one, two).statistic
    return round(float(spearman), 12), round(float(pearson), 12)


class Records:
    """All that lies in the folder of the study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pretraining: Found = find_runs([folder / "pretraining"])
        self.found: Found = find_runs([folder / "transfer"])
        self.tuned = [Tuned(run, _json(run.folder / "spectrum.json")) for run in self.found.runs]

    @cached_property
    def rates(self) -> list[float]:
        """Shares of wrong labels, the lowest first."""
        return sorted({one.rate for one in self.tuned})

    @cached_property
    def tasks(self) -> list[str]:
        """New before old."""
        return sorted({one.task for one in self.tuned})

    @cached_property
    def classes(self) -> int:
        """Classes that the networks were pre-trained on."""
        return max(int(run.record.data.get("classes", 1)) for run in self.pretraining.runs)

    @cached_property
    def fractions(self) -> list[float]:
        """Of the rows that were tuned on, the highest last."""
        return sorted({one.fraction for one in self.tuned})

    @cached_property
    def methods(self) -> list[str]:
        """In the order of the study."""
        there = {one.run.names["method"] for one in self.tuned}
        return [name for name in METHODS if name in there]

    def values(
        self, of: Of, *, task: str, method: str, rate: float, fraction: float | None = None
    ) -> dict[str, float]:
        """A number by seed; the highest fraction unless another is asked for."""
        wanted = self.fractions[-1] if fraction is None else fraction
        found = {
            one.run.seed: of(one)
            for one in self.tuned
            if (one.task, one.rate, one.fraction) == (task, rate, wanted)
            and one.run.names["method"] == method
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def line(self, of: Of, task: str, method: str) -> dict[float, list[float]]:
        """A number over the share of wrong labels."""
        found = {rate: self.values(of, task=task, method=method, rate=rate) for rate in self.rates}
        return {100 * rate: list(values.values()) for rate, values in found.items() if values}

    def before(self, task: str, rate: float) -> dict[str, dict[str, Any]]:
        """Spectra and angles of the test features of a network, by seed."""
        place = self.folder / "features" / f"{100 * rate:g}%"
        files = sorted(place.glob("*/spectra.json"))
        return {file.parent.name: found for file in files if (found := _json(file).get(task))}

    def pretrained(self, rate: float) -> list[float]:
        """Accuracy of the networks on their own classes, with right labels."""
        runs = [run for run in self.pretraining.runs if run.names["noise"] == f"{100 * rate:g}%"]
        return [value for run in runs if (value := run.metric("test_accuracy")) is not None]

    def correlation(
        self, measure: str, of: Of, task: str, method: str
    ) -> tuple[Summary | None, Summary | None]:
        """Correlation over rates of a spectral measure with an accuracy, summarised over seeds.

        Returns:
            By ranks (Spearman), and of the numbers (Pearson).
        """
        by_rate = {rate: self.before(task, rate) for rate in self.rates}
        accuracy = {rate: self.values(of, task=task, method=method, rate=rate)
                    for rate in self.rates}  # fmt: skip
        seeds = set.intersection(*(set(by_rate[r]) & set(accuracy[r]) for r in self.rates))
        found = [
            correlations(
                [by_rate[rate][seed][measure] for rate in self.rates],
                [accuracy[rate][seed] for rate in self.rates],
            )
            for seed in sorted(seeds)
        ]
        known = [pair for pair in found if pair is not None]
        return summarize(by_rank for by_rank, _ in known), summarize(linear for _, linear in known)

    def order(self, points: Mapping[float, Sequence[float]]) -> float | None:
        """Spearman's correlation of the rates with the means over seeds of a number."""
        means = {rate: fmean(values) for rate, values in points.items() if values}
        found = correlations(list(means), list(means.values()))
        return None if found is None else found[0]

    def spectral(self, measure: str, task: str) -> dict[float, list[float]]:
        """A spectral measure of the features before tuning, over the share of wrong labels."""
        return {100 * rate: [one[measure] for one in self.before(task, rate).values()]
                for rate in self.rates}  # fmt: skip

    def rise(self, measure: str, task: str) -> Difference | None:
        """A spectral measure at the highest rate minus that at the lowest, seed by seed."""
        high, low = ({seed: one[measure] for seed, one in self.before(task, rate).items()}
                     for rate in (self.rates[-1], self.rates[0]))  # fmt: skip
        return compare(high, low)

    def fall(self, of: Of, task: str, method: str, place: int = -1) -> Difference | None:
        """An accuracy at a rate, the highest, minus that at the lowest, seed by seed."""
        high, low = (self.values(of, task=task, method=method, rate=rate)
                     for rate in (self.rates[place], self.rates[0]))  # fmt: skip
        return compare(high, low)

    def gain(
        self, of: Of, task: str, method: str, rate: float, fraction: float
    ) -> Difference | None:
        """A method minus its control, the MLP, seed by seed."""
        mine, control = (
            self.values(of, task=task, method=name, rate=rate, fraction=fraction)
            for name in (method, "MLP")
        )
        return compare(mine, control)


def angle(found: dict[str, Any], k: int) -> float | None:
    """Mean of the principal angles of k leading directions, in degrees; None of fewer."""
    angles = found["angles"].get(str(k))
    return None if angles is None else float(np.degrees(np.mean(angles)))


def as_rows(records: Records) -> str:
    """One row per tuning, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shifted = sorted({name for one in records.tuned for name in one.run.record.ood})
    writer.writerow(["rate", "task", "fraction", "method", "seed", "id", "ood", *shifted,
                     "sve_before", "lsvr_before", *(f"angle_{k}" for k in ANGLES), "sve_after",
                     "lsvr_after"])  # fmt: skip
    for one in records.tuned:
        before = records.before(one.task, one.rate).get(one.run.seed, {})
        ood = [one.run.record.ood.get(name, {}).get("accuracy") for name in shifted]
        angles = [angle(before, k) if before else None for k in ANGLES]
        writer.writerow([one.rate, one.task, one.fraction, one.run.names["method"], one.run.seed,
                         one.id, one.ood, *ood, before.get("sve"), before.get("lsvr"), *angles,
                         one.after.get("sve"), one.after.get("lsvr")])  # fmt: skip
    return text.getvalue()


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
