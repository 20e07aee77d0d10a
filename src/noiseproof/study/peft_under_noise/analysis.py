"""What the records say: slopes over capacity, interference, and the two claims.

A value belongs to a seed under a kind of noise. Differences are taken between runs of the same seed
and noise, which share rows, wrong labels and order. Families count alike: where several are taken
together, a seed and noise that one of them lacks is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from noiseproof.report.runs import Found, Run
from noiseproof.statistics import slope
from noiseproof.study.estimates import Estimate, Values, Verdict, estimate
from noiseproof.study.peft_under_noise.families import FAMILIES, FULL, PROBE


@dataclass(frozen=True)
class Seen:
    """A run in the words of the study.

    Attributes:
        run: As the report found it.
        family: ``full``, ``head`` or a family of adapters.
        capacity: Of the family; None where it has none.
        routed: Whether it is CleaR, else plain.
        control: Whether it trained on the right rows alone.
        resized: Whether it is there for its capacity.
        random: Whether all its labels are random.
    """

    run: Run
    family: str
    capacity: int | None = None
    routed: bool = False
    control: bool = False
    resized: bool = False
    random: bool = False

    @property
    def noise(self) -> str:
        """Its noise, as the grid calls it."""
        return self.run.names["noise"]

    @property
    def key(self) -> str:
        """What pairs it with others: seed, data, model and noise."""
        return "\t".join(self.run.names[name] for name in ("seed", "data", "model", "noise"))


def seen(run: Run) -> Seen | None:
    """A run in the words of the study; None of one that has no place in it."""
    method = run.record.spec.get("method")
    if not isinstance(method, dict):
        return None
    part = run.names.get("part", "")
    about = {
        "control": bool(run.record.spec.get("only_clean_rows")),
        "resized": part == "capacity",
        "random": part == "random labels",
    }
    if method.get("name") == "CrossEntropy" and method.get("tune") in (FULL, PROBE):
        return Seen(run, str(method["tune"]), **about)
    for family in FAMILIES.values():
        if method.get("name") == "CleaR" and method.get("peft") == family.name:
            capacity = method.get(family.capacity)
            return Seen(
                run,
                family.name,
                int(capacity) if capacity is not None else None,
                method.get("routing") != "none" or bool(method.get("lambda_consistency")),
                **about,
            )
    return None


@dataclass(frozen=True)
class Claim:
    """A claim that a number is above 0, by family and for the mean of the families.

    Attributes:
        families: Estimates by family.
        overall: Of the mean of the families; None where nothing can be compared.
        missing: Families of which there is nothing to compare.
    """

    families: Mapping[str, Estimate]
    overall: Estimate | None
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Of the mean of the families."""
        return "no claim" if self.overall is None else self.overall.verdict


def claim(
    by_family: Mapping[str, Mapping[str, float]],
    families: Sequence[str],
    others: Mapping[str, float] | None = None,
) -> Claim:
    """Test that the values of the families lie above others (above 0 without any).

    Args:
        by_family: Values of each family by seed and noise.
        families: All families that should be there.
        others: What they are compared with.
    """
    estimates = {}
    for family in families:
        values = by_family.get(family, {})
        if values and (others is None or values.keys() & others.keys()):
            estimates[family] = estimate(values, others)
    together = mean_over_families(by_family[family] for family in estimates)
    if others is not None:
        together = {key: value for key, value in together.items() if key in others}
    overall = estimate(together, others) if together else None
    missing = tuple(family for family in families if family not in estimates)
    return Claim(estimates, overall, missing)


def mean_over_families(by_family: Iterable[Mapping[str, float]]) -> Values:
    """Mean over families by seed and noise, where all of them have it.

    >>> mean_over_families([{"0": 1.0, "1": 2.0}, {"0": 3.0}])
    {'0': 2.0}
    """
    tables = list(by_family)
    if not tables:
        return {}
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    return {key: fmean(table[key] for table in tables) for key in keys}


