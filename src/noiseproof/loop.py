"""The training loop: one for every method.

    model = method.prepare_model(model)
    for stage in method.stages(epochs):
        freeze by stage; fresh optimizer and schedule
        for epoch in stage:                                # texts as the stage transforms them
            columns |= method.on_epoch_start(run)          # predict -> (N, C) -> (N, ...)
            for batch in rows where keep:                  # columns joined by row number
                loss = method.compute_loss(model, batch, run); backward; clip; step
            measure; one history row; checkpoint
    model = method.finalize_model(run)

The loop knows no concrete method and no true labels: what is measured is the caller's `measure`.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.adapters import set_adapters
from noiseproof.checkpoint import (
    Interrupted,
    StopSignals,
    Stopwatch,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    with_prefix,
)
from noiseproof.encoding import Encoded, RowChange
from noiseproof.engine import (
    Engine,
    TrainSettings,
    derive_seed,
    rate_factor,
    repeated,
    training_batches,
)
from noiseproof.errors import InputError
from noiseproof.method import BeforeBatch, Columns, Method, RowTransform, Run, Stage
from noiseproof.models import (
    class_names,
    count_parameters,
    fast_dropout,
    is_head,
    is_head_or_pooler,
    set_trainable,
    training_mode,
)

DEFAULT_RATE = 5e-5
FEWEST_STEPS = 50  # of a stage on selected rows, below which the user is warned (TURN's lineage)
HistoryRow = dict[str, Any]


def validation_accuracy(row: Mapping[str, Any]) -> float | None:
    """What select=best takes the highest of, unless the caller of `train` has something else."""
    return row.get("validation_accuracy")


class Measure(Protocol):
    """Numbers for the history row at the end of an epoch; holds what methods must not see."""

    def __call__(self, predict_on: Callable[[Encoded], Tensor], run: Run) -> Mapping[str, Any]:
        """Return JSON values by name; `predict_on` gives logits of any encoded rows."""


@dataclass(frozen=True)
class Progress:
    """Where training is, for a progress display."""

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    history: HistoryRow | None = None


@dataclass
class Outcome:
    """What training leaves behind.

    Attributes:
        model: The model to deploy.
        run: The run, with its last columns.
        history: One row per stage and epoch.
        seconds: ``train_s``, ``score_s``, ``eval_s``, and ``stage_NAME_s`` of every stage as a
            whole, over all legs of a resumed run.
        precision: fp32, bf16 or fp16.
        trainable: Trained parameters over all stages.
        trainable_head: Those of them in the task head or the encoder's pooler.
        best_epoch: Number of the history row whose weights were taken, with select=best.
    """

    model: nn.Module
    run: Run
    history: list[HistoryRow]
    seconds: dict[str, float]
    precision: str
    trainable: int
    trainable_head: int = 0
    best_epoch: int | None = None


@dataclass
class _State:
    """All that a checkpoint holds besides weights, moments and columns."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    columns: list[str] = field(default_factory=list)  # their order; the file sorts its tensors
    logged: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    doubted: bool = False  # whether it was judged if a selection leaves enough rows
    history: list[HistoryRow] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train_s": 0.0, "score_s": 0.0, "eval_s": 0.0}
    )
    legs: dict[str, float] = field(default_factory=dict)  # total_s and cpu_s so far
    best_score: float = -math.inf
    best_row: int | None = None


def train(
    method: Method,
    model: nn.Module,
    encoded: Encoded,
    labels: Tensor,
    num_classes: int,
    settings: TrainSettings,
    *,
    measure: Measure | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    tracking_folder: str | None = None,
    watch: Stopwatch | None = None,
    passes: float = 1.0,
    score: Callable[[Mapping[str, Any]], float | None] = validation_accuracy,
) -> Outcome:
    """Fine-tune ``model`` with ``method`` on encoded rows and their given labels (N,).

    Args:
        method: What to train with.
        model: A classifier; it is changed.
        encoded: The rows.
        labels: Their given labels (N,).
        num_classes: C.
        settings: How to run the loop.
        measure: Called at the end of an epoch; its numbers go into the history.
        checkpoints: Folder for them; None writes none.
        resume: Continue from the checkpoint in that folder, if there is one.
        report: Called after every step and epoch.
        tracking_folder: Where a tracker writes.
        watch: Runs since the work began; its seconds go into the checkpoints, and on resuming
            those of the earlier legs are carried into it.
        passes: Over the rows of an epoch; more than one repeats rows, so that fewer rows take as
            many steps as more of them would.
        score: How good a history row is, for select=best: the higher the better; None where the
            epoch was not measured.

    Raises:
        InputError: The method refuses these settings.
        FloatingPointError: A loss is not finite; names method, stage, epoch and step.
        Interrupted: A SIGINT or SIGTERM came; a checkpoint was written where there is a folder.
    """
    loop = _Loop(method, encoded, labels, num_classes, settings, checkpoints, tracking_folder)
    loop.measure, loop.report, loop.watch = measure, report, watch or Stopwatch()
    loop.passes, loop.score = passes, score
    with torch.random.fork_rng(), StopSignals() as stop:
        loop.stop = stop
        return loop.run_all(model, resume)


