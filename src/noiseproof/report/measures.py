"""What is measured of runs, and runs by setting and method: the numbers of a comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from noiseproof.errors import InputError, unknown_name
from noiseproof.report.runs import PLACES, Found, Group, LeftOut, Run, as_number, natural
from noiseproof.statistics import Difference, compare, mean_over, recovered_gap


@dataclass(frozen=True)
class Measure:
    """A number of a run that is averaged over seeds.

    Attributes:
        title: Head of its column.
        meaning: What it is and how it is computed.
        of: Takes it from a run.
        better: 1 where more is better, -1 where less is, 0 where neither.
        share: Whether it is shown in percent.
    """

    title: str
    meaning: str
    of: Callable[[Run], float | None]
    better: int = 0
    share: bool = True


def metric(name: str) -> Callable[[Run], float | None]:
    """Takes a metric from a run."""
    return lambda run: run.metric(name)


ACCURACIES = ("accuracy", "choice_accuracy", "token_accuracy")


def first_of(takers: Sequence[Callable[[Run], float | None]]) -> Callable[[Run], float | None]:
    """Takes the first number that a run has."""
    return lambda run: next((found for of in takers if (found := of(run)) is not None), None)


def last_epoch(run: Run) -> float | None:
    """Test accuracy in the last row of the history; of a run without one, the metric."""
    curve = run.curve("test_accuracy")
    if curve:
        return as_number(curve[-1])
    return None if run.setting("train.select") == "best" else run.metric("test_accuracy")


def late_mean(run: Run) -> float | None:
    """Test accuracy over the late epochs; of a run that was tested once there is none."""
    tested = sum(math.isfinite(value) for value in run.curve("test_accuracy"))
    return None if tested == 1 else run.metric("test_accuracy_late")


ACCURACY = Measure(
    "Last epoch", "Test accuracy after the last epoch.", metric("test_accuracy"), better=1
)
CHOSEN = Measure(
    "Deployed",
    "Test accuracy of the deployed model: of the epoch that validation chose, else of the last.",
    metric("test_accuracy"),
    better=1,
)
LAST = Measure("Last epoch", "Test accuracy after the last epoch.", last_epoch)
RESPONSES = Measure(
    "Right",
    "Of a language model: test rows whose right choice is the likeliest; where there are no "
    "choices, response tokens that it ranks first.",
    first_of([metric(f"test_{kind}") for kind in ACCURACIES]),
    better=1,
)
LATE = Measure(
    "Late mean",
    "Test accuracy, mean over the last half of the epochs.",
    late_mean,
    better=1,
)
BEST = Measure(
    "Best epoch (oracle)",
    "Highest test accuracy of all epochs. The test labels chose the epoch, so this is a bound and "
    "no result.",
    metric("test_accuracy_best"),
)
VALIDATION = Measure(
    "Validation",
    "Accuracy of the deployed model on the validation rows, by their labels; of a language model "
    "response tokens that it ranks first.",
    first_of([metric("validation_accuracy"), metric("validation_token_accuracy")]),
    better=1,
)
OTHERS = (
    Measure("Validation loss", "Mean loss per response token of the validation rows.",
            metric("validation_loss"), better=-1, share=False),
    Measure("Macro F1", "F1 averaged over the classes, on the test set.",
            metric("test_macro_f1"), better=1),
    Measure("ECE", "Calibration error on the test set: mean gap of confidence and accuracy, "
            "15 bins.", metric("test_ece"), better=-1),
    Measure("Test loss", "Mean loss per response token of the test set.",
            metric("test_loss"), better=-1, share=False),
    Measure("Perplexity", "e to the power of the test loss.",
            metric("test_perplexity"), better=-1, share=False),
    Measure("Token accuracy", "Response tokens of the test set that the model ranks first.",
            metric("test_token_accuracy"), better=1),
    Measure("Choices", "Test rows whose right choice is the likeliest.",
            metric("test_choice_accuracy"), better=1),
    Measure("Exact match", "Test rows whose generated answer is right.",
            metric("test_exact_match"), better=1),
    Measure("Memorised", "Wrongly labelled training rows predicted as their wrong label.",
            metric("memorization"), better=-1),
    Measure("Clean fit", "Rightly labelled training rows predicted as their label.",
            metric("clean_fit")),
    Measure("AUROC", "How well the score of a row tells wrong labels from right ones; 50 is "
            "chance.", metric("detection_auroc"), better=1),
    Measure("AP", "Average precision of finding wrong labels; chance is the noise rate.",
            metric("detection_ap"), better=1),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Runs by setting and method."""

    found: Found
    baseline: str | None

    @cached_property
    def cells(self) -> dict[Group, dict[str, list[Run]]]:
        """Finished runs by setting, then by method; methods without one have an empty list."""
        known = [(run, True) for run in self.found.runs]
        known += [
            (left.run, False) for left in self.found.left_out if unfinished(left) and left.run
        ]
        cells: dict[Group, dict[str, list[Run]]] = {}
        for run, done in sorted(known, key=lambda item: _order(item[0].group)):
            runs = cells.setdefault(run.group, {}).setdefault(run.row, [])
            if done:
                runs.append(run)
        return cells

    @cached_property
    def rows(self) -> list[str]:
        """All methods, the baseline first."""
        names = sorted({row for cells in self.cells.values() for row in cells}, key=natural)
        return sorted(names, key=lambda name: self.partners.get(name) != name)

    @cached_property
    def partners(self) -> dict[str, str]:
        """The row that each row is compared with; a baseline with itself.

        A baseline that was run with several families of adapters meets each row with its own.
        """
        runs = [*self.found.runs, *(left.run for left in self.found.left_out if left.run)]
        places = {run.row: (run.names["method"], run.names["peft"]) for run in runs}
        by_family = {
            family: row for row, (method, family) in places.items() if method == self.baseline
        }
        if not by_family:  # the name of a row, or none at all
            return dict.fromkeys(places, self.baseline) if self.baseline in places else {}
        anyone = next(iter(by_family.values())) if len(by_family) == 1 else None
        found = {}
        for row, (_, family) in places.items():
            partner = by_family.get(family)
            if partner is None and (not family or "" in by_family):
                partner = anyone
            if partner is not None:
                found[row] = partner
        return found

    @cached_property
    def styles(self) -> dict[str, int]:
        """Number of the style of each method; baselines are grey."""
        greys = sum(self.partners.get(row) == row for row in self.rows)
        return {
            row: -index if index < greys else index - greys + 1
            for index, row in enumerate(self.rows)
        }

    @cached_property
    def heads(self) -> list[Measure]:
        """What comes first in a table: the end of the training, then its late and best epochs."""
        chosen = any(run.setting("train.select") == "best" for run in self.found.runs)
        first = [CHOSEN, LAST] if chosen and self.judged is ACCURACY else [self.judged]
        return self._known([*first, LATE, BEST])

    @cached_property
    def measures(self) -> list[Measure]:
        """What is known of at least one run."""
        return self._known(
            [*self.heads, *(m for m in (VALIDATION, *OTHERS) if m is not self.judged)]
        )

    def _known(self, measures: Iterable[Measure]) -> list[Measure]:
        return [m for m in measures if any(m.of(run) is not None for run in self.found.runs)]

    @cached_property
    def judged(self) -> Measure:
        """What methods are compared by: test accuracy, or what language models have in its place.

        Where no run has test rows it is the accuracy on the validation rows.
        """
        return next(iter(self._known([ACCURACY, RESPONSES, VALIDATION])), ACCURACY)

    @property
    def judged_name(self) -> str:
        """What that is in words."""
        return "validation accuracy" if self.judged is VALIDATION else "test accuracy"

    @cached_property
    def tested(self) -> bool:
        """Whether any run had rows to judge it by: only then are there accuracies to compare."""
        return bool(self._known([self.judged]))

    @cached_property
    def shared(self) -> list[Group]:
        """Settings in which every method has a result that has one anywhere."""
        having = {
            group: {row for row in self.rows if self.values(group, row, self.judged.of)}
            for group in self.cells
        }
        every = set().union(*having.values())
        return [group for group, rows in having.items() if rows and rows == every]

    def name(self, group: Group, *, short: bool = False) -> str:
        """What a setting is called: its data and noise, and what else differs between settings.

        The short name leaves out what all settings have in common.
        """
        parts = []
        for index, place in enumerate(PLACES):
            value = group[index]
            varies = len({other[index] for other in self.cells}) > 1
            if short and not varies:
                continue
            if place in ("data", "noise"):
                parts.append("no added noise" if (place, value) == ("noise", "none") else value)
            elif place == "validation":
                if varies or value != "none":
                    parts.append(f"{value} validation")
            elif varies and value:
                parts.append(value)
        return " · ".join(parts)

    def values(self, group: Group, row: str, of: Callable[[Run], float | None]) -> dict[str, float]:
        """A measure by seed."""
        runs = self.cells.get(group, {}).get(row, [])
        return {run.seed: value for run in runs if (value := of(run)) is not None}

    def difference(self, group: Group, row: str) -> Difference | None:
        """What runs are judged by against the baseline, seed by seed."""
        partner, of = self.partners.get(row), self.judged.of
        if partner is None or partner == row:
            return None
        return compare(self.values(group, row, of), self.values(group, partner, of))

    def mean(self, group: Group, row: str) -> float | None:
        """What runs are judged by, the mean over seeds."""
        values = self.values(group, row, self.judged.of).values()
        return fmean(values) if values else None

    @cached_property
    def means(self) -> dict[str, float]:
        """Mean over the settings that all methods share, of those that have a result."""
        found = {row: [self.mean(group, row) for group in self.shared] for row in self.rows}
        return {
            row: fmean(known)
            for row, means in found.items()
            if (known := [mean for mean in means if mean is not None])
        }

    def overall(self, row: str) -> tuple[Difference, int] | None:
        """The difference in the mean over the settings that all methods share, and their number.

        Without such settings over those that the method has.
        """
        found = [self.difference(group, row) for group in self.shared or self.cells]
        return mean_over([dict(zip(d.seeds, d.values, strict=True)) for d in found if d])

    def recovered(self, group: Group, row: str) -> float | None:
        """Recovered gap of the means over the seeds that method, plain and clean runs share."""
        clean, partner = self.clean(group), self.partners.get(row)
        if partner is None or clean is None or clean == group or self.judged is VALIDATION:
            return None
        of = self.judged.of
        method = self.values(group, row, of)
        plain, best = self.values(group, partner, of), self.values(clean, partner, of)
        seeds = method.keys() & plain.keys() & best.keys()
        if not seeds:
            return None
        means = [fmean(v[s] for s in seeds) for v in (method, plain, best)]
        return recovered_gap(*means)

    def runs(self, group: Group) -> list[Run]:
        """All finished runs of a setting."""
        return [run for found in self.cells[group].values() for run in found]

    def clean(self, group: Group) -> Group | None:
        """The same setting with right labels: no noise was added, and none is known of.

        It may stand in another part of the grid, with as many rows and epochs.
        """
        same = [index for index, place in enumerate(PLACES) if place not in ("noise", "part")]
        for other in sorted(self.cells, key=lambda other: other[:2] != group[:2]):
            runs = self.runs(other)
            if runs and all(map(_clean, runs)) and all(other[i] == group[i] for i in same):
                sizes = [{_size(run) for run in found} for found in (runs, self.runs(group))]
                if sizes[0] & sizes[1]:
                    return other
        return None


