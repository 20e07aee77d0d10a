"""Baselines: what every table needs beside the four methods.

All of them share one setting, ``tune``: full, head (linear probe), or any adapter type of peft.
Each class is its own method card: source, formula, settings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from noiseproof.losses import (
    bootstrapping,
    cross_entropy,
    early_learning_regularizer,
    generalized_cross_entropy,
    label_smoothing,
    marginal_cross_entropy,
    symmetric_cross_entropy,
)
from noiseproof.method import (
    MOST_EPOCHS,
    MOST_RANK,
    Batch,
    Columns,
    Method,
    Run,
    Stage,
    logits_of,
    losses_of,
    require,
    require_count,
    require_range,
    require_warmup,
)
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.models import set_dropout
from noiseproof.noise import load_transition
from noiseproof.selection import estimate_transition, finite_losses, lowest
from noiseproof.tuning import PROMPTS, tune_model, usual_rate, virtual_tokens

T = TypeVar("T", bound="Tuned")
ALL_TASKS = ("text", "features", "image", "causal-lm")


@dataclass(frozen=True)
class Tuned(Method):
    """Shared settings of the baselines.

    Attributes:
        tune: full, head, adapter (bottlenecks), bitfit (biases), prompt, prefix, or an adapter type
            of peft in lower case (lora, loha, vera, ia3, ...).
        rank: Rank of low-rank adapters, width of bottlenecks.
        alpha: Scaling numerator of LoRA-like adapters; None is twice the rank.
        target_modules: Module names that get adapters; None takes peft's choice.
        dropout: Dropout of the encoder; None keeps the model's own.
        learning_rate: None is 5e-5 (full), 5e-3 (head, bitfit), 5e-4 (adapter), 1e-2 (prompt,
            prefix) or 2e-3.
    """

    tune: str = "full"
    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    dropout: float | None = None
    learning_rate: float | None = None

    tasks: ClassVar[tuple[str, ...]] = ("text", "features", "image")

    def __post_init__(self) -> None:
        """Check the shared settings and then those of the method."""
        require_count(self.name, "rank", self.rank, MOST_RANK)
        if self.alpha is not None:
            require_range(self.name, "alpha", self.alpha, 0, 1e6, open_low=True)
        if self.dropout is not None:
            require_range(self.name, "dropout", self.dropout, 0, 1, open_high=True)
        if self.learning_rate is not None:
            require_range(self.name, "learning_rate", self.learning_rate, 0, 10, open_low=True)
        self.check()

    def check(self) -> None:
        """Check the settings of one method."""

    def for_tokens(self: T) -> T:
        """The method as it is, unless it tunes prompts of ours, which need an encoder."""
        require(
            self.tune not in PROMPTS,
            f"{self.name}.tune={self.tune} works with encoders alone; with task causal-lm use "
            "prompt_tuning, prefix_tuning or lora",
        )
        return self

    @property
    def reserved_tokens(self) -> int:
        """What prompts put before every text."""
        return virtual_tokens(self.tune)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Make trainable what ``tune`` names."""
        if self.dropout is not None:
            set_dropout(model, self.dropout)
        return tune_model(
            model,
            self.tune,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
        )

    def stages(self, epochs: int) -> list[Stage]:
        """One stage, at the rate of the tuned part."""
        return [Stage("train", epochs, learning_rate=self.learning_rate or usual_rate(self.tune))]


@dataclass(frozen=True)
class CrossEntropy(Tuned):
    """Plain fine-tuning: cross-entropy on the given labels.

    Paper: none; the floor of every comparison.
    Idea: trust every label. ``tune=head`` is the linear probe, ``tune=lora`` plain LoRA.
    Cost: no extra pass.
    """

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS


