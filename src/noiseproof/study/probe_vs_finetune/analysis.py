"""What the records say: where probe and fine-tuning cross, what selection leaves, what it costs.

A value belongs to a seed (with data and model) at a rate. Differences are taken between runs of the
same seed and rate, which share rows, wrong labels and test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

from noiseproof.report.runs import Found, Run, as_number
from noiseproof.statistics import Difference, Summary, compare, summarize

BASELINE = "FT-CE"
AS_GIVEN = "none"  # noise that the data came with
Values = dict[str, float]
"""By seed, data and model, as `seed_key`."""
Of = str | Callable[[Run], float | None]
"""A metric of the record, or what computes one from a run."""


@dataclass(frozen=True)
class Approach:
    """A way to use a pre-trained model.

    Attributes:
        method: In the words of a grid.
        style: Number of its colour.
    """

    method: Mapping[str, Any]
    style: int


APPROACHES = {
    "LP-CE": Approach({"name": "TURN:robust_probe", "probe_loss": "ce"}, 1 + 6),
    "LP-GCE": Approach({"name": "TURN:robust_probe"}, 2 + 6),
    "FT-CE": Approach({"name": "CrossEntropy"}, 1),
    "FT-GCE": Approach({"name": "GCE"}, 2),
    "LP-FT": Approach({"name": "TURN:lp_ft"}, 3),
    "TURN": Approach({"name": "TURN"}, 4),
}
"""By their names in the study; a probe has the colour of its loss, dashed."""
PAIRS = (("LP-GCE", "FT-CE"), ("LP-CE", "FT-CE"), ("LP-GCE", "FT-GCE"))
"""Probes and fine-tunings that are compared; the first pair is that of the paper's claim."""


def crossing(rates: Sequence[float], differences: Sequence[float]) -> float | None:
    """The rate from which on a difference is no longer above 0.  (n,), (n,) -> number.

    On straight lines between the points; None where it is above 0 at no rate, or at the highest.

    >>> crossing([0.0, 0.4, 0.8], [0.2, 0.1, -0.1])
    0.6
    >>> crossing([0.0, 0.4], [0.2, 0.1]), crossing([0.0, 0.4], [-0.2, -0.1])
    (None, None)
    """
    points = sorted(zip(rates, differences, strict=True))
    if not points or points[-1][1] > 0:
        return None
    for (low, above), (high, below) in reversed(list(pairwise(points))):
        if above > 0:
            return round(low + (high - low) * above / (above - below), 12)
    return None


@dataclass(frozen=True)
class Crossing:
    """Where a probe and a fine-tuning cross, seed by seed.

    Attributes:
        rates: Of the seeds where they cross.
        summary: Of these rates; None where there is none.
        seeds: Seeds that were looked at.
        probe_ahead: Seeds in which the probe is at least as good at every rate.
        tuning_ahead: Seeds in which fine-tuning is still better at the highest rate.
    """

    rates: Mapping[str, float]
    summary: Summary | None
    seeds: int
    probe_ahead: int
    tuning_ahead: int


@dataclass(frozen=True)
class Passes:
    """Passes of the encoder over rows, those that only measure left out.

    Attributes:
        forward: Over all training rows, so 1 is one pass over N rows.
        backward: The same.
    """

    forward: float
    backward: float

    @property
    def equivalent(self) -> float:
        """In forward passes; a backward pass counts two."""
        return self.forward + 2 * self.backward


def passes(history: Sequence[Mapping[str, Any]], rows: int, tune: str = "full") -> Passes:
    """Count the passes of a run from its history.

    A probe runs on features that one pass gave. Training passes over the rows of an epoch, forward
    and backward. Where an epoch selected its rows (it logged ``kept_share``) all rows were scored,
    after a probe the first time by its features.

    Args:
        history: Rows of a run.
        rows: N.
        tune: What the method trains; ``head`` makes every epoch one of a probe.

    >>> tuned = [{"stage": "tune", "rows": 50, "kept_share": 0.5}] * 2
    >>> passes([{"stage": "probe", "rows": 100}, *tuned], rows=100)
    Passes(forward=3.0, backward=1.0)
    """
    probed = [row for row in history if row["stage"] == "probe" or tune == "head"]
    tuned = [row for row in history if row["stage"] != "probe" and tune != "head"]
    trained = sum(float(row["rows"]) for row in tuned) / rows
    scored = sum(as_number(row.get("kept_share")) is not None for row in tuned)
    free = int(bool(probed) and bool(tuned) and as_number(tuned[0].get("kept_share")) is not None)
    return Passes(bool(probed) + trained + scored - free, trained)


