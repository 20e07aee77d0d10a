"""The main job: from a table with doubtful labels to a model, a list of suspects and a record.

read -> (noise) -> split -> encode -> train -> predict the training rows
-> model/, samples.parquet, suspects.csv, history.csv, record.json
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from noiseproof import metrics
from noiseproof.checkpoint import Interrupted
from noiseproof.data import (
    Examples,
    read_examples,
    read_label_names,
    read_table,
    read_texts,
    stratified_sample,
    stratified_split,
    write_table,
)
from noiseproof.engine import (
    Engine,
    TrainSettings,
    check_tracker,
    derive_seed,
)
from noiseproof.errors import InputError
from noiseproof.loop import Outcome, Progress, train
from noiseproof.losses import cross_entropy
from noiseproof.method import Method, Run, require
from noiseproof.methods import CleaR, find_method
from noiseproof.models import (
    count_parameters,
    load_saved_model,
    load_text_classifier,
    mean_pooled,
    save_model,
)
from noiseproof.noise import Corruption, parse_noise
from noiseproof.record import (
    RunRecord,
    differences,
    peak_memory_mb,
    versions,
    write_history,
)
from noiseproof.selection import LossMixture, fit_loss_mixture
from noiseproof.tasks import Encoded, TextClassification

if TYPE_CHECKING:
    from noiseproof.tables import Source

TASKS = ("text",)
MERGEABLE = ("full", "head", "lora")
VALIDATION_KINDS = ("clean", "noisy")


@dataclass(frozen=True)
class Job:
    """What to fine-tune, on what, and how.

    Attributes:
        data: Training rows: a CSV, TSV, JSONL or Parquet file, a saved datasets folder, a hub name;
            from Python also a DataFrame, a Dataset or a dict of columns.
        text: Text column, or two of them as "first,second".
        label: Column of the given labels, which may be wrong.
        test: Test rows, read like data.
        validation: Validation rows: a file, or a share such as 0.1 that is split off the training
            rows (its labels are then as noisy as those).
        validation_labels: clean or noisy; must be said of a validation file, goes into the record.
        clean_label: Column of the true labels where they are known; used for metrics alone. A test
            file that has the column is measured against it.
        row_id: Column that names the rows; without it rows are numbered from 0.
        label_names: File of class names (JSON list or one a line), for labels that are numbers.
        drop_label: Rows with this given label are left out (abstentions of labelling rules).
        sample: Train on this many rows only, drawn so that class shares stay the same.
        split: Split of a hub data set or of a saved dataset dictionary.
        task: Kind of row: text.
        model: Pre-trained model: local folder, hub name, or minilm.
        noise: Noise to inject into the training labels, such as symmetric:0.4, or none.
        noise_seed: Seed of the injected noise; None follows train.seed.
        noise_pool: File of foreign rows for open-set noise, with the same text columns.
        method: How to fine-tune.
        train: How to run the loop.
        merge: Merge adapters into the encoder, so that model/ needs transformers alone.
    """

    data: Any
    text: str = "text"
    label: str = "label"
    test: Any = None
    validation: Any = None
    validation_labels: str | None = None
    clean_label: str | None = None
    row_id: str | None = None
    label_names: str | None = None
    drop_label: str | None = None
    sample: int | None = None
    split: str = "train"
    task: str = "text"
    model: str = "minilm"
    noise: str = "none"
    noise_seed: int | None = None
    noise_pool: str | None = None
    method: Method = field(default_factory=CleaR)
    train: TrainSettings = field(default_factory=TrainSettings)
    merge: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading the data."""
        require(self.task in TASKS, f"task must be one of {', '.join(TASKS)}; got {self.task!r}")
        require(
            self.task in self.method.tasks,
            f"{self.method.name} does not support task {self.task!r}; "
            f"it supports {', '.join(self.method.tasks)}",
        )
        noise = parse_noise(self.noise)
        require(
            noise is None or not noise.needs_pool or self.noise_pool is not None,
            f"noise {self.noise!r} replaces texts and needs noise_pool, a file of foreign rows",
        )
        share = self.validation_share
        require(
            share is None or 0 < share < 1,
            f"validation must be a file or a share between 0 and 1, got {self.validation}",
        )
        from_file = self.validation is not None and share is None
        require(
            not from_file or self.validation_labels in VALIDATION_KINDS,
            "say whether the labels of the validation file are trusted: validation_labels must be "
            f"clean or noisy, got {self.validation_labels}",
        )
        require(
            share is None or self.validation_labels in (None, "noisy"),
            "a validation share comes from the training rows, so its labels are noisy; "
            f"got validation_labels={self.validation_labels}",
        )
        require(
            self.train.select != "best" or self.validation is not None,
            "train.select=best needs validation rows; give validation, or use select=last",
        )
        tune = getattr(self.method, "tune", "lora")
        require(
            not self.merge or tune in MERGEABLE,
            f"merge works with tune={', '.join(MERGEABLE)}; tune={tune} stays an adapter of peft",
        )
        require(
            self.noise_seed is None or 0 <= self.noise_seed < 2**32,
            f"noise_seed must lie in [0, 2^32), got {self.noise_seed}",
        )
        require(
            not self.merge or getattr(self.method, "eval_gate", "all_on") == "all_on",
            f"merge would drop the gates that {self.method.name} uses at test; "
            "use eval_gate=all_on, or no merge",
        )
        self.method.stages(self.train.epochs)
        check_tracker(self.train.tracker)

    @property
    def validation_share(self) -> float | None:
        """The share to split off, when ``validation`` is one."""
        try:
            return float(self.validation) if isinstance(self.validation, str | float) else None
        except ValueError:
            return None

    @property
    def validation_kind(self) -> str:
        """clean, noisy or none."""
        if self.validation is None:
            return "none"
        return "noisy" if self.validation_share is not None else str(self.validation_labels)

    def spec(self) -> dict[str, Any]:
        """All settings as JSON values; tables given as objects stand as their kind."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Method):
                value = value.to_dict()
            elif isinstance(value, TrainSettings):
                value = dataclasses.asdict(value)
            elif isinstance(value, Path):
                value = str(value)
            elif not isinstance(value, str | int | float | bool | None):
                value = f"<{type(value).__name__}>"
            values[item.name] = value
        return values


@dataclass
class FitResult:
    """What `fit` returns: the record, and what is in memory anyway.

    Attributes:
        record: As written to ``record.json``.
        history: One row per stage and epoch.
        samples: One row per training row (a DataFrame), as written to ``samples.parquet``.
        predictor: The deployed model, ready to label texts.
        folder: The run's folder, when there is one.
    """

    record: RunRecord
    history: list[dict[str, Any]]
    samples: Any
    predictor: Predictor
    folder: Path | None


def fit(
    data: Any,
    *,
    method: Method | str = "CleaR",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> FitResult:
    """Fine-tune a pre-trained model on labels that may be wrong.

    Args:
        data: Training rows, see `Job`.
        method: A method object or its name (its default settings).
        out: Folder of the run; None keeps everything in memory.
        resume: Continue the run in ``out`` from its last checkpoint.
        overwrite: Replace what is in ``out``.
        report: Called after every step and epoch.
        **settings: Fields of `Job`.

    Raises:
        InputError: The data or a setting is wrong; one line says what, where and what to do.
        Interrupted: SIGINT or SIGTERM; with ``out``, ``resume=True`` continues.

    Example:
        >>> import noiseproof
        >>> result = noiseproof.fit("tickets.csv", label="intent")  # doctest: +SKIP
        >>> result.record.metrics["test_accuracy"]  # doctest: +SKIP
    """
    chosen = find_method(method)() if isinstance(method, str) else method
    try:
        job = Job(data, method=chosen, **settings)
    except TypeError as error:
        raise InputError(f"fit: {error}") from error
    return run_job(job, out=out, resume=resume, overwrite=overwrite, report=report)


def run_job(
    job: Job,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Run a job; see `fit`."""
    from accelerate import PartialState

    started = time.perf_counter()
    state = PartialState(cpu=job.train.device == "cpu")
    folder = Path(out).expanduser() if out is not None else None
    record = RunRecord(job.spec())
    main = state.is_main_process
    earlier = None
    if folder is not None and main:
        earlier = prepare_folder(folder, record, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    work = _Work(job)
    work.describe(record)
    if earlier is not None:
        same_data(earlier, record, folder)
    elif folder is not None and main and overwrite:  # not before the new data are known to be good
        clear_run(folder)
    try:
        if folder is not None and main:
            record.write(folder)
        outcome = work.train(folder, resume, report)
        predictor = Predictor(outcome.model, work.task, work.data.label_names, job.text)
        samples = work.samples(outcome)
        work.conclude(record, outcome, samples, time.perf_counter() - started)
        if folder is not None and main:
            _write_results(folder, record, outcome, samples, predictor, work)
    except Exception as error:
        if folder is not None and main:
            record.status = "interrupted" if isinstance(error, Interrupted) else "failed"
            record.error = " ".join(str(error).split()) or type(error).__name__
            record.write(folder)
        raise
    state.wait_for_everyone()
    return FitResult(record, outcome.history, samples, predictor, folder)


def prepare_folder(
    folder: Path, record: RunRecord, *, resume: bool, overwrite: bool
) -> RunRecord | None:
    """Make the run's folder, or check that what is there may be continued or replaced.

    Returns:
        The record of the run to continue, if there is one.

    Raises:
        InputError: It cannot be written, holds something, or holds a run of another specification.
    """
    if resume and (folder / "record.json").exists():
        found = RunRecord.read(folder)
        if found.id != record.id:
            changed = ", ".join(differences(record.spec, found.spec)) or "unknown"
            raise InputError(f"cannot resume {folder}: its settings differ in {changed}")
        if found.status == "done":
            raise InputError(f"{folder} is finished; nothing is left to resume")
        return found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite and not (resume and folder.is_dir() and _only_leftovers(folder)):
            raise InputError(
                f"{folder} exists; choose another --out, --resume it, or give --overwrite"
            )
        if overwrite:
            _require_run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return None


def same_data(earlier: RunRecord, record: RunRecord, folder: Path | None) -> None:
    """Refuse to continue a run on rows that have changed since.

    Raises:
        InputError: The fingerprints differ.
    """
    then, now = earlier.data.get("fingerprint"), record.data["fingerprint"]
    if then is not None and then != now:
        raise InputError(
            f"cannot resume {folder}: the training rows have changed since it started; "
            "choose another --out, or give --overwrite"
        )


def _only_leftovers(folder: Path) -> bool:
    """Whether a run was killed before it wrote its first record."""
    return all(path.name.startswith(".") for path in folder.iterdir())


RUN_FILES = ("record.json", "history.csv", "samples.parquet", "suspects.csv", "report.html")


def _require_run(folder: Path) -> None:
    """Refuse to overwrite what is no run."""
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    if any(folder.iterdir()) and not (folder / "record.json").exists():
        raise InputError(
            f"{folder} holds files but no run; --overwrite replaces runs only, choose another --out"
        )


def clear_run(folder: Path) -> None:
    """Remove what a run leaves behind, and nothing else."""
    import shutil

    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)