@dataclass(frozen=True)
class LabelSmoothing(Tuned):
    """Cross-entropy against labels mixed with the uniform distribution.

    Paper: Szegedy et al., CVPR 2016; with noise: Lukasik et al., ICML 2020, arXiv:2003.02819.
    Idea: never ask for certainty, so wrong labels pull less.
    Settings: smoothing = 0.1 (both papers).
    Cost: no extra pass.

    Attributes:
        smoothing: Share of the uniform distribution in the target.
    """

    smoothing: float = 0.1

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    def check(self) -> None:
        """Smoothing lies in [0, 1)."""
        require_range(self.name, "smoothing", self.smoothing, 0, 1, open_high=True)

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Smoothed cross-entropy."""
        loss = partial(label_smoothing, smoothing=self.smoothing)
        return losses_of(model, batch, loss).mean()


@dataclass(frozen=True)
class GCE(Tuned):
    """Generalised cross-entropy, (1 - p^q) / q.

    Paper: Zhang & Sabuncu, NeurIPS 2018, arXiv:1805.07836.
    Idea: between cross-entropy (q to 0) and mean absolute error (q = 1): fits well, yet rows whose
    label the model disbelieves get small gradients.
    Settings: q = 0.7 (paper).
    Cost: no extra pass.

    Attributes:
        q: Robustness against speed of learning.
    """

    q: float = 0.7

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    def check(self) -> None:
        """The exponent lies in (0, 1]."""
        require_range(self.name, "q", self.q, 0, 1, open_low=True)

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """GCE."""
        loss = partial(generalized_cross_entropy, q=self.q)
        return losses_of(model, batch, loss).mean()


@dataclass(frozen=True)
class SCE(Tuned):
    """Symmetric cross-entropy: cross-entropy plus its reverse.

    Paper: Wang et al., ICCV 2019, arXiv:1908.06112.
    Idea: the reverse term is noise tolerant and holds back memorisation.
    Settings: ce_weight = 0.1, reverse_weight = 1, log_zero = -4 (paper, CIFAR-10).
    Cost: no extra pass.

    Attributes:
        ce_weight: Weight of cross-entropy (alpha).
        reverse_weight: Weight of reverse cross-entropy (beta).
        log_zero: What log 0 stands for in the reverse term (A).
    """

    ce_weight: float = 0.1
    reverse_weight: float = 1.0
    log_zero: float = -4.0

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    def check(self) -> None:
        """Weights are not negative, the stand-in for log 0 is."""
        require_range(self.name, "ce_weight", self.ce_weight, 0, 1e3)
        require_range(self.name, "reverse_weight", self.reverse_weight, 0, 1e3)
        require_range(self.name, "log_zero", self.log_zero, -1e3, 0, open_high=True)

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """SCE."""
        loss = partial(
            symmetric_cross_entropy,
            alpha=self.ce_weight,
            beta=self.reverse_weight,
            log_zero=self.log_zero,
        )
        return losses_of(model, batch, loss).mean()


@dataclass(frozen=True)
class Bootstrapping(Tuned):
    """Cross-entropy against a mixture of the given label and the model's own prediction.

    Paper: Reed et al., ICLR 2015 workshop, arXiv:1412.6596.
    Idea: what the model consistently predicts is evidence as well.
    Settings: beta = 0.8 with hard = true, 0.95 with hard = false (paper).
    Cost: no extra pass.

    Attributes:
        beta: Weight of the given label.
        hard: Predicted class (true) or predicted probabilities (false).
    """

    beta: float = 0.8
    hard: bool = True

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    def check(self) -> None:
        """The weight lies in [0, 1]."""
        require_range(self.name, "beta", self.beta, 0, 1)

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Bootstrapped cross-entropy."""
        loss = partial(bootstrapping, beta=self.beta, hard=self.hard)
        return losses_of(model, batch, loss).mean()


