"""Peers: the same job done by other libraries, the way their users would do it.

A peer trains with its own library: no loop, loss or selection of ours. What it is given (rows,
noise, encoding, fresh head, seeds) comes from `Prepared`, so it is exactly what our methods are
given. What it leaves behind is measured and recorded as a run of ours is, so one report reads both.

    job -> Prepared -> peer.fit(work) -> record.json, history.csv, samples.parquet, suspects.csv

Which settings are whose: docs/peers.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.checkpoint import Interrupted, StopSignals, Stopwatch
from noiseproof.encoding import Encoded
from noiseproof.engine import TrainSettings, derive_seed, prediction_batches
from noiseproof.errors import InputError, unknown_name
from noiseproof.job import OPT_IN, Job
from noiseproof.method import Columns, require, require_range
from noiseproof.models import count_parameters, evaluation_mode, merged
from noiseproof.preparation import OOD, Prepared, frozen_features
from noiseproof.record import RunRecord, clear_run, peak_memory_mb, prepare_folder
from noiseproof.results import (
    detection_metrics,
    epoch_metrics,
    ood_metrics,
    sample_table,
    set_metrics,
    test_metrics,
    truth_metrics,
    write_results,
)
from noiseproof.tasks import TextClassification

if TYPE_CHECKING:
    import transformers

TINY = 1e-12  # the least probability of which a logarithm is taken

Predict = Callable[[Encoded], Tensor]
"""Logits (N, C) of any encoded rows, fp32 on the CPU."""


@dataclass(frozen=True)
class Work:
    """What a peer is given. It holds no true labels.

    Attributes:
        model: The pre-trained classifier with the fresh head that our methods start from.
        tokenizer: Its tokenizer, which pads batches.
        encoded: The training rows.
        labels: Their given labels (N,).
        num_classes: C.
        settings: Epochs, batch size, device; what else a peer reads stands in its docstring.
        seeds: ``init`` for new weights, ``order`` for order, dropout and folds.
        scratch: Folder for files that a library insists on; removed afterwards.
        measure: To be called after every epoch; answers whether to keep the weights.
        stop: Set on SIGINT and SIGTERM.
    """

    model: nn.Module
    tokenizer: Any
    encoded: Encoded
    labels: np.ndarray
    num_classes: int
    settings: TrainSettings
    seeds: dict[str, int]
    scratch: Path
    measure: Measure
    stop: StopSignals

    def features(self, encoded: Encoded) -> np.ndarray:
        """Mean-pooled features of the frozen encoder (N, D)."""
        return frozen_features(self.model, encoded, self.settings)

    def check_stop(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.stop.received:
            raise Interrupted(self.stop.received)


@dataclass
class Fitted:
    """What a peer leaves behind.

    Attributes:
        predict: Scores any encoded rows.
        kind: Class name of what was trained.
        trained: Number of trained parameters.
        precision: fp32, bf16 or fp16.
        seconds: ``train_s`` and ``score_s``, without what `Work.measure` took.
        columns: What the peer found out about each training row (N, ...).
        suspicious: Its own verdict (N,) bool; None leaves it to ``clean_prob`` below 0.5.
        model: The network to save, if there is one.
    """

    predict: Predict
    kind: str
    trained: int
    precision: str
    seconds: dict[str, float]
    columns: Columns = field(default_factory=dict)
    suspicious: np.ndarray | None = None
    model: nn.Module | None = None


class Measure:
    """Measures after every epoch, with what peers must not see.

    Attributes:
        history: One row per epoch.
        best_epoch: Row of the highest validation accuracy, the first of equals, where the job
            selects by it.
        seconds: Spent here.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._sets = {name: prepared.encode(rows) for name, rows in prepared.sets.items()}
        self._logits: dict[str, Tensor] = {}  # of the last epoch measured
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.seconds = 0.0

    def __call__(
        self, predict: Predict, columns: Columns, *, last: bool, **numbers: float | None
    ) -> bool:
        """Add a row to the history.

        Args:
            predict: The network as it is now.
            columns: What the peer knows of the rows.
            last: No epoch follows.
            **numbers: ``steps``, ``rows``, ``loss``, ``learning_rate``.

        Returns:
            Whether these weights are to be deployed unless better ones come.
        """
        started = time.perf_counter()
        row: dict[str, Any] = {"stage": "train", "epoch": len(self.history), **numbers}
        if last or self._prepared.job.train.evaluate == "epoch":
            self._logits = {name: predict(rows) for name, rows in self._sets.items()}
            row |= set_metrics(self._prepared, self._logits)
            if last or self._prepared.wrong is not None:
                train = self._logits["train"] = predict(self._prepared.encoded)
                row |= truth_metrics(self._prepared, train, columns)
        better = self._prepared.job.train.select == "best" and self._is_best(row)
        if better:
            self.best_epoch = len(self.history)
        self.history.append(row)
        self.seconds += time.perf_counter() - started
        return better

    def _is_best(self, row: dict[str, Any]) -> bool:
        score = row.get("validation_accuracy")
        if score is None or self.best_epoch is None:
            return score is not None
        return bool(score > self.history[self.best_epoch]["validation_accuracy"])

    def deployed(self, predict: Predict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """History row of the deployed weights, and their logits: name of the set -> (N, C)."""
        if self.best_epoch in (None, len(self.history) - 1):
            return self.history[-1], self._logits
        started = time.perf_counter()
        sets = self._sets | {"train": self._prepared.encoded}
        logits = {name: predict(rows) for name, rows in sets.items()}
        self.seconds += time.perf_counter() - started
        assert self.best_epoch is not None
        return self.history[self.best_epoch], logits


@dataclass(frozen=True)
class Peer(ABC):
    """Another library at the same job: a frozen bundle of settings and one hook.

    Attributes:
        name: The class name.
        needs: Packages of the extra ``peers`` that it imports; their versions are recorded.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """The class name is the name everywhere."""
        cls.name = cls.__name__

    @abstractmethod
    def fit(self, work: Work) -> Fitted:
        """Train with the library, calling ``work.measure`` after every epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record: ``{"name": ..., field: value, ...}``."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"name": self.name, **values}

    def check_installed(self) -> None:
        """Refuse to run without the library.

        Raises:
            InputError: It is not installed; says how to install it.
        """
        for package in self.needs:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InputError(
                    f"{self.name} needs {package} ({error}): pip install 'noiseproof[peers]'"
                ) from error


# --- transformers.Trainer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer(Peer):
    """Full fine-tuning by ``transformers.Trainer``.

    The library's: everything but what stands below; so AdamW without weight decay, a linear
    schedule without warm-up, gradients clipped to 1, fp32, random order.
    Ours: epochs, batch size, seed, the rate where the job gives one, device, fp32, bf16 or fp16
    where the job says so (``auto`` stays the library's), no checkpoints, no progress bar.

    Attributes:
        learning_rate: Peak rate (the library's default); the job's ``train.learning_rate`` goes
            first.
    """

    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        """Check the setting."""
        require_range(self.name, "learning_rate", self.learning_rate, 0, 10, open_low=True)

    def fit(self, work: Work, columns: Columns | None = None) -> Fitted:
        """Train all weights; rows whose column ``keep`` is False are left out."""
        return train_with_trainer(work, work.model, self.learning_rate, columns=columns)


@dataclass(frozen=True)
class TrainerLabelSmoothing(Trainer):
    """`Trainer` with ``label_smoothing_factor``.

    Attributes:
        smoothing: The factor; 0.1 is the usual one, the library's default is none.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        require_range(self.name, "smoothing", self.smoothing, 0, 1, open_high=True)

    def fit(self, work: Work, columns: Columns | None = None) -> Fitted:
        """Train all weights against smoothed labels."""
        return train_with_trainer(
            work, work.model, self.learning_rate, smoothing=self.smoothing, columns=columns
        )


@dataclass(frozen=True)
class TrainerLoRA(Peer):
    """``transformers.Trainer`` on a LoRA model of ``peft``.

    The libraries': target modules, initialisation, no LoRA dropout, which head is trained (peft
    trains modules called ``classifier`` or ``score``), and of the Trainer what `Trainer` names.
    Ours: rank, alpha and rate, those of our own LoRA baseline (peft's own alpha is 8, the
    Trainer's own rate 5e-5, at which LoRA learns little in so few steps).

    Attributes:
        rank: Rank of the adapters.
        alpha: Scaling numerator; None is twice the rank.
        learning_rate: Peak rate; the job's ``train.learning_rate`` goes first.
    """

    rank: int = 8
    alpha: float | None = None
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        """Check the settings."""
        require(self.rank >= 1, f"{self.name}.rank must be at least 1, got {self.rank}")
        if self.alpha is not None:
            require_range(self.name, "alpha", self.alpha, 0, 1e6, open_low=True)
        require_range(self.name, "learning_rate", self.learning_rate, 0, 10, open_low=True)

    def fit(self, work: Work, columns: Columns | None = None) -> Fitted:
        """Train adapters and head; rows whose column ``keep`` is False are left out."""
        model = add_lora(work, self.rank, self.alpha)
        return train_with_trainer(work, model, self.learning_rate, columns=columns)


def add_lora(work: Work, rank: int, alpha: float | None) -> nn.Module:
    """The model with LoRA as ``peft`` adds it, its weights drawn under the ``init`` seed.

    Raises:
        InputError: peft does not know which modules of this model to adapt.
    """
    import peft

    torch.manual_seed(derive_seed(work.seeds["init"], "init"))
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type, unused-ignore]
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a name it renamed ...
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # ... and sets this right itself: GPT-2 has transposed weights
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            model: nn.Module = peft.get_peft_model(work.model, config)
    except ValueError as error:
        raise InputError(f"peft cannot add LoRA to this model: {error}") from error
    return model


def train_with_trainer(
    work: Work,
    model: nn.Module,
    learning_rate: float,
    *,
    smoothing: float = 0.0,
    columns: Columns | None = None,
) -> Fitted:
    """Train with ``transformers.Trainer`` at its defaults.

    Args:
        work: The job.
        model: All that requires a gradient is trained.
        learning_rate: Peak rate, where the job gives none.
        smoothing: ``label_smoothing_factor``.
        columns: What is known of the rows; those with ``keep`` False are left out.
    """
    import transformers

    known = columns or {}
    keep = known.get("keep", torch.ones(len(work.labels), dtype=torch.bool))
    rows = _Rows(work.encoded, work.labels, np.flatnonzero(keep.numpy()))
    arguments = _arguments(work, learning_rate, smoothing)
    predict = network_logits(model)
    callback, best = _callback(work, model, known, len(rows))
    trainer = transformers.Trainer(
        model=model,  # type: ignore[arg-type, unused-ignore]
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type, unused-ignore]
        data_collator=transformers.DataCollatorWithPadding(work.tokenizer),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it prints every log
    before, started = work.measure.seconds, time.perf_counter()
    trainer.train()
    model.load_state_dict(best, strict=False)  # nothing, if the last epoch is to be kept
    seconds = time.perf_counter() - started - (work.measure.seconds - before)
    return Fitted(
        predict,
        kind=type(work.model).__name__,
        trained=count_parameters(p for p in model.parameters() if p.requires_grad),
        precision="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        seconds={"train_s": seconds, "score_s": 0.0},
        columns=known,
        model=model,
    )


def _arguments(work: Work, rate: float, smoothing: float) -> transformers.TrainingArguments:
    """The Trainer's settings: the job's, quiet, and else its own."""
    import transformers

    settings = work.settings
    micro = settings.micro_batch_size or settings.batch_size
    return transformers.TrainingArguments(
        output_dir=str(work.scratch),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=rate if settings.learning_rate is None else settings.learning_rate,
        label_smoothing_factor=smoothing,
        seed=work.seeds["order"],
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device != "cpu" and torch.cuda.is_available(),
        logging_strategy="epoch",
        eval_strategy="no",  # the callback measures
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _callback(
    work: Work, model: nn.Module, columns: Columns, rows: int
) -> tuple[transformers.TrainerCallback, dict[str, Tensor]]:
    """Measures whenever the Trainer logs an epoch, keeps the best weights, stops on signals.

    Returns:
        The callback and the weights that it keeps, where the job selects the best epoch.
    """
    import transformers

    predict, best = network_logits(model), dict[str, Tensor]()

    class Callback(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            work.check_stop()

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            logs = given["logs"]
            if "loss" not in logs:  # the summary at the end of training
                return
            better = work.measure(
                predict,
                columns,
                last=state.global_step >= state.max_steps,
                steps=state.global_step - self.steps,
                rows=rows,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
            )
            self.steps = state.global_step
            if better:
                best.update({name: value.clone() for name, value in trained_weights(model).items()})

    return Callback(), best


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What training may change: trained parameters and buffers, by name."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def network_logits(model: nn.Module) -> Predict:
    """Predict with a network where it lies, in the batches that our own methods predict in."""

    def predict(encoded: Encoded) -> Tensor:
        device = next(model.parameters()).device
        found: dict[int, Tensor] = {}
        with evaluation_mode(model):
            for rows in prediction_batches(encoded.lengths):
                inputs = {name: part.to(device) for name, part in encoded.inputs(rows).items()}
                logits = model(**inputs).logits.float().cpu()
                found |= dict(zip(rows.tolist(), logits, strict=True))
        return torch.stack([found[row] for row in range(len(encoded))])

    return predict


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Chosen encoded rows with their given labels, one by one, as a Trainer reads them."""

    def __init__(self, encoded: Encoded, labels: np.ndarray, rows: np.ndarray) -> None:
        self.encoded, self.labels, self.rows = encoded, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place : place + 1]
        inputs = {name: part[0] for name, part in self.encoded.inputs(row).items()}
        return inputs | {"labels": int(self.labels[row[0]])}


