"""The model of a finished run at work: load it, label new rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from noiseproof.adapters import restored
from noiseproof.data import Inputs
from noiseproof.encoding import Encoded
from noiseproof.engine import Engine, TrainSettings
from noiseproof.errors import InputError, path_of
from noiseproof.experts.model import ExpertModel, restored_experts
from noiseproof.method import Method
from noiseproof.methods import find_method
from noiseproof.record import RunRecord
from noiseproof.saving import HEAD_FILE
from noiseproof.tables import has_splits, load_table
from noiseproof.tasks import RowSettings, Task, find_task

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
    """A deployed model that labels rows: texts or pairs of texts, features (N, D), images, prompts.

    Attributes:
        model: The classifier.
        task: How rows are encoded.
        label_names: Class names in the order of the logits.
        column: The columns of the inputs it was trained on.
        rows: How new rows are read from a table.
        label: The column of the labels it was trained on.
    """

    model: torch.nn.Module
    task: Task
    label_names: tuple[str, ...]
    column: str
    rows: RowSettings = dataclasses.field(default_factory=RowSettings)
    label: str = "label"

    def predict_proba(
        self, rows: Any, pairs: Any = None, settings: TrainSettings | None = None
    ) -> np.ndarray:
        """Class probabilities (N, C); in fp32 unless told otherwise, as transformers would.

        Args:
            rows: N texts, a matrix of features (N, D), or N images.
            pairs: N second texts, where the model was trained on pairs.
            settings: Device and precision.

        Raises:
            InputError: No list of such rows as the model was trained on, or an empty one.
        """
        return self.probabilities(self._inputs(rows, pairs), settings)

    def probabilities(self, inputs: Inputs, settings: TrainSettings | None = None) -> np.ndarray:
        """Class probabilities (N, C) of inputs that were read from a table.

        Raises:
            InputError: The labels are no classes.
        """
        if self.task.text_labels:
            raise InputError(
                f"task {self.task.name!r} has no class probabilities; predict gives its answers"
            )
        outputs = self.outputs(self.task.encode(inputs), settings)
        return torch.softmax(outputs, dim=1).numpy()

    def outputs(self, encoded: Encoded, settings: TrainSettings | None = None) -> Tensor:
        """Outputs (N, K) of encoded rows, in fp32 unless told otherwise; see `Encoded.outputs`."""
        exact = TrainSettings(precision="fp32")
        return predict_logits(self.model, encoded, settings or exact)

    def answers(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What the model says of inputs that were read from a table, see `Task.answers`."""
        return self.task.answers(self.model, inputs, self.outputs, self.label_names)

    def predict(self, rows: Any, pairs: Any = None) -> list[str]:
        """The most probable class name of each row; the response to each prompt.

        Args:
            rows: See `predict_proba`.
            pairs: See `predict_proba`.

        Raises:
            InputError: No list of such rows as the model was trained on, or an empty one.
        """
        answers = self.answers(self._inputs(rows, pairs))
        return list(answers[self.task.answer_columns[0]])

    def _inputs(self, rows: Any, pairs: Any) -> Inputs:
        """Inputs of rows that are given as Python objects, checked as those of a table are."""
        if self.task.column == "text":
            rows = _texts(rows, "texts", chat=self.task.text_labels)
            pairs = None if pairs is None else _texts(pairs, "second texts")
        inputs = self.task.inputs_of(rows, pairs)
        if not len(inputs):
            raise InputError("expected at least one row to label, got an empty list")
        self.task.accept(inputs, None, self.column)
        return inputs


def load(run: str | Path, *, model: Any = None) -> Predictor:
    """Load the model of a finished run.

    Args:
        run: Its folder.
        model: A torch module that is built as the one that the run was started from, where it was
            one: its weights are taken from the run.

    Raises:
        InputError: There is no run, or it is not finished.
    """
    folder = path_of(run)
    record = RunRecord.read(folder)
    if record.status != "done":
        raise InputError(f"the run in {folder} is {record.status}; finish it with --resume")
    settings = RowSettings.of(record.spec)
    kind = find_task(record.spec["task"])
    given = record.spec["model"] if model is None else model
    task, network = kind.load_saved(folder / "model", given, settings)
    network = restored_experts(restored(network, folder / "model"), folder / "model")
    gated = record.spec["method"].get("eval_gate", "all_on") != "all_on"
    if (gated and not record.spec["merge"]) or (folder / "model" / HEAD_FILE).exists():
        network = method_from_dict(record.spec["method"]).restore_model(network)
    names = tuple(record.data["label_names"])
    column, label = getattr(settings, kind.column), record.spec["label"]
    return Predictor(network, task, names, column, settings, label)