@dataclass(frozen=True)
class ForwardCorrection(Tuned):
    """Cross-entropy of the prediction pushed through the noise transition matrix.

    Paper: Patrini et al., CVPR 2017, arXiv:1609.03683.
    Idea: if the noise is known, fit the noisy labels with the noised prediction; the model below
    then learns the clean ones.
    Steps: (1) cross-entropy for ``warmup_epochs``; (2) unless given, estimate the matrix from
    anchor rows; (3) train on with the corrected loss.
    Deviations: one run, not two; the estimate is made once, at the end of the warm-up, and kept in
    ``transition.json``.
    Settings: warmup_epochs = 2 (ours), percentile = 97 (released code).
    Cost: one scoring pass.

    Attributes:
        transition: File of the matrix (.json, .csv, .npy; row = true class), its rows, or None to
            estimate it.
        warmup_epochs: Epochs of plain cross-entropy; not used when the matrix is given.
        percentile: Which row serves as the anchor of a class, by its probability.
    """

    transition: str | tuple[tuple[float, ...], ...] | None = None
    warmup_epochs: int = 2
    percentile: float = 97.0

    def check(self) -> None:
        """Warm-up and percentile are in range."""
        require_count(self.name, "warmup_epochs", self.warmup_epochs, MOST_EPOCHS)
        require_range(self.name, "percentile", self.percentile, 0, 100, open_low=True)

    def stages(self, epochs: int) -> list[Stage]:
        """One stage that outlasts the warm-up."""
        if self.transition is None:
            require_warmup(self, self.warmup_epochs, epochs, least=1)
        return super().stages(epochs)

    def on_epoch_start(self, run: Run) -> Columns:
        """Column ``likelihood`` (N, C): the chance of the given label under each true class."""
        if "likelihood" in run.columns:
            return {}
        if self.transition is not None:
            matrix = _matrix(self.transition, run.num_classes)
        elif run.epoch < self.warmup_epochs:
            return {}
        else:
            probabilities = torch.softmax(run.predict(), dim=1)
            usable = torch.isfinite(probabilities).all(dim=1)
            matrix = estimate_transition(probabilities[usable], run.labels[usable], self.percentile)
            exact = matrix.double()  # rows of float32 that sum to 1 do not in double
            run.findings["transition"] = (exact / exact.sum(dim=1, keepdim=True)).tolist()
        run.log(transition_trace=float(matrix.diagonal().mean()))
        return {"likelihood": matrix.float().T[run.labels].contiguous()}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """-log of the probability of the given label, summed over true classes."""
        logits = logits_of(model, batch)
        if "likelihood" not in batch.columns:
            return cross_entropy(logits, batch.labels).mean()
        likelihood = batch.columns["likelihood"].clamp_min(1e-6)  # (B, C), nothing is impossible
        return marginal_cross_entropy(logits, likelihood).mean()


def _matrix(given: str | tuple[tuple[float, ...], ...], num_classes: int) -> Tensor:
    matrix = load_transition(Path(given)) if isinstance(given, str) else given
    try:
        tensor = torch.as_tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError):  # rows of different lengths, or no numbers
        tensor = torch.zeros(0)
    rows_sum = tensor.sum(dim=1) if tensor.ndim == 2 else torch.zeros(1)
    require(
        tensor.shape == (num_classes, num_classes)
        and bool((tensor >= 0).all())
        and bool(torch.allclose(rows_sum, torch.ones_like(rows_sum), atol=1e-6)),
        f"ForwardCorrection.transition must be ({num_classes}, {num_classes}), not negative, rows "
        f"summing to 1; got shape {tuple(tensor.shape)}",
    )
    return tensor