# --- cleanlab ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanlabProbe(Peer):
    """``cleanlab.CleanLearning`` around a logistic regression on frozen embeddings.

    The library's: cross-validation, which rows have a label issue, weights of the remaining rows,
    the refit on them, the quality of every label.
    Ours: mean-pooled embeddings of the frozen encoder, the iteration limit, ``seed``, and one
    process for the search (it changes the time alone). Suspicious rows are the library's issues,
    and rows are ranked by 1 - label quality.

    Attributes:
        folds: Folds of the cross-validation (the library's default).
        max_iter: Iterations of the logistic regression at most.
    """

    folds: int = 5
    max_iter: int = 1000

    needs: ClassVar[tuple[str, ...]] = ("cleanlab",)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_folds(self.name, self.folds, self.max_iter)

    def fit(self, work: Work) -> Fitted:
        """Cross-validate, find issues, refit; there is one epoch."""
        from cleanlab.classification import CleanLearning

        started = time.perf_counter()
        classes, labels = np.unique(work.labels, return_inverse=True)
        learner = CleanLearning(
            _regression(self.max_iter),
            seed=work.seeds["order"],
            cv_n_folds=self.folds,
            find_label_issues_kwargs={"n_jobs": 1},
        )
        learner.fit(work.features(work.encoded), labels)
        seconds = time.perf_counter() - started
        issues = learner.get_label_issues()
        flagged = issues["is_label_issue"].to_numpy()
        columns = _quality_columns(issues["label_quality"].to_numpy(), ~flagged)

        def predict(encoded: Encoded) -> Tensor:
            probabilities = np.zeros((len(encoded), work.num_classes))
            probabilities[:, classes] = learner.predict_proba(work.features(encoded))
            return torch.from_numpy(np.log(probabilities.clip(TINY))).float()

        work.check_stop()
        kept = int((~flagged).sum())
        work.measure(predict, columns, last=True, steps=1, rows=kept, loss=None, learning_rate=None)
        regression = learner.clf
        return Fitted(
            predict,
            kind=type(regression).__name__,
            trained=regression.coef_.size + regression.intercept_.size,
            precision="fp32",
            seconds={"train_s": seconds, "score_s": 0.0},
            columns=columns,
            suspicious=flagged,
        )


