"""The main job: from a table with doubtful labels to a model, a list of suspects and a record.

read -> (noise) -> split -> encode -> train -> predict the training rows
-> model/, samples.parquet, suspects.csv, history.csv, record.json
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from noiseproof.checkpoint import Interrupted, Stopwatch
from noiseproof.distortion import Look, distortion, look_at
from noiseproof.encoding import Encoded
from noiseproof.engine import TrainSettings, derive_seed
from noiseproof.errors import InputError, path_of
from noiseproof.gradients import GradientSample, draw_sample, measure_gates, measure_gradients
from noiseproof.job import Job, JobSettings, check_names
from noiseproof.loop import Outcome, Progress, train
from noiseproof.method import Method, Run
from noiseproof.methods import method_of
from noiseproof.noise import save_transition
from noiseproof.prediction import Predictor, predict_logits
from noiseproof.preparation import OOD, Prepared
from noiseproof.record import (
    RunRecord,
    clear_run,
    empty_folders_removed,
    missing_folders,
    peak_memory_mb,
    prepare_folder,
    same_data,
)
from noiseproof.results import (
    answer_metrics,
    detection_metrics,
    epoch_metrics,
    mode_metrics,
    ood_metrics,
    sample_table,
    set_metrics,
    test_metrics,
    truth_metrics,
    write_results,
)
from noiseproof.saving import merged

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHOWN = ("test_accuracy", "test_macro_f1", "detection_auroc", "suspicious")
"""Metrics that the short form of a result shows."""


@dataclass(repr=False)
class FitResult:
    """What `fit` returns: the record, and what is in memory anyway.

    Attributes:
        record: As written to ``record.json``.
        history: One row per stage and epoch.
        samples: One row per training row (a DataFrame), as written to ``samples.parquet``.
        predictor: The deployed model, ready to label rows.
        folder: The run's folder, when there is one.
    """

    record: RunRecord
    history: list[dict[str, Any]]
    samples: Any
    predictor: Predictor
    folder: Path | None

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured, by name."""
        return self.record.metrics

    @property
    def suspects(self) -> Any:
        """The rows of ``samples`` whose label looks wrong, worst first (a DataFrame)."""
        suspicious = self.samples[self.samples["suspicious"]]
        return suspicious.sort_values("loss", ascending=False, kind="stable")

    def __repr__(self) -> str:
        """What was trained and what came out, in one line."""
        spec, metrics = self.record.spec, self.metrics
        shown = [f"{name}={metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None]
        place = "in memory" if self.folder is None else str(self.folder)
        rows = f"{spec['method']['name']}, {len(self.samples)} rows"
        return f"<FitResult: {', '.join([rows, *shown, place])}>"


def fit(
    data: Any,
    *,
    method: Method | type[Method] | str = "CleaR",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
    **settings: Unpack[JobSettings],
) -> FitResult:
    """Fine-tune a pre-trained model on labels that may be wrong.

    Args:
        data: Training rows: a CSV, TSV, JSONL or Parquet file, a DataFrame, a Dataset, a dict of
            columns, ...
        method: A method such as ``CleaR(warmup_epochs=2)``, its name, or a name with a preset such
            as ``"CleaR:fast"``.
        out: Folder of the run; None keeps everything in memory.
        resume: Continue the run in ``out`` from its last checkpoint.
        overwrite: Replace what is in ``out``.
        report: Called after every step and epoch.
        **settings: Fields of `Job`, which lists all of them. The usual ones: ``text`` and
            ``label``, the columns; ``test`` and ``validation``, rows or a share such as 0.2;
            ``clean_label``, the column of the true labels where they are known; ``task``;
            ``model``; ``noise`` to inject; ``train``, such as ``TrainSettings(epochs=3)``.

    Raises:
        InputError: The data or a setting is wrong; one line says what, where and what to do.
        Interrupted: SIGINT or SIGTERM; with ``out``, ``resume=True`` continues.

    Example:
        >>> import noiseproof
        >>> result = noiseproof.fit("tickets.csv", label="intent", test=0.2)  # doctest: +SKIP
        >>> result.metrics["test_accuracy"]  # doctest: +SKIP
        >>> result.suspects  # doctest: +SKIP
    """
    chosen = method_of(method)
    given: Mapping[str, Any] = settings
    check_names("fit", given, chosen)
    job = Job(data, method=chosen, **given)
    return run_job(job, out=out, resume=resume, overwrite=overwrite, report=report)


def _with_all_settings(function: Callable[..., Any]) -> None:
    """Let help() and completion show the fields of `Job` among the parameters of a function."""
    shown = signature(function)
    own = [item for item in shown.parameters.values() if item.kind is not Parameter.VAR_KEYWORD]
    more = [
        Parameter(
            item.name,
            Parameter.KEYWORD_ONLY,
            default=TrainSettings() if item.name == "train" else item.default,
            annotation=item.type,
        )
        for item in dataclasses.fields(Job)
        if item.name in JobSettings.__annotations__
    ]
    vars(function)["__signature__"] = shown.replace(parameters=[*own, *more])


_with_all_settings(fit)


def run_job(
    job: Job,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
    labels: Mapping[str, str] | None = None,
    search: Mapping[str, Any] | None = None,
) -> FitResult:
    """Run a job; see `fit`.

    ``labels`` are the names that a grid gives it, ``search`` says how its settings were found; both
    are for the record alone.
    """
    from accelerate import PartialState

    watch = Stopwatch()
    state = PartialState(cpu=job.train.device == "cpu")
    folder = path_of(out) if out is not None else None
    record = RunRecord(job.spec(), labels=dict(labels or {}), search=dict(search or {}))
    main = state.is_main_process
    earlier, new = None, list[Path]()
    if folder is not None and main:
        new = missing_folders(folder)
        earlier = prepare_folder(folder, record, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    with empty_folders_removed(new):
        prepared = Prepared(job)
        prepared.describe(record)
        if earlier is not None:
            same_data(earlier, record, folder)
        elif (
            folder is not None and main and overwrite
        ):  # not before the new data are known to be good
            clear_run(folder)
        measure = _Measure(prepared)
        begun, refused = False, False

        def told(progress: Progress) -> None:
            nonlocal begun
            begun = True
            if report is not None:
                report(progress)

        try:
            if folder is not None and main:
                record.write(folder)
            outcome = train(
                job.method,
                prepared.model,
                prepared.encoded,
                torch.from_numpy(prepared.data.labels),
                prepared.num_classes,
                job.train,
                measure=measure,
                checkpoints=None if folder is None else folder / "checkpoints",
                resume=resume,
                report=told,
                tracking_folder=None if folder is None else str(folder),
                watch=watch,
                passes=prepared.passes,
                score=prepared.task.measures.score,
            )
            samples = sample_table(prepared, outcome.run.predict(), outcome.run.columns)
            _conclude(record, prepared, outcome, samples, measure)
            predictor = Predictor(
                outcome.model,
                prepared.task,
                prepared.data.label_names,
                job.column,
                job.rows,
                job.label,
            )
            if folder is not None and main:
                if job.merge:
                    predictor.model = merged(predictor.model)
                prepared.task.save(predictor.model, folder / "model")
                write_results(folder, outcome.history, samples, prepared)
                if "transition" in record.findings:
                    save_transition(folder / "transition.json", record.findings["transition"])
            record.status = "done"
        except Exception as error:
            record.status = "interrupted" if isinstance(error, Interrupted) else "failed"
            record.error = " ".join(str(error).split()) or type(error).__name__
            # such as an adapter that the model has no place for: --out stays free for the next try
            unused = earlier is None and not overwrite and not begun
            refused = unused and isinstance(error, InputError)
            raise
        finally:
            record.timings |= watch.seconds()
            if folder is not None and main:
                if refused:
                    (folder / "record.json").unlink(missing_ok=True)
                else:
                    record.write(folder)
    if folder is not None and main:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    state.wait_for_everyone()
    return FitResult(record, outcome.history, samples, predictor, folder)


class _Measure:
    """What is measured at the end of every epoch."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.sets = {name: prepared.encode(rows) for name, rows in prepared.sets.items()}
        self.logits: dict[str, Tensor] = {}
        count, wrong = prepared.job.probe_gradients, prepared.wrong
        self.probed: GradientSample | None = None
        if count and wrong is not None:
            seed = derive_seed(prepared.job.train.seed, "gradients")
            self.probed = draw_sample(wrong, count, seed)
        asked = prepared.job.measure_distortion
        self.before = self._look(prepared.model, keep=True) if asked else None

    def __call__(self, predict_on: Callable[[Encoded], Tensor], run: Run) -> Mapping[str, Any]:
        """Numbers of one history row; training rows are predicted only if the truth is known."""
        self.logits = {name: predict_on(encoded) for name, encoded in self.sets.items()}
        row: dict[str, Any] = set_metrics(self.prepared, self.logits)
        if self.prepared.wrong is None:
            return row
        row |= truth_metrics(self.prepared, run.predict(), run.columns)
        if self.probed is not None:
            inputs = self.prepared.encoded.inputs
            row |= measure_gradients(self.prepared.job.method, run, inputs, self.probed)
            row |= measure_gates(self.prepared.job.method, run, self.prepared.wrong)
        return row

    def distorted(self, model: nn.Module) -> dict[str, float | None]:
        """How far the deployed encoder is from the pre-trained one; nothing where not asked for."""
        prepared = self.prepared
        if self.before is None or prepared.data.clean_labels is None:
            return {}
        return distortion(
            self.before,
            self._look(model),
            prepared.data.clean_labels,
            prepared.sets["test"].labels,
            prepared.num_classes,
        )

    def _look(self, model: nn.Module, *, keep: bool = False) -> Look:
        prepared = self.prepared
        rows = (prepared.encoded, self.sets["test"])
        return look_at(model, *rows, prepared.job.train, keep=keep)

    def deployed(self, outcome: Outcome) -> dict[str, Tensor]:
        """Logits of the test sets by the deployed model: name of the set -> (N, C)."""
        found = {}
        other = outcome.best_epoch is not None or outcome.model is not outcome.run.model
        for name in self.prepared.test_sets:
            logits = self.logits.get(name)
            if logits is None or other:  # resumed at the end, other weights or another network
                logits = predict_logits(outcome.model, self.sets[name], self.prepared.job.train)
            found[name] = logits
        return found


def _conclude(
    record: RunRecord, prepared: Prepared, outcome: Outcome, samples: Any, measure: _Measure
) -> None:
    """Put into the record what came out."""
    record.model = {
        "name": prepared.job.spec()["model"],
        "class": type(prepared.model).__name__,
        "parameters": prepared.parameters,
        "trained_parameters": outcome.trainable,
        "trained_head_parameters": outcome.trainable_head,
        "precision": outcome.precision,
        "device": str(next(outcome.model.parameters()).device),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    record.timings |= outcome.seconds
    record.peak_memory_mb = peak_memory_mb()
    last = outcome.history[-1 if outcome.best_epoch is None else outcome.best_epoch]
    epoch_metrics(record, prepared, last)
    logits = measure.deployed(outcome)
    ood_metrics(record, prepared, {n: found for n, found in logits.items() if n.startswith(OOD)})
    if "test" in logits:
        stage = outcome.history[-1]["stage"]  # a probe before it is no epoch of fine-tuning
        followed = prepared.task.measures.curve
        curve = [
            row[followed] for row in outcome.history if row["stage"] == stage and followed in row
        ]
        test_metrics(record, prepared, logits["test"], curve)
    answers = answer_metrics(record, prepared, outcome.model)
    mode_metrics(record, prepared, outcome.model, measure.sets, logits, answers)
    record.findings = outcome.run.findings
    record.metrics |= measure.distorted(outcome.model)
    detection_metrics(record, prepared, samples)