@dataclass(frozen=True)
class ELR(Tuned):
    """Early-learning regularisation: hold on to what the model predicted early.

    Paper: Liu et al., NeurIPS 2020, arXiv:2007.00151.
    Idea: predictions are right before they memorise; a running mean of each row's own predictions
    is a target that the model must not leave.
    Steps: per step: (1) target <- momentum * target + (1 - momentum) * prediction;
    (2) loss = cross-entropy + weight * log(1 - <prediction, target>).
    Settings: momentum = 0.7, weight = 3 (paper, CIFAR-10).
    Cost: no extra pass; N x C numbers.

    Attributes:
        momentum: Share of the old target (beta).
        weight: Weight of the regulariser (lambda).
    """

    momentum: float = 0.7
    weight: float = 3.0

    writes: ClassVar[tuple[str, ...]] = ("target",)

    def check(self) -> None:
        """Momentum and weight are in range."""
        require_range(self.name, "momentum", self.momentum, 0, 1, open_high=True)
        require_range(self.name, "weight", self.weight, 0, 1e3)

    def on_epoch_start(self, run: Run) -> Columns:
        """An empty target at the start of the run."""
        if "target" in run.columns:
            return {}
        return {"target": torch.zeros(len(run.labels), run.num_classes)}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Update the rows' targets, then cross-entropy plus the regulariser."""
        logits = logits_of(model, batch)
        probabilities = torch.softmax(logits, dim=1).clamp(1e-4, 1 - 1e-4)
        current = probabilities.detach()
        current = current / current.sum(dim=1, keepdim=True)
        target = self.momentum * batch.columns["target"] + (1 - self.momentum) * current
        run.write("target", batch, target)
        penalty = early_learning_regularizer(probabilities, target)
        return (cross_entropy(logits, batch.labels) + self.weight * penalty).mean()


@dataclass(frozen=True)
class SmallLoss(Tuned):
    """Train on the rows whose loss looks clean, selected anew in every epoch.

    Paper: the small-loss trick; mixture form after Arazo et al., ICML 2019, arXiv:1904.11238 and
    Li et al. (DivideMix), ICLR 2020, arXiv:2002.07394.
    Idea: right labels are fitted before wrong ones, so a row with a high loss is suspicious.
    Steps: (1) all rows for ``warmup_epochs``; (2) score every row; (3) keep the rows whose
    probability of being clean exceeds ``threshold`` (or the lowest ``clean_share`` of the losses).
    Settings: threshold = 0.5 (DivideMix), warmup_epochs = 2 (ours).
    Cost: one scoring pass per epoch after the warm-up, fewer rows to train on.

    Attributes:
        warmup_epochs: Epochs on all rows.
        threshold: Least probability of being clean.
        clean_share: Keep this share of the rows instead of asking the mixture.
        mixture: How the losses are split.
    """

    warmup_epochs: int = 2
    threshold: float = 0.5
    clean_share: float | None = None
    mixture: LossMixture = field(default_factory=LossMixture)

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    def check(self) -> None:
        """Warm-up, threshold and share are in range."""
        require(self.warmup_epochs >= 0, f"{self.name}.warmup_epochs must be at least 0")
        require_range(self.name, "threshold", self.threshold, 0, 1, open_high=True)
        if self.clean_share is not None:
            require_range(self.name, "clean_share", self.clean_share, 0, 1, open_low=True)

    def stages(self, epochs: int) -> list[Stage]:
        """One stage that outlasts the warm-up."""
        require_warmup(self, self.warmup_epochs, epochs)
        return super().stages(epochs)

    def on_epoch_start(self, run: Run) -> Columns:
        """Columns ``loss``, ``clean_prob`` and ``keep`` (N,)."""
        if run.epoch < self.warmup_epochs:
            return {}
        loss = run.losses()  # (N,)
        fit = fit_loss_mixture(loss, run.labels, self.mixture, run.columns.get("clean_prob"))
        run.log(**fit.summary())
        keep = fit.clean_prob > self.threshold
        if self.clean_share is not None:
            keep = lowest(loss, self.clean_share)
        keep &= torch.isfinite(loss)
        return {"loss": finite_losses(loss), "clean_prob": fit.clean_prob, "keep": keep}


class PairOutput(NamedTuple):
    """What `Pair` answers."""

    logits: Tensor
    first: Tensor
    second: Tensor


