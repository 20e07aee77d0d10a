"""The page of the study: spectra and accuracies over the wrong labels of pre-training."""

from __future__ import annotations

import dataclasses
from itertools import product

from noiseproof import charts
from noiseproof.charts import Series
from noiseproof.report.blocks import (
    MISSING,
    Block,
    Cell,
    Column,
    Facts,
    Figures,
    Report,
    Section,
    Table,
    Text,
    bounds,
    percent,
)
from noiseproof.report.figures import mean_line
from noiseproof.report.provenance import left_out, versions
from noiseproof.spectrum import PREPROCESS
from noiseproof.statistics import LEVEL, Difference, Interval, Summary
from noiseproof.study.noisy_pretraining.records import Of, Records, Tuned, angle
from noiseproof.study.noisy_pretraining.working import ANGLES
from noiseproof.study.showing import mean_cell, number_cell, summaries, told

STYLES = {"LP": 0, "MLP": 1, "NMTune code": 2, "NMTune paper": 3}
RATE = "wrong labels in pre-training, %"
MEASURES = (("sve", "SVE"), ("lsvr", "LSVR"))


def _id(one: Tuned) -> float | None:
    return one.id


def _ood(one: Tuned) -> float | None:
    return one.ood


def _after(key: str) -> Of:
    """SVE or LSVR of the reshaped features."""

    def take(one: Tuned) -> float | None:
        return one.after.get(key)

    return take


ACCURACIES: tuple[tuple[str, Of], ...] = (("ID", _id), ("OOD", _ood))


def page(records: Records, title: str) -> Report:
    """Everything that the records say.

    Args:
        records: Of one folder.
        title: Of the page.
    """
    sections = []
    for task in records.tasks:
        sections += [_spectra(records, task), _accuracy(records, task), _gains(records, task)]
    sections += [_together(records), _results(records), _facts(records), left_out(records.found)]
    said = [section.title for section in sections[:2]]
    return Report(title, ". ".join(said) + ".", [one for one in sections if one.blocks])


def _of(records: Records, task: str) -> str:
    return f" ({task} classes)" if len(records.tasks) > 1 else ""


def _direction(found: Difference | None) -> str:
    """What a difference says in a word."""
    if found is None:
        return "is not known"
    if found.verdict == "no claim":
        return "has one seed" if found.summary.n == 1 else "has no spread over seeds"
    return {"won": "rises", "lost": "falls", "open": "does not clearly change"}[found.verdict]


def _chart(lines: list[Series], records: Records, title: str) -> str:
    ticks = [100 * rate for rate in records.rates]
    return charts.line_chart(lines, title=title, x_label=RATE, x_ticks=ticks)


def _spectra(records: Records, task: str) -> Section:
    """SVE, LSVR and angles of the features over the rate."""
    drawn = []
    for key, name in MEASURES:
        before = summaries(records.spectral(key, task))
        lines = [mean_line("before tuning", before, 0, scale=1)]
        for method in ("MLP", "NMTune code", "NMTune paper"):
            points = records.line(_after(key), task, method)
            if points:
                lines.append(mean_line(method, summaries(points), STYLES[method], scale=1))
        drawn.append(_chart(lines, records, f"{name} of test features, nats"))
    angles = {100 * rate: _angles(records, task, rate, 5) for rate in records.rates}
    drawn.append(_chart([mean_line("angle", summaries(angles), 4, scale=1)], records,
                        "Turned against the clean network, degrees"))  # fmt: skip
    rises = {name: records.rise(key, task) for key, name in MEASURES}
    title = ", ".join(f"{name} {_direction(found)}" for name, found in rises.items())
    note = (
        "Singular value entropy and largest singular value ratio of the features of test rows, "
        "prepared as in the released code (rows of length 1, minus their mean); "
        f"means over seeds with {LEVEL:.0%} t intervals from three on; the angle is the mean of "
        "the principal angles between the leading subspaces of a network and of the one without "
        "wrong labels."
    )
    ends = f"{percent(records.rates[0])} to {percent(records.rates[-1])} %"
    blocks: list[Block] = [
        Figures([one for one in drawn if one], note),
        _differences(
            f"From {ends} wrong labels",
            {name: (rises[name], records.order(records.spectral(key, task)), 1.0)
             for key, name in MEASURES},
        ),
        _prepared(records, task),
    ]  # fmt: skip
    return Section(f"{title} with wrong labels in pre-training{_of(records, task)}", blocks,
                   link="Spectra")  # fmt: skip