class _Loop:
    """The loop's working state; `run_all` reads top to bottom like the pseudocode above."""

    measure: Measure | None
    report: Callable[[Progress], None] | None
    watch: Stopwatch
    passes: float
    score: Callable[[Mapping[str, Any]], float | None]
    stop: StopSignals
    run: Run

    def __init__(
        self,
        method: Method,
        encoded: Encoded,
        labels: Tensor,
        num_classes: int,
        settings: TrainSettings,
        checkpoints: Path | None,
        tracking_folder: str | None,
    ) -> None:
        self.method, self.encoded = method, encoded
        self.asked = self.settings = settings  # a stage may have settings of its own
        self.labels, self.num_classes = labels, num_classes
        self.checkpoints = checkpoints
        self.engine = Engine(settings, tracking_folder)
        self.state = _State()
        self.optimizer: torch.optim.Optimizer
        self.best: dict[str, Tensor] = {}
        self.own_rows = torch.zeros(len(labels), dtype=torch.bool)
        self._predicted: Tensor | None = None
        self._transformed: tuple[tuple[int, int], Encoded, Tensor] | None = None
        self._forgotten = False
        self._since = time.perf_counter()

    def run_all(self, model: nn.Module, resume: bool) -> Outcome:
        self.stages = stages = self.method.stages(self.settings.epochs)
        self.total_epochs = sum(stage.epochs for stage in stages)
        init_seed = self.settings.init_seed
        torch.manual_seed(derive_seed(_or(init_seed, self.settings.seed), "init"))
        model = self.method.prepare_model(model).to(self.engine.device)
        self.run = Run(
            model,
            self.labels,
            self.num_classes,
            self._predict,
            torch.Generator(),
            seed=self.settings.seed,
            encode=self._encode,
            autocast=self.engine.accelerator.autocast,
            redrawn=self.encoded.redrawn,
            features=lambda: self.engine.features(self.encoded),
            row_losses=self.encoded.losses,
            forget=self._forget,
        )
        self.prepared = {name for name, p in model.named_parameters() if p.requires_grad}
        names = (name for name, _ in model.named_parameters())
        self.trained = set(filter(self._trained_in(stages), names))
        saved = load_checkpoint(self.checkpoints) if resume and self.checkpoints else None
        if saved:
            self._restore(*saved)
        if self.settings.tracker != "none":
            self.engine.accelerator.init_trackers("noiseproof")
        for number in range(self.state.stage, len(stages)):
            self._run_stage(number, stages[number], saved[0] if saved else {})
            saved = None
        if self.settings.tracker != "none":
            self.engine.accelerator.end_training()
        return self._finish(model)

    def _run_stage(self, number: int, stage: Stage, saved: dict[str, Tensor]) -> None:
        run, self._since = self.run, time.perf_counter()
        self.settings = settings = settings_of_stage(self.asked, stage)
        set_trainable(run.model, self._trains(stage))
        rate = _or(settings.learning_rate, _or(stage.learning_rate, DEFAULT_RATE))
        views = self.encoded.views(stage.views)
        if stage.bare:
            set_adapters(run.model, on=False)
        self.optimizer = self.engine.start_stage(run.model, self.encoded, rate, settings, views)
        if saved:
            restore_optimizer(_inner(self.optimizer), saved)
        run.stage, run.epochs = stage.name, stage.epochs
        own = -(-settings.batch_size // self.engine.processes)
        run.pass_rows = views * min(settings.micro_batch_size or own, own)
        self.state.stage = number
        self.method.on_stage_start(run)
        with fast_dropout(run.model):
            for epoch in range(self.state.epoch, stage.epochs):
                run.epoch = epoch
                self._run_epoch(stage, rate, saved)
                saved = {}
        if self.engine.cached or stage.bare:  # what follows starts from here, without a new pass
            self._predicted = self._predict()
        self.engine.end_stage()
        if stage.bare:
            set_adapters(run.model, on=True)
        self.state.epoch = 0

    def _run_epoch(self, stage: Stage, rate: float, saved: dict[str, Tensor]) -> None:
        run, state, settings = self.run, self.state, self.settings
        order_seed = _or(settings.order_seed, settings.seed)
        words = (state.stage, run.epoch)
        run.generator.manual_seed(derive_seed(settings.seed, "hooks", *words))
        encoded = self._encoded_for(stage)
        if state.step == 0:
            self._score()
            torch.manual_seed(derive_seed(order_seed, "dropout", *words, self.engine.rank))
        else:  # resumed inside the epoch: the columns came with the checkpoint
            if self.engine.rank >= len(saved["random"]):
                raise InputError(
                    f"the run was interrupted inside an epoch with {len(saved['random'])} "
                    "processes; resume it with as many"
                )
            own = saved["random"][self.engine.rank].clone()  # torch reads from the storage's start
            torch.set_rng_state(own)
            run.generator.set_state(saved["generator"])
        rows = self._rows_of_epoch()
        if self.passes != 1:
            rows = repeated(rows, self.passes, derive_seed(order_seed, "repeated", *words))
        batches = training_batches(
            rows,
            self.engine.view(encoded).lengths,
            settings.batch_size,
            derive_seed(order_seed, "order", *words),
        )
        training_mode(run.model)
        self._predicted = None
        started = time.perf_counter()
        for step in range(state.step, len(batches)):
            run.step = step
            loss = self._step(encoded, batches[step], self._rate(stage, rate, step, len(batches)))
            state.loss_sum += loss * len(batches[step])
            state.step = step + 1
            if self.report and self.engine.main:
                self.report(
                    Progress(stage.name, run.epoch, stage.epochs, step + 1, len(batches), loss)
                )
            signum = self.engine.any_process(self.stop.received)
            if signum:
                state.seconds["train_s"] += time.perf_counter() - started
                run.sums = self.engine.merge_sums(run.sums)
                self._checkpoint()
                raise Interrupted(signum)
        state.seconds["train_s"] += time.perf_counter() - started
        last = self._rate(stage, rate, len(batches) - 1, len(batches))
        self._end_epoch(stage, len(rows), last, len(batches))

    def _score(self) -> None:
        started = time.perf_counter()
        self.run.logged, self.run.sums, self.run.warned = {}, {}, []
        self.run.columns.pop("keep", None)
        if not self.state.history:
            self._doubt_classes()
        columns = self.method.on_epoch_start(self.run)
        self._check(columns)
        self.run.columns.update(columns)
        if "keep" in columns and not self.state.doubted:
            self.state.doubted = True
            self._doubt_few(int(columns["keep"].sum()))
        self.state.seconds["score_s"] += time.perf_counter() - started
        for message in self.run.warned if self.engine.main else ():
            warnings.warn(message, UserWarning, stacklevel=2)

    def _rate(self, stage: Stage, peak: float, step: int, steps: int) -> float:
        """The learning rate of a step, by the share of the stage that is done in its middle.

        At its start the first step of a warm-up would have the rate 0, and a run of one step would
        train nothing.
        """
        progress = (self.run.epoch + (step + 0.5) / steps) / stage.epochs
        return peak * rate_factor(self.settings, progress)

    def _step(self, encoded: Encoded, rows: np.ndarray, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.engine.backward(self.method, encoded, rows, self.run)
        if not math.isfinite(loss):
            run = self.run
            raise FloatingPointError(
                f"loss {loss} of {self.method.name} in stage {run.stage!r}, epoch {run.epoch}, "
                f"step {run.step}; lower the learning rate or use precision fp32"
            )
        done = self.run.left_out < len(rows)  # Adam would move on gradients of 0 as well
        if done and self.settings.max_grad_norm:
            self.engine.accelerator.clip_grad_norm_(
                [p for p in self.run.model.parameters() if p.grad is not None],
                self.settings.max_grad_norm,
            )
        if done:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.own_rows[rows[self.engine.rank :: self.engine.processes]] = True
        return loss

    def _end_epoch(self, stage: Stage, rows: int, rate: float, steps: int) -> None:
        run, state = self.run, self.state
        self._merge()
        run.sums = self.engine.merge_sums(run.sums)
        self._check(run.columns)
        row: HistoryRow = {
            "stage": stage.name,
            "epoch": run.epoch,
            "steps": steps,
            "rows": rows,
            "loss": state.loss_sum / rows,
            "learning_rate": rate,
            **run.logged,
            **{name: total / (count or 1) for name, (total, count) in run.sums.items()},
        }
        if run.warned:
            row["warning"] = "; ".join(run.warned)
        started = time.perf_counter()
        last = len(state.history) + 1 == self.total_epochs
        if self.measure and (last or self.settings.evaluate == "epoch"):
            row.update(self.measure(self.engine.predict, run))
        state.seconds["eval_s"] += time.perf_counter() - started
        state.history.append(row)
        self._keep_best(stage, row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self.engine.track(numbers, len(state.history))
        if self.report and self.engine.main:
            self.report(
                Progress(stage.name, run.epoch, stage.epochs, steps, steps, row["loss"], row)
            )
        state.epoch, state.step, state.loss_sum = run.epoch + 1, 0, 0.0
        self._checkpoint()
        signum = self.engine.any_process(self.stop.received)
        if signum and not last:  # came while scoring or measuring
            raise Interrupted(signum)

    def _finish(self, model: nn.Module) -> Outcome:
        if self.best:
            model.load_state_dict(self.best, strict=False)
            self._predicted = None
        self.engine.net = model
        self.engine.net = deployed = self.method.finalize_model(self.run)
        if self._forgotten and self.measure:
            best = self.state.best_row
            row = self.state.history[-1 if best is None else best]
            row.update(self.measure(self.engine.predict, self.run))
        return Outcome(
            deployed,
            self.run,
            self.state.history,
            self.state.seconds,
            self.engine.precision,
            self._count(model, lambda name: True),
            self._count(model, is_head_or_pooler(model)),
            self.state.best_row,
        )

    # --- parts -----------------------------------------------------------------------------------

    def _encoded_for(self, stage: Stage) -> Encoded:
        """The rows as this epoch trains on them; every pass without gradient sees those given."""
        if stage.transform is None:
            self.run.changed = None
            return self.encoded
        key = (self.state.stage, self.run.epoch if stage.redraw else 0)
        if self._transformed is None or self._transformed[0] != key:
            change = self._change(stage.transform, key[1])
            encoded, changed = self.encoded.changed(change)
            self._transformed = (key, encoded, torch.from_numpy(changed))
        _, encoded, self.run.changed = self._transformed
        return encoded

    def _change(self, transform: RowTransform, epoch: int) -> RowChange:
        seed = self.settings.seed
        return lambda texts, row: transform(texts, row, epoch, seed)

    def _predict(
        self,
        before_batch: BeforeBatch | None = None,
        rows: Tensor | None = None,
        transform: RowTransform | None = None,
    ) -> Tensor:
        """Logits of the training rows; kept until the next step unless the caller sets gates."""
        if transform is not None:
            chosen = None if rows is None else rows.numpy()
            encoded, _ = self.encoded.changed(self._change(transform, 0), chosen)
            return self.engine.predict(encoded, before_batch)
        if before_batch is not None or rows is not None:
            return self.engine.predict(self.encoded, before_batch, rows)
        if self._predicted is None:
            self._predicted = self.engine.predict(self.encoded)
        return self._predicted.clone()

    def _forget(self) -> None:
        self._predicted, self._forgotten = None, True

    def _encode(self, position: str, before_batch: BeforeBatch | None = None) -> Tensor:
        """What the head reads of the training rows (N, D, 1 or 2)."""
        return self.engine.encode(self.run.model, self.encoded, position, before_batch)

    def _rows_of_epoch(self) -> np.ndarray:
        keep = self.run.columns.get("keep")
        if keep is None:
            return np.arange(len(self.labels))
        rows = np.flatnonzero(keep.numpy())
        if not len(rows):
            raise InputError(
                f"stage {self.run.stage!r} of {self.method.name} kept no row in epoch "
                f"{self.run.epoch}; loosen its selection or lengthen its warm-up"
            )
        return rows

    def _doubt_classes(self) -> None:
        """Say which classes no training row has; the head keeps a column for each."""
        sizes = torch.bincount(self.labels, minlength=self.num_classes)  # (C,)
        if missing := class_names(self.run.model, sizes == 0):
            self.run.warn(f"no training row has the label {missing}; the model will not predict it")

    def _doubt_few(self, rows: int) -> None:
        """Say that a selection leaves little to train on, judged by its first epoch."""
        size, epochs = self.settings.batch_size, self.run.epochs - self.run.epoch
        steps = epochs * math.ceil(self.passes * rows / size)
        if rows < size:
            self.run.warn(f"{rows} rows are kept, fewer than the batch size, {size}; lower it")
        elif steps < FEWEST_STEPS:
            self.run.warn(
                f"{rows} rows are kept, {steps} steps in the epochs left ({epochs}); train longer, "
                "lower the batch size, or loosen the selection"
            )

    def _check(self, columns: Columns) -> None:
        for name, column in columns.items():
            owner = f"column {name!r} of {self.method.name}"
            if len(column) != len(self.labels):
                raise ValueError(
                    f"{owner} has {len(column)} rows, the training set has {len(self.labels)}"
                )
            if column.is_floating_point() and not bool(torch.isfinite(column).all()):
                raise FloatingPointError(f"{owner} has values that are not finite")
        if "keep" in columns and columns["keep"].dtype != torch.bool:
            raise TypeError(f"column 'keep' of {self.method.name} must be bool")

    def _trained_in(self, stages: list[Stage]) -> Callable[[str], bool]:
        """Parameter name -> whether one of these stages trains it."""
        parts = [self._trains(stage) for stage in stages]
        return lambda name: any(trains(name) for trains in parts)

    def _trains(self, stage: Stage) -> Callable[[str], bool]:
        """Parameter name -> whether this stage trains it."""
        if stage.trains == "head":
            head = is_head(self.run.model)
            return lambda name: name in self.prepared and head(name)
        trains = stage.trains
        if trains is None:
            return self.prepared.__contains__
        return lambda name: name in self.prepared and trains(name)

    def _count(self, model: nn.Module, chosen: Callable[[str], bool]) -> int:
        """Trained parameters with such names."""
        return count_parameters(
            part for name, part in model.named_parameters() if name in self.trained and chosen(name)
        )

    def _merge(self) -> None:
        self.engine.merge_writes(self.run, self.method.writes, self.own_rows)
        self.own_rows.zero_()

    def _keep_best(self, stage: Stage, row: HistoryRow) -> None:
        score = self.score(row) if stage.selectable else None
        if self.settings.select != "best" or score is None or score <= self.state.best_score:
            return
        self.state.best_score, self.state.best_row = score, len(self.state.history) - 1
        self.best = {name: tensor.clone() for name, tensor in self._weights().items()}

    # --- checkpoints -----------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        model = self.run.model
        weights = {n: p.detach() for n, p in model.named_parameters() if n in self.trained}
        return weights | dict(model.named_buffers())

    def _checkpoint(self) -> None:
        now, key = time.perf_counter(), f"stage_{self.run.stage}_s"
        self.state.seconds[key] = self.state.seconds.get(key, 0.0) + now - self._since
        self._since = now
        if self.checkpoints is None:
            return
        self._merge()
        random = self.engine.random_states()
        if not self.engine.main:
            return
        begun = self._trained_in(self.stages[: self.state.stage + 1])
        tensors = {
            f"model.{name}": tensor
            for name, tensor in self._weights().items()
            if name not in self.trained or begun(name)  # the rest is still as it was loaded
        }
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"column.{name}": column for name, column in self.run.columns.items()}
        tensors |= optimizer_tensors(_inner(self.optimizer))
        tensors |= {"random": random, "generator": self.run.generator.get_state()}
        self.state.columns, self.state.logged = list(self.run.columns), self.run.logged
        self.state.sums, self.state.warned = self.run.sums, self.run.warned
        self.state.findings = self.run.findings
        self.state.legs = self.watch.seconds()
        save_checkpoint(self.checkpoints, tensors, vars(self.state))

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.state = _State(**state)
        self.watch.carry(self.state.legs)
        self.run.model.load_state_dict(with_prefix("model", tensors), strict=False)
        self.best = with_prefix("best", tensors)
        columns = with_prefix("column", tensors)
        self.run.columns = {name: columns[name] for name in self.state.columns}
        self.run.logged, self.run.warned = self.state.logged, self.state.warned
        self.run.findings = self.state.findings
        self.run.sums = self.state.sums if self.engine.main else {}  # those of all processes


def settings_of_stage(asked: TrainSettings, stage: Stage) -> TrainSettings:
    """What was asked for, with the stage's own settings in their place."""
    batch = int(stage.settings.get("batch_size", asked.batch_size))
    micro = asked.micro_batch_size
    values: dict[str, Any] = {"micro_batch_size": micro and min(micro, batch), **stage.settings}
    return dataclasses.replace(asked, **values)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