def passes_of(run: Run) -> Passes | None:
    """Those of a run; None without a history."""
    rows = as_number(run.record.data.get("rows"))
    if not run.history or not rows:
        return None
    return passes(run.history, int(rows), str(run.setting("method.tune", "full")))


def cost(run: Run) -> float | None:
    """Passes of a run in forward passes over all rows."""
    found = passes_of(run)
    return None if found is None else found.equivalent


def tuned(run: Run, column: str) -> list[float]:
    """A column of the history in the last step of TURN (epochs,); what is no number is left out."""
    rows = [row for row in run.history if row.get("stage") == "tune"]
    found = [as_number(row.get(column)) for row in rows]
    return [value for value in found if value is not None]


def seed_key(run: Run) -> str:
    """What pairs a run with those of other approaches at the same rate."""
    return "\t".join(run.names[name] for name in ("seed", "data", "model"))


class Records:
    """All runs of the study, and what is computed from them."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.runs = [run for run in found.runs if run.names["method"] in APPROACHES]
        there = {run.names["method"] for run in self.runs}
        self.approaches = [name for name in APPROACHES if name in there]

    @cached_property
    def rates(self) -> dict[str, float]:
        """Realised share of wrong labels by noise, the mean of its runs, from low to high."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            rate = as_number(run.record.noise.get("noise_rate"))
            if rate is not None:
                found.setdefault(run.names["noise"], []).append(rate)
        means = {noise: fmean(rates) for noise, rates in found.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """Noise by its kind, from low to high; what changes no label belongs to every kind."""
        none = [noise for noise, rate in self.rates.items() if rate == 0]
        wrong = [noise for noise in self.rates if noise not in none]
        kinds = list(dict.fromkeys(map(kind_of, wrong))) or list(map(kind_of, none[:1]))
        return {
            kind: [noise for noise in self.rates if noise in none or kind_of(noise) == kind]
            for kind in kinds
        }

    def pick(self, approach: str, noise: str) -> list[Run]:
        """Finished runs of an approach under a noise."""
        return [
            run
            for run in self.runs
            if (run.names["method"], run.names["noise"]) == (approach, noise)
        ]

    def values(self, approach: str, noise: str, of: Of) -> Values:
        """A metric by seed, of the runs that have it."""
        found = {}
        for run in self.pick(approach, noise):
            value = run.metric(of) if isinstance(of, str) else of(run)
            if value is not None:
                found[seed_key(run)] = value
        return found

    def mean(self, approach: str, noise: str, of: Of) -> Summary | None:
        """Mean over seeds."""
        return summarize(self.values(approach, noise, of).values())

    def ahead(self, approach: str, other: str, noise: str, of: Of) -> Difference | None:
        """An approach minus another, seed by seed."""
        return compare(self.values(approach, noise, of), self.values(other, noise, of))

    def crossing(self, probe: str, tuning: str, kind: str) -> Crossing | None:
        """Where test accuracies cross; None unless a seed has both at two rates or more."""
        points: dict[str, dict[float, float]] = {}
        for noise in self.kinds[kind]:
            probes = self.values(probe, noise, "test_accuracy")
            for key, value in self.values(tuning, noise, "test_accuracy").items():
                if key in probes:
                    more = round(value - probes[key], 12)
                    points.setdefault(key, {})[self.rates[noise]] = more
        points = {key: found for key, found in points.items() if len(found) > 1}
        if not points:
            return None
        last = {key: found[max(found)] for key, found in points.items()}
        rates = {
            key: rate
            for key, found in points.items()
            if (rate := crossing(list(found), list(found.values()))) is not None
        }
        return Crossing(
            rates,
            summarize(rates.values()),
            len(points),
            sum(last[key] <= 0 and key not in rates for key in points),
            sum(value > 0 for value in last.values()),
        )

    def bent(self, approach: str, noise: str) -> Difference | None:
        """Accuracy of the re-probe minus that with pre-trained features, seed by seed."""
        return compare(
            self.values(approach, noise, "distortion_probe"),
            self.values(approach, noise, "distortion_probe_before"),
        )


def kind_of(noise: str) -> str:
    """A noise without its rate.

    >>> kind_of("symmetric:0.4")
    'symmetric'
    """
    return noise.partition(":")[0]