@dataclass(frozen=True)
class CleanlabPrune(Peer):
    """Drop the rows that ``cleanlab.filter.find_label_issues`` names, fine-tune on the others.

    The library's: which rows have an issue, the quality of every label; the fine-tuning is that of
    `TrainerLoRA` or `Trainer`.
    Ours: the out-of-sample probabilities, by cross-validated logistic regression on mean-pooled
    embeddings of the frozen encoder, and one process for the search. Suspicious rows are the
    library's issues, and rows are ranked by 1 - label quality.

    Attributes:
        tune: ``lora`` or ``full``.
        folds: Folds of the cross-validation.
        max_iter: Iterations of the logistic regression at most.
        rank: Rank of the adapters.
        alpha: Scaling numerator; None is twice the rank.
        learning_rate: Peak rate; None is 2e-3 (lora) or 5e-5 (full). The job's
            ``train.learning_rate`` goes first.
    """

    tune: str = "lora"
    folds: int = 5
    max_iter: int = 1000
    rank: int = 8
    alpha: float | None = None
    learning_rate: float | None = None

    needs: ClassVar[tuple[str, ...]] = ("cleanlab",)

    def __post_init__(self) -> None:
        """Check the settings."""
        require(
            self.tune in ("lora", "full"),
            f"{self.name}.tune must be lora or full, got {self.tune!r}",
        )
        _check_folds(self.name, self.folds, self.max_iter)
        self.tuner()

    def tuner(self) -> Trainer | TrainerLoRA:
        """The peer that trains on the rows that are left."""
        given = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        if self.tune == "full":
            return Trainer(**given)
        return TrainerLoRA(self.rank, self.alpha, **given)

    def fit(self, work: Work) -> Fitted:
        """Score all rows once, then train on those without an issue."""
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        started = time.perf_counter()
        _, labels = np.unique(work.labels, return_inverse=True)
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=work.seeds["order"])
        probabilities = cross_val_predict(
            _regression(self.max_iter),
            work.features(work.encoded),
            labels,
            cv=folds,
            method="predict_proba",
        )
        flagged = find_label_issues(labels, probabilities, n_jobs=1)
        quality = get_label_quality_scores(labels, probabilities)
        columns = _quality_columns(quality, ~flagged)
        seconds = time.perf_counter() - started
        work.check_stop()
        fitted = self.tuner().fit(work, columns)
        fitted.seconds["score_s"] = seconds
        fitted.suspicious = flagged
        return fitted