class _Work:
    """The data, task and model of one job. True labels live here and go no further."""

    def __init__(self, job: Job) -> None:
        self.job = job
        read: dict[str, Any] = {
            "text": job.text,
            "label": job.label,
            "row_id": job.row_id,
            "drop_label": job.drop_label,
        }
        names = read_label_names(job.label_names) if job.label_names else None
        data = read_examples(
            job.data, clean_label=job.clean_label, label_names=names, split=job.split, **read
        )
        seed = job.train.seed
        if job.sample is not None:
            data = data.select(
                stratified_sample(data.labels, job.sample, derive_seed(seed, "rows"))
            )
        init_seed = seed if job.train.init_seed is None else job.train.init_seed
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(init_seed, "head"))
            self.model, tokenizer = load_text_classifier(job.model, data.label_names)
        self.parameters = count_parameters(self.model.parameters())
        self.task = TextClassification(tokenizer, job.train.max_length)
        self.noise_seed = seed if job.noise_seed is None else job.noise_seed
        self.corruption: Corruption | None = None
        data = self._corrupt(data)
        self.validation: Examples | None = None
        if job.validation_share is not None:
            rest, split = stratified_split(
                data.labels, job.validation_share, derive_seed(seed, "validation")
            )
            self.validation, data = data.select(split), data.select(rest)
        elif job.validation is not None:
            self.validation = self._read_other(job.validation, "validation", data.label_names)
        self.data = data
        self.test = None
        if job.test is not None:
            self.test = self._read_other(job.test, "test", data.label_names)
        self.encoded = self._encode(self.data)
        self.sets = {
            name: (self._encode(examples), examples.labels)
            for name, examples in (("test", self.test), ("validation", self.validation))
            if examples is not None
        }
        self.last_logits: dict[str, Tensor] = {}

    def _read_other(self, source: Any, role: str, names: Sequence[str]) -> Examples:
        """Rows of another file; test rows count by the true label where there is one."""
        job, label = self.job, self.job.label
        clean = role == "test" or job.validation_labels == "clean"
        if job.clean_label and clean and job.clean_label in read_table(source, "test").columns:
            label = job.clean_label
        return read_examples(
            source, text=job.text, label=label, label_names=names, split=role, role=role
        )

    def _encode(self, examples: Examples) -> Encoded:
        return self.task.encode(examples.texts, examples.text_pairs)

    def _corrupt(self, data: Examples) -> Examples:
        noise = parse_noise(self.job.noise)
        if noise is None:
            return data
        features, pool = None, None
        if noise.needs_features:
            features = frozen_features(self.model, self._encode(data), self.job.train)
        if noise.needs_pool:
            assert self.job.noise_pool is not None
            pool = read_texts(self.job.noise_pool, self.job.text)
        self.corruption = corruption = noise.apply(
            data.labels,
            len(data.label_names),
            self.noise_seed,
            features=features,
            pool_size=None if pool is None else len(pool[0]),
        )
        known = data.clean_labels is not None
        data = data.with_labels(corruption.labels, old_are_clean=not known)
        if pool is None:
            return data
        return replace_texts(data, corruption.extras["replacement"], *pool)

    # --- the run ---------------------------------------------------------------------------------

    def train(
        self, folder: Path | None, resume: bool, report: Callable[[Progress], None] | None
    ) -> Outcome:
        return train(
            self.job.method,
            self.model,
            self.encoded,
            torch.from_numpy(self.data.labels),
            len(self.data.label_names),
            self.job.train,
            measure=self.measure,
            checkpoints=None if folder is None else folder / "checkpoints",
            resume=resume,
            report=report,
            tracking_folder=None if folder is None else str(folder),
        )

    def measure(self, predict_on: Callable[[Encoded], Tensor], run: Run) -> Mapping[str, Any]:
        """Numbers of one history row; training rows are predicted only if the truth is known."""
        row: dict[str, Any] = {}
        for name, (encoded, labels) in self.sets.items():
            logits = self.last_logits[name] = predict_on(encoded)
            measured = metrics.classification_metrics(logits, labels, run.num_classes)
            row[f"{name}_accuracy"] = measured["accuracy"]
            row[f"{name}_macro_f1"] = measured["macro_f1"]
        clean = self.data.clean_labels
        if clean is not None:
            logits = run.predict()
            predicted, given = logits.argmax(dim=1).numpy(), self.data.labels
            row["memorization"] = metrics.memorization(predicted, given, clean)
            row["clean_fit"] = metrics.clean_fit(predicted, given, clean)
            row["recovery"] = metrics.recovery(predicted, given, clean)
            score = run.columns.get("loss")
            score = cross_entropy(logits, run.labels) if score is None else score
            row["detection_auroc"] = metrics.detection(score.numpy(), given != clean)["auroc"]
        return row

    def samples(self, outcome: Outcome) -> Any:
        """One row per training row: id, labels, columns, verdict (a DataFrame)."""
        import pandas as pd

        run, names = outcome.run, np.asarray(self.data.label_names, dtype=object)
        logits = run.predict()
        probabilities = torch.softmax(logits, dim=1)
        confidence, predicted = probabilities.max(dim=1)
        columns = dict(run.columns)
        if "loss" not in columns:
            columns["loss"] = cross_entropy(logits, run.labels)
        if "clean_prob" not in columns:
            columns["clean_prob"] = fit_loss_mixture(
                columns["loss"], run.labels, LossMixture()
            ).clean_prob
        table: dict[str, Any] = {
            "row_id": list(self.data.row_ids),
            "label": names[self.data.labels],
        }
        if self.data.clean_labels is not None:
            table["clean_label"] = names[self.data.clean_labels]
        for name, column in columns.items():
            values = column.numpy()
            table[name] = list(values) if values.ndim > 1 else values
        table["suggested_label"] = names[predicted.numpy()]
        table["confidence"] = confidence.numpy()
        table["suspicious"] = columns["clean_prob"].numpy() < 0.5
        return pd.DataFrame(table)

    # --- the record ------------------------------------------------------------------------------

    def describe(self, record: RunRecord) -> None:
        """What is known before training."""
        job, data, seed = self.job, self.data, self.job.train.seed
        record.seeds = {
            "noise": self.noise_seed,
            "init": seed if job.train.init_seed is None else job.train.init_seed,
            "order": seed if job.train.order_seed is None else job.train.order_seed,
        }
        sizes = {name: len(labels) for name, (_, labels) in self.sets.items()}
        record.data = {
            "rows": len(data),
            **{f"{name}_rows": size for name, size in sizes.items()},
            "classes": len(data.label_names),
            "label_names": list(data.label_names),
            "dropped": data.dropped,
            "validation": job.validation_kind,
            "fingerprint": data.fingerprint,
        }
        if self.corruption is not None:
            record.noise = {
                "spec": self.corruption.spec,
                "seed": self.corruption.seed,
                "injected_rate": self.corruption.noise_rate,
                "transition": self.corruption.transition.tolist(),
            }
        if data.clean_labels is not None:
            record.noise["noise_rate"] = float((data.labels != data.clean_labels).mean())
        record.versions = versions()

    def conclude(self, record: RunRecord, outcome: Outcome, samples: Any, seconds: float) -> None:
        """What came out."""
        engine_device = next(outcome.model.parameters()).device
        record.model = {
            "name": self.job.model,
            "class": type(self.model).__name__,
            "parameters": self.parameters,
            "trained_parameters": outcome.trainable,
            "precision": outcome.precision,
            "device": str(engine_device),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        record.timings = {**outcome.seconds, "total_s": seconds}
        record.peak_memory_mb = peak_memory_mb()
        last = outcome.history[-1 if outcome.best_epoch is None else outcome.best_epoch]
        names = ("memorization", "clean_fit", "recovery", "validation_accuracy")
        found = {name: last[name] for name in names if name in last}
        if "test" in self.sets:
            found |= self._test_metrics(record, outcome)
        clean = self.data.clean_labels
        if clean is not None:
            quality = metrics.detection(
                samples["loss"].to_numpy(),
                self.data.labels != clean,
                flagged=samples["suspicious"].to_numpy(),
            )
            found |= {f"detection_{name}": value for name, value in quality.items()}
        found["suspicious"] = int(samples["suspicious"].sum())
        record.metrics = found
        record.status = "done"

    def _test_metrics(self, record: RunRecord, outcome: Outcome) -> dict[str, Any]:
        encoded, labels = self.sets["test"]
        logits = self.last_logits.get("test")
        other = outcome.best_epoch is not None or outcome.model is not outcome.run.model
        if logits is None or other:  # resumed at the end, other weights or another network
            logits = predict_logits(outcome.model, encoded, self.job.train)
        classes = len(self.data.label_names)
        measured = metrics.classification_metrics(logits, labels, classes)
        table = metrics.per_class(logits.argmax(dim=1).numpy(), labels, classes)
        record.per_class = {
            self.data.label_names[int(number)]: scores for number, scores in table.items()
        }
        curve = [row["test_accuracy"] for row in outcome.history if "test_accuracy" in row]
        late = curve[len(curve) // 2 :]
        return {
            "test_accuracy": measured["accuracy"],
            "test_accuracy_best": max(curve),
            "test_accuracy_late": sum(late) / len(late),
            "test_macro_f1": measured["macro_f1"],
            "test_ece": measured["ece"],
            "test_nll": measured["nll"],
        }


def replace_texts(
    data: Examples, replacement: np.ndarray, texts: Sequence[str], pairs: Sequence[str] | None
) -> Examples:
    """Put rows of a foreign pool in the place of the marked rows; -1 leaves a row as it is."""
    new_texts = list(data.texts)
    new_pairs = None if data.text_pairs is None else list(data.text_pairs)
    for row in np.flatnonzero(replacement >= 0):
        new_texts[row] = texts[replacement[row]]
        if new_pairs is not None and pairs is not None:
            new_pairs[row] = pairs[replacement[row]]
    return dataclasses.replace(data, texts=new_texts, text_pairs=new_pairs)


def frozen_features(
    model: torch.nn.Module, encoded: Encoded, settings: TrainSettings
) -> np.ndarray:
    """Mean-pooled features of the pre-trained encoder (N, D)."""
    engine = Engine(settings)
    model.to(engine.device).eval()
    with torch.no_grad():
        features = engine.compute(encoded, lambda inputs: mean_pooled(model, inputs))
    return features.numpy()


def predict_logits(model: torch.nn.Module, encoded: Encoded, settings: TrainSettings) -> Tensor:
    """Logits (N, C) of a deployed model."""
    engine = Engine(settings)
    engine.net = engine.accelerator.prepare_model(model, evaluation_mode=True)
    logits = engine.predict(encoded)
    engine.end_stage()
    return logits


def _write_results(
    folder: Path,
    record: RunRecord,
    outcome: Outcome,
    samples: Any,
    predictor: Predictor,
    work: _Work,
) -> None:
    import shutil

    model: Any = outcome.model
    if work.job.merge and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        predictor.model = model
    save_model(model, predictor.task.tokenizer, folder / "model")
    write_history(folder, outcome.history)
    write_table(samples, folder / "samples.parquet", overwrite=True)
    shown = samples[
        ["row_id", "label", "suggested_label", "confidence", "clean_prob", "loss", "suspicious"]
    ]
    for place, texts in enumerate((work.data.texts, work.data.text_pairs)):
        if texts is not None:
            shown.insert(1 + place, ("text", "second_text")[place], texts)
    suspects = shown[shown.pop("suspicious")].sort_values("loss", ascending=False, kind="stable")
    write_table(suspects, folder / "suspects.csv", overwrite=True)
    record.write(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


# --- prediction ----------------------------------------------------------------------------------


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
        """Class probabilities (N, C)."""
        encoded = self.task.encode(texts, pairs)
        logits = predict_logits(self.model, encoded, settings or TrainSettings())
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
    model, tokenizer = load_saved_model(folder / "model")
    if record.spec["method"].get("eval_gate", "all_on") != "all_on" and not record.spec["merge"]:
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
