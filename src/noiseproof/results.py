"""What a run measures and leaves behind: history numbers, sample table, record, files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noiseproof import metrics
from noiseproof.losses import cross_entropy
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.preparation import OOD, Prepared
from noiseproof.record import RunRecord, write_history
from noiseproof.tables import PIECE, Strings, array_column, write_table

CONFUSION_CLASSES = 200  # larger matrices stay out of the record
SHOWN = ("label", "suggested_label", "confidence", "clean_prob", "loss")


def set_metrics(prepared: Prepared, logits: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy and macro-F1 of every set beside the training rows, from their logits (N, C)."""
    row = {}
    for name, scores in logits.items():
        labels = prepared.sets[name].labels
        measured = metrics.classification_metrics(scores, labels, prepared.num_classes)
        row[f"{name}_accuracy"] = measured["accuracy"]
        row[f"{name}_macro_f1"] = measured["macro_f1"]
    return row


def truth_metrics(
    prepared: Prepared, logits: Tensor, columns: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a model does with the wrong rows, where they are known.

    Args:
        prepared: Holds the given and the true labels.
        logits: Of the training rows (N, C).
        columns: Those of the method. Rows are suspected by its ``loss`` (N,), without one by the
            loss of the logits; ``clean_prob`` (N,) is judged, without one the mixture on the loss.
    """
    clean, given = prepared.data.clean_labels, prepared.data.labels
    if clean is None:
        return {}
    predicted, labels = logits.argmax(dim=1).numpy(), torch.from_numpy(given)
    wrong = given != clean
    score = columns["loss"] if "loss" in columns else cross_entropy(logits, labels)
    chance = columns.get("clean_prob")
    if chance is None:
        with warnings.catch_warnings():  # nothing is decided by it
            warnings.simplefilter("ignore", RuntimeWarning)
            chance = fit_loss_mixture(score, labels, LossMixture()).clean_prob
    found = metrics.detection(score.numpy(), wrong)
    return {
        "memorization": metrics.memorization(predicted, given, clean),
        "clean_fit": metrics.clean_fit(predicted, given, clean),
        "recovery": metrics.recovery(predicted, given, clean),
        **{f"detection_{name}": value for name, value in found.items()},
        **_judged(chance.numpy(), wrong),
    }


def _judged(clean_prob: np.ndarray, wrong: np.ndarray) -> dict[str, float | None]:
    """How good the estimated probability is that a label is right."""
    judged = metrics.clean_probability(clean_prob, wrong)
    return {f"clean_prob_{name}": value for name, value in judged.items()}


def sample_table(prepared: Prepared, logits: Tensor, columns: Mapping[str, Tensor]) -> Any:
    """One row per training row: id, labels, columns, verdict (a DataFrame).

    Args:
        prepared: The rows.
        logits: Of the training rows (N, C), by the final model.
        columns: What the method knew of the rows; ``loss`` and ``clean_prob`` are derived from
            the logits where it knew neither.
    """
    import pandas as pd

    data, names = prepared.data, list(prepared.data.label_names)
    labels = torch.from_numpy(data.labels)
    confidence, predicted = torch.softmax(logits, dim=1).max(dim=1)
    known = dict(columns)
    if "loss" not in known:
        known["loss"] = cross_entropy(logits, labels)
    if "clean_prob" not in known:
        known["clean_prob"] = fit_loss_mixture(known["loss"], labels, LossMixture()).clean_prob
    table: dict[str, Any] = {
        "row_id": Strings.of(data.row_ids).series(),
        "label": pd.Categorical.from_codes(data.labels, names),
    }
    if data.clean_labels is not None:  # -1 is a foreign row, which has none
        table["clean_label"] = pd.Categorical.from_codes(data.clean_labels, names)
    for name, column in known.items():
        values = column.numpy()
        wide = array_column if values.ndim == 2 else list
        table[name] = wide(values) if values.ndim > 1 else values
    table["suggested_label"] = pd.Categorical.from_codes(predicted.numpy(), names)
    table["confidence"] = confidence.numpy()
    table["suspicious"] = known["clean_prob"].numpy() < 0.5
    return pd.DataFrame(table)


def epoch_metrics(record: RunRecord, row: Mapping[str, Any]) -> None:
    """Start the metrics of the record from the history row of the epoch that is deployed."""
    names = ["memorization", "clean_fit", "recovery", "validation_accuracy"]
    names += [name for name in row if name.startswith("gradient_")]
    record.metrics = {name: row[name] for name in names if name in row}


def detection_metrics(record: RunRecord, prepared: Prepared, samples: Any) -> None:
    """Put into the record how well the wrong rows were found.

    Args:
        record: Gets metrics and curves.
        prepared: Knows which rows are wrong, or not.
        samples: Of `sample_table`: ``loss``, ``clean_prob`` and ``suspicious`` are read.
    """
    loss, suspicious = samples["loss"].to_numpy(), samples["suspicious"].to_numpy()
    record.metrics["suspicious"] = int(suspicious.sum())
    if prepared.wrong is None:
        return
    quality = metrics.detection(loss, prepared.wrong, flagged=suspicious)
    record.metrics |= {f"detection_{name}": value for name, value in quality.items()}
    record.metrics |= _judged(samples["clean_prob"].to_numpy(), prepared.wrong)
    record.curves = metrics.detection_curves(loss, prepared.wrong)


def test_metrics(
    record: RunRecord, prepared: Prepared, logits: Tensor, curve: Sequence[float]
) -> None:
    """Put the test metrics of the deployed model into the record.

    Args:
        record: Gets metrics, per-class scores and the confusion matrix.
        prepared: Has the test rows.
        logits: Of the test rows (N, C).
        curve: Test accuracy after every epoch.
    """
    labels, names = prepared.sets["test"].labels, prepared.data.label_names
    measured = metrics.classification_metrics(logits, labels, len(names))
    predicted = logits.argmax(dim=1).numpy()
    table = metrics.per_class(predicted, labels, len(names))
    record.per_class = {names[number]: scores for number, scores in table.items()}
    if len(names) <= CONFUSION_CLASSES:
        record.confusion = metrics.confusion(predicted, labels, len(names)).tolist()
    late = curve[len(curve) // 2 :]
    record.metrics |= {
        "test_accuracy": measured["accuracy"],
        "test_accuracy_best": max(curve),
        "test_accuracy_late": sum(late) / len(late),
        "test_macro_f1": measured["macro_f1"],
        "test_mcc": measured["mcc"],
        "test_ece": measured["ece"],
        "test_nll": measured["nll"],
    }


def ood_metrics(record: RunRecord, prepared: Prepared, logits: Mapping[str, Tensor]) -> None:
    """Put the metrics of each test set from elsewhere into the record, under its name.

    Args:
        record: Gets them.
        prepared: Has the sets.
        logits: Of their rows (N, C), by the name of the set.
    """
    for name, scores in logits.items():
        labels = prepared.sets[name].labels
        measured = metrics.classification_metrics(scores, labels, prepared.num_classes)
        record.ood[name.removeprefix(OOD)] = {"rows": len(labels), **measured}


def write_results(
    folder: Path, history: Sequence[Mapping[str, Any]], samples: Any, prepared: Prepared
) -> None:
    """Write ``history.csv``, ``samples.parquet`` and ``suspects.csv``, the most doubtful first."""
    write_history(folder, history)
    write_table(samples, folder / "samples.parquet", overwrite=True)
    suspicious = np.flatnonzero(samples["suspicious"].to_numpy())
    worst = np.argsort(-samples["loss"].to_numpy()[suspicious], kind="stable")
    found = {"row_id": prepared.data.row_ids, **prepared.data.inputs.shown()}

    def pieces() -> Iterator[Any]:
        for start in range(0, max(1, len(worst)), PIECE):
            rows = suspicious[worst[start : start + PIECE]]
            piece = samples[list(SHOWN)].iloc[rows]
            for place, (name, column) in enumerate(found.items()):
                piece.insert(place, name, list(Strings.of(column).take(rows)))
            yield piece

    write_table(pieces(), folder / "suspects.csv", overwrite=True)