def _accuracy(records: Records, task: str) -> Section:
    """ID and OOD accuracy over the rate, by method."""
    drawn = []
    for name, of in ACCURACIES:
        lines = [mean_line(method, summaries(points), STYLES[method]) for method in records.methods
                 if (points := records.line(of, task, method))]  # fmt: skip
        drawn.append(_chart(lines, records, f"{name} accuracy, %"))
    falls = {name: records.fall(of, task, "LP") for name, of in ACCURACIES}

    def until(place: int) -> Table:
        ends = f"{percent(records.rates[0])} to {percent(records.rates[place])} %"
        return _differences(f"From {ends} wrong labels, points", {
            f"{name}, {method}": (records.fall(of, task, method, place),
                                  records.order(records.line(of, task, method)), 100.0)
            for name, of in ACCURACIES for method in records.methods
        })  # fmt: skip

    note = (
        "OOD is the mean over pixel noise, blur, low contrast and a grey square on the test rows "
        f"of ID; the two are never mixed. Tuned on {percent(records.fractions[-1])} % of the rows, "
        f"last epoch, means over seeds with {LEVEL:.0%} t intervals from three on."
    )
    last = len(records.rates) - 1
    said = ", ".join(f"{name} accuracy of LP {_direction(found)}" for name, found in falls.items())
    blocks: list[Block] = [
        Figures([one for one in drawn if one], note),
        *(until(place) for place in sorted({last, min(1, last)}, reverse=True)),
    ]
    return Section(f"{said}{_of(records, task)}", blocks, link="Accuracy")


def _differences(
    heading: str, found: dict[str, tuple[Difference | None, float | None, float]]
) -> Table:
    """Paired differences with their intervals, and whether all rates are in order."""
    columns = [Column("Number", numeric=False), Column(heading), Column("It", numeric=False),
               Column("Order of all rates")]  # fmt: skip
    rows = [
        [Cell(name), Cell(_number(one.summary, scale), value=one.summary.mean),
         Cell(_direction(one)), Cell(MISSING if order is None else _signed(order), value=order)]
        for name, (one, order, scale) in found.items()
        if one is not None
    ]  # fmt: skip
    note = (
        "Paired by seed. Order: Spearman's correlation of the rates with the means over seeds: 1 "
        "where every step rises, \N{MINUS SIGN}1 where every step falls."
    )
    return Table(columns, rows, note, fixed=True)


def _angles(records: Records, task: str, rate: float, k: int) -> list[float]:
    """Mean angles of a network's k leading directions to the clean one's, a number a seed."""
    found = (angle(one, k) for one in records.before(task, rate).values())
    return [one for one in found if one is not None]


def _prepared(records: Records, task: str) -> Table:
    """Both measures by the preparation of features, and the angles, over the rates."""
    columns = [Column("Wrong labels, %")]
    columns += [Column(f"{name}, {kind}") for kind in PREPROCESS for _, name in MEASURES]
    columns += [Column(f"Angle, k = {k}") for k in ANGLES]
    rows = []
    for rate in records.rates:
        networks = list(records.before(task, rate).values())
        cells = [
            number_cell([one["spectra"][kind][key] for one in networks], 2)
            for kind in PREPROCESS
            for key, _ in MEASURES
        ]
        cells += [number_cell(_angles(records, task, rate, k), 1) for k in ANGLES]
        rows.append([Cell(percent(rate), value=rate), *cells])
    note = (
        "Before tuning, mean ± standard deviation over seeds, by the preparation of features: "
        "none, l2 (rows of length 1), code (l2, minus the mean of the row), column (minus the mean "
        "of the column). Principal angles in degrees, after code, between the k leading "
        "directions of a network and of the one without wrong labels."
    )
    return Table(columns, rows, note)


