"""What every method must do on every kind of row that it says it supports, beside texts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.loop import Outcome, train
from noiseproof.method import Batch, Method, Run
from noiseproof.methods import METHODS, NMTune
from noiseproof.prediction import Predictor
from noiseproof.preparation import Prepared
from noiseproof.tasks import TASKS
from rows import SOURCES, settings_of
from test_conformance import CASES, all_finite
from tiny import LABELS, same_weights, train_settings, weights

NOT_ON_TOKENS = ("CleaR(prompt)", "CleaR(prefix)", "CleaR(reuse)")
PAIRS = [
    (task, case)
    for task in SOURCES
    for case, method in CASES.items()
    if task in method.tasks and not (task == "causal-lm" and case in NOT_ON_TOKENS)
]  # fmt: skip


def method_of(case: str) -> Method:
    """The settings of the suite for texts; six features have no five leading singular values."""
    method = CASES[case]
    return dataclasses.replace(method, svd_k=2) if isinstance(method, NMTune) else method


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, Method]:
    task, case = request.param
    return task, method_of(case)


def prepared(task: str, method: Method, **changes: Any) -> Prepared:
    """The rows of a task, ready to train on; the model anew each time."""
    settings = train_settings(**changes)
    job = Job(SOURCES[task](), task=task, method=method, train=settings, **settings_of(task))
    return Prepared(job)


def trained(work: Prepared, labels: torch.Tensor | None = None) -> Outcome:
    """What the loop makes of it."""
    given = torch.from_numpy(work.data.labels) if labels is None else labels
    job = work.job
    return train(job.method, work.model, work.encoded, given, work.num_classes, job.train)


@pytest.mark.parametrize("case", NOT_ON_TOKENS)
def test_what_a_method_cannot_do_on_tokens_is_refused_before_anything_is_read(case: str) -> None:
    """A consistency term without its teacher, or a prompt a decoder never sees, would train."""
    with pytest.raises(InputError, match="CleaR"):
        Job({}, task="causal-lm", model="gpt2", method=CASES[case])


def answers(predictor: Predictor, new: Any) -> np.ndarray:
    """What the model says of new rows, as numbers (N, K)."""
    second = ["garden"] * len(new) if predictor.task.name == "causal-lm" else None
    inputs = predictor.task.inputs_of(new, second)
    return predictor.outputs(predictor.task.encode(inputs), train_settings()).numpy()


def test_every_task_has_rows_in_this_suite() -> None:
    """A kind of row that is missing here would be supported by hearsay."""
    assert {"text", *SOURCES} == set(TASKS)
    for task in TASKS:
        assert any(task in method.tasks for method in METHODS.values())
    for method in METHODS.values():
        assert set(method.tasks) <= set(TASKS)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    pair: tuple[str, Method],
) -> None:
    """Augmentation, order and initialisation all hang on the seed, and on nothing else."""
    one, again = trained(prepared(*pair)), trained(prepared(*pair))
    other = trained(prepared(*pair, seed=1))
    assert same_weights(one.model, again.model) and one.history == again.history
    assert not same_weights(one.model, other.model)
    assert all_finite(weights(one.model)) and all_finite(one.run.columns)
    assert all(len(column) == 25 for column in one.run.columns.values())


def test_a_last_batch_of_one_row_trains(
    pair: tuple[str, Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm and covariances have no statistics of a single row."""
    work, sizes = prepared(*pair, batch_size=24), set()
    cls, original = type(work.job.method), type(work.job.method).compute_loss

    def spy(self: Method, model: torch.nn.Module, batch: Batch, run: Run) -> torch.Tensor:
        sizes.add(len(batch.rows))
        return original(self, model, batch, run)

    monkeypatch.setattr(cls, "compute_loss", spy)
    outcome = trained(work)
    assert 1 in sizes and all_finite(weights(outcome.model))
    for row in outcome.history:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_a_class_without_a_training_row_does_no_harm(pair: tuple[str, Method]) -> None:
    """Rare classes vanish from small samples; per-class statistics then divide by zero."""
    if pair[0] == "causal-lm":
        pytest.skip("a response is no class")
    work = prepared(*pair)
    labels = torch.from_numpy(work.data.labels)
    with pytest.warns(UserWarning, match="no training row has the label"):
        outcome = trained(work, torch.where(labels == 1, 2, labels))
    assert all_finite(weights(outcome.model)) and outcome.run.predict().shape == (25, 3)


def test_a_saved_model_answers_as_the_trained_one_whatever_the_truth_is(
    pair: tuple[str, Method], tmp_path: Path
) -> None:
    """The true labels change nothing, and nothing of the model is lost on the disk."""
    task, method = pair
    data = SOURCES[task]()
    settings = {"task": task, "method": method, "train": train_settings(epochs=3)}
    settings |= {"clean_label": "clean_label"} | settings_of(task)
    shifted = [LABELS[(LABELS.index(name) + 1) % 3] for name in data["clean_label"]]
    one = noiseproof.fit(data, out=tmp_path / "run", **settings)
    other = noiseproof.fit(data | {"clean_label": shifted}, **settings)
    assert same_weights(one.predictor.model, other.predictor.model)
    columns = [name for name in one.samples.columns if name != "clean_label"]
    pd.testing.assert_frame_equal(one.samples[columns], other.samples[columns])
    new = SOURCES[task](7, seed=8)[TASKS[task].column]
    kept = answers(one.predictor, new)
    loaded = answers(noiseproof.load(tmp_path / "run"), new)
    assert (kept == loaded).all() and len({tuple(row) for row in kept.round(6).tolist()}) > 1
