"""What a run measures and leaves behind: history numbers, sample table, record, files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof import metrics
from noiseproof.encoding import Encoded
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.prediction import predict_logits
from noiseproof.preparation import OOD, Prepared
from noiseproof.record import RunRecord, write_history
from noiseproof.tables import PIECE, Strings, array_column, write_table

Answers = dict[str, dict[str, float]]  # by the name of a set, what its rows were asked


def set_metrics(prepared: Prepared, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """What is measured in an epoch of every set beside the training rows, from outputs (N, K)."""
    row: dict[str, float] = {}
    for name, scores in outputs.items():
        measured = prepared.task.measures.epoch(scores, prepared.sets[name])
        row |= {f"{name}_{what}": value for what, value in measured.items()}
    return row


def truth_metrics(
    prepared: Prepared, outputs: Tensor, columns: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a model does with the wrong rows, where they are known.

    Args:
        prepared: Holds the given and the true labels.
        outputs: Of the training rows (N, K), see `Encoded.outputs`.
        columns: Those of the method. Rows are suspected by its ``loss`` (N,), without one by the
            loss of the outputs; ``clean_prob`` (N,) is judged, without one the mixture on the loss;
            so are the rows of ``keep`` (N,), and those that were ``marked`` (N,) before classes
            were balanced, where there are any.
    """
    wrong = prepared.wrong
    if wrong is None:
        return {}
    labels = torch.from_numpy(prepared.data.labels)
    score = columns["loss"] if "loss" in columns else prepared.encoded.losses(outputs, labels)
    chance = columns.get("clean_prob")
    if chance is None:
        with warnings.catch_warnings():  # nothing is decided by it
            warnings.simplefilter("ignore", RuntimeWarning)
            chance = fit_loss_mixture(score, labels, LossMixture()).clean_prob
    found = metrics.detection(score.numpy(), wrong)
    chosen = [("selection", columns.get("keep")), ("marked", columns.get("marked"))]
    kept = {
        f"{name}_{what}": value
        for name, rows in chosen
        if rows is not None
        for what, value in metrics.selection(rows.numpy(), wrong).items()
    }
    return {
        **prepared.task.measures.truth(outputs, prepared.data),
        **{f"detection_{name}": value for name, value in found.items()},
        **_judged(chance.numpy(), wrong),
        **kept,
    }


def _judged(clean_prob: np.ndarray, wrong: np.ndarray) -> dict[str, float | None]:
    """How good the estimated probability is that a label is right."""
    judged = metrics.clean_probability(clean_prob, wrong)
    return {f"clean_prob_{name}": value for name, value in judged.items()}


def sample_table(prepared: Prepared, outputs: Tensor, columns: Mapping[str, Tensor]) -> Any:
    """One row per training row: id, labels, columns, verdict (a DataFrame).

    Args:
        prepared: The rows.
        outputs: Of the training rows (N, K), by the final model, see `Encoded.outputs`.
        columns: What the method knew of the rows; ``loss`` and ``clean_prob`` are derived from
            the outputs where it knew neither.
    """
    import pandas as pd

    data, measures = prepared.data, prepared.task.measures
    labels = torch.from_numpy(data.labels)
    known = dict(columns)
    if "loss" not in known:
        known["loss"] = prepared.encoded.losses(outputs, labels)
    if "clean_prob" not in known:
        known["clean_prob"] = fit_loss_mixture(known["loss"], labels, LossMixture()).clean_prob
    table: dict[str, Any] = {
        "row_id": Strings.of(data.row_ids).series(),
        **measures.labels(data),
    }
    for name, column in known.items():
        values = column.numpy()
        wide = array_column if values.ndim == 2 else list
        table[name] = wide(values) if values.ndim > 1 else values
    table |= measures.verdict(outputs, data)
    table["suspicious"] = known["clean_prob"].numpy() < 0.5
    return pd.DataFrame(table)


def epoch_metrics(record: RunRecord, prepared: Prepared, row: Mapping[str, Any]) -> None:
    """Start the metrics of the record from the history row of the epoch that is deployed."""
    names = ["memorization", "clean_fit", "recovery", *prepared.task.measures.kept]
    names += [name for name in row if name.startswith("gradient_")]
    record.metrics = {name: row[name] for name in names if name in row}


def detection_metrics(record: RunRecord, prepared: Prepared, samples: Any) -> None:
    """Put into the record how well the wrong rows were found, and losses with and without noise.

    Args:
        record: Gets metrics and curves.
        prepared: Knows which rows are wrong, or not.
        samples: Of `sample_table`: ``loss``, ``clean_prob`` and ``suspicious`` are read.
    """
    loss, suspicious = samples["loss"].to_numpy(), samples["suspicious"].to_numpy()
    record.metrics["suspicious"] = int(suspicious.sum())
    noisy = prepared.noisy
    if noisy is not None:
        for name, rows in (("noisy", noisy), ("clean", ~noisy)):
            record.metrics[f"train_loss_{name}"] = float(loss[rows].mean()) if rows.any() else None
    if prepared.wrong is None:
        return
    quality = metrics.detection(loss, prepared.wrong, flagged=suspicious)
    record.metrics |= {f"detection_{name}": value for name, value in quality.items()}
    by_class = metrics.detection_by_class(loss, prepared.wrong, prepared.data.labels)
    record.metrics["detection_auroc_by_class"] = by_class
    record.metrics |= _judged(samples["clean_prob"].to_numpy(), prepared.wrong)
    record.curves = metrics.detection_curves(loss, prepared.wrong)
    record.curves |= metrics.loss_histogram(loss, prepared.wrong)