def _number(found: Summary, scale: float) -> str:
    if scale == 100:
        return told(found)
    if found.interval is None:
        return f"{_signed(found.mean)} {bounds(found)}"
    return (
        f"{_signed(found.mean)} ({_signed(found.interval.low)} to {_signed(found.interval.high)})"
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _correlation(found: Summary) -> str:
    """A mean correlation; its interval is cut where correlations end."""
    ends = found.interval
    if ends is not None:
        ends = Interval(max(-1.0, ends.low), min(1.0, ends.high), ends.level)
    return _number(dataclasses.replace(found, interval=ends), 1)


def _gains(records: Records, task: str) -> Section:
    """NMTune against its control, rate by rate."""
    columns = [Column("Method", numeric=False), Column("Rows, %"), Column("Wrong labels, %"),
               Column("ID minus MLP, points"), Column("OOD minus MLP, points")]  # fmt: skip
    rows, verdicts = [], []
    methods = ("LP", "NMTune code", "NMTune paper")
    for method, part, rate in product(methods, records.fractions[::-1], records.rates):
        gains = [records.gain(of, task, method, rate, part) for _, of in ACCURACIES]
        if method != "LP":
            verdicts += [one.verdict for one in gains if one is not None]
        if any(gains):
            cells = [Cell(MISSING) if one is None else
                     Cell(told(one.summary), value=one.summary.mean)
                     for one in gains]  # fmt: skip
            rows.append([Cell(method), Cell(percent(part), value=part),
                         Cell(percent(rate), value=rate), *cells])  # fmt: skip
    if not rows:
        return Section("NMTune")
    title = (
        f"NMTune is better than its control MLP in {verdicts.count('won')} of {len(verdicts)} "
        f"comparisons, worse in {verdicts.count('lost')}{_of(records, task)}"
    )
    note = (
        f"Paired by seed, with {LEVEL:.0%} t intervals. The weights of the presets are not tuned."
    )
    return Section(title, [Table(columns, rows, note, fixed=True)], link="NMTune")


def _together(records: Records) -> Section:
    """Do the measures go with the accuracies?"""
    columns = [Column("Correlation over rates", numeric=False), Column("Method", numeric=False),
               Column("Classes", numeric=False), Column("Spearman"), Column("Pearson"),
               Column("Seeds")]  # fmt: skip
    rows = []
    for task in records.tasks:
        for measure, name, accuracy, of in (
            ("sve", "SVE", "ID", _id),
            ("lsvr", "LSVR", "OOD", _ood),
        ):
            for method in records.methods:
                ranks, linear = records.correlation(measure, of, task, method)
                if ranks is not None and linear is not None:
                    rows.append([Cell(f"{name} before tuning with {accuracy} accuracy"),
                                 Cell(method), Cell(task),
                                 Cell(_correlation(ranks), value=ranks.mean),
                                 Cell(_correlation(linear), value=linear.mean),
                                 Cell(str(ranks.n), value=ranks.n)])  # fmt: skip
    note = (
        "Correlation of ranks and of numbers, over the rates inside a seed; mean over seeds with "
        f"{LEVEL:.0%} t interval; few rates make it coarse. That two things change together does "
        "not say that one makes the other."
    )
    return Section("What goes together", [Table(columns, rows, note)] if rows else [])


def _results(records: Records) -> Section:
    """A row per classes, rate, fraction and method."""
    columns = [Column("Classes", numeric=False), Column("Wrong labels, %"), Column("Rows, %"),
               Column("Method", numeric=False), Column("ID"), Column("OOD"),
               Column("SVE after"), Column("LSVR after")]  # fmt: skip
    takes: tuple[Of, ...] = (_id, _ood, lambda one: one.after.get("sve"),
                             lambda one: one.after.get("lsvr"))  # fmt: skip
    places = product(records.tasks, records.rates, records.fractions, records.methods)
    rows = []
    for task, rate, part, method in places:
        found = [records.values(of, task=task, method=method, rate=rate, fraction=part).values()
                 for of in takes]  # fmt: skip
        if found[0]:
            rows.append([Cell(task), Cell(percent(rate), value=rate),
                         Cell(percent(part), value=part), Cell(method),
                         mean_cell(found[0]), mean_cell(found[1]),
                         number_cell(found[2], 3), number_cell(found[3], 3)])  # fmt: skip
    note = "Accuracies in percent, last epoch; mean ± standard deviation over seeds."
    return Section("All results", [Table(columns, rows, note)] if rows else [])


def _facts(records: Records) -> Section:
    """The networks, and what it took."""
    runs = [*records.pretraining.runs, *records.found.runs]
    seconds = sum(run.timing("total_s") or 0.0 for run in runs)
    columns = [Column("Asked rate, %"), Column("Realised rate, %"),
               Column("Accuracy on its own classes, right labels, %"), Column("Seeds")]  # fmt: skip
    rows = []
    for rate in records.rates:
        mine = [run for run in records.pretraining.runs
                if run.names["noise"] == f"{100 * rate:g}%"]  # fmt: skip
        wrong = [float(run.record.noise.get("noise_rate", 0.0)) for run in mine]
        rows.append([Cell(percent(rate), value=rate), mean_cell(wrong),
                     mean_cell(records.pretrained(rate)),
                     Cell(str(len(mine)), value=len(mine))])  # fmt: skip
    items = [
        ("Runs", f"{len(records.pretraining.runs)} of pre-training, {len(records.found.runs)} of "
                 "tuning"),
        ("Pictures", "; ".join(sorted({run.names["data"] for run in records.pretraining.runs}))),
        ("Seconds of all runs", f"{seconds:.0f}"),
        *versions(runs),
    ]  # fmt: skip
    clean, classes = records.pretrained(records.rates[0]), records.classes
    blocks: list[Block] = []
    if clean and sum(clean) / len(clean) < 2 / classes:
        blocks.append(
            Text(
                f"The network without wrong labels tells its {classes} classes hardly better than "
                "chance; nothing can be read from its features. Give more rows or epochs.",
                warning=True,
            )
        )
    return Section("The networks", [*blocks, Table(columns, rows, fixed=True), Facts(items)])