class Records:
    """All runs of the study, and what is computed from them."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.all = [one for run in found.runs if (one := seen(run)) is not None]
        unfinished = [seen(left.run) for left in found.left_out if left.run is not None]
        there = {one.family for one in (*self.all, *unfinished) if one is not None}
        self.families = [family.name for family in FAMILIES.values() if family.name in there]

    def pick(
        self,
        family: str,
        *,
        noise: str | None = None,
        routed: bool = False,
        control: bool = False,
        random: bool = False,
        resized: bool | None = False,
    ) -> list[Seen]:
        """Finished runs of a family; None takes any."""
        return [
            one
            for one in self.all
            if (one.family, one.routed, one.control, one.random)
            == (family, routed, control, random)
            and (noise is None or one.noise == noise)
            and (resized is None or one.resized == resized)
        ]

    @cached_property
    def noises(self) -> list[str]:
        """Kinds of noise that the families were run under, as the grid orders them."""
        names = (one.noise for one in self.all if not (one.random or one.control or one.resized))
        return list(dict.fromkeys(names))

    @cached_property
    def closer(self) -> str | None:
        """The noise of the closer looks: that of the capacities, else the first wrong one."""
        resized = [one.noise for one in self.all if one.resized]
        wrong = [one.noise for one in self.all if _memorised(one) is not None and not one.random]
        return next(iter([*resized, *wrong]), None)

    def slopes(self, metric: str = "memorization") -> dict[str, Values]:
        """Change of a metric per doubling of the capacity, by family."""
        found: dict[str, Values] = {}
        for family in self.families:
            points: dict[str, dict[int, float]] = {}
            for one in self.pick(family, resized=None):
                value = one.run.metric(metric)
                if one.capacity and value is not None:
                    points.setdefault(one.key, {})[one.capacity] = value
            steep = {key: slope(map(math.log2, many), many.values())
                     for key, many in points.items()}  # fmt: skip
            found[family] = {key: value for key, value in steep.items() if value is not None}
        return found

    def interference(self, metric: str = "clean_fit") -> dict[str, Values]:
        """What wrong labels cost, by family: right rows alone minus all rows."""
        found = {}
        for family in (FULL, PROBE, *self.families):
            alone = values(self.pick(family, control=True), metric)
            noisy = values(self.pick(family), metric)
            found[family] = {key: alone[key] - noisy[key] for key in alone if key in noisy}
        return found

    def by_family(self, metric: str, *, routed: bool = False) -> dict[str, Values]:
        """A metric under noise at the usual capacity, where there are wrong labels."""
        return {
            family: values(
                [one for one in self.pick(family, routed=routed) if _memorised(one) is not None],
                metric,
            )
            for family in (FULL, PROBE, *self.families)
        }

    def capacity_claim(self) -> Claim:
        """The smaller the capacity, the less is memorised: the slope is above 0."""
        sized = [family.name for family in FAMILIES.values() if family.capacity]
        return claim(self.slopes(), [name for name in self.families if name in sized])

    def full_claim(self) -> Claim:
        """Full fine-tuning memorises more than adapters: the difference is above 0."""
        found = self.by_family("memorization")
        full = found[FULL]
        less = {
            family: {key: full[key] - value for key, value in found[family].items() if key in full}
            for family in self.families
        }
        return claim(less, self.families)

    def interference_claim(self, metric: str = "clean_fit") -> Claim:
        """Wrong labels cost adapters more than full fine-tuning: the difference is above 0."""
        found = self.interference(metric)
        return claim(found, self.families, found[FULL])


def values(runs: Iterable[Seen], metric: str | Callable[[Run], float | None]) -> Values:
    """A metric by seed and noise, of the runs that have it."""
    table = {}
    for one in runs:
        value = one.run.metric(metric) if isinstance(metric, str) else metric(one.run)
        if value is not None:
            table[one.key] = value
    return table


def _memorised(one: Seen) -> float | None:
    return one.run.metric("memorization")
