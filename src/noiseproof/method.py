"""The contract between a method and the training loop.

A method is a frozen dataclass of hyper-parameters with five hooks. The data flow is

    predict -> (N, C) logits -> on_epoch_start -> (N, ...) columns
            -> joined by row number -> (B, ...) batch -> compute_loss -> scalar

Letters: N training rows, B batch rows, C classes. ``labels`` are the given labels, possibly wrong.
True labels are not part of anything a method can reach.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError, check_types, unknown_name
from noiseproof.losses import cross_entropy
from noiseproof.tokens import TARGETS, RowLoss, token_losses

Columns = dict[str, Tensor]
"""What is known of each training row: name -> (N, ...) tensor."""

BeforeBatch = Callable[[Tensor], None]
"""Called with the row numbers (B,) just before a batch of a prediction pass."""

M = TypeVar("M", bound="Method")

MOST_RANK, MOST_EPOCHS, MOST_BATCH = 10_000, 10_000, 1_000_000
"""Beyond which a setting is a mistake."""


class Predict(Protocol):
    """Score the training rows with the current model, in row order, without gradient."""

    def __call__(
        self,
        before_batch: BeforeBatch | None = None,
        rows: Tensor | None = None,
        transform: RowTransform | None = None,
    ) -> Tensor:
        """Return fp32 logits (N, C) on the CPU; the same in every process.

        With row numbers (M,) only these rows are scored, in this order: (M, C). A transform is
        applied to their texts first, as for epoch 0; ``before_batch`` then gets places in ``rows``.

        Rows whose label is a text have statistics (N, 3) in their place, see
        `noiseproof.tokens.token_statistics`; `Run.losses` reads either.
        """


class RowTransform(Protocol):
    """Change the texts of a row before it is encoded; a pure function."""

    def __call__(self, texts: tuple[str, ...], row: int, epoch: int, seed: int) -> tuple[str, ...]:
        """Return as many texts as came.

        Args:
            texts: One text, or the two of a pair, or a prompt and its response.
            row: Number of the row in the training set.
            epoch: Epoch of the stage; 0 where the stage does not redraw.
            seed: Seed of the run.
        """


class Encode(Protocol):
    """Compute what the head reads of every training row, in row order, without gradient."""

    def __call__(self, position: str, before_batch: BeforeBatch | None = None) -> Tensor:
        """Return features (N, D, 1 or 2) on the CPU, see `noiseproof.frozen.encode_batch`."""


@dataclass(frozen=True)
class Batch:
    """Rows of one training step. It holds no true labels.

    Attributes:
        inputs: What the model is called with; every tensor starts with dimension B, in a stage of
            two views with 2 B: all rows in the first view, then all in the second.
        labels: Given labels (B,).
        rows: Row numbers (B,) in the training set, on the CPU.
        columns: The columns of the run, cut to these rows (B, ...).
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own optimizer, schedule and trainable part.

    Attributes:
        name: ``train``, ``probe``, ``tune``, ``poison`` or ``adapt``.
        epochs: Epochs of this stage.
        trains: Parameter name -> whether it is trained, of those that ``prepare_model`` left
            trainable; ``"head"`` is the task head, None trains all of them.
        learning_rate: Rate of this stage; the user's ``train.learning_rate`` goes first.
        settings: What this stage has instead of the user's ``train`` settings: ``batch_size``,
            ``learning_rate``, ``weight_decay``, ``schedule`` or ``warmup_share``.
        transform: Changes the texts that this stage trains on, see `RowTransform`; whatever is
            predicted, encoded or measured keeps to the rows as given.
        redraw: Transform anew in every epoch, not once for the stage.
        selectable: Whether ``train.select=best`` may take weights of this stage.
        views: Views of every row in a step, 1 or 2; None takes those that the rows hold. With two
            nothing is cached: the encoder sees both.
        bare: Leave the adapters out: encoder and head answer alone, up to the prediction that the
            next stage starts from.
    """

    name: str
    epochs: int
    trains: Callable[[str], bool] | Literal["head"] | None = None
    learning_rate: float | None = None
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    transform: RowTransform | None = None
    redraw: bool = False
    selectable: bool = True
    views: int | None = 1
    bare: bool = False


@dataclass
class Run:
    """One fine-tuning in progress: the only mutable object.

    Attributes:
        model: The model that is trained, without wrappers of the trainer.
        labels: Given labels (N,), on the CPU.
        num_classes: C.
        predict: Scores all training rows, see `Predict`.
        generator: Random source for hooks, fresh for every epoch from the run's seed.
        seed: Seed of the run, for draws that are keyed by row.
        encode: Features of all training rows, see `Encode`; None where there is no encoder.
        autocast: Context in which a module computes in the run's precision, as the model does.
        redrawn: Whether steps see a row otherwise than `encode` does, such as an augmented image.
        features: What the head reads of the training rows, (N, D, 1 or 2) on the CPU, in a stage
            that trains on cached features; else it returns None.
        forget: For `Method.finalize_model`: the model answers differently now. What `predict` kept
            is dropped, and the last epoch is measured again.
        changed: Which rows the stage's transform changed (N,) bool; None without one.
        findings: What a method found out about its model, as JSON values for the record.
        row_losses: Loss of every row (N,) from what `predict` gives and the labels.
        stage: Name of the current stage.
        epoch: Epoch within the stage, from 0.
        epochs: Epochs of the stage.
        step: Optimizer steps done in this epoch.
        columns: Name -> (N, ...) on the CPU, replicated in every process.
        left_out: Rows of this step that the method left out; a step of none but such is not done.
        pass_rows: Most rows that one call of the model takes in this stage, all views counted.
        logged: Numbers that the hooks reported for the history row of this epoch.
        sums: Name -> sum over rows and number of rows, of what `average` was given in this epoch;
            of what `count` was given the sum, and 0.
        warned: What the hooks warned of in this epoch, for the user and the history row.
    """

    model: nn.Module
    labels: Tensor
    num_classes: int
    predict: Predict
    generator: torch.Generator
    seed: int = 0
    encode: Encode | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    redrawn: bool = False
    features: Callable[[], Tensor | None] = lambda: None
    forget: Callable[[], None] = lambda: None
    changed: Tensor | None = None
    findings: dict[str, Any] = field(default_factory=dict)
    row_losses: RowLoss = cross_entropy
    stage: str = "train"
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    columns: Columns = field(default_factory=dict)
    left_out: int = 0
    pass_rows: int | None = None
    logged: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)

    def losses(self, before_batch: BeforeBatch | None = None) -> Tensor:
        """Score every training row by its loss (N,), whatever its label is: a class or a text."""
        return self.row_losses(self.predict(before_batch), self.labels)

    def log(self, **numbers: float) -> None:
        """Put numbers into the history row of this epoch."""
        self.logged.update({name: float(value) for name, value in numbers.items()})

    def average(self, rows: int, **numbers: float) -> None:
        """Put means over so many rows into the history row, as means over those of the epoch."""
        for name, value in numbers.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + rows * float(value), count + rows)

    def count(self, **numbers: float) -> None:
        """Add to numbers of the history row that are sums over the epoch and all processes."""
        for name, value in numbers.items():
            self.sums[name] = (self.sums.get(name, (0.0, 0))[0] + float(value), 0)

    def warn(self, message: str) -> None:
        """Tell the user, in one line, why the result may be worse than hoped for.

        The loop issues it as a `UserWarning`, once, and puts it into the history row.
        """
        self.warned.append(message)

    def write(self, name: str, batch: Batch, values: Tensor) -> None:
        """Write the rows of ``batch`` of a column that the method declares in ``writes``."""
        column = self.columns[name]
        column[batch.rows] = values.detach().to(column.device, column.dtype)


@dataclass(frozen=True)
class Method:
    """How to fine-tune on labels that may be wrong. The defaults are plain cross-entropy.

    Attributes:
        name: The name on the command line; equal to the class name.
        tasks: Tasks that the method supports.
        writes: Columns that `compute_loss` updates row by row.
        merges: Whether what was trained can become part of the encoder's own weights.
        later: Settings that came after the first version, and what was done before them. The record
            leaves them out at that value, so that runs from before keep their identifiers and are
            read as what they were.
    """

    name: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ("text",)
    writes: ClassVar[tuple[str, ...]] = ()
    merges: ClassVar[bool] = True
    later: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """The class name is the name everywhere; types are checked before a method's own checks."""
        cls.name = cls.__name__
        own = cls.__dict__.get("__post_init__")
        if own is not None:
            cls.__post_init__ = _after_types(own)  # type: ignore[method-assign,assignment]

    def __post_init__(self) -> None:
        """Check the settings; every method checks its own ones here.

        Raises:
            InputError: A setting is not of the type that it declares.
        """
        _check_own_types(self)

    def for_tokens(self: M) -> M:
        """Give the method as it runs where a label is a text, row by row a mean over its tokens.

        Raises:
            InputError: With these settings it cannot.
        """
        return self

    @property
    def reserved_tokens(self) -> int:
        """Positions of the encoder that `prepare_model` takes away from every text."""
        return 0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Add adapters, freeze, wrap; called once, under the initialisation seed."""
        return model

    def stages(self, epochs: int) -> list[Stage]:
        """Split the epochs into stages; raise `InputError` when they are too few."""
        return [Stage("train", epochs)]

    def on_stage_start(self, run: Run) -> None:
        """Set up what a stage needs and no checkpoint holds, such as switches of the model.

        Called when a stage begins, and when a run is continued inside it.
        """

    def on_epoch_start(self, run: Run) -> Columns:
        """Score the rows. The returned columns replace those of the same name.

        The bool column ``keep`` (N,) selects the rows of this epoch; without it all rows train.
        """
        return {}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Return the scalar loss of one batch, a mean over its rows."""
        return losses_of(model, batch).mean()

    def row_gates(self, run: Run) -> Tensor | None:
        """Gates (N, U) of all training rows in the epoch that has ended, for whoever measures.

        U are the layers or modules that are gated; None where nothing is.
        """
        return None

    def finalize_model(self, run: Run) -> nn.Module:
        """Return the model to deploy."""
        return run.model

    def modes(self, model: nn.Module) -> Mapping[str, Callable[[], None]]:
        """Ways in which the deployed model can answer: name -> what switches to it.

        The test set is measured in each of them; the way that it is deployed in comes last.
        """
        return {}

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Put back on a loaded model what plain transformers and peft do not save."""
        return model

    @classmethod
    def presets(cls: type[M]) -> dict[str, M]:
        """Named settings of this method; ``default`` always exists."""
        return {"default": cls()}

    @classmethod
    def preset(cls: type[M], name: str, **changes: Any) -> M:
        """Settings by name, with changes on top; a dict changes some of nested settings.

        Raises:
            InputError: There is no preset, or no nested setting, of that name.
        """
        presets = cls.presets()
        if name not in presets:
            raise InputError(
                f"unknown preset {name!r} of {cls.__name__}; available: {', '.join(presets)}"
            )
        chosen = presets[name]
        for field_name, value in changes.items():
            nested: Any = getattr(chosen, field_name, None)
            if isinstance(value, Mapping) and dataclasses.is_dataclass(nested):
                known = [item.name for item in dataclasses.fields(nested)]
                for inner in value:
                    if inner not in known:
                        raise InputError(unknown_name(f"setting of {field_name}", inner, known))
                changes[field_name] = dataclasses.replace(nested, **value)  # type: ignore[type-var]
        return dataclasses.replace(chosen, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record: ``{"name": ..., field: value, ...}``."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name, before in self.later.items():
            if getattr(self, name) == before:
                del values[name]
        return {"name": type(self).__name__, **values}

    @classmethod
    def from_dict(cls: type[M], values: dict[str, Any]) -> M:
        """The inverse of `to_dict` for this class."""
        hints = get_type_hints(cls)
        settings = dict(cls.later)
        for name, value in values.items():
            if name == "name":
                continue
            hint = hints.get(name)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                value = hint(**value)
            elif isinstance(value, list):
                value = _tuples(value)
            settings[name] = value
        return cls(**settings)


def _check_own_types(method: Method) -> None:
    """Refuse settings of another type; nested ones that came as a dict with what does take one."""
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        if isinstance(value, Mapping) and callable(item.default_factory):
            kind = type(item.default_factory()).__name__
            raise InputError(
                f"{method.name}.{item.name} must be a {kind}, got {type(value).__name__}; "
                f'{method.name}.preset("default", {item.name}={{...}}) changes some of its settings'
            )
    check_types(method, f"{method.name}.")


def _after_types(own: Callable[[Any], None]) -> Callable[[Any], None]:
    """The checks of a method, which may then compare numbers with numbers."""

    @functools.wraps(own)
    def checked(self: Any) -> None:
        _check_own_types(self)
        own(self)

    return checked


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Call the model on a batch and return its logits in fp32.  -> (B, C)."""
    logits: Tensor = model(**batch.inputs).logits
    return logits.float()