def _check_folds(name: str, folds: int, max_iter: int) -> None:
    require(folds >= 2, f"{name}.folds must be at least 2, got {folds}")
    require(max_iter >= 1, f"{name}.max_iter must be at least 1, got {max_iter}")


def _regression(max_iter: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=max_iter)


def _quality_columns(quality: np.ndarray, keep: np.ndarray) -> Columns:
    """Columns of a label quality, the out-of-sample probability of the given label (N,)."""
    return {
        "loss": torch.from_numpy(-np.log(quality.clip(TINY))).float(),
        "clean_prob": torch.tensor(quality, dtype=torch.float32),  # pandas may lend it read-only
        "keep": torch.tensor(keep),
    }


# --- running -------------------------------------------------------------------------------------

PEERS: dict[str, type[Peer]] = {
    peer.__name__: peer
    for peer in (Trainer, TrainerLabelSmoothing, TrainerLoRA, CleanlabProbe, CleanlabPrune)
}


def find_peer(name: str) -> type[Peer]:
    """The class of a peer.

    Raises:
        InputError: Unknown name; gives the nearest and all names.
    """
    if name not in PEERS:
        raise InputError(unknown_name("peer", name, PEERS))
    return PEERS[name]


def run_peer(
    job: Job,
    peer: Peer,
    *,
    out: str | Path,
    overwrite: bool = False,
    labels: dict[str, str] | None = None,
    search: dict[str, Any] | None = None,
) -> RunRecord:
    """Run a peer on the rows, noise and seeds of a job; its method is not used.

    Args:
        job: Data, noise, model and training settings.
        peer: Who trains.
        out: Folder of the run: the files of a run of ours, without ``model/`` where no network was
            trained.
        overwrite: Replace what is in ``out``.
        labels: Names for the record, such as those of a grid's cell.
        search: How the settings were found, for the record.

    Raises:
        InputError: The data or a setting is wrong, or the library is not installed.
        Interrupted: SIGINT or SIGTERM; there is nothing to resume from.

    Example:
        >>> from noiseproof.job import Job
        >>> job = Job("train.csv", test="test.csv", noise="symmetric:0.4")  # doctest: +SKIP
        >>> record = run_peer(job, CleanlabPrune(), out="runs/prune")  # doctest: +SKIP
    """
    watch = Stopwatch()
    peer.check_installed()
    _check_job(job)
    folder = Path(out).expanduser()
    record = RunRecord(
        job.spec() | {"method": peer.to_dict()},
        labels=dict(labels or {}),
        search=dict(search or {}),
    )
    prepare_folder(folder, record, resume=False, overwrite=overwrite)
    prepared = Prepared(job)
    prepared.describe(record)
    for package in peer.needs:
        record.versions[package] = importlib.import_module(package).__version__
    if overwrite:  # not before the new data are known to be good
        clear_run(folder)
    measure, scratch = Measure(prepared), folder / "checkpoints"
    try:
        record.write(folder)
        with _own_random_state(), StopSignals() as stop:
            task = prepared.task
            assert isinstance(task, TextClassification)
            work = Work(
                prepared.model,
                task.tokenizer,
                prepared.encoded,
                prepared.data.labels,
                prepared.num_classes,
                job.train,
                prepared.seeds,
                scratch,
                measure,
                stop,
            )
            fitted = peer.fit(work)
        _conclude(record, prepared, fitted, measure, folder)
        record.status = "done"
    except Exception as error:
        record.status = "interrupted" if isinstance(error, Interrupted) else "failed"
        record.error = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        record.timings |= watch.seconds()
        record.write(folder)
    return record


