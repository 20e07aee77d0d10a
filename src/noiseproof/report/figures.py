"""Charts from runs: learning curves, detection curves, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from noiseproof.charts import Dot, Series, dot_chart, heat_map, line_chart
from noiseproof.report.runs import Run, as_number
from noiseproof.statistics import LEVEL, Summary

MOST_CLASSES = 24
MOST_POINTS = 201
PANELS = (
    ("test_accuracy", "Test accuracy, %"),
    ("memorization", "Memorised wrong labels, %"),
    ("clean_fit", "Fit of right labels, %"),
)
CURVES = (
    ("roc", "Wrong labels found (ROC)", "right labels suspected, %"),
    ("pr", "Precision", "wrong labels found, %"),
)
Styled = Mapping[str, int | None]
"""Method -> number of its style; None draws it in the background."""
ENOUGH = 3  # values for a whisker: the interval of two is 18 times as long as their distance


def learning_curves(cells: Mapping[str, Sequence[Run]], styles: Styled) -> list[str]:
    """Accuracy, memorisation and clean fit by epoch, a line per method: the mean of its runs.

    Where methods have unequal numbers of epochs, by the share of the training that is done.
    """
    charts = []
    for name, title in PANELS:
        curves = {
            row: curve
            for row, runs in cells.items()
            if len(curve := 100 * mean_curve([run.curve(name) for run in runs]))
        }
        shares = len({len(curve) for curve in curves.values()}) > 1
        lines = []
        for row, curve in curves.items():
            scale = 100 / len(curve) if shares else 1
            x = [scale * epoch for epoch in range(1, len(curve) + 1)]
            lines.append(Series(row, x, curve.tolist(), styles[row]))
        charts.append(
            line_chart(
                lines,
                title=title,
                x_label="share of the training, %" if shares else "epoch",
                x_range=(0, 100) if shares else None,
                x_ticks=None if shares else epoch_ticks(lines),
                marks=_few(lines),
            )
        )
    return [chart for chart in charts if chart]


def mean_line(
    name: str,
    points: Mapping[int, Summary] | Mapping[float, Summary],
    style: int | None,
    scale: float = 100,
) -> Series:
    """Means over seeds by position, with t intervals where there are three seeds or more.

    Args:
        name: Of the line.
        points: What was found, by position.
        style: Of the line.
        scale: Factor of the values.
    """
    ends = [point.interval if point.n >= ENOUGH else None for point in points.values()]
    return Series(
        name,
        list(points),
        [scale * point.mean for point in points.values()],
        style,
        [scale * end.low if end else math.nan for end in ends],
        [scale * end.high if end else math.nan for end in ends],
    )


def difference_dots(found: Mapping[str, Summary], title: str, styles: Mapping[str, int]) -> str:
    """A row per name: the mean of a difference in points, with its interval where there is one."""
    dots = []
    for name, one in found.items():
        low, high = (
            (100 * one.interval.low, 100 * one.interval.high) if one.interval else (None, None)
        )
        dots.append(Dot(name, 100 * one.mean, low, high, styles[name]))
    some = any(one.interval for one in found.values())
    x_label = f"difference with {LEVEL:.0%} interval" if some else "difference, without interval"
    return dot_chart(dots, title=title, x_label=x_label)


def detection_curves(cells: Mapping[str, Sequence[Run]], styles: Styled) -> list[str]:
    """ROC and precision over recall of finding wrong labels, the mean over the runs of a method."""
    charts = []
    for name, title, x_label in CURVES:
        lines = []
        for row, runs in cells.items():
            x, y = mean_points([_points(run, name) for run in runs])
            if len(x):
                lines.append(
                    Series(row, (100 * x).tolist(), (100 * y).tolist(), styles[row])
                )  # fmt: skip
        charts.append(
            line_chart(
                lines,
                title=f"{title}, %",
                x_label=x_label,
                x_range=(0, 100),
                y_range=(0, 100),
                marks=False,
                diagonal=name == "roc",
                legend=True,
            )
        )
    return [chart for chart in charts if chart]


def class_maps(noise: Sequence[Run], tests: Mapping[str, Sequence[Run]]) -> list[str]:
    """Heat maps of classes by classes: what noise made of the labels, and confusions by title.

    Of many classes all maps show the same: those that are confused most in any of them.
    """
    found = [("What noise made of the labels", _transition(noise), "given", noise)]
    found += [(title, _confusion(runs), "predicted", runs) for title, runs in tests.items()]
    drawn = []
    for title, shares, column_label, runs in found:
        if shares is None:
            continue
        alike = [
            other for _, other, _, _ in found if other is not None and len(other) == len(shares)
        ]
        picked = _most_confused(alike)
        names = class_names(runs[0], len(shares))
        drawn.append(
            heat_map(
                shares[np.ix_(picked, picked)].tolist(),
                [names[index] for index in picked],
                title=title,
                row_label="true class",
                column_label=column_label,
            )
        )
    return drawn


def cut_note(runs: Iterable[Run]) -> str:
    """What the heat maps leave out, if they do."""
    classes = max((_classes(run) for run in runs), default=0)
    if classes <= MOST_CLASSES:
        return ""
    return f"Of {classes} classes the {MOST_CLASSES} that are confused most are shown."


def mean_curve(curves: Iterable[Sequence[float]]) -> np.ndarray:
    """Mean over runs by epoch, of the runs that have the epoch.  (epochs,) each -> (epochs,)."""
    found = [curve for curve in curves if len(curve)]
    if not found:
        return np.empty(0)
    table = np.full((len(found), max(map(len, found))), np.nan)
    for row, curve in zip(table, found, strict=True):
        row[: len(curve)] = curve
    there = np.isfinite(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = np.where(there, table, 0).sum(axis=0) / there.sum(axis=0)
    return mean


def mean_points(
    curves: Iterable[Sequence[tuple[float, float]]],
) -> tuple[np.ndarray, np.ndarray]:
    """One curve of several: itself if it is alone, else the mean height on an even grid of x."""
    found = [np.array(curve) for curve in curves if len(curve) > 1]
    if not found:
        return np.empty(0), np.empty(0)
    if len(found) == 1:
        picked = np.unique(np.linspace(0, len(found[0]) - 1, MOST_POINTS).round().astype(int))
        return found[0][picked, 0], found[0][picked, 1]
    x = np.linspace(0, 1, 101)
    heights = [np.interp(x, points[:, 0], points[:, 1]) for points in found]
    return x, np.mean(heights, axis=0)


def class_names(run: Run, classes: int) -> list[str]:
    """Names of the classes, numbers where they have none."""
    names = run.record.data.get("label_names")
    if isinstance(names, list) and len(names) == classes:
        return [str(name) for name in names]
    return [str(index) for index in range(classes)]


def _points(run: Run, name: str) -> list[tuple[float, float]]:
    """The points of a curve, by growing x; nothing if they are not numbers."""
    points = []
    for point in run.record.curves.get(name) or ():
        pair = [as_number(value) for value in point] if isinstance(point, list) else []
        if len(pair) != 2 or pair[0] is None or pair[1] is None:
            return []
        points.append((pair[0], pair[1]))
    return sorted(points, key=lambda point: point[0])  # stable: a step stays a step


def _matrix(values: object) -> np.ndarray | None:
    """A square matrix of numbers (C, C), None for anything else."""
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    return matrix if square and np.isfinite(matrix).all() else None


def _classes(run: Run) -> int:
    for values in (run.record.confusion, run.record.noise.get("transition")):
        matrix = _matrix(values)
        if matrix is not None:
            return len(matrix)
    return 0


def _confusion(runs: Sequence[Run]) -> np.ndarray | None:
    """Test rows by true and predicted class, as shares of the true class.  (C, C)."""
    matrices = [m for run in runs if (m := _matrix(run.record.confusion)) is not None]
    if not matrices or len({matrix.shape for matrix in matrices}) > 1:
        return None
    counts = np.sum(matrices, axis=0)  # (C, C)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: np.ndarray = counts / counts.sum(axis=1, keepdims=True)
    return shares


def _transition(runs: Sequence[Run]) -> np.ndarray | None:
    """What noise made of the labels: the mean over the seeds of the noise.  (C, C)."""
    matrices: dict[object, np.ndarray] = {}
    for run in runs:
        matrix = _matrix(run.record.noise.get("transition"))
        if matrix is not None:
            matrices.setdefault(run.record.noise.get("seed", run.seed), matrix)
    if not matrices or len({matrix.shape for matrix in matrices.values()}) > 1:
        return None
    mean: np.ndarray = np.mean(list(matrices.values()), axis=0)
    return mean


def _most_confused(maps: Sequence[np.ndarray]) -> list[int]:
    """Of many classes those with the largest shares off the diagonal, over all maps."""
    size = len(maps[0])
    off = [np.nan_to_num(shares * (1 - np.eye(size))) for shares in maps]
    score = sum(shares.max(axis=0) + shares.max(axis=1) for shares in off)
    order = np.argsort(-np.asarray(score), kind="stable")
    return sorted(order[:MOST_CLASSES].tolist())


def epoch_ticks(lines: Sequence[Series]) -> list[float]:
    """Whole numbers for an axis of epochs."""
    most = max((len(line.x) for line in lines), default=1)
    step = math.ceil(most / 10)
    return [float(epoch) for epoch in range(step, most + 1, step)]


def _few(lines: Sequence[Series]) -> bool:
    return max((len(line.x) for line in lines), default=0) <= 40
