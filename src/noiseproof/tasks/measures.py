"""What is measured of rows of one kind: the outputs of a model against the labels, as numbers.

Outputs are what a scoring pass keeps of a row: the logits (N, C) where a label is a class,
statistics of the tokens (N, 3) where it is a text, see `noiseproof.tokens`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from noiseproof import metrics
from noiseproof.data import Examples

CONFUSION_CLASSES = 200  # larger matrices stay out of the record
Numbers = dict[str, float | None]


class Tested(NamedTuple):
    """What is measured on the test set.

    Attributes:
        metrics: Name -> number, without the prefix ``test_``.
        per_class: Class name -> precision, recall, F1 and support.
        confusion: (C, C) rows by true and predicted class.
    """

    metrics: Numbers
    per_class: dict[str, Any]
    confusion: list[list[int]]


class Measures(ABC):
    """How rows of one kind are measured. Nothing here is state."""

    kept: ClassVar[tuple[str, ...]]
    """Numbers of the deployed epoch that go from the history into the record."""
    curve: ClassVar[str]
    """The number of the test set that is followed over the epochs."""
    shown: ClassVar[tuple[str, ...]]
    """Columns of the sample table that stand in ``suspects.csv``."""

    @abstractmethod
    def epoch(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Measure a set at the end of an epoch; the names get the set's name in front."""

    @abstractmethod
    def final(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Measure a set with the deployed model."""

    @abstractmethod
    def test(self, outputs: Tensor, rows: Examples, curve: Sequence[float]) -> Tested:
        """Measure the test set with the deployed model; ``curve`` holds the epochs' numbers."""

    @abstractmethod
    def truth(self, outputs: Tensor, rows: Examples) -> Numbers:
        """Measure what a model does with wrongly labelled training rows, where they are known."""

    @abstractmethod
    def score(self, row: Mapping[str, Any]) -> float | None:
        """How good an epoch is, for select=best: the higher the better; None if not measured."""

    @abstractmethod
    def labels(self, rows: Examples) -> dict[str, Any]:
        """The columns ``label`` and, where it is known, ``clean_label`` of the sample table."""

    @abstractmethod
    def verdict(self, outputs: Tensor, rows: Examples) -> dict[str, Any]:
        """What the final model says of every row, as columns of the sample table."""


class ClassMeasures(Measures):
    """Rows whose label is one of C classes; outputs are logits (N, C)."""

    kept = ("validation_accuracy",)
    curve = "test_accuracy"
    shown = ("label", "suggested_label", "confidence", "clean_prob", "loss")

    def epoch(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Accuracy and macro-F1."""
        measured = self.final(outputs, rows)
        return {name: measured[name] for name in ("accuracy", "macro_f1")}

    def final(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation, calibration error, negative log-likelihood."""
        return metrics.classification_metrics(outputs, rows.labels, len(rows.label_names))

    def test(self, outputs: Tensor, rows: Examples, curve: Sequence[float]) -> Tested:
        """All of `final`, the best and the late epochs, scores by class and the confusion."""
        labels, names = rows.labels, rows.label_names
        measured = self.final(outputs, rows)
        predicted = outputs.argmax(dim=1).numpy()
        table = metrics.per_class(predicted, labels, len(names))
        few = len(names) <= CONFUSION_CLASSES
        late = curve[len(curve) // 2 :]
        numbers: Numbers = {
            "accuracy": measured["accuracy"],
            "accuracy_best": max(curve),
            "accuracy_late": sum(late) / len(late),
            **{name: measured[name] for name in ("macro_f1", "mcc", "ece", "nll")},
        }
        return Tested(
            numbers,
            {names[number]: scores for number, scores in table.items()},
            metrics.confusion(predicted, labels, len(names)).tolist() if few else [],
        )

    def truth(self, outputs: Tensor, rows: Examples) -> Numbers:
        """Memorisation, clean fit and recovery."""
        clean = rows.clean_labels
        assert clean is not None  # only asked for where the truth is known
        predicted = outputs.argmax(dim=1).numpy()
        return {
            "memorization": metrics.memorization(predicted, rows.labels, clean),
            "clean_fit": metrics.clean_fit(predicted, rows.labels, clean),
            "recovery": metrics.recovery(predicted, rows.labels, clean),
        }

    def score(self, row: Mapping[str, Any]) -> float | None:
        """Validation accuracy."""
        return row.get("validation_accuracy")

    def labels(self, rows: Examples) -> dict[str, Any]:
        """Class names; a foreign row has no true one."""
        import pandas as pd

        names = list(rows.label_names)
        columns = {"label": pd.Categorical.from_codes(rows.labels, names)}
        if rows.clean_labels is not None:
            columns["clean_label"] = pd.Categorical.from_codes(rows.clean_labels, names)
        return columns

    def verdict(self, outputs: Tensor, rows: Examples) -> dict[str, Any]:
        """The most probable class and its probability."""
        import pandas as pd

        confidence, predicted = torch.softmax(outputs, dim=1).max(dim=1)
        suggested = pd.Categorical.from_codes(predicted.numpy(), list(rows.label_names))
        return {"suggested_label": suggested, "confidence": confidence.numpy()}


class ResponseMeasures(Measures):
    """Rows whose label is a text; outputs are statistics (N, 3) of its tokens."""

    kept = ("validation_loss", "validation_token_accuracy")
    curve = "test_loss"
    shown = ("clean_prob", "loss", "token_accuracy", "tokens")

    def epoch(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Mean loss per token and the share of tokens that are ranked first."""
        measured = self.final(outputs, rows)
        return {name: measured[name] for name in ("loss", "token_accuracy")}

    def final(self, outputs: Tensor, rows: Examples) -> dict[str, float]:
        """Loss, perplexity and accuracy over all response tokens of the set together."""
        loss, tokens, right = outputs.double().sum(dim=0).tolist()
        mean = loss / max(tokens, 1)
        return {
            "loss": mean,
            "perplexity": float(np.exp(min(mean, 700.0))),
            "token_accuracy": right / max(tokens, 1),
        }

    def test(self, outputs: Tensor, rows: Examples, curve: Sequence[float]) -> Tested:
        """All of `final`, and the loss of the best and of the late epochs."""
        late = curve[len(curve) // 2 :]
        extra = {"loss_best": min(curve), "loss_late": sum(late) / len(late)}
        return Tested({**self.final(outputs, rows), **extra}, {}, [])

    def truth(self, outputs: Tensor, rows: Examples) -> Numbers:
        """Memorisation and clean fit: the token accuracy on wrong and on right responses."""
        assert rows.clean_labels is not None
        wrong = torch.from_numpy(rows.labels != rows.clean_labels)
        parts = {"memorization": outputs[wrong], "clean_fit": outputs[~wrong]}
        return {
            name: self.final(part, rows)["token_accuracy"] if len(part) else None
            for name, part in parts.items()
        }

    def score(self, row: Mapping[str, Any]) -> float | None:
        """Minus the validation loss."""
        loss = row.get("validation_loss")
        return None if loss is None else -loss

    def labels(self, rows: Examples) -> dict[str, Any]:
        """The responses, and the true ones where they are known."""
        return rows.inputs.labels_shown()

    def verdict(self, outputs: Tensor, rows: Examples) -> dict[str, Any]:
        """Number of response tokens, and the share of them that the model ranks first."""
        tokens = outputs[:, 1]
        return {
            "token_accuracy": (outputs[:, 2] / tokens.clamp(min=1)).numpy(),
            "tokens": tokens.long().numpy(),
        }
