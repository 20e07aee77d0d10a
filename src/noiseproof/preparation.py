"""From files to encoded rows: read, draw a sample, inject noise, split, encode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from noiseproof.data import (
    Examples,
    Inputs,
    check_classes,
    read_inputs,
    read_label_names,
    read_table,
    stratified_sample,
    stratified_split,
)
from noiseproof.distortion import encoder_features
from noiseproof.encoding import Encoded
from noiseproof.engine import TrainSettings, derive_seed
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.models import count_parameters
from noiseproof.noise import Corruption, parse_noise
from noiseproof.record import RunRecord, versions
from noiseproof.tasks import LabelColumns, Task, find_task

OOD = "ood_"  # before the names of test sets from elsewhere


class Prepared:
    """The data, task and model of one job. True labels live here and go no further.

    Attributes:
        job: What was asked for.
        data: Training rows with their given labels, noise included.
        sets: ``test`` and ``validation`` where there are any, and ``ood_NAME``: examples.
        encoded: The training rows, encoded; `encode` gives the other sets.
        model: The pre-trained model with a fresh head.
        task: How rows are encoded.
        parameters: Of the model.
        passes: Over the rows in an epoch: more than one where rows were left out and the number of
            steps is to stay.
        corruption: What the injected noise did, if there was any.
        seeds: Seeds of noise, initialisation and order.
        unreadable: How many rows of each set could not be read and were left out.
        dropped: How many rows of each other set have the label that is dropped.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        train = job.train
        self.seeds = {
            "noise": train.seed if job.noise_seed is None else job.noise_seed,
            "init": train.seed if train.init_seed is None else train.init_seed,
            "order": train.seed if train.order_seed is None else train.order_seed,
        }
        self.sets: dict[str, Examples] = {}
        self.unreadable: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.reader = find_task(job.task).reader(job.rows)
        data = self._read()
        self.task: Task
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seeds["init"], "head"))
            self.task, self.model = find_task(job.task).load(
                job.model, data, job.rows, reserved_tokens=job.method.reserved_tokens
            )
        self.parameters = count_parameters(self.model.parameters())
        self.corruption: Corruption | None = None
        self._changed: np.ndarray | None = None  # rows whose texts noise changed (N,) bool
        data = self._ready("training", data)
        self.sets = {name: self._ready(name, rows) for name, rows in self.sets.items()}
        self.task.learn(self.model, data.inputs)
        data = self._corrupt(data)
        if job.test is not None and job.test_share is None:
            self.sets["test"] = self._read_other(job.test, "test", data.label_names)
        for name, source in (job.test_ood or {}).items():
            self.sets[f"{OOD}{name}"] = self._read_other(
                source, "test", data.label_names, f"{OOD}{name}"
            )
        for name, spec in job.corrupted_sets.items():
            self.sets[f"{OOD}{name}"] = self._corrupted(self.sets["test"], spec)
        if job.validation_share is not None:
            rest, split = stratified_split(
                data.labels, job.validation_share, derive_seed(train.seed, "validation")
            )
            self.sets["validation"], data = data.select(split), self._select(data, rest)
        elif job.validation is not None:
            self.sets["validation"] = self._read_other(
                job.validation, "validation", data.label_names
            )
        self.passes = 1.0
        if job.only_clean_rows:
            data = self._only_clean(data)
        self.data = data
        self.task.learn(self.model, data.inputs)  # those that were split off do not count
        self.encoded = self.encode(data)
        for stage in job.method.stages(train.epochs):
            self.encoded.views(stage.views)  # refuses more than there are

    @property
    def wrong(self) -> np.ndarray | None:
        """Which training rows are labelled wrongly (N,) bool; None where the truth is unknown."""
        clean = self.data.clean_labels
        return None if clean is None else self.data.labels != clean

    @property
    def noisy(self) -> np.ndarray | None:
        """Which training rows have a wrong label or a text that noise changed; None as above."""
        wrong = self.wrong
        if wrong is None or self._changed is None:
            return self._changed if wrong is None else wrong
        noisy: np.ndarray = wrong | self._changed
        return noisy

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.data.label_names)

    @property
    def test_sets(self) -> dict[str, Examples]:
        """What the deployed model is measured on: all sets but the validation rows."""
        return {name: rows for name, rows in self.sets.items() if name != "validation"}

    def encode(self, examples: Examples) -> Encoded:
        """Encode rows for the model, in order."""
        return self.task.encode(examples.inputs)

    def describe(self, record: RunRecord) -> None:
        """Put into the record what is known before training."""
        data = self.data
        record.seeds = dict(self.seeds)
        record.data = {
            "rows": len(data),
            **{
                f"{name}_rows": len(examples)
                for name, examples in self.sets.items()
                if not name.startswith(OOD)
            },
            "classes": self.num_classes,
            "label_names": list(data.label_names),
            "dropped": data.dropped,
            **({"passes": self.passes} if self.job.only_clean_rows else {}),
            "validation": self.job.validation_kind,
            "fingerprint": data.fingerprint,
        }
        record.data |= self.encoded.counts
        if self.dropped:
            record.data["dropped_elsewhere"] = dict(self.dropped)
        if self.unreadable:
            record.data["unreadable"] = dict(self.unreadable)
        if self.corruption is not None:
            record.noise = {
                "spec": self.corruption.spec,
                "seed": self.corruption.seed,
                "injected_rate": self.corruption.noise_rate,
                "transition": self.corruption.transition.tolist(),
            }
            if "text_changed" in self.corruption.extras:
                record.noise["text_rate"] = float(self.corruption.extras["text_changed"].mean())
        if self.wrong is not None:
            record.noise["noise_rate"] = float(self.wrong.mean())
        record.versions = versions()

    # --- parts -----------------------------------------------------------------------------------

    def _read(self) -> Examples:
        job = self.job
        names = read_label_names(job.label_names) if job.label_names else None
        columns = LabelColumns(job.label, job.clean_label, job.row_id, names, job.drop_label)
        kind = find_task(job.task)
        data = kind.examples(job.data, job.rows, columns, job.split, "training")
        if job.drop_label is not None and not data.dropped:
            warnings.warn(
                f"no training row has the label {job.drop_label!r} that is to be dropped",
                UserWarning,
                stacklevel=2,
            )
        if not kind.text_labels:
            check_classes(data.labels, data.label_names, job.label)
        if job.test_share is not None:
            seed = derive_seed(job.train.seed, "test")
            rest, split = stratified_split(data.labels, job.test_share, seed)
            test, data = data.select(split), data.select(rest)
            self.sets["test"] = test.trusted()
        if job.sample is None:
            return data
        rows = len(data.labels)
        if not 1 <= job.sample <= rows:
            raise InputError(f"sample must lie in 1 to {rows} (the rows), got {job.sample}")
        seed = derive_seed(job.train.seed, "rows")
        data = data.select(stratified_sample(data.labels, job.sample, seed))
        classes = len(np.unique(data.labels))
        if len(data) < 2 or (classes < 2 and not kind.text_labels):
            left = "a single row" if len(data) < 2 else "rows of a single class"
            raise InputError(
                f"sample={job.sample} leaves {left}; expected at least 2 rows and 2 classes, so "
                "take more"
            )
        return data

    def _read_other(self, source: Any, role: str, names: Sequence[str], name: str = "") -> Examples:
        """Rows of another file; test rows count by the true label where there is one."""
        job, label = self.job, self.job.label
        clean = role == "test" or job.validation_labels == "clean"
        if job.clean_label and clean and job.clean_label in read_table(source, "test").columns:
            label = job.clean_label
        columns = LabelColumns(label, label_names=names, drop_label=job.drop_label)
        read = find_task(job.task).examples(source, job.rows, columns, role, role)
        if read.dropped:
            self.dropped[name or role] = read.dropped
        return self._ready(name or role, read)

    def _corrupted(self, test: Examples, spec: str) -> Examples:
        """The test rows with texts that text noise corrupted; what is to be said stays right."""
        noise = parse_noise(spec)
        assert noise is not None  # the job has checked it
        given = test.inputs.as_texts()
        seed = derive_seed(self.seeds["noise"], "test texts")
        found = noise.apply(test.labels, len(test.label_names), seed, texts=given)
        texts = found.extras["texts"].tolist()
        if self.task.text_labels:
            texts = [(*new[:-1], old[-1]) for new, old in zip(texts, given, strict=True)]
        return dataclasses.replace(test, inputs=test.inputs.with_texts(texts))

    def _ready(self, name: str, data: Examples) -> Examples:
        """The rows in the form that the task encodes; those that cannot be used are counted."""
        inputs, rows = self.task.ready(data.inputs)
        if len(rows) < len(data):
            self.unreadable[name] = len(data) - len(rows)
            data = data.select(rows)
        return dataclasses.replace(data, inputs=inputs)

    def _only_clean(self, data: Examples) -> Examples:
        """The rows whose label is right, and as many passes as keep the number of steps."""
        assert data.clean_labels is not None  # the job has refused what would not know them
        right = np.flatnonzero(data.labels == data.clean_labels)
        if not len(right):
            raise InputError("only_clean_rows leaves no row: every label is wrong; use less noise")
        self.passes = len(data) / len(right)
        return self._select(data, right)

    def _select(self, data: Examples, rows: np.ndarray) -> Examples:
        """Training rows at these positions, with what is known of them."""
        if self._changed is not None:
            self._changed = self._changed[rows]
        return data.select(rows)

    def _corrupt(self, data: Examples) -> Examples:
        noise = parse_noise(self.job.noise)
        if noise is None:
            return data
        features, pool = None, None
        if noise.needs_features:
            features = frozen_features(self.model, self.encode(data), self.job.train)
        if noise.needs_pool:
            assert self.job.noise_pool is not None
            pool, _ = self.task.ready(read_inputs(self.job.noise_pool, self.reader))
        texts = data.inputs.as_texts() if noise.needs_texts else None
        if noise.needs_responses:
            texts = [(response,) for response in data.inputs.labels_shown()["label"]]
        noise = noise.for_classes(data.label_names)
        self.corruption = corruption = noise.apply(
            data.labels,
            len(data.label_names),
            self.seeds["noise"],
            features=features,
            pool_size=None if pool is None else len(pool),
            texts=texts,
        )
        if noise.needs_responses:
            inputs = data.inputs.with_responses(corruption.extras["responses"].tolist())
            return dataclasses.replace(data, inputs=inputs, clean_labels=inputs.right)
        known = data.clean_labels is not None
        data = data.with_labels(corruption.labels, old_are_clean=not known)
        if noise.needs_texts:
            self._changed = corruption.extras.get("text_changed")
            inputs = data.inputs.with_texts(corruption.extras["texts"].tolist())
            data = dataclasses.replace(data, inputs=inputs)
            if inputs.right is not None:  # texts that are labels got wrong
                data = dataclasses.replace(data, clean_labels=inputs.right)
        if pool is None:
            return data
        return replace_inputs(data, corruption.extras["replacement"], pool)


def replace_inputs(data: Examples, replacement: np.ndarray, pool: Inputs) -> Examples:
    """Put rows of a foreign pool in the place of the marked rows; -1 leaves a row as it is.

    No class is right for a foreign row: its true class number is -1.
    """
    foreign = replacement >= 0  # (N,)
    rows = np.flatnonzero(foreign)
    clean = data.labels if data.clean_labels is None else data.clean_labels
    return dataclasses.replace(
        data,
        inputs=data.inputs.replaced(rows, pool, replacement[rows]),
        clean_labels=np.where(foreign, -1, clean),
    )


def frozen_features(
    model: torch.nn.Module, encoded: Encoded, settings: TrainSettings
) -> np.ndarray:
    """Mean-pooled features of the pre-trained encoder (N, D), kept on disk as those of a head."""
    return encoder_features(model, encoded, settings, keep=True).numpy()