def _check_job(job: Job) -> None:
    """Refuse what peers cannot do."""
    train = job.train
    for name in OPT_IN:
        require(not getattr(job, name), f"peers do not offer {name}; leave it out")
    require(job.task == "text", f"peers run on texts alone, got task={job.task}")
    micro = train.micro_batch_size
    require(
        micro is None or train.batch_size % micro == 0,
        f"peers need a micro_batch_size that divides batch_size={train.batch_size}, got {micro}",
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(processes == 1, f"peers run in one process, got {processes}")
    devices = torch.cuda.device_count()
    require(
        train.device == "cpu" or devices <= 1,
        f"peers run on one GPU, found {devices}; set CUDA_VISIBLE_DEVICES=0",
    )


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put back the global random states: the libraries seed them and draw from them."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _conclude(
    record: RunRecord, prepared: Prepared, fitted: Fitted, measure: Measure, folder: Path
) -> None:
    """Put into the record what came out, and write the files."""
    record.model = {
        "name": prepared.job.model,
        "class": fitted.kind,
        "parameters": prepared.parameters,
        "trained_parameters": fitted.trained,
        "precision": fitted.precision,
        "device": str(next(prepared.model.parameters()).device),
        "processes": 1,
    }
    row, logits = measure.deployed(fitted.predict)
    record.timings |= {**fitted.seconds, "eval_s": measure.seconds}
    record.peak_memory_mb = peak_memory_mb()
    epoch_metrics(record, prepared, row)
    if "test" in logits:
        curve = [row["test_accuracy"] for row in measure.history if "test_accuracy" in row]
        test_metrics(record, prepared, logits["test"], curve)
    ood_metrics(record, prepared, {n: found for n, found in logits.items() if n.startswith(OOD)})
    samples = sample_table(prepared, logits["train"], fitted.columns)
    if fitted.suspicious is not None:
        samples["suspicious"] = fitted.suspicious
    detection_metrics(record, prepared, samples)
    if fitted.model is not None:
        model = merged(fitted.model) if prepared.job.merge else fitted.model
        prepared.task.save(model, folder / "model")
    write_results(folder, measure.history, samples, prepared)