def choose_baseline(found: Found, asked: str | None) -> tuple[str | None, str]:
    """The method that others are compared with, or one row of it, and why it is that one.

    Raises:
        InputError: The one that was asked for is not there.
    """
    rows = {run.row for run in found.runs}
    methods = {run.names["method"] for run in found.runs}
    if asked is not None and asked not in rows | methods:
        raise InputError(unknown_name("baseline", asked, sorted(rows | methods, key=natural)))
    if asked is not None:
        return asked, "as asked for"
    told = found.grid.get("baseline")
    if told in rows | methods:
        return told, "as the grid says"
    plain = Counter(
        run.names["method"] if len(methods) > 1 else run.row
        for run in found.runs
        if _method_name(run) == "CrossEntropy"
    )
    if told or not plain or len(rows) < 2:
        why = f"{told}, the baseline of the grid, has no finished run" if told else ""
        return None, why
    return min(plain, key=lambda name: (-plain[name], len(name), name)), "plain fine-tuning"


def noise_rate(run: Run) -> float | None:
    """Share of wrong training labels: against the truth where it is known, else as injected."""
    known = as_number(run.record.noise.get("noise_rate"))
    return as_number(run.record.noise.get("injected_rate")) if known is None else known


def unfinished(left: LeftOut) -> bool:
    """Whether a run that was left out belongs into a table: it has not finished."""
    return left.run is not None and left.status not in ("copy", "clash")


def _clean(run: Run) -> bool:
    """Whether a run had right labels, as far as it is known."""
    return run.setting("noise") in (None, "none") and not noise_rate(run)


def _order(group: Group) -> list[object]:
    """Key that sorts settings: those without noise first."""
    return [natural("" if name == "none" else name) for name in group]


def _size(run: Run) -> tuple[object, object]:
    """Rows and epochs."""
    return run.record.data.get("rows"), run.setting("train.epochs")


def _method_name(run: Run) -> str:
    return str(run.setting("method.name") or run.setting("method") or "")