def test_metrics(
    record: RunRecord, prepared: Prepared, outputs: Tensor, curve: Sequence[float]
) -> None:
    """Put the test metrics of the deployed model into the record.

    Args:
        record: Gets metrics, per-class scores and the confusion matrix.
        prepared: Has the test rows.
        outputs: Of the test rows (N, K).
        curve: The followed number of the test set after every epoch.
    """
    tested = prepared.task.measures.test(outputs, prepared.sets["test"], curve)
    record.metrics |= {f"test_{name}": value for name, value in tested.metrics.items()}
    record.per_class, record.confusion = tested.per_class, tested.confusion


def ood_metrics(record: RunRecord, prepared: Prepared, outputs: Mapping[str, Tensor]) -> None:
    """Put the metrics of each test set from elsewhere into the record, under its name.

    Args:
        record: Gets them.
        prepared: Has the sets.
        outputs: Of their rows (N, K), by the name of the set.
    """
    for name, scores in outputs.items():
        rows = prepared.sets[name]
        measured = prepared.task.measures.final(scores, rows)
        record.ood[name.removeprefix(OOD)] = {"rows": len(rows), **measured}


def answer_metrics(record: RunRecord, prepared: Prepared, model: nn.Module) -> Answers:
    """Put into the record what only some kinds of rows can be asked, set by set.

    Args:
        record: Gets it: of the test set among the metrics, of sets from elsewhere under their name.
        prepared: Has the sets.
        model: The deployed one.

    Returns:
        What was measured, by the name of the set.
    """
    answers = {name: _asked(prepared, model, name) for name in prepared.test_sets}
    for name, found in answers.items():
        if name.startswith(OOD):
            record.ood[name.removeprefix(OOD)] |= found
        else:
            record.metrics |= {f"{name}_{what}": value for what, value in found.items()}
    return answers


def mode_metrics(
    record: RunRecord,
    prepared: Prepared,
    model: nn.Module,
    encoded: Mapping[str, Encoded],
    deployed: Mapping[str, Tensor],
    answers: Answers,
) -> None:
    """Measure the test sets in every way in which the deployed model can answer.

    Args:
        record: Gets it, by mode and set.
        prepared: Has the sets and the method.
        model: The deployed one; it answers as before when this is done.
        encoded: The rows of each set.
        deployed: Outputs (N, K) of each set in the mode that is deployed, which is the last.
        answers: What `answer_metrics` found of each set in that mode.
    """
    modes = prepared.job.method.modes(model)
    for number, (mode, switch) in enumerate(modes.items(), start=1):
        switch()
        record.modes[mode] = {}
        for name, rows in prepared.test_sets.items():
            if number == len(modes):
                outputs, asked = deployed[name], answers[name]
            else:
                outputs = predict_logits(model, encoded[name], prepared.job.train)
                asked = _asked(prepared, model, name)
            measured = prepared.task.measures.final(outputs, rows) | asked
            record.modes[mode] |= {f"{name}_{what}": value for what, value in measured.items()}


def _asked(prepared: Prepared, model: nn.Module, name: str) -> dict[str, float]:
    return prepared.task.answer_metrics(
        model,
        prepared.test_sets[name],
        lambda encoded: predict_logits(model, encoded, prepared.job.train),
    )


def write_results(
    folder: Path, history: Sequence[Mapping[str, Any]], samples: Any, prepared: Prepared
) -> None:
    """Write ``history.csv``, ``samples.parquet`` and ``suspects.csv``, the most doubtful first."""
    write_history(folder, history)
    write_table(samples, folder / "samples.parquet", overwrite=True)
    suspicious = np.flatnonzero(samples["suspicious"].to_numpy())
    worst = np.argsort(-samples["loss"].to_numpy()[suspicious], kind="stable")
    shown = list(prepared.task.measures.shown)
    found = {"row_id": prepared.data.row_ids, **prepared.data.inputs.shown()}

    def pieces() -> Iterator[Any]:
        for start in range(0, max(1, len(worst)), PIECE):
            rows = suspicious[worst[start : start + PIECE]]
            piece = samples[shown].iloc[rows]
            for place, (name, column) in enumerate(found.items()):
                piece.insert(place, name, list(Strings.of(column).take(rows)))
            yield piece

    write_table(pieces(), folder / "suspects.csv", overwrite=True)
