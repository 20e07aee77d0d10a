"""The model of a finished run at work: load it, label new rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from noiseproof.adapters import restored
from noiseproof.data import read_table, read_texts
from noiseproof.engine import Engine, TrainSettings
from noiseproof.errors import InputError
from noiseproof.method import Method
from noiseproof.methods import find_method
from noiseproof.models import HEAD_FILE, load_saved_model
from noiseproof.record import RunRecord
from noiseproof.tasks import Encoded, TextClassification

if TYPE_CHECKING:
    from noiseproof.tables import Source


def predict_logits(model: torch.nn.Module, encoded: Encoded, settings: TrainSettings) -> Tensor:
    """Logits (N, C) of a deployed model."""
    engine = Engine(settings)
    engine.net = engine.accelerator.prepare_model(model, evaluation_mode=True)
    logits = engine.predict(encoded)
    engine.end_stage()
    return logits


@dataclass
class Predictor:
    """A deployed model that labels texts.

    Attributes:
        model: The classifier.
        task: How texts are encoded.
        label_names: Class names in the order of the logits.
        text: The text columns it was trained on.
    """

    model: torch.nn.Module
    task: TextClassification
    label_names: tuple[str, ...]
    text: str

    def predict_proba(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        settings: TrainSettings | None = None,
    ) -> np.ndarray:
        """Class probabilities (N, C); in fp32 unless told otherwise, as transformers would."""
        encoded = self.task.encode(texts, pairs)
        exact = TrainSettings(precision="fp32")
        logits = predict_logits(self.model, encoded, settings or exact)
        return torch.softmax(logits, dim=1).numpy()

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[str]:
        """The most probable class name of each text."""
        return [self.label_names[best] for best in self.predict_proba(texts, pairs).argmax(axis=1)]


def load(run: str | Path) -> Predictor:
    """Load the model of a finished run.

    Raises:
        InputError: There is no run, or it is not finished.
    """
    folder = Path(run).expanduser()
    record = RunRecord.read(folder)
    if record.status != "done":
        raise InputError(f"the run in {folder} is {record.status}; finish it with --resume")
    model, tokenizer = load_saved_model(folder / "model", record.spec["model"])
    model = restored(model, folder / "model")
    gated = record.spec["method"].get("eval_gate", "all_on") != "all_on"
    if (gated and not record.spec["merge"]) or (folder / "model" / HEAD_FILE).exists():
        model = method_from_dict(record.spec["method"]).restore_model(model)
    task = TextClassification(tokenizer, record.spec["train"]["max_length"])
    return Predictor(model, task, tuple(record.data["label_names"]), record.spec["text"])


def method_from_dict(values: dict[str, Any]) -> Method:
    """A method object from the record's values.

    Raises:
        InputError: The method is not among `METHODS`.
    """
    return find_method(values["name"]).from_dict(values)


def predict(run: str | Path, data: Source, *, text: str | None = None, split: str = "train") -> Any:
    """Label new rows with the model of a run.

    Args:
        run: Folder of a finished run.
        data: Rows with the text columns the model was trained on; read like training data.
        text: Other text columns than in training.
        split: Split of a hub data set.

    Returns:
        The table (a DataFrame) with the columns ``predicted_label`` and ``confidence`` added.

    Raises:
        InputError: No finished run, or a column is missing or would be replaced.
    """
    predictor = load(run)
    table = read_table(data, split)
    for name in ("predicted_label", "confidence"):
        if name in table.columns:
            raise InputError(f"the data has a column {name!r} already; rename it first")
    texts, pairs = read_texts(data, text or predictor.text, split)
    if (pairs is None) != ("," not in predictor.text or predictor.text in table.columns):
        raise InputError(
            f"the model was trained on the text columns {predictor.text!r}; give as many of them, "
            f"got {text!r}"
        )
    probabilities = predictor.predict_proba(texts, pairs)
    names = np.asarray(predictor.label_names, dtype=object)
    return table.assign(
        predicted_label=names[probabilities.argmax(axis=1)], confidence=probabilities.max(axis=1)
    )