def losses_of(model: nn.Module, batch: Batch, loss: RowLoss = cross_entropy) -> Tensor:
    """Call the model on a batch and return the loss of every row.  -> (B,).

    Args:
        model: What is trained.
        batch: Its rows.
        loss: Of a label: logits (B, C), labels (B,) -> (B,). Where a label is a text it is the loss
            of one token, and the row's is the mean over the tokens of its response.
    """
    if TARGETS in batch.inputs:
        return token_losses(model, batch.inputs, loss)
    return loss(logits_of(model, batch), batch.labels)


def require(ok: bool, message: str) -> None:
    """Raise `InputError` with the message unless ``ok``; NaN comparisons fail as they should."""
    if not ok:
        raise InputError(message)


def require_range(
    owner: str,
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `InputError` unless ``value`` lies in the range."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below and math.isfinite(value)):
        left, right = "(["[not open_low], ")]"[not open_high]
        raise InputError(f"{owner}.{name} must lie in {left}{low:g}, {high:g}{right}, got {value}")


def require_count(owner: str, name: str, value: int, most: int, least: int = 1) -> None:
    """Raise `InputError` unless a number of things is possible, and small enough to be meant."""
    require(value >= least, f"{owner}.{name} must be at least {least}, got {value}")
    require(value <= most, f"{owner}.{name} must be at most {most}, got {value}")


def require_warmup(method: Method, warmup_epochs: int, epochs: int, least: int = 0) -> None:
    """Refuse a run that ends before the method begins.

    Args:
        method: Whose warm-up it is.
        warmup_epochs: How long it takes.
        epochs: Of the run.
        least: The shortest warm-up that the method takes.
    """
    shorter = f", or {method.name}.warmup_epochs={epochs - 1}" if epochs > least else ""
    require(
        epochs > warmup_epochs,
        f"train.epochs={epochs} leaves no epoch after the warm-up of {method.name}; give more than "
        f"{warmup_epochs}{shorter}",
    )