class Pair(nn.Module):
    """Two networks that see the same inputs; predicts with their mean logits."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, **inputs: Tensor) -> PairOutput:
        """Logits of both, (B, C) each."""
        first, second = self.first(**inputs).logits, self.second(**inputs).logits
        return PairOutput((first + second) / 2, first, second)


@dataclass(frozen=True)
class CoTeaching(Tuned):
    """Two networks; each trains on the rows that the other finds easy.

    Paper: Han et al., NeurIPS 2018, arXiv:1804.06872.
    Idea: differently initialised networks make different mistakes, so each filters for the other.
    Steps: per step: (1) both score the batch; (2) each picks its lowest losses, fewer as the epochs
    go on; (3) each trains on the other's choice. The first network is deployed; epochs before the
    last are measured by the mean logits of both.
    Deviations: without ``noise_rate`` the rate is estimated once, by a mixture on the losses at the
    end of the warm-up. Under gradient accumulation rows are picked per micro-batch.
    Settings: ramp_epochs = 2, warmup_epochs = 1 (ours; the paper ramps over 10 of 200 epochs).
    Cost: twice the training, twice the memory.

    Attributes:
        noise_rate: Share of wrong labels; None estimates it.
        warmup_epochs: Epochs on all rows.
        ramp_epochs: Epochs over which the dropped share rises to the noise rate.
        mixture: How the losses are split for the estimate.
    """

    noise_rate: float | None = None
    warmup_epochs: int = 1
    ramp_epochs: int = 2
    mixture: LossMixture = field(default_factory=LossMixture)

    def check(self) -> None:
        """The rate is in range, the epochs are whole."""
        if self.noise_rate is not None:
            require_range(self.name, "noise_rate", self.noise_rate, 0, 1, open_high=True)
        require_count(self.name, "warmup_epochs", self.warmup_epochs, MOST_EPOCHS)
        require_count(self.name, "ramp_epochs", self.ramp_epochs, MOST_EPOCHS)

    def stages(self, epochs: int) -> list[Stage]:
        """One stage that outlasts the warm-up."""
        require_warmup(self, self.warmup_epochs, epochs, least=1)
        return super().stages(epochs)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Two copies of the encoder with two different new heads and adapters."""
        from noiseproof.models import head_modules, plain_model

        second = copy.deepcopy(model)
        for name in head_modules(second):
            for module in getattr(plain_model(second), name).modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return Pair(super().prepare_model(model), super().prepare_model(second))

    def on_epoch_start(self, run: Run) -> Columns:
        """Column ``clean_prob`` (N,) at the end of the warm-up, for the noise rate."""
        if run.epoch < self.warmup_epochs or "clean_prob" in run.columns:
            return {}
        loss = cross_entropy(run.predict(), run.labels)
        fit = fit_loss_mixture(loss, run.labels, self.mixture)
        run.log(**fit.summary())
        return {"clean_prob": fit.clean_prob}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Mean cross-entropy of each network on the rows that the other picked."""
        output: PairOutput = model(**batch.inputs)
        first = cross_entropy(output.first.float(), batch.labels)  # (B,)
        second = cross_entropy(output.second.float(), batch.labels)
        if run.epoch < self.warmup_epochs:
            return (first.mean() + second.mean()) / 2
        rate = self.noise_rate
        if rate is None:
            rate = 1 - float(run.columns["clean_prob"].mean())
        done = (run.epoch - self.warmup_epochs + 1) / self.ramp_epochs
        share = 1 - rate * min(1.0, done)
        easy_first = lowest(first.detach(), max(share, 1e-6))
        easy_second = lowest(second.detach(), max(share, 1e-6))
        return (first[easy_second].mean() + second[easy_first].mean()) / 2

    def finalize_model(self, run: Run) -> nn.Module:
        """The first network, which answers otherwise than both."""
        assert isinstance(run.model, Pair)
        run.forget()
        return run.model.first
