"""From a model or a finished run and some rows to a table of features (M, D)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from noiseproof.data import Examples, Inputs, read_inputs
from noiseproof.demo import demo_job
from noiseproof.distortion import encoder_features
from noiseproof.encoding import Encoded
from noiseproof.engine import Engine, TrainSettings
from noiseproof.errors import InputError, path_of
from noiseproof.job import NO_MODEL
from noiseproof.method import require
from noiseproof.methods.nmtune import ReshapedClassifier
from noiseproof.models import evaluation_mode
from noiseproof.prediction import load
from noiseproof.preparation import frozen_features
from noiseproof.record import RunRecord
from noiseproof.study.contract import Asked
from noiseproof.tasks import RowSettings, find_task
from noiseproof.tuning import PROMPTS

AS_GIVEN = "features as given"


def read_rows(asked: Asked, most: int | None, seed: int) -> Inputs:
    """The rows that all models see, without their labels; some of them where there are more.

    Args:
        asked: Says where they lie; without data the test messages of the demo.
        most: Rows to draw; None takes all.
        seed: The same seed, the same rows.
    """
    source = demo_job().test if asked.data is None else asked.data
    inputs = read_inputs(source, find_task(asked.task).reader(_settings(asked)))
    if most is None or len(inputs) <= most:
        return inputs
    return inputs.take(np.sort(np.random.default_rng(seed).permutation(len(inputs))[:most]))


def features_of(model: str, inputs: Inputs, asked: Asked) -> dict[str, np.ndarray]:
    """Mean-pooled features of the encoder (M, D) by what they are called.

    Args:
        model: Name or folder of a pre-trained model, or folder of a finished run. Rows of features
            have no encoder: without a run they are taken as they are.
        inputs: The rows.
        asked: Task, columns and device.

    Raises:
        InputError: There is no such model, the run is of another task, or a row cannot be used.
    """
    settings = TrainSettings(device=asked.device, precision="fp32")
    kind = find_task(asked.task)
    if (path_of(model) / "record.json").is_file():
        return _of_run(model, inputs, asked, settings)
    if model == NO_MODEL and kind.default_model is not None:
        model = kind.default_model
    if asked.task == "features":
        require(
            model == kind.default_model,
            f"features have no encoder to load, got {model!r}; give folders of runs, or no model",
        )
        task, _ = kind.load(model, _examples(inputs), _settings(asked))
        usable = task.encode(inputs).inputs(np.arange(len(inputs)))
        return {AS_GIVEN: next(iter(usable.values())).numpy()}
    with torch.random.fork_rng():
        task, network = kind.load(model, _examples(inputs), _settings(asked))
    usable_rows, _ = task.ready(inputs)
    return {model: frozen_features(network, task.encode(usable_rows), settings)}


def _of_run(
    folder: str, inputs: Inputs, asked: Asked, settings: TrainSettings
) -> dict[str, np.ndarray]:
    """Of a run the features of its encoder and, where it reshapes them, what it makes of them."""
    record = RunRecord.read(path_of(folder))
    tune = record.spec["method"].get("tune", record.spec["method"].get("peft"))
    require(
        record.spec["task"] == asked.task,
        f"{folder} is a run of task {record.spec['task']!r}, the rows are of task {asked.task!r}",
    )
    require(
        tune not in PROMPTS,
        f"{folder} was tuned with {tune}, which stands outside the encoder whose features are "
        "compared; leave it out",
    )
    predictor = load(folder)
    usable, _ = predictor.task.ready(inputs)
    encoded, model = predictor.task.encode(usable), predictor.model
    found = {folder: encoder_features(model, encoded, settings).numpy()}
    if isinstance(model, ReshapedClassifier):
        found[f"{folder}, reshaped"] = reshaped_features(model, encoded, settings)
    return found


def reshaped_features(
    model: ReshapedClassifier, encoded: Encoded, settings: TrainSettings
) -> np.ndarray:
    """What NMTune makes of the features of rows (M, D)."""
    engine = Engine(settings)
    model.to(engine.device)
    with evaluation_mode(model):
        return engine.compute(encoded, lambda inputs: model(**inputs).transformed).numpy()


def _settings(asked: Asked) -> RowSettings:
    where: dict[str, Any] = {"text": asked.text, **asked.where}
    return RowSettings(**where)


def _examples(inputs: Inputs) -> Examples:
    """The rows with two classes in turn: a model wants some to be loaded with."""
    if len(inputs) < 2:
        raise InputError(f"a spectrum needs at least 2 rows, got {len(inputs)}")
    numbers = np.arange(len(inputs))
    return Examples([str(row) for row in numbers], inputs, numbers % 2, None, ("0", "1"))
