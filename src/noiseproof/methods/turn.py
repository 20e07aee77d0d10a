"""TURN: probe, cleanse, fine-tune.

Paper: Ahn, Kim, Ko & Yun, "Fine-tuning Pre-trained Models for Robustness under Noisy Labels",
IJCAI 2024, arXiv:2310.17668. No code by its authors is known, and we had its abstract and two
readings of it by others, not its equations: where they say nothing, the choice is ours.
Idea: full fine-tuning bends good features to wrong labels; a linear probe on frozen features
cannot. So a probe with a robust loss is trained first, its losses tell which labels look right, and
only these rows are used to fine-tune the whole model, for a few epochs.
Steps: (1) train the head alone with GCE for ``probe_epochs``, on features that are computed once;
(2) at the start of every epoch of the last step: score all rows with the current model, fit a
mixture on the losses of each given class, keep the rows whose posterior of the low-loss part
exceeds ``threshold``, and draw as many of each class as the smallest class has; (3) train what
``tune`` names on these rows with cross-entropy. ``train.epochs`` counts the epochs of (3).
Deviations: the paper's form is the preset strict, which raises on a class that keeps no row. The
default, the guarded form, continues: mixtures that mean nothing leave the rows of their class as
they were, no class falls below ``min_class_fraction``, and classes are not balanced where that
would cost most rows. Step 3 takes ``train.epochs``, 6 unless they are given, where the paper has 4,
as has strict; ``tune_epochs`` goes before ``train.epochs``, even if both are given.
The published method tunes the whole model and knows images only; adapters and text are ours. Probe
and first selection see the encoder without its adapters, some of which start at random, such as
prompts; with these train.select=best takes no epoch of the probe.
``probe_features=mean`` (ours) puts a linear head on the mean of the last hidden states, for
encoders whose pooler no task has trained, such as sentence encoders. With mean or first
``probe_normalize`` scales what the head reads to length 1; other heads read features as they are.
The head is what lies outside the encoder, or the last linear layer of a torch module, and cannot be
named. New weights inside the encoder, such as a pooler that the checkpoint lacks, are no part of
it: the probe reads them at random, which is warned of. Random draws are keyed by (seed, stage,
epoch), for draw=fixed by the seed alone. The mixture starts at the best split into two clusters,
not at k-means, so it has neither seed nor restarts. An empty class is an InputError. BatchNorm uses
its running statistics in a step of one row, where an error would be needless. Cached features are
fp32 and always memory-mapped.
Settings: probe_epochs = 20, GCE, per class, threshold = 0.6, smallest count, every epoch (readings
of the paper, which has 4 epochs in step 3); q = 0.7 (GCE's paper); scoring by cross-entropy and all
guards (ours); probe_learning_rate = 0.03 (ours: with the 0.01 of a re-implementation, a probe with
77 classes on BERT's pooled output was far from trained). Presets: default, strict, lineage
(mixture settings of DivideMix), lp_ft (no selection), robust_probe (no step 3).
Needs: features that separate the classes before any tuning, which is checked and warned of; no
noise rate, no clean rows.
Cost: one pass for the features, one scoring pass per epoch of step 3 after the first, and fewer
rows to train on; the probe costs next to nothing. In forward passes over N rows (a backward pass
counts two): 1 + (epochs - 1) + 3 epochs |kept| / N, against 3 epochs.
Model: model/ is as usual; after probe_features=mean or first its head is model/head.safetensors,
and noiseproof.load puts them together, as transformers has no class for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.frozen import encoder_width
from noiseproof.heads import LinearHead, PooledClassifier, saved_head
from noiseproof.losses import cross_entropy, generalized_cross_entropy
from noiseproof.method import (
    MOST_BATCH,
    MOST_EPOCHS,
    Batch,
    Columns,
    Run,
    Stage,
    logits_of,
    require,
    require_count,
    require_range,
)
from noiseproof.methods.baselines import Tuned
from noiseproof.mixture import LossMixture, MixtureFit, fit_loss_mixture
from noiseproof.models import (
    class_name,
    class_names,
    encoder_of,
    has_weights,
    new_modules,
    plain_model,
    start_head,
)
from noiseproof.selection import (
    best_first,
    candidates,
    class_quota,
    draw_per_class,
    finite_losses,
    held_out_scores,
    kappa,
)
from noiseproof.tuning import NEUTRAL_TUNING

SALT_DRAW = 21
CHECKED_ROWS = 20_000  # for the check of the features; the cost grows with rows times width squared
LEAST_AGREEMENT = 0.05  # kappa of held-out predictions and labels ...
MOST_OVERLAP = 0.06  # ... and expected share of rows on the wrong side of the mixture; measured
NOT_CHECKED = "TURN cannot check whether the frozen features separate the classes"
NOT_CACHED = (
    "no one hidden state of the encoder, nor their mean, nor its pooled output is all that the "
    "head reads, so features cannot be kept: TURN's probe encodes every row anew in each epoch; "
    "use probe_features=mean, or fewer probe_epochs"
)
INSTEAD = "CleaR and ELR do not rely on a probe; lp_ft selects no rows; or use another encoder"
INSTEAD_ON_FEATURES = (
    "GCE and ELR select no rows, nor does lp_ft; or use features of another encoder"
)


@dataclass(frozen=True)
class TURN(Tuned):
    """Probe the frozen model, keep the rows that look right, fine-tune on them.

    Attributes:
        probe_epochs: Epochs of the head alone, besides ``train.epochs``; 0 skips the probe.
        probe_loss: gce or ce.
        q: Exponent of GCE, wherever it is used.
        probe_ce_epochs: First epochs of the probe with cross-entropy; GCE starts slowly where there
            are many classes.
        probe_learning_rate: Peak rate of the probe, whatever ``train.learning_rate`` is.
        probe_weight_decay: Decay of the probe.
        probe_batch_size: Rows per step of the probe.
        probe_warmup_epochs: Epochs in which the probe's rate rises, at most half of them.
        probe_init: Start of the head's last layer: zero, normal (deviation 0.01), or keep (as
            loaded).
        probe_features: What the head reads: model (as the model's own head does), mean (the mean of
            the last hidden states over the real tokens), or first (the first of them).
        probe_normalize: Scale what the head reads to length 1, in both stages; with
            probe_features mean or first.
        precondition: When the features do not separate the classes: warn, stop, or off. Where
            that cannot be checked, warn and stop both warn.
        cleanse: False keeps every row, which is plain probing, then fine-tuning (LP-FT).
        score_loss: Loss that the mixture splits: ce or gce.
        threshold: Least posterior of a row that may be kept.
        mixture: How the losses are split; mixture.scope is per_class here.
        min_class_fraction: Least share of its rows that a class keeps; 0 sets no floor.
        on_empty: When a class keeps no row (min_class_fraction=0): raise, skip (go on without it),
            or no_balance (go on without it and without balance in this epoch).
        balance: min (as many rows of each class as the smallest has), auto (min unless that would
            keep too few), none, or weight (all rows, each class weighs the same).
        balance_ratio: Most rows of a class as a multiple of the smallest.
        balance_min_keep: balance=auto: least share of the selected rows to keep.
        draw: Which rows of a class are kept: random, fixed (by one draw for the run), or top (the
            highest posteriors).
        refresh_every: Epochs between two selections; 0 selects once.
        tune_epochs: Epochs of the last step; None takes ``train.epochs``, 0 leaves the probe as the
            result, without adapters.
        tune_loss: Loss of the last step: ce or gce.
        tune_from: Head at its start: probe, or fresh; the first selection uses the probe's.
    """

    probe_epochs: int = 20
    probe_loss: str = "gce"
    q: float = 0.7
    probe_ce_epochs: int = 0
    probe_learning_rate: float = 3e-2
    probe_weight_decay: float = 1e-4
    probe_batch_size: int = 128
    probe_warmup_epochs: int = 1
    probe_init: str = "zero"
    probe_features: str = "model"
    probe_normalize: bool = False
    precondition: str = "warn"
    cleanse: bool = True
    score_loss: str = "ce"
    threshold: float = 0.6
    mixture: LossMixture = field(default_factory=lambda: LossMixture(scope="per_class"))
    min_class_fraction: float = 0.05
    on_empty: str = "raise"
    balance: str = "auto"
    balance_ratio: float = 1.0
    balance_min_keep: float = 0.3
    draw: str = "random"
    refresh_every: int = 1
    tune_epochs: int | None = None
    tune_loss: str = "ce"
    tune_from: str = "probe"

    later: ClassVar[Mapping[str, Any]] = {"probe_features": "model", "probe_normalize": False}

    def check(self) -> None:
        """Every setting is in range, and something is left to train."""
        for name, choices in (
            ("probe_loss", ("gce", "ce")),
            ("probe_init", ("zero", "normal", "keep")),
            ("probe_features", ("model", "mean", "first")),
            ("precondition", ("warn", "stop", "off")),
            ("score_loss", ("ce", "gce")),
            ("on_empty", ("raise", "skip", "no_balance")),
            ("balance", ("auto", "min", "none", "weight")),
            ("draw", ("random", "fixed", "top")),
            ("tune_loss", ("ce", "gce")),
            ("tune_from", ("probe", "fresh")),
        ):
            value = getattr(self, name)
            require(
                value in choices, f"TURN.{name} must be one of {', '.join(choices)}; got {value!r}"
            )
        for name in ("probe_epochs", "probe_warmup_epochs", "refresh_every"):
            require_count("TURN", name, getattr(self, name), MOST_EPOCHS, least=0)
        require(
            0 <= self.probe_ce_epochs <= self.probe_epochs,
            f"TURN.probe_ce_epochs must lie in [0, probe_epochs={self.probe_epochs}], "
            f"got {self.probe_ce_epochs}",
        )
        require(
            self.probe_features == "model" or self.tune in ("full", "head"),
            f"TURN.probe_features={self.probe_features} goes with tune=full or head, got "
            f"tune={self.tune}: its head is no part of a transformers model, so files of adapters "
            "cannot hold it; leave probe_features out",
        )
        require(
            self.probe_features != "model" or not self.probe_normalize,
            "TURN.probe_normalize needs a head of TURN's own: use probe_features mean or first",
        )
        require_count("TURN", "probe_batch_size", self.probe_batch_size, MOST_BATCH)
        if self.tune_epochs is not None:
            require_count("TURN", "tune_epochs", self.tune_epochs, MOST_EPOCHS, least=0)
        require(
            self.probe_epochs > 0 or self.tune_epochs != 0,
            "TURN would train nothing: probe_epochs=0 and tune_epochs=0",
        )
        require(
            self.probe_epochs > 0 or not self.cleanse or self.mixture.guard != "off",
            "TURN without a probe starts from equal losses, which mixture.guard=off cannot split; "
            "use mixture.guard=fallback, or probe_epochs",
        )
        require_range("TURN", "q", self.q, 0, 1, open_low=True)
        require_range("TURN", "probe_learning_rate", self.probe_learning_rate, 0, 10, open_low=True)
        require_range("TURN", "probe_weight_decay", self.probe_weight_decay, 0, 10)
        require_range("TURN", "threshold", self.threshold, 0, 1, open_low=True, open_high=True)
        require_range("TURN", "min_class_fraction", self.min_class_fraction, 0, 1)
        require_range("TURN", "balance_ratio", self.balance_ratio, 1, 1e6)
        require_range("TURN", "balance_min_keep", self.balance_min_keep, 0, 1)

    @classmethod
    def presets(cls) -> dict[str, TURN]:
        """Default, strict (the paper's form), lineage, lp_ft and robust_probe."""
        unguarded = LossMixture(scope="per_class", monotone=False, guard="off")
        divided = LossMixture(
            scope="per_class", transform="minmax", max_iter=10, tol=1e-2, reg_covar=5e-4
        )
        return {
            "default": cls(),
            "strict": cls(mixture=unguarded, min_class_fraction=0.0, balance="min", tune_epochs=4),
            "lineage": cls(mixture=divided),
            "lp_ft": cls(cleanse=False),
            "robust_probe": cls(tune_epochs=0),
        }

    # --- hooks -----------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Start the head, then add what ``tune`` names; adapters keep a copy of the head."""
        if self.probe_epochs or self.probe_init != "keep":
            _require_head(model)
        if self.probe_features != "model":
            require(
                not getattr(plain_model(model), "encoder_gives_tensor", False),
                f"TURN.probe_features={self.probe_features} needs an encoder with hidden states, "
                f"not {type(plain_model(model)).__name__}; leave probe_features out",
            )
            config: Any = plain_model(model).config
            width = encoder_width(model)
            head = LinearHead(width, config.num_labels, normalize=self.probe_normalize)
            model = PooledClassifier(model, head, self.probe_features)
        if self.probe_init != "keep":
            start_head(model, 0.0 if self.probe_init == "zero" else 0.01)
        if self.tune_epochs == 0 and self.tune != "head":  # adapters would not be trained
            return Tuned.prepare_model(replace(self, tune="full"), model)
        return super().prepare_model(model)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Put the saved head behind the encoder of a loaded model."""
        if self.probe_features == "model":
            return model
        tensors = saved_head(model)
        classes, width = tensors["weight"].shape
        with torch.random.fork_rng(devices=[]):  # torch draws a start of its own
            head = LinearHead(width, classes, normalize=self.probe_normalize)
        head.load_state_dict(tensors)
        return PooledClassifier(model, head, self.probe_features).eval()

    def stages(self, epochs: int) -> list[Stage]:
        """The probe, with settings of its own, and the last step, with those of the run."""
        tuned = epochs if self.tune_epochs is None else self.tune_epochs
        probe = Stage(
            "probe",
            self.probe_epochs,
            trains="head",
            bare=True,
            selectable=self.tune_epochs == 0 or self.tune in NEUTRAL_TUNING,
            settings={
                "batch_size": self.probe_batch_size,
                "learning_rate": self.probe_learning_rate,
                "weight_decay": self.probe_weight_decay,
                "schedule": "cosine",
                "warmup_share": min(0.5, self.probe_warmup_epochs / max(1, self.probe_epochs)),
            },
        )
        rate = super().stages(tuned)[0].learning_rate
        tune = Stage("tune", tuned, learning_rate=rate)
        return [stage for stage in (probe, tune) if stage.epochs]

    def on_epoch_start(self, run: Run) -> Columns:
        """Columns ``loss``, ``clean_prob``, ``marked``, ``selected`` (N,), ``keep``, equal to it.

        Those marked may be kept, as they were before classes were balanced.
        """
        selects = self.cleanse and self.tune_epochs != 0
        first = run.epoch == 0 and (run.stage == "probe" or not self.probe_epochs)
        if first and selects:
            self._check_classes(run)
        if run.stage == "probe":
            if first and self.precondition != "off":
                self._check_new(run)
                features = run.features()  # (N, D, 1 or 2)
                if features is None and _encodes(run.model):
                    run.warn(NOT_CACHED)
                if selects:
                    self._check_features(run, features)
            return {}
        columns = self._select(run) if self.cleanse else {}
        if run.epoch == 0 and self.tune_from == "fresh":
            with torch.random.fork_rng():
                torch.manual_seed(int(torch.randint(2**62, (), generator=run.generator)))
                start_head(run.model, 0.0 if self.probe_init == "zero" else 0.01, hidden=True)
        return columns

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """GCE in the probe, cross-entropy after it, each row with its class's weight if it has one.

        Which of the two losses is a setting in both stages.
        """
        logits = logits_of(model, batch)
        if run.stage == "probe":
            kind = "ce" if run.epoch < self.probe_ce_epochs else self.probe_loss
        else:
            kind = self.tune_loss
        loss = self._loss(kind, logits, batch.labels)  # (B,)
        if "weight" in batch.columns:
            loss = loss * batch.columns["weight"]
        return loss.mean()

    # --- parts -----------------------------------------------------------------------------------

    def _loss(self, kind: str, logits: Tensor, labels: Tensor) -> Tensor:
        if kind == "ce":
            return cross_entropy(logits, labels)
        return generalized_cross_entropy(logits, labels, self.q)

    def _select(self, run: Run) -> Columns:
        """Score all rows and choose those of this epoch, or go on with those chosen before."""
        if run.epoch > 0 and not (self.refresh_every and run.epoch % self.refresh_every == 0):
            return {"keep": run.columns["selected"]}
        logits = run.predict()  # (N, C)
        entropy = cross_entropy(logits, run.labels)  # (N,)
        loss = self._loss(self.score_loss, logits, run.labels)
        fit = fit_loss_mixture(
            loss,
            run.labels,
            self.mixture,
            run.columns.get("clean_prob"),
            entropy,
            names=partial(_named, run),
            warn=run.warn,
        )
        run.log(**fit.summary())
        if run.epoch == 0 and self.probe_epochs and self.precondition != "off":
            self._check_probe(run, logits, entropy, fit)
        usable = torch.isfinite(loss)  # a lone row that is not: never kept
        loss = finite_losses(loss)
        clean = torch.where(usable, fit.clean_prob, 0.0)
        ranked = torch.where(usable, clean, -1.0)  # behind every row that has a loss
        marked = usable & candidates(
            ranked, loss, run.labels, self.threshold, self.min_class_fraction
        )
        sizes = torch.bincount(run.labels[usable], minlength=run.num_classes)  # (C,)
        keep, counts = self._balanced(run, marked, best_first(ranked, loss), sizes)
        kept = torch.bincount(run.labels[keep], minlength=run.num_classes)  # (C,)
        self._log_selection(run, clean > self.threshold, keep, counts, sizes, kept)
        table = {
            "epoch": run.epoch,
            "rows": sizes.tolist(),
            "selected": counts.tolist(),
            "kept": kept.tolist(),
            "mixtures": fit.table(),
        }  # by class, in label order
        run.findings.setdefault("selection", {"first": table})["last"] = table
        if not bool(usable.all()):
            run.log(rows_not_finite=int((~usable).sum()))
        columns = {"loss": loss, "clean_prob": clean, "marked": marked}
        columns |= {"selected": keep, "keep": keep}
        if self.balance == "weight":
            present = counts > 0
            weight = counts[present].double().mean() / counts.clamp_min(1)  # (C,)
            columns["weight"] = weight.float()[run.labels]
        return columns

    def _balanced(
        self, run: Run, marked: Tensor, best: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw as many rows of each class as it may keep.  -> (N,) bool, counts before it (C,).

        Args:
            run: The run.
            marked: Rows that may be kept (N,) bool.
            best: All rows, the best first (N,).
            sizes: Rows of each class that have a loss (C,); a class without one is left out.
        """
        counts = torch.bincount(run.labels[marked], minlength=run.num_classes)
        empty = ((sizes > 0) & (counts == 0)).nonzero().flatten().tolist()
        if empty and self.on_empty == "raise":
            names = [f"{class_name(run.model, label)} (of {sizes[label]})" for label in empty[:5]]
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            raise InputError(
                f"TURN kept no row of {len(empty)} of {int((sizes > 0).sum())} classes in epoch "
                f"{run.epoch}: {', '.join(names)}{more}; lower threshold={self.threshold}, or use "
                "the default preset, which continues"
            )
        balance = "none" if self.balance == "weight" else self.balance
        if empty and self.on_empty == "no_balance":
            balance = "none"
        quota = class_quota(counts, balance, self.balance_ratio, self.balance_min_keep)
        if bool((quota < counts).any()):
            run.log(balance_cap=int(quota.max()))
        order = best
        if self.draw == "random":
            order = torch.randperm(len(marked), generator=run.generator)
        elif self.draw == "fixed":
            random = np.random.default_rng([run.seed, SALT_DRAW])
            order = torch.from_numpy(random.permutation(len(marked)))
        return draw_per_class(marked, run.labels, quota, order), counts

    def _log_selection(
        self, run: Run, above: Tensor, keep: Tensor, counts: Tensor, sizes: Tensor, kept: Tensor
    ) -> None:
        """Sizes of the selection, for the history row; of classes the extremes and the median."""
        present = counts[sizes > 0]
        shares = (kept / sizes)[sizes > 0].double()
        floored = torch.bincount(run.labels[above], minlength=run.num_classes) < counts
        run.log(
            selected_min=int(present.min()),
            selected_median=float(present.double().median()),
            selected_max=int(present.max()),
            marked_share=float(counts.sum() / len(keep)),
            kept_share=float(keep.double().mean()),
            class_kept_min=float(shares.min()),
            class_kept_median=float(shares.median()),
            class_kept_max=float(shares.max()),
            classes_floored=int(floored.sum()),
            balanced=float(int(keep.sum()) < int(counts.sum())),
        )
        if "selected" in run.columns:
            last = run.columns["selected"]
            run.log(kept_again=int((keep & last).sum()) / max(1, int((keep | last).sum())))

    # --- whether the method has a basis ----------------------------------------------------------

    def _check_classes(self, run: Run) -> None:
        """Before training: one row has no mixture of its own."""
        single = torch.bincount(run.labels, minlength=run.num_classes) == 1  # (C,)
        if self.mixture.scope == "per_class" and self.mixture.guard == "off" and bool(single.any()):
            raise InputError(
                "a mixture for each class needs two rows or more of it, and of "
                f"{class_names(run.model, single)} there is one; add rows or drop the label, or "
                "use mixture.guard=fallback, which keeps it"
            )

    def _check_new(self, run: Run) -> None:
        """Before the probe: does its head read weights that are random?"""
        new = new_modules(run.model) if self.probe_features == "model" else []
        if new:
            run.warn(
                f"the checkpoint of the encoder does not hold {', '.join(new)}, so TURN's probe "
                "would read a random projection of its features; use probe_features=mean"
            )

    def _check_features(self, run: Run, features: Tensor | None) -> None:
        """Before training: do the frozen features tell the labels of rows not trained on?

        Args:
            run: The run.
            features: What the head reads (N, D, 1 or 2); None where it is not at hand.
        """
        if features is None:
            run.warn(f"{NOT_CHECKED}: they are not at hand as one table")
            return
        if len(features) < 2 * run.num_classes:
            run.warn(
                f"{NOT_CHECKED}: that takes two rows a class, and there are {len(features)} rows "
                f"of {run.num_classes} classes; add rows, or compare with CrossEntropy"
            )
            return
        rows = torch.randperm(len(features), generator=run.generator)[:CHECKED_ROWS]
        labels = run.labels[rows]
        scores = held_out_scores(features[rows].flatten(1), labels, run.num_classes)
        agreement = kappa(scores.argmax(1), labels)
        fit = float((scores.argmax(1) == labels).double().mean())
        run.log(held_out_agreement=agreement, held_out_fit=fit)
        if agreement < LEAST_AGREEMENT:
            self._doubt(
                run,
                "the frozen features hardly tell the labels apart (agreement beyond chance on rows "
                f"held out: {agreement:.3f}, needed: {LEAST_AGREEMENT})",
            )

    def _check_probe(self, run: Run, logits: Tensor, entropy: Tensor, fit: MixtureFit) -> None:
        """Before tuning: do the probe's losses come apart?"""
        signals = probe_signals(logits, run.labels, entropy, fit.clean_prob)
        run.log(**signals)
        classes = len(fit.label)
        small = fit.fallback.count("min_samples")
        if not signals["probe_fit"] >= min(1.2 / run.num_classes, 1 / run.num_classes + 0.05):
            self._doubt(run, f"the probe fits {signals['probe_fit']:.0%} of the labels, as chance")
        elif signals["probe_start"] > 0.5:
            self._doubt(run, "the probe has hardly left its start; raise probe_learning_rate")
        elif signals["mixture_overlap"] > MOST_OVERLAP:
            self._doubt(
                run,
                "the probe's losses hardly separate right from wrong labels (expected share of "
                f"rows on the wrong side: {signals['mixture_overlap']:.2f}, wanted: at most "
                f"{MOST_OVERLAP})",
            )
        elif small > classes / 2:
            self._doubt(
                run,
                f"{small} of {classes} classes have fewer rows than mixture.min_samples="
                f"{self.mixture.min_samples} and are not cleansed; mixture.scope=global does not "
                "need so many",
            )

    def _doubt(self, run: Run, found: str) -> None:
        """Say that the selection has no basis, or stop."""
        instead = INSTEAD if _encodes(run.model) else INSTEAD_ON_FEATURES
        message = f"TURN selects on a weak basis: {found}. {instead}"
        if self.precondition == "stop":
            raise InputError(f"{message}; precondition=warn goes on")
        run.warn(message)


def _named(run: Run, labels: Sequence[int]) -> str:
    """These classes by name, the first of them where they are many."""
    chosen = torch.zeros(run.num_classes, dtype=torch.bool)
    chosen[list(labels)] = True
    return class_names(run.model, chosen)


def _encodes(model: nn.Module) -> bool:
    """Whether the model has an encoder, or its rows are features already."""
    try:
        return has_weights(model)
    except InputError:
        return True


def _require_head(model: nn.Module) -> None:
    """Refuse a model that cannot be split into encoder and head: there is nothing to probe."""
    try:
        encoder_of(model)
    except InputError as error:
        inner = getattr(model, "module", model)
        linear = [name for name, part in inner.named_modules() if isinstance(part, nn.Linear)]
        raise InputError(
            f"TURN probes a last linear layer on one vector a row, and {type(inner).__name__} does "
            f"not end in one; its linear layers: {', '.join(linear[-5:]) or 'none'}. Let it end in "
            "such a layer, or use GCE or ELR, which train it whole"
        ) from error


def probe_signals(
    logits: Tensor, labels: Tensor, entropy: Tensor, clean_prob: Tensor
) -> dict[str, float]:
    """How well a trained probe separates right from wrong labels, as far as it can tell itself.

    Args:
        logits: Of the probe (N, C).
        labels: Given labels (N,).
        entropy: Their cross-entropies (N,).
        clean_prob: Posterior of the low-loss part (N,).

    Returns:
        probe_fit: share predicted as their given label; probe_confidence: mean probability of the
        prediction; probe_start: share of losses within 1 % of log C, where a zero head starts;
        mixture_overlap: mean of min(p, 1 - p), the share of rows that the mixture itself expects on
        the wrong side.

    >>> even = torch.zeros(2, 4)
    >>> entropy = torch.tensor([4.0, 4.0]).log()
    >>> probe_signals(even, torch.tensor([0, 1]), entropy, torch.tensor([0.75, 0.25]))
    {'probe_fit': 0.5, 'probe_confidence': 0.25, 'probe_start': 1.0, 'mixture_overlap': 0.25}
    """
    start = float(np.log(logits.shape[1]))
    confidence, predicted = torch.softmax(logits, dim=1).max(dim=1)
    return {
        "probe_fit": float((predicted == labels).double().mean()),
        "probe_confidence": float(confidence.double().mean()),
        "probe_start": float(((entropy - start).abs() < 0.01 * start).double().mean()),
        "mixture_overlap": float(torch.minimum(clean_prob, 1 - clean_prob).double().mean()),
    }