def method_from_dict(values: dict[str, Any]) -> Method:
    """A method object from the record's values.

    Raises:
        InputError: The method is not among `METHODS`.
    """
    return find_method(values["name"]).from_dict(values)


def predict(
    run: str | Path,
    data: Source,
    *,
    text: str | None = None,
    features: str | None = None,
    image: str | None = None,
    on_bad_image: str | None = None,
    max_new_tokens: int | None = None,
    inference_mode: str | None = None,
    model: Any = None,
    split: str = "train",
) -> Any:
    """Label new rows with the model of a run.

    Args:
        run: Folder of a finished run.
        data: Rows with the columns the model was trained on; read like training data.
        text: Other text columns than in training.
        features: Other columns of features than in training.
        image: Another column of images than in training.
        on_bad_image: error, or skip; as in training unless given.
        max_new_tokens: Longest response of a language model; as in training unless given.
        inference_mode: How the poisoning experts of LoPE count: none, mask, renorm or compensate;
            as it was deployed unless given.
        model: See `load`.
        split: Split of a hub data set or of an archive.

    Returns:
        The table (a DataFrame) with the columns ``predicted_label`` and ``confidence`` added; they
        are empty where an image that could not be read was skipped. A language model gives
        ``predicted_response``, and ``response_loss`` where the rows have responses.

    Raises:
        InputError: No finished run, a setting that its rows do not have, or a column that is
            missing or would be replaced.
    """
    if split != "train" and not has_splits(data):
        raise InputError(
            f"split={split}: {data} is a file of rows, which has no splits; leave split out"
        )
    predictor = load(run, model=model)
    if inference_mode is not None:
        _switch(predictor.model, inference_mode)
    asked = {
        "text": text,
        "features": features,
        "image": image,
        "on_bad_image": on_bad_image,
        "max_new_tokens": max_new_tokens,
    }
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    _check_read(predictor.task, changes)
    table = load_table(data, split)
    for name in predictor.task.answer_columns:
        if name in table.frame.columns:
            raise InputError(f"the data has a column {name!r} already; rename it first")
    settings = dataclasses.replace(predictor.rows, **changes)
    task = predictor.task.with_settings(settings)
    predictor.task = task
    reader = task.reader_of_new(settings, table, predictor.label)
    inputs = reader.read(table, np.arange(len(table)))
    task.accept(inputs, table, predictor.column)
    usable, rows = task.ready(inputs)
    answers = predictor.answers(usable)
    columns = {}
    for name, values in answers.items():
        empty = None if values.dtype == object else np.nan
        columns[name] = np.full(len(table), empty, dtype=object if empty is None else float)
        columns[name][rows] = values
    return table.frame.assign(**columns)


def _texts(given: Any, what: str, chat: bool = False) -> list[Any]:
    """A list of texts (N,), or of chats; what only iterates like one would be labelled in parts."""
    if isinstance(given, str):
        raise InputError(f"expected a list of {what}, got a single text; write [text]")
    if isinstance(given, Mapping) or not isinstance(given, Iterable) or hasattr(given, "columns"):
        raise InputError(
            f"expected a list of {what}, got {type(given).__name__}; noiseproof.predict labels "
            "the rows of a table"
        )
    rows = list(given)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str) and not chat:
            raise InputError(
                f"row {number} of the {what} is of type {type(row).__name__}, expected text; leave "
                "it out, or write it as text"
            )
    return rows


def _switch(model: torch.nn.Module, mode: str) -> None:
    """Let a model with experts answer in another way than it was deployed."""
    if not isinstance(model, ExpertModel):
        raise InputError("inference_mode is for models with experts (LoPE); leave it out")
    model.set_inference_mode(mode)


def _check_read(task: Task, given: Iterable[str]) -> None:
    """Refuse settings that rows of this task do not have; else they would do nothing."""
    own = {task.column}
    own |= {"on_bad_image"} if task.column == "image" else set()
    own |= {"max_new_tokens"} if task.text_labels else set()
    for name in given:
        if name not in own:
            raise InputError(
                f"{name} is nothing that rows of task {task.name!r} have; leave it out"
            )
