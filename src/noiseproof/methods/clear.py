"""CleaR: clean routing of adapter modules.

Paper: Kim, Kim & Lee, "CleaR: Towards Robust and Generalized Parameter-Efficient Fine-Tuning for
Noisy Label Learning", ACL 2024, arXiv:2411.00873; released code `yeachan-kr/clear`.
Idea: adapters memorise little because they are small, and for the same reason wrong labels disturb
what they learn from right ones. So a mixture on the losses gives every row a probability that its
label is right, and in every layer the adapter is switched on for a row with ``gamma`` times that
probability. Rows that look wrong run through the frozen encoder and do not write into the adapter.
Steps: (1) ``warmup_epochs`` with gates drawn at rate gamma, whatever the label; (2) at the start of
every later epoch score all rows (mean logits of ``scoring_passes`` gated passes), fit the mixture
on the losses; (3) in every step draw a gate per row and layer at rate gamma * clean_prob; loss =
cross-entropy + consistency with the logits of the scoring; (4) evaluate with all gates open.
Deviations: gates act on the adapter's update, without a frozen copy of each layer; a bottleneck
stands behind the last matrix of attention and feed-forward, before the layer's own dropout; deep
prompts offer keys and values instead of running through the layer, and take no position; bias
updates decay to the pre-trained bias, not to 0; the posterior is made monotone and degenerate
mixtures keep every row; evaluation is deterministic; dropout stays on after the warm-up; gates
depend on (seed, epoch, row) alone, at test on the content of the row or batch. ``prefix``, kinds of
peft but LoRA, ``gate_unit=module`` and ``scoring=reuse`` are ours. The head is not protected from
wrong labels, as published; ``ce_weight``, an inactive line of the released code, did not help
(docs/results/clear-defaults.md). Doubts are borne out by what the model contradicts
(``cap_doubt``, ours): a mixture finds two parts where all labels are right as well, and gates would
shut out small classes and hard rows. Preset gentle has other gates: none is closed at random (gamma
= 1), rows that are predicted as labelled and rows of a class that is not known yet are trusted no
less than the average row (``spare``), routing waits for a model that has learned something
(``max_clean_loss``), and consistency holds a row as far as its label is doubted
(``consistency_weight``, another inactive line). It keeps small classes and loses less where labels
are right; where most are wrong the published gates are ahead (docs/results/clear.md).
Settings: gamma = 0.8 (the released code has 0.7 to 0.9), warmup_epochs = 3 (released code; 3 to 10
of 20 in the paper), lambda_consistency = 1, temperature = 1, scoring_passes = 1 (released code; 5
in the paper), bottleneck_size = 16 and num_virtual_tokens = 20 (released code); rank, alpha,
dropout and learning_rate are ours, see docs/results/foundation.md. Presets: default, gentle, plain,
paper, fast, and the released code by family: code (lora), code-adapter, code-bitfit, code-prompt.
Needs: no noise rate, no clean rows; an encoder with numbered layers. Prompts and prefixes need the
attention interface of transformers, so not DeBERTa, and no decoder. What cannot be gated exactly is
refused: every model is tried on a tiny input before it is trained.
Cost: scoring_passes forward passes per epoch after the warm-up; none with scoring=reuse, which
finds wrong labels less well (docs/results/trec6-2000.md: AUROC 4 to 11 points lower).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from noiseproof.adapters import FAMILIES, AdaptedModel, Adapter
from noiseproof.frozen import HeadOnly, feature_position
from noiseproof.losses import consistency, cross_entropy
from noiseproof.method import (
    Batch,
    BeforeBatch,
    Columns,
    Method,
    Run,
    Stage,
    logits_of,
    losses_of,
    require,
    require_range,
    require_warmup,
)
from noiseproof.methods.clear_gates import (
    Routing,
    gate_table,
    only_gated_trains,
    open_gates,
    route,
    row_wise_targets,
    unroute,
)
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.models import set_dropout
from noiseproof.saving import merged
from noiseproof.selection import borne_out, finite_losses, spared_rows, trusted
from noiseproof.tokens import TARGETS
from noiseproof.tuning import PLAIN_TUNING, PROMPTS, tune_model, usual_rate

FROZEN_BYTES = 2**27  # the backbone's features of all rows may take this much
NEVER_ROUTED = (
    "CleaR never began to route: the rows that look clean are hardly known better than by a guess; "
    "train for more epochs, at a higher learning rate, or with peft=lora"
)
SALT_TRAIN, SALT_SCORE, SALT_STEP = 11, 12, 14


@dataclass(frozen=True)
class CleaR(Method):
    """Route probably clean rows through the adapters, the others around them.

    Attributes:
        peft: Adapter family: lora, adapter (bottlenecks), bitfit (biases), prompt, prefix (keys and
            values), or another kind of peft that adds to the output of linear modules (loha, vera).
        gamma: Ceiling of the gate rate; also the rate of draws that ignore the label.
        warmup_epochs: Epochs before routing begins; None is half of the epochs. Try that, or 5 and
            more, with 20 or more classes.
        routing: bernoulli, soft (gate = gamma * p), hard (gate = p > threshold), random (ignores
            p), none (all gates open).
        threshold: Cut of routing=hard, and of the logged selection.
        gate_unit: A gate per layer, per module, or one for the whole network.
        free_gate: Draws that ignore the label, of which gamma=1 has none: one per sample, or one
            per batch.
        scoring: passes (extra forward passes), or reuse (logits of the last epoch's steps).
        scoring_passes: Gated passes whose logits are averaged; one where gamma is 1, as all would
            be alike.
        loss_ema: Weight of the last epoch's smoothed loss.
        mixture: How the losses are split.
        min_class_fraction: Where fewer rows of a class look clean, gates trust this share of them,
            the lowest losses first; 0 leaves it to the mixture.
        spare: Gates are no less open than those of the average row for rows whose given label is
            predicted, and for rows of a class that is hardly ever predicted: the loss of these
            says that the class is not known yet, not that they are wrong.
        cap_doubt: A mixture splits the losses of right labels as well. Where it doubts more rows
            than the model contradicts, gates are closed, at random too, and rows held to former
            answers only as far as the two numbers agree: hardly at all where labels are right.
            Without effect on routing=random.
        max_clean_loss: Routing waits while the rows that look clean have a mean loss above this
            share of a blind guess's, log(C): a model that has learned nothing tells no labels
            apart. None begins after the warm-up in any case, as published; preset gentle has 0.75.
        lambda_consistency: Weight of the consistency term.
        temperature: Temperature of the consistency term.
        temperature_squared: Multiply the consistency term by the squared temperature.
        consistency_ramp: Epochs over which the consistency weight rises; 0 is at once.
        ce_weight: none, or clean_prob: weigh cross-entropy by the clean probability that the gates
            follow (with spare and min_class_fraction).
        consistency_weight: none, or noisy_prob: weigh consistency by one minus it, so that a row
            that is trusted is not held to former answers.
        dropout_after_warmup: False turns dropout off in routed epochs, as the released code does.
        eval_gate: all_on, expected (gate = gamma), sample, or mean (of eval_passes samples); all
            the same where gamma is 1.
        eval_passes: Passes of eval_gate=mean.
        learning_rate: Peak rate; None is 2e-3, 5e-4 (adapter), 5e-3 (bitfit) or 1e-2 (prompt,
            prefix).
        rank: Rank of LoRA and other low-rank families.
        alpha: LoRA scaling numerator; None is twice the rank.
        lora_dropout: Dropout on the input of LoRA's A.
        bottleneck_size: Width of the bottlenecks of adapter.
        adapter_init: Start of a bottleneck: zero (the bare encoder) or linear (released code).
        num_virtual_tokens: Vectors of prompt and prefix.
        prompt_depth: Prompts deep in every layer, or shallow before the first.
        train_pooler: Train the encoder's pooler as well; it has no gate.
        train_outer_biases: bitfit trains the biases outside the layers as well; they have no gate.
        target_modules: Module names inside a layer that get LoRA or bottlenecks; None takes peft's
            choice (query, value), or the ends of attention and feed-forward.
        dropout: Dropout of the encoder; None keeps the model's own. Gates already leave parts out.
    """

    peft: str = "lora"
    gamma: float = 0.8
    warmup_epochs: int | None = 3
    routing: str = "bernoulli"
    threshold: float = 0.5
    gate_unit: str = "layer"
    free_gate: str = "sample"
    scoring: str = "passes"
    scoring_passes: int = 1
    loss_ema: float = 0.0
    mixture: LossMixture = field(default_factory=LossMixture)
    min_class_fraction: float = 0.0
    spare: bool = False
    cap_doubt: bool = True
    max_clean_loss: float | None = None
    lambda_consistency: float = 1.0
    temperature: float = 1.0
    temperature_squared: bool = True
    consistency_ramp: int = 0
    ce_weight: str = "none"
    consistency_weight: str = "none"
    dropout_after_warmup: bool = True
    eval_gate: str = "all_on"
    eval_passes: int = 5
    learning_rate: float | None = None
    rank: int = 8
    alpha: float | None = None
    lora_dropout: float = 0.0
    bottleneck_size: int = 16
    adapter_init: str = "zero"
    num_virtual_tokens: int = 20
    prompt_depth: str = "deep"
    train_pooler: bool = False
    train_outer_biases: bool = True
    target_modules: tuple[str, ...] | None = None
    dropout: float | None = 0.0

    tasks: ClassVar[tuple[str, ...]] = ("text", "image", "causal-lm")
    writes: ClassVar[tuple[str, ...]] = ("train_logits", "recorded")
    later: ClassVar[Mapping[str, Any]] = {
        "min_class_fraction": 0.0,
        "spare": False,
        "cap_doubt": False,
        "max_clean_loss": None,
    }

    def __post_init__(self) -> None:
        """Check every setting where it stands."""
        for name, choices in (
            ("routing", ("bernoulli", "soft", "hard", "random", "none")),
            ("gate_unit", ("layer", "module", "network")),
            ("free_gate", ("sample", "batch")),
            ("scoring", ("passes", "reuse")),
            ("ce_weight", ("none", "clean_prob")),
            ("consistency_weight", ("none", "noisy_prob")),
            ("eval_gate", ("all_on", "expected", "sample", "mean")),
            ("adapter_init", ("zero", "linear")),
            ("prompt_depth", ("deep", "shallow")),
        ):
            value = getattr(self, name)
            require(
                value in choices, f"CleaR.{name} must be one of {', '.join(choices)}; got {value!r}"
            )
        for name in (
            "scoring_passes",
            "eval_passes",
            "rank",
            "bottleneck_size",
            "num_virtual_tokens",
        ):
            value = getattr(self, name)
            require(value >= 1, f"CleaR.{name} must be at least 1, got {value}")
        require(
            self.warmup_epochs is None or self.warmup_epochs >= 1,
            f"CleaR.warmup_epochs must be at least 1, got {self.warmup_epochs}",
        )
        require(self.consistency_ramp >= 0, "CleaR.consistency_ramp must be at least 0")
        require_range("CleaR", "gamma", self.gamma, 0, 1, open_low=True)
        require_range("CleaR", "threshold", self.threshold, 0, 1, open_low=True, open_high=True)
        require_range("CleaR", "loss_ema", self.loss_ema, 0, 1, open_high=True)
        require_range("CleaR", "min_class_fraction", self.min_class_fraction, 0, 1)
        require_range("CleaR", "lambda_consistency", self.lambda_consistency, 0, 1e3)
        require_range("CleaR", "temperature", self.temperature, 0, 1e3, open_low=True)
        require(
            self.routing != "random" or self.gamma < 1,
            "CleaR.routing=random closes no gate with gamma=1; give gamma=0.8 or so",
        )
        if self.max_clean_loss is not None:
            require_range("CleaR", "max_clean_loss", self.max_clean_loss, 0, 10, open_low=True)
        if self.learning_rate is not None:
            require_range("CleaR", "learning_rate", self.learning_rate, 0, 10, open_low=True)
        require(
            self.peft not in PLAIN_TUNING,
            f"CleaR.peft must be an adapter such as lora, {', '.join(FAMILIES)}; got {self.peft!r}",
        )
        require_range("CleaR", "lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        if self.dropout is not None:
            require_range("CleaR", "dropout", self.dropout, 0, 1, open_high=True)
        if self.alpha is not None:
            require_range("CleaR", "alpha", self.alpha, 0, 1e6, open_low=True)

    @classmethod
    def presets(cls) -> dict[str, CleaR]:
        """Default, gentle (gates of ours), plain (the adapter alone), fast (no extra pass), paper.

        And the released code, which has other values for each family: code is that of lora.
        """
        published = cls(
            mixture=LossMixture(monotone=False, guard="off"), cap_doubt=False, dropout=None
        )
        code = replace(published, dropout_after_warmup=False, eval_gate="sample", rank=4)
        gentle = cls(
            gamma=1.0,
            spare=True,
            cap_doubt=False,
            max_clean_loss=0.75,
            consistency_weight="noisy_prob",
        )
        return {
            "default": cls(),
            "gentle": gentle,
            "plain": cls(routing="none", cap_doubt=False, lambda_consistency=0.0, dropout=None),
            "paper": replace(published, scoring_passes=5),
            "fast": cls(scoring="reuse", loss_ema=0.5),
            "code": replace(code, gamma=0.85, scoring_passes=2, free_gate="batch", alpha=1.0),
            "code-adapter": replace(
                code,
                peft="adapter",
                gamma=0.7,
                loss_ema=0.9,
                temperature=0.5,
                temperature_squared=False,
                adapter_init="linear",
            ),
            "code-bitfit": replace(code, peft="bitfit", gamma=0.9, train_pooler=True),
            "code-prompt": replace(
                code, peft="prompt", gamma=0.85, free_gate="batch", train_pooler=True
            ),
        }

    def for_tokens(self) -> CleaR:
        """Routing alone: a teacher's logits of every token of every row are not kept."""
        require(
            self.scoring == "passes",
            "CleaR.scoring=reuse keeps the logits of every row; with task causal-lm use passes",
        )
        require(
            self.peft not in PROMPTS,
            f"CleaR.peft={self.peft} works with encoders alone; with task causal-lm use lora",
        )
        return replace(
            self, lambda_consistency=0.0, spare=False, cap_doubt=False, max_clean_loss=None
        )

    # --- hooks -----------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Add the adapters and their gates; the encoder is frozen, the head trains."""
        if self.dropout is not None:
            set_dropout(model, self.dropout)
        if self.peft in FAMILIES:
            size = self.bottleneck_size if self.peft == "adapter" else self.num_virtual_tokens
            adapter = Adapter(
                self.peft,
                size,
                self.adapter_init,
                self.prompt_depth,
                self.train_outer_biases,
                self.train_pooler,
                self.target_modules,
            )
            return self.restore_model(AdaptedModel(model, adapter))
        targets = self.target_modules or row_wise_targets(model)
        adapted = tune_model(
            model,
            self.peft,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=targets,
            settings={"lora_dropout": self.lora_dropout} if self.peft == "lora" else None,
            pooler=self.train_pooler,
        )
        return self.restore_model(adapted)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Put the gates around the adapters of a model."""
        eval_gate = "all_on" if self.routing == "none" else self.eval_gate
        route(
            model,
            Routing(
                gamma=self.gamma,
                eval_gate=eval_gate,
                eval_passes=self.eval_passes,
                free=self.free_gate,
                unit=self.gate_unit,
            ),
        )
        return model

    def stages(self, epochs: int) -> list[Stage]:
        """One stage: a new one would mean a fresh optimizer."""
        warmup = self.warmup(epochs)
        if not self._plain:
            require_warmup(self, warmup, epochs, least=1)
        return [Stage("train", epochs, learning_rate=self.learning_rate or usual_rate(self.peft))]

    def on_epoch_start(self, run: Run) -> Columns:
        """Columns fixed for the epoch: how clean a row looks, and what follows for its gates.

        ``loss``, ``clean_prob`` (N,); once routing has begun ``target_logits`` (N, C), and
        ``gate_prob`` (N,) where the gates follow more than ``clean_prob``, or have waited, and
        ``doubt`` (N,), one number for all rows, with ``cap_doubt``.
        """
        if run.epoch < self.warmup(run.epochs):
            return self._recorder(run) if run.epoch == 0 else {}
        if self._plain:
            return {}
        logits = self._score(run)  # (N, C)
        loss = run.row_losses(logits, run.labels)  # (N,)
        if self.loss_ema and "loss" in run.columns:
            loss = (1 - self.loss_ema) * loss + self.loss_ema * run.columns["loss"]
        fit = fit_loss_mixture(loss, run.labels, self.mixture, run.columns.get("clean_prob"))
        columns = {"loss": finite_losses(loss), "clean_prob": fit.clean_prob}
        begun = self._routed(run) or self._has_learned(columns, run.num_classes)
        run.log(
            **fit.summary(),
            selected=float((fit.clean_prob > self.threshold).float().mean()),
            routed=float(begun),
        )
        if not begun:
            if run.epoch + 1 == run.epochs:
                run.warn(NEVER_ROUTED)
            return columns
        if self.max_clean_loss is not None:
            columns["gate_prob"] = fit.clean_prob
        if self.cap_doubt and self.routing != "random":
            contradicted, doubt = borne_out(logits, run.labels, fit.clean_prob)
            columns["doubt"] = torch.full_like(fit.clean_prob, doubt)
            columns["gate_prob"] = fit.clean_prob + (1 - fit.clean_prob) * (1 - doubt)
            run.log(contradicted=contradicted, doubt=doubt)
        if self.consistency_ramp:
            now = torch.full_like(fit.clean_prob, run.epoch)
            columns["routed_since"] = run.columns.get("routed_since", now)
        if self.min_class_fraction:
            columns["gate_prob"] = trusted(
                gate_prob(columns), columns["loss"], run.labels, self.min_class_fraction
            )
        if self.spare:
            spared, known = spared_rows(logits, run.labels)  # (N,), (N,)
            prior = float(fit.clean_prob[known].mean())
            gates = gate_prob(columns)
            columns["gate_prob"] = torch.where(spared, gates.clamp(min=prior), gates)
            run.log(known_share=float(known.float().mean()), gates_least=prior)
        if self.lambda_consistency:
            usable = torch.isfinite(logits).all(dim=1, keepdim=True)
            columns["target_logits"] = torch.where(usable, logits, 0.0)  # a uniform target
        return columns

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Cross-entropy plus consistency, with this step's gates."""
        routed = self._routed(run)
        if routed and not self.dropout_after_warmup and run.model.training:
            run.model.eval()
        gates = self._train_gates(batch, run, routed)  # (B, U)
        run.average(len(batch.rows), gates_open=1.0 if gates is None else float(gates.mean()))
        if TARGETS in batch.inputs:
            routing_of(run).set(gates)
            loss = losses_of(model, batch)  # (B,)
        else:
            logits = self._logits(model, batch, run, gates)  # (B, C)
            loss = cross_entropy(logits, batch.labels)
        if self._records:
            run.write("train_logits", batch, logits)
            run.write("recorded", batch, torch.ones(len(batch.rows)))
        if not routed or self._plain:
            return loss.mean()
        clean = gate_prob(batch.columns)
        if self.ce_weight == "clean_prob":
            loss = loss * clean
        if self.lambda_consistency:
            agreement = consistency(
                logits, batch.columns["target_logits"], self.temperature, self.temperature_squared
            )
            if self.consistency_weight == "noisy_prob":
                agreement = agreement * (1 - clean)
            if "doubt" in batch.columns:
                agreement = agreement * batch.columns["doubt"]
            loss = loss + self.lambda_consistency * self._ramp(run) * agreement
        return loss.mean()

    def row_gates(self, run: Run) -> Tensor | None:
        """Gates (N, U) as the epoch drew them; of draws for whole batches those of its last."""
        rows = torch.arange(len(run.labels))
        batch = Batch({}, run.labels, rows, run.columns)
        return self._train_gates(batch, run, self._routed(run))

    def finalize_model(self, run: Run) -> nn.Module:
        """Without gates when they are all open at test; else they stay in place."""
        if routing_of(run).eval_gate != "all_on":
            return run.model
        unroute(run.model)
        return merged(run.model) if self.peft == "bitfit" else run.model

    def warmup(self, epochs: int) -> int:
        """Epochs before routing begins, out of all.

        >>> CleaR().warmup(10), CleaR(warmup_epochs=None).warmup(10)
        (3, 5)
        """
        return max(1, epochs // 2) if self.warmup_epochs is None else self.warmup_epochs

    # --- parts -----------------------------------------------------------------------------------

    def _has_learned(self, columns: Columns, classes: int) -> bool:
        """Whether the rows that look clean are known better than by a guess among all classes."""
        assert self.max_clean_loss is not None  # else routing has begun
        loss, clean = columns["loss"].double(), columns["clean_prob"].double()  # (N,), (N,)
        mean = float((clean * loss).sum() / clean.sum().clamp(min=1e-9))
        return mean <= self.max_clean_loss * math.log(classes)

    def _routed(self, run: Run) -> bool:
        """Whether the warm-up is over, and whatever waited after it."""
        warm = run.epoch < self.warmup(run.epochs)
        waits = self.max_clean_loss is not None and not self._plain
        return not warm and (not waits or "gate_prob" in run.columns)

    @property
    def _plain(self) -> bool:
        """Nothing would read the scores."""
        return (
            self.routing in ("none", "random")
            and not self.lambda_consistency
            and self.ce_weight == "none"
        )

    @property
    def _records(self) -> bool:
        return self.scoring == "reuse" and not self._plain

    def _recorder(self, run: Run) -> Columns:
        if not self._records:
            return {}
        rows = len(run.labels)
        return {
            "train_logits": torch.zeros(rows, run.num_classes),
            "recorded": torch.zeros(rows),
        }

    def _ramp(self, run: Run) -> float:
        if not self.consistency_ramp:
            return 1.0
        since = float(run.columns["routed_since"][0])
        return min(1.0, (run.epoch - since + 1) / self.consistency_ramp)

    def _train_gates(self, batch: Batch, run: Run, routed: bool) -> Tensor | None:
        """Gates (B, U) of one training step; None is all open."""
        if self.routing == "none":
            return None
        device = batch.labels.device
        rate = torch.full((len(batch.rows),), self.gamma, device=device)
        follows = routed and self.routing != "random"
        if follows and self.routing == "hard":
            units = routing_of(run).units
            kept = (gate_prob(batch.columns) > self.threshold).float()
            return kept[:, None].expand(-1, units)
        if follows and "doubt" in batch.columns:
            rate = rate + (1 - rate) * (1 - batch.columns["doubt"])
        if follows:
            rate = rate * gate_prob(batch.columns)
        return self._gates(run, batch.rows, rate, not follows, SALT_TRAIN, run.epoch, run.step)

    def _logits(self, model: nn.Module, batch: Batch, run: Run, gate: Tensor | None) -> Tensor:
        """Logits (B, C) at these gates (B, U).

        A row whose gates are all closed sees the frozen backbone and nothing else. Its features
        never change, so they are computed once for the whole run and only the head runs.
        """
        routing = routing_of(run)
        closed = torch.zeros(0) if gate is None else (gate == 0).all(dim=1)  # (B,)
        some = bool(closed.any()) and not bool(closed.all())  # none open: no gradient, not zero
        if gate is None or not some or not self._bypass(model, run, batch):
            routing.set(gate)
            return logits_of(model, batch)
        assert routing.frozen is not None
        closed = in_steps(closed)
        features = routing.frozen[batch.rows[closed.cpu()]].to(closed.device)
        bypassed: Tensor = HeadOnly(run.model)(features).logits.float()
        logits = bypassed.new_empty(len(closed), bypassed.shape[1])
        routing.set(gate[~closed])
        inputs = {name: tensor[~closed] for name, tensor in batch.inputs.items()}
        logits[closed] = bypassed
        logits[~closed] = logits_of(model, replace(batch, inputs=inputs))
        return logits

    def _bypass(self, model: nn.Module, run: Run, batch: Batch) -> bool:
        """Whether the backbone's features of closed rows are known; computed on first need.

        They are exact only without dropout in the encoder, for rows that every step sees alike. A
        model that is wrapped for several processes must be called whole in every step.
        """
        routing = routing_of(run)
        routed = self._routed(run)
        still = self.dropout == 0 or (routed and not self.dropout_after_warmup)
        if run.encode is None or run.redrawn or model is not run.model or not still:
            return False
        if routing.frozen is None:
            routing.frozen = torch.empty(0)
            some = {name: tensor[:4] for name, tensor in batch.inputs.items()}
            with run.autocast():  # as the model answers, else no position gives its logits
                known = only_gated_trains(run.model)
                position = feature_position(run.model, some) if known else None
            width = int(getattr(run.model.config, "hidden_size", 0))
            if position is not None and len(run.labels) * width * 8 <= FROZEN_BYTES:
                device = batch.labels.device

                def close(rows: Tensor) -> None:
                    routing.gate = torch.zeros(len(rows), routing.units, device=device)

                routing.frozen = run.encode(position, before_batch=close)
        return len(routing.frozen) > 0

    def _gates(
        self, run: Run, rows: Tensor, rate: Tensor, free: bool, salt: int, epoch: int, step: int
    ) -> Tensor | None:
        """Gates (B, U) at these rates (B,), soft or drawn by (seed, epoch, row); None is open."""
        routing = routing_of(run)
        if free and self.gamma == 1:
            return None
        if self.routing == "soft":
            return rate[:, None].expand(-1, routing.units)
        if free and self.free_gate == "batch":
            one = gate_table(1, routing.units, run.seed, SALT_STEP, salt, epoch, step)
            uniform = torch.from_numpy(one).expand(len(rows), -1)
        else:
            uniform = routing.table(len(run.labels), run.seed, salt, epoch)[rows]
        if self.gate_unit == "network":
            uniform = uniform[:, :1].expand(-1, routing.units)
        return open_gates(uniform.to(rate.device), rate)

    def _score(self, run: Run) -> Tensor:
        """Logits (N, C) that the mixture and the consistency term read."""
        if self._records:
            recorded = run.columns["recorded"] > 0
            if bool(recorded.all()):
                return run.columns["train_logits"].clone()
            missing = self._scoring_pass(run, 0)
            return torch.where(recorded[:, None], run.columns["train_logits"], missing)
        if self.routing == "none":
            return run.predict()
        passes = 1 if self.routing == "soft" or self.gamma == 1 else self.scoring_passes
        total = self._scoring_pass(run, 0)
        for number in range(1, passes):
            total += self._scoring_pass(run, number)
        return total / passes

    def _scoring_pass(self, run: Run, number: int) -> Tensor:
        """One pass with label-free gates at rate gamma."""
        if self.routing == "none":
            return run.predict()
        routing = routing_of(run)
        device = next(run.model.parameters()).device
        salt = SALT_SCORE + 16 * number

        def before_batch(rows: Tensor) -> None:
            rate = torch.full((len(rows),), self.gamma, device=device)
            routing.set(self._gates(run, rows, rate, True, salt, run.epoch, int(rows[0])))

        prepared: BeforeBatch = before_batch
        return run.predict(before_batch=prepared)


def in_steps(closed: Tensor) -> Tensor:
    """Let some closed rows (B,) bool go with the open ones, whose number is then a few quarters.

    Kernels are made and kept for every size of a batch: many sizes take memory and time.

    >>> in_steps(torch.tensor([False, True, True, False, False, True, True, True])).sum()
    tensor(4)
    """
    step = max(1, len(closed) // 4)
    extra = -int((~closed).sum()) % step
    return closed & (closed.cumsum(0) > extra)


def gate_prob(columns: Columns) -> Tensor:
    """How open the gates of each row of a batch may be.  -> (B,)."""
    return columns["gate_prob"] if "gate_prob" in columns else columns["clean_prob"]


def routing_of(run: Run) -> Routing:
    """The gates of the run's model."""
    routing = run.model.noiseproof_routing
    assert isinstance(routing, Routing)
    return routing
