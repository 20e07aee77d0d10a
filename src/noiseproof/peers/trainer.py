"""transformers.Trainer: plain, with label smoothing, with LoRA of peft."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.encoding import Encoded
from noiseproof.engine import derive_seed, prediction_batches
from noiseproof.errors import InputError
from noiseproof.method import MOST_RANK, Columns, require_count, require_range
from noiseproof.models import count_parameters, evaluation_mode
from noiseproof.peers.contract import Fitted, Peer, Predict, Work

if TYPE_CHECKING:
    import transformers


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
        require_count(self.name, "rank", self.rank, MOST_RANK)
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
