"""LoPE: asymmetric LoRA with a poisoning expert.

Paper: Wang, Guo, Pu, Chen, Pu, Ou, Qin & Tian, "Noise-Robustness Through Noise: A Framework
combining Asymmetric LoRA with Poisoning MoE" (NeurIPS 2025, arXiv:2505.23868). No code by its
authors is known, and the printed equations of its two stages and of the compensation were not
available to us: they follow its prose.
The layer is HydraLoRA's (Tian et al., NeurIPS 2024, arXiv:2404.19245).
Idea: noise in the data is learned somewhere. Give it a place of its own: an expert that is trained
first on data made noisier on purpose, kept frozen while the others learn, and left out at the end.
Steps: (1) stage poison: texts of some rows are shuffled, given extra characters or robbed of some,
some labels are flipped, token embeddings shake; the shared A and the poisoning expert train; (2)
stage adapt: on the data as given, A, the normal experts and the router train while the poisoning
expert stays as it is and takes part; (3) the similarity theta of each normal expert to the
poisoning one is measured; (4) at inference the poisoning expert is masked, and the weights of the
others are multiplied by 1 + theta and normalised to the weight that they had together.
Deviations: the stage poison takes one of train.epochs (epoch_budget=per_stage gives each stage all
of them; published runs have one epoch each): with more, the poisoning expert learns the task, and
masking it costs most of the accuracy of a classifier; with weights that sum to one the others add
more than they did in training, which cost 2 to 14 points (docs/results/lope-defaults.md); embedding
noise is relative to the embeddings' size (the paper's 0.05 is absolute, and scales differ between
models); it is drawn by row and epoch, not from one stream; the head trains in both stages and
starts anew in the second where labels were flipped in the first (the paper has no classifiers).
poison_dropout and more_modes are ours: language models lost most of what they had learned with the
poisoning expert left out, unless half of the rows went without it in training.
Settings: rank = 4, three normal experts and one, noise_rate = 0.05 (paper); alpha = 32,
lora_dropout = 0.05, the router reads x (code of HydraLoRA); noise by row with 10 % of the
characters, beta, the moment at which theta is taken (ours); learning_rate 2e-3 (ours, as for LoRA;
paper 2e-4 for 7 billion parameters). Presets: default, paper (also called sft, after its task: an
epoch for each stage, rate 2e-4, absolute noise, weights that sum to one), the layer alone
(hydralora), its controls (hydralora-noise, hydralora-neftune, no-noise). To the preset paper
belong, of the run: one epoch, --train.batch_size 8 --train.schedule cosine
--train.warmup_share 0.03 --train.weight_decay 0.
Needs: rows of text; no noise rate, no clean rows. Query and value projections must be known or be
named (target_modules).
Cost: with epoch_budget=total that of LoRA with as many epochs, one more pass over at most
theta_examples rows and two over at most 200; with per_stage twice that. Weights depend on the
token, so nothing is merged; beside LoRA of peft with as many active parameters
(docs/results/lope-cost.json) a step took 1.0 times as long in an encoder, 1.1 times in its layers
alone, and kept .90 of the memory; generation had .90 of the speed, .83 of that of merged LoRA.
Model: model/ holds experts, routers and head; noiseproof.load puts them into the encoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.experts.mixing import (
    MODES,
    Experts,
    check_compensation,
    embedding_noise,
    rms_of_tokens,
)
from noiseproof.experts.model import FUSED, ExpertModel
from noiseproof.experts.watching import Watch
from noiseproof.frozen import feature_position
from noiseproof.method import (
    Batch,
    Columns,
    Method,
    Run,
    Stage,
    losses_of,
    require,
    require_range,
)
from noiseproof.metrics import detection
from noiseproof.models import is_language_model, set_dropout, start_head, trial_inputs
from noiseproof.noise import Symmetric
from noiseproof.textnoise import CHARSETS, OPERATIONS, UNITS, TextNoise, row_random
from noiseproof.tuning import usual_rate

POISON, ADAPT = "poison", "adapt"
GROUPS = ("A", "B", "BD", "gate", "head")
EMBEDDING_NOISE = ("absolute", "relative", "neftune", "off")
DIAGNOSED_ROWS = 200  # rows whose corrupted copy is shown to the router at the end
TOKEN_DROPOUT = 0.5  # poison_dropout for responses, see docs/results/lope-defaults.md
SAMPLED = 4096  # values of a tensor of the frozen model that its seal covers


@dataclass(frozen=True)
class LoPE(Method):
    """Let a poisoning expert absorb noise, and leave it out at the end.

    Attributes:
        rank: Rank of the shared down-projection and of every expert.
        alpha: Scaling numerator; updates are scaled by alpha / rank.
        dropout: Dropout of the encoder; None keeps the model's own.
        lora_dropout: On the input of the down-projection.
        dropout_mode: Masks of lora_dropout: shared (one a layer), or per_expert (costs a product
            more each).
        target_modules: Ends of the names of linear modules; None takes query and value.
        num_experts: Normal experts.
        num_poison_experts: Poisoning experts; 0 is HydraLoRA, with the stage adapt alone.
        gate_input: What the router reads: x, or Ax.
        gate_init: kaiming, or normal.
        balance_weight: Weight of the squared coefficient of variation of the normal experts' load.
        train_poison: What trains in the stage poison: some of A, B, BD, gate, head.
        train_adapt: What trains in the stage adapt.
        epoch_budget: total (train.epochs is for both stages), or per_stage.
        poison_epochs: epoch_budget=total: epochs of the stage poison; the rest is for adapt.
        learning_rate: Of both stages; None is 2e-3.
        head_policy: Head at the start of the stage adapt: carry, restore (as before training),
            reinit (drawn anew), or auto (restore where labels were flipped and the head trains
            again).
        noise_rate: Share of rows, words or characters that are corrupted in a noisy stage.
        noise_unit: sample (rows), word or char.
        noise_ops: Which of shuffle, insert and delete; none leaves texts as they are.
        char_strength: noise_unit=sample: share of the characters that are inserted or deleted.
        shuffle_window: noise_unit=sample: words change places inside windows of so many; 0 is all.
        noise_charset: Inserted characters: ascii or keyboard.
        target_noise_rate: Share of labels that are flipped, or of responses that are corrupted;
            None is noise_rate, and responses then suffer with their prompts.
        noise_resample: static (drawn once for the stage), or epoch.
        noise_stages: Which stages are noisy: some of poison and adapt.
        noise_seed: Seed of that noise; None follows the run's.
        emb_noise_mode: absolute, relative (to the root mean square of embeddings), neftune, or off.
        emb_noise_alpha: Its amplitude.
        emb_noise_prob: Share of rows that get it in a step.
        adapt_forward: How the poisoning expert counts in the stage adapt: none (it takes part as
            it is), mask, renorm or compensate.
        poison_dropout: adapt_forward=none: share of rows that go without the poisoning expert in a
            step of the stage adapt, with weights as at inference; the others learn to do without.
            None is 0.5 for responses and 0 for classes; a record without it had 0.
        inference_mode: How it counts at inference: none, mask, renorm or compensate.
        theta_mode: calibrate (one similarity a layer), or online (of every token).
        theta_examples: Training rows that calibrate.
        compensate_sign: Sign of the similarities; 0 leaves them out: compensate is then mask with
            beta=keep_mass, and renorm with sum_to_one.
        compensate_k: Experts that are compensated; None is all.
        compensate_order: Which: theta (most similar first) or index.
        beta: sum_to_one, keep_mass, or a factor.
        more_modes: Measure compensation with other signs, sums and numbers of experts too, and
            with similarities that are calibrated or of every token.
        save_poison: Keep the poisoning experts in model/; without them the mode none is gone.
        responses: Whether the last text of a row is its response; set by the task causal-lm.
    """

    rank: int = 4
    alpha: float = 32.0
    dropout: float | None = None
    lora_dropout: float = 0.05
    dropout_mode: str = "shared"
    target_modules: tuple[str, ...] | None = None
    num_experts: int = 3
    num_poison_experts: int = 1
    gate_input: str = "x"
    gate_init: str = "kaiming"
    balance_weight: float = 0.0
    train_poison: tuple[str, ...] = ("A", "BD", "head")
    train_adapt: tuple[str, ...] = ("A", "B", "gate", "head")
    epoch_budget: str = "total"
    poison_epochs: int = 1
    learning_rate: float | None = None
    head_policy: str = "auto"
    noise_rate: float = 0.05
    noise_unit: str = "sample"
    noise_ops: tuple[str, ...] = OPERATIONS
    char_strength: float = 0.1
    shuffle_window: int = 4
    noise_charset: str = "ascii"
    target_noise_rate: float | None = None
    noise_resample: str = "static"
    noise_stages: tuple[str, ...] = (POISON,)
    noise_seed: int | None = None
    emb_noise_mode: str = "relative"
    emb_noise_alpha: float = 0.05
    emb_noise_prob: float = 1.0
    adapt_forward: str = "none"
    poison_dropout: float | None = None
    inference_mode: str = "compensate"
    theta_mode: str = "calibrate"
    theta_examples: int = 512
    compensate_sign: int = 1
    compensate_k: int | None = None
    compensate_order: str = "theta"
    beta: float | str = "keep_mass"
    more_modes: bool = False
    save_poison: bool = True
    responses: bool = False

    tasks: ClassVar[tuple[str, ...]] = ("text", "causal-lm")
    merges: ClassVar[bool] = False
    writes: ClassVar[tuple[str, ...]] = ("noisy_loss", "embedding_noise")
    later: ClassVar[Mapping[str, Any]] = {"poison_dropout": None, "more_modes": False}

    def __post_init__(self) -> None:
        """Every setting is in range, and they fit each other."""
        for name, choices in (
            ("dropout_mode", ("shared", "per_expert")),
            ("gate_input", ("x", "Ax")),
            ("gate_init", ("kaiming", "normal")),
            ("epoch_budget", ("total", "per_stage")),
            ("head_policy", ("auto", "carry", "restore", "reinit")),
            ("noise_unit", UNITS),
            ("noise_charset", CHARSETS),
            ("noise_resample", ("static", "epoch")),
            ("emb_noise_mode", EMBEDDING_NOISE),
            ("adapt_forward", MODES),
            ("inference_mode", MODES),
            ("theta_mode", ("calibrate", "online")),
        ):
            value = getattr(self, name)
            require(
                value in choices, f"LoPE.{name} must be one of {', '.join(choices)}; got {value!r}"
            )
        for name in ("rank", "num_experts", "theta_examples"):
            value = getattr(self, name)
            require(value >= 1, f"LoPE.{name} must be at least 1, got {value}")
        for name, low, high in (
            ("alpha", 0, 1e6),
            ("balance_weight", 0, 1e6),
            ("emb_noise_alpha", 0, 1e6),
            ("emb_noise_prob", 0, 1),
        ):
            require_range("LoPE", name, getattr(self, name), low, high, open_low=name == "alpha")
        require_range("LoPE", "lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        if self.dropout is not None:
            require_range("LoPE", "dropout", self.dropout, 0, 1, open_high=True)
        require_range("LoPE", "noise_rate", self.noise_rate, 0, 1, open_high=True)
        if self.target_noise_rate is not None:
            require_range("LoPE", "target_noise_rate", self.target_noise_rate, 0, 1, open_high=True)
        if self.poison_dropout is not None:
            require_range("LoPE", "poison_dropout", self.poison_dropout, 0, 1)
        if self.learning_rate is not None:
            require_range("LoPE", "learning_rate", self.learning_rate, 0, 10, open_low=True)
        poison = self.num_poison_experts
        require(poison in (0, 1, 2), f"LoPE.num_poison_experts must be 0, 1 or 2, got {poison}")
        require(
            poison > 0 or (self.inference_mode, self.adapt_forward) == ("none", "none"),
            "LoPE without a poisoning expert has nothing to mask: inference_mode and adapt_forward "
            "must be none; use the preset hydralora",
        )
        require(
            self.save_poison or self.inference_mode != "none" or not poison,
            "LoPE.save_poison=False leaves out what inference_mode=none answers with; use mask, "
            "renorm or compensate, or keep the poisoning experts",
        )
        require(
            not self.poison_dropout or (poison > 0 and self.adapt_forward == "none"),
            "LoPE.poison_dropout leaves a poisoning expert out that takes part otherwise: it needs "
            f"adapt_forward=none and num_poison_experts of 1 or 2; got {self.adapt_forward} and "
            f"{poison}",
        )
        for name in ("train_poison", "train_adapt"):
            groups = getattr(self, name)
            require(
                len(groups) > 0 and set(groups) <= set(GROUPS),
                f"LoPE.{name} must name some of {', '.join(GROUPS)}; got {groups}",
            )
        require(
            set(self.noise_stages) <= {POISON, ADAPT},
            f"LoPE.noise_stages must name some of {POISON}, {ADAPT}; got {self.noise_stages}",
        )
        require(
            set(self.noise_ops) <= set(OPERATIONS),
            f"LoPE.noise_ops must name some of {', '.join(OPERATIONS)}; got {self.noise_ops}",
        )
        require(
            self.poison_epochs >= 1,
            f"LoPE.poison_epochs must be at least 1, got {self.poison_epochs}",
        )
        require(
            self.poison_epochs == 1 or self.epoch_budget == "total",
            f"LoPE.poison_epochs={self.poison_epochs} shares out train.epochs, and with "
            "epoch_budget=per_stage each stage has all of them; leave one of the two out",
        )
        require(
            self.head_policy not in ("restore", "reinit") or "head" in self.train_adapt,
            f"LoPE.head_policy={self.head_policy} needs a head that trains again: put head into "
            f"train_adapt, got {self.train_adapt}",
        )
        check_compensation(
            self._compensation,
            self.num_experts,
            {
                "sign": "LoPE.compensate_sign",
                "most": "LoPE.compensate_k",
                "order": "LoPE.compensate_order",
                "beta": "LoPE.beta",
            },
        )
        seed = self.noise_seed
        require(
            seed is None or 0 <= seed < 2**32, f"LoPE.noise_seed must lie in [0, 2^32), got {seed}"
        )
        self.text_noise(0.5)

    @classmethod
    def presets(cls) -> dict[str, LoPE]:
        """Default, the published settings, HydraLoRA and the controls."""
        hydra: dict[str, Any] = {
            "num_poison_experts": 0,
            "noise_stages": (),
            "inference_mode": "none",
            "beta": "sum_to_one",  # nothing is left out, so nothing is summed anew
        }
        noisy = hydra | {"noise_stages": (ADAPT,)}
        published: dict[str, Any] = {
            "emb_noise_mode": "absolute",
            "epoch_budget": "per_stage",
            "learning_rate": 2e-4,
            "beta": "sum_to_one",
            "poison_dropout": 0.0,
        }
        return {
            "default": cls(),
            "paper": cls(**published),
            "sft": cls(**published),
            "hydralora": cls(**hydra),
            "hydralora-noise": cls(**noisy),
            "hydralora-neftune": cls(
                **noisy,
                noise_ops=(),
                target_noise_rate=0.0,
                emb_noise_mode="neftune",
                emb_noise_alpha=5.0,
            ),
            "no-noise": cls(noise_stages=()),
        }

    # --- hooks -----------------------------------------------------------------------------------

    def for_tokens(self) -> LoPE:
        """The last text of a row is its response, which suffers as the prompt does."""
        require(
            self.head_policy != "reinit",
            "LoPE.head_policy=reinit draws a head anew, and with task causal-lm there is no new "
            "one; leave it out",
        )
        require(
            bool(self.noise_ops) or not self.target_noise_rate,
            f"LoPE.target_noise_rate={self.target_noise_rate} corrupts responses by noise_ops, and "
            f"there are none; name some of {', '.join(OPERATIONS)}, or leave it out",
        )
        left_out = self.poison_dropout
        takes_part = self.num_poison_experts > 0 and self.adapt_forward == "none"
        if left_out is None and takes_part and not self.responses:
            left_out = TOKEN_DROPOUT
        # With responses None is 0, so that records from before the setting say what was done.
        return dataclasses.replace(self, responses=True, poison_dropout=left_out or None)

    def prepare_model(self, model: nn.Module) -> ExpertModel:
        """Put experts beside the target modules; they start as if they were not there."""
        require(
            self.responses == is_language_model(model),
            f"LoPE.responses={self.responses} does not fit a {type(model).__name__}: the task says "
            "whether rows have responses; leave it out",
        )
        require(
            self.responses or not self.num_poison_experts or "head" in self.train_poison,
            "LoPE.train_poison without head would train the poisoning expert against a new head "
            f"that never trained; put head into it, got {self.train_poison}",
        )
        if self.dropout is not None:
            set_dropout(model, self.dropout)
        adapted = ExpertModel(
            model,
            Experts(
                rank=self.rank,
                alpha=self.alpha,
                dropout=self.lora_dropout,
                dropout_mode=self.dropout_mode,
                targets=self.target_modules,
                normal=self.num_experts,
                poison=self.num_poison_experts,
                gate_input=self.gate_input,
                gate_init=self.gate_init,
                **self._compensation,
            ),
        )
        adapted.save_poison = self.save_poison
        return adapted

    def stages(self, epochs: int) -> list[Stage]:
        """The stages poison and adapt; without a poisoning expert the second alone."""
        if not self.num_poison_experts:
            return [self._stage(ADAPT, epochs)]
        separate = self.epoch_budget == "per_stage"
        first = epochs if separate else self.poison_epochs
        rest = epochs if separate else epochs - first
        require(
            first >= 1 and rest >= 1,
            f"LoPE has two stages of at least one epoch, train.epochs={epochs} leaves {first} and "
            f"{rest}; give more epochs, or epoch_budget=per_stage",
        )
        return [self._stage(POISON, first), self._stage(ADAPT, rest)]

    def _stage(self, name: str, epochs: int) -> Stage:
        return Stage(
            name,
            epochs,
            trains=trains_groups(self.train_poison if name == POISON else self.train_adapt),
            learning_rate=self.learning_rate or usual_rate("lora"),
            transform=self._transform(name),
            redraw=self.noise_resample == "epoch",
            selectable=name == ADAPT,
        )

    def on_stage_start(self, run: Run) -> None:
        """Check what the last stage must have left alone, seal what this one must, set modes."""
        model = experts_of(run)
        check_seal(model)
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        model.seal = {name: digest(name, tensor) for name, tensor in frozen.items()}
        poisoning = run.stage == POISON
        model.switch.training_mode = "none" if poisoning else self.adapt_forward
        if self.num_poison_experts:
            model.switch.absent_mode = self._without
            keeps = poisoning or self.inference_mode == "none"
            model.switch.mode = "none" if keeps else self._without

    def on_epoch_start(self, run: Run) -> Columns:
        """Labels of a noisy stage, and which rows it corrupts; the head at the start of adapt."""
        model = experts_of(run)
        if run.epoch == 0 and run.stage == ADAPT and self.num_poison_experts:
            model.keep_down()
            poisons = (
                up for layer in model.layers.values() for up in layer.up()[self.num_experts :]
            )
            if not any(bool(up.any()) for up in poisons):
                run.warn(
                    "the poisoning expert learned nothing in the stage poison, so masking it "
                    "changes nothing; put BD into train_poison, or raise the learning rate"
                )
            if self._restores_head:
                model.restore_head()
            elif self.head_policy == "reinit":
                with torch.random.fork_rng():
                    torch.manual_seed(int(torch.randint(2**62, (), generator=run.generator)))
                    start_head(model, getattr(model.config, "initializer_range", 0.02), hidden=True)
        noisy = run.stage in self.noise_stages
        if run.epoch == 0 and run.stage == POISON and not (noisy and self._adds_noise):
            run.warn("the stage poison adds no noise, so the poisoning expert learns what all do")
        if not noisy:
            return {}
        labels, flipped = run.labels, torch.zeros(len(run.labels), dtype=torch.bool)
        rate = self._target_rate
        if not self.responses and rate > 0:
            epoch = run.epoch if self.noise_resample == "epoch" else 0
            seed = int(row_random("lope-labels", self._seed(run.seed), 0, epoch).integers(2**32))
            drawn = Symmetric(rate).apply(run.labels.numpy(), run.num_classes, seed)
            labels, flipped = torch.from_numpy(drawn.labels), torch.from_numpy(drawn.mask)
        changed = flipped if run.changed is None else run.changed | flipped
        run.log(corrupted_share=float(changed.double().mean()))
        blank = torch.zeros(len(labels))
        found = {"noisy_label": labels, "corrupted": changed, "noisy_loss": blank}
        return found | ({"embedding_noise": blank.clone()} if self._shakes else {})

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Cross-entropy, on the labels and with the embedding noise of a noisy stage."""
        experts = experts_of(run)
        noisy = run.stage in self.noise_stages
        experts.noise = self._shaker(run, batch) if noisy and self._shakes else None
        if noisy and "noisy_label" in batch.columns:
            batch = dataclasses.replace(batch, labels=batch.columns["noisy_label"])
        experts.switch.loads = [] if self.balance_weight else None
        experts.switch.poison = [] if self.num_poison_experts else None
        experts.switch.absent = self._absent(run, batch)
        losses = losses_of(model, batch)
        experts.noise = experts.switch.absent = None
        if experts.switch.poison:
            run.average(len(losses), poison_weight=float(torch.stack(experts.switch.poison).mean()))
        experts.switch.poison = None
        if noisy:
            run.write("noisy_loss", batch, losses)
            self._log_noise(run, batch, losses)
        loss = losses.mean()
        if self.balance_weight:
            loads = torch.stack(experts.switch.loads or [])  # (layers, NE)
            spread = loads.var(dim=1, correction=0) / loads.mean(dim=1).square()
            loss = loss + self.balance_weight * spread.mean()
            experts.switch.loads = None
        return loss

    def _log_noise(self, run: Run, batch: Batch, losses: Tensor) -> None:
        """Put the losses (B,) of corrupted and other rows into the history, and the shaking."""
        hit = run.columns["corrupted"][batch.rows]
        for name, rows in (("loss_corrupted", hit), ("loss_others", ~hit)):
            if bool(rows.any()):
                own = losses.detach()[rows.to(losses.device)]
                run.average(len(own), **{name: float(own.mean())})
        if self._shakes:
            shaken = run.columns["embedding_noise"][batch.rows]
            run.average(len(shaken), embedding_noise=float(shaken.mean()))

    def _absent(self, run: Run, batch: Batch) -> Tensor | None:
        """Rows (B,) of a batch that go without the poisoning expert, by row and epoch."""
        if run.stage != ADAPT or not self.poison_dropout:
            return None
        draws = [
            row_random("lope-dropout", run.seed, row, run.epoch).random()
            for row in batch.rows.tolist()
        ]
        return torch.tensor(draws, device=batch.labels.device) < self.poison_dropout

    def finalize_model(self, run: Run) -> nn.Module:
        """Measure the similarities, look at the router, and answer as ``inference_mode`` says."""
        model = experts_of(run)
        check_seal(model)
        model.remove_noise()
        if "noisy_loss" in run.columns:
            run.findings["noise"] = noise_seen(run.columns)
        if not self.num_poison_experts:  # it answers as it did in training
            return model
        model.switch.mode = "none"
        order = np.random.default_rng([run.seed, 41]).permutation(len(run.labels))
        watch = self._watch(run, order[: self.theta_examples])
        for name, layer in model.layers.items():
            layer.calibrate(watch.theta(name))
        run.findings["experts"] = self._diagnosis(run, watch, order[:DIAGNOSED_ROWS])
        model.set_inference_mode(self.inference_mode)
        run.forget()
        return model

    def modes(self, model: nn.Module) -> Mapping[str, Callable[[], None]]:
        """All inference modes, the deployed one last."""
        if not self.num_poison_experts or not isinstance(model, ExpertModel):
            return {}
        own = self._compensation
        found = {name: partial(model.set_inference_mode, name, **own) for name in MODES}
        if self.more_modes:
            others: dict[str, dict[str, Any]] = {
                "sum to one": {"beta": "sum_to_one"},
                "mass kept": {"beta": "keep_mass"},
                "sign -1": {"sign": -1},
                "sign 0": {"sign": 0},
                "calibrated": {"online": False},
                "online": {"online": True},
            }
            for most in range(self.num_experts):
                others[f"{most} of {self.num_experts}"] = {"most": most}
            for name, changes in others.items():
                switch = partial(model.set_inference_mode, "compensate", **own | changes)
                found[f"compensate, {name}"] = switch
        return found | {self.inference_mode: found.pop(self.inference_mode)}

    # --- noise -----------------------------------------------------------------------------------

    def text_noise(self, rate: float) -> TextNoise | None:
        """How texts are corrupted; None leaves them as they are."""
        if not self.noise_ops:
            return None
        return TextNoise(
            rate,
            self.noise_unit,
            self.noise_ops,
            self.char_strength,
            self.shuffle_window,
            self.noise_charset,
        )

    @property
    def _compensation(self) -> dict[str, Any]:
        """The settings of `COMPENSATION`."""
        return {
            "online": self.theta_mode == "online",
            "sign": self.compensate_sign,
            "most": self.compensate_k,
            "order": self.compensate_order,
            "beta": self.beta,
        }

    @property
    def _target_rate(self) -> float:
        return self.noise_rate if self.target_noise_rate is None else self.target_noise_rate

    @property
    def _shakes(self) -> bool:
        return self.emb_noise_mode != "off" and self.emb_noise_alpha > 0

    @property
    def _adds_noise(self) -> bool:
        targets = self._target_rate > 0 and (not self.responses or bool(self.noise_ops))
        return targets or (self.noise_rate > 0 and bool(self.noise_ops)) or self._shakes

    @property
    def _without(self) -> str:
        """The mode next to inference_mode that needs no similarities: mask or renorm."""
        if self.inference_mode in ("mask", "renorm"):
            return self.inference_mode
        return "mask" if self.beta == "keep_mass" else "renorm"

    @property
    def _restores_head(self) -> bool:
        flips = POISON in self.noise_stages and self._target_rate > 0 and not self.responses
        again = flips and "head" in self.train_adapt
        return self.head_policy == "restore" or (self.head_policy == "auto" and again)

    def _seed(self, seed: int) -> int:
        return seed if self.noise_seed is None else self.noise_seed

    def _transform(self, stage: str) -> Callable[..., tuple[str, ...]] | None:
        noise = self.text_noise(self.noise_rate)
        if stage not in self.noise_stages or noise is None:
            return None
        own = self.text_noise(self._target_rate) if self.target_noise_rate is not None else None
        if self.noise_rate == 0 and (own is None or own.rate == 0 or not self.responses):
            return None

        def transform(texts: tuple[str, ...], row: int, epoch: int, seed: int) -> tuple[str, ...]:
            random = row_random("lope", self._seed(seed), row, epoch)
            if not self.responses or own is None:
                return noise.apply(texts, random)
            *asked, response = texts  # the response has a draw of its own
            other = row_random("lope-response", self._seed(seed), row, epoch)
            return (*noise.apply(tuple(asked), random), *own.apply((response,), other))

        return transform

    def _shaker(self, run: Run, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives noise for the embeddings of one batch, by row and epoch.

        Encoder and decoder ask one after the other, and a row's draws go on.
        """
        draws = [
            row_random("lope-embeddings", self._seed(run.seed), row, run.epoch)
            for row in batch.rows.tolist()
        ]
        hit = torch.tensor([random.random() < self.emb_noise_prob for random in draws])
        ratios = []

        def shake(embeddings: Tensor, mask: Tensor) -> Tensor:
            kind, alpha = self.emb_noise_mode, self.emb_noise_alpha
            noise = embedding_noise(embeddings, mask, draws, kind, alpha)
            noise = noise * hit.to(embeddings.device)[:, None, None]
            with torch.no_grad():
                size = rms_of_tokens(embeddings, mask).clamp_min(1e-12)
                ratios.append(rms_of_tokens(noise, mask) / size)
            run.write("embedding_noise", batch, torch.stack(ratios).mean(dim=0))
            return noise

        return shake

    # --- looking at the router -------------------------------------------------------------------

    def _watch(
        self, run: Run, rows: np.ndarray, transform: Callable[..., tuple[str, ...]] | None = None
    ) -> Watch:
        """What the layers see of these rows, over all processes."""
        place = {int(row): number for number, row in enumerate(rows)}
        with experts_of(run).watching(len(rows)) as watch:

            def before(some: Tensor) -> None:
                numbers = some.tolist()
                watch.begin(numbers if transform else [place[row] for row in numbers])

            run.predict(before, torch.from_numpy(rows.copy()), transform)
        watch.gather()
        return watch

    def _diagnosis(self, run: Run, watch: Watch, rows: np.ndarray) -> dict[str, Any]:
        """Layer by layer what the router does, and whether it knows corrupted texts.

        Args:
            run: Its model is calibrated.
            watch: What calibrated it.
            rows: Row numbers that are looked at once as they are and once corrupted.
        """
        model = experts_of(run)
        noise = TextNoise(1.0, strength=self.char_strength, window=self.shuffle_window)

        def corrupt(texts: tuple[str, ...], row: int, epoch: int, seed: int) -> tuple[str, ...]:
            return noise.apply(texts, row_random("lope-diagnosis", seed, row))

        seen, corrupted = self._watch(run, rows), self._watch(run, rows, corrupt)
        first = not self.responses and feature_position(model, trial_inputs(model)) == "first"
        table = watch.table()
        for row, again in zip(table, seen.table(), strict=True):
            row |= {name: again[name] for name in again if name.startswith("update_")}
            row |= model.layers[row["layer"]].drift()
            if not first:
                del row["theta_first"]
        numbers = [name for name, value in table[0].items() if isinstance(value, float)]
        mean = {name: float(np.mean([row[name] for row in table])) for name in numbers}
        found: dict[str, Any] = {
            "layers": table,
            "mean": mean,
            "poison_weight": mean["poison_weight"],
            "even_share": self.num_poison_experts / (self.num_experts + self.num_poison_experts),
        }
        fused = [name for name in FUSED if any(n.endswith(f".{name}") for n in model.layers)]
        if fused:
            found["fused"] = fused
        clean, noisy = seen.row_scores(), corrupted.row_scores()
        scores = np.concatenate([clean, noisy])
        wrong = np.repeat([False, True], len(rows))
        found |= {
            "rows": len(rows),
            "weight_clean": float(clean.mean()),
            "weight_corrupted": float(noisy.mean()),
            "weight_difference": float((noisy - clean).mean()),
            "raised_share": float((noisy > clean).mean()),
            "noise_auroc": detection(scores, wrong)["auroc"],
        }
        return found


def noise_seen(columns: Columns) -> dict[str, float | None]:
    """What the last noisy epoch was like: how many rows it hit, losses, strength of the shaking.

    Args:
        columns: ``corrupted`` (N,) bool, ``noisy_loss`` (N,), and ``embedding_noise`` (N,) where
            embeddings were shaken.
    """
    hit, loss = columns["corrupted"], columns["noisy_loss"].double()
    parts = {"loss_corrupted": loss[hit], "loss_others": loss[~hit]}
    found: dict[str, float | None] = {"corrupted_share": float(hit.double().mean())}
    found |= {name: float(part.mean()) if len(part) else None for name, part in parts.items()}
    if "embedding_noise" in columns:
        found["embedding_noise"] = float(columns["embedding_noise"].double().mean())
    return found


def experts_of(run: Run) -> ExpertModel:
    """The run's model, as `LoPE.prepare_model` made it."""
    assert isinstance(run.model, ExpertModel)
    return run.model


def trains_groups(groups: tuple[str, ...]) -> Callable[[str], bool]:
    """Parameter name -> whether it belongs to one of these groups.

    >>> trains = trains_groups(("A", "BD"))
    >>> names = ("q.lora_A.weight", "q.lora_B0.weight", "q.lora_BD.weight", "classifier.bias")
    >>> [trains(name) for name in names]
    [True, False, True, False]
    """

    def trains(name: str) -> bool:
        return group_of(name) in groups

    return trains


def group_of(name: str) -> str:
    """The group of a parameter: A, B, BD, gate or head (whatever else may train).

    >>> [group_of(f"x.{name}.weight") for name in ("lora_B12", "lora_BD1", "lora_gate")]
    ['B', 'BD', 'gate']
    """
    for part in name.split("."):
        if part == "lora_A":
            return "A"
        if part == "lora_gate":
            return "gate"
        if part.startswith("lora_BD"):
            return "BD"
        if part.startswith("lora_B"):
            return "B"
    return "head"


def digest(name: str, tensor: Tensor) -> str:
    """Digest of a tensor, by which a change is noticed; of the frozen model's the first values."""
    values = tensor.detach().reshape(-1)
    if ".lora_" not in name:
        values = values[:SAMPLED]
    values = values.cpu().contiguous()
    return hashlib.blake2b(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def check_seal(model: ExpertModel) -> None:
    """What was frozen in the last stage is what it was.

    Raises:
        RuntimeError: Something changed it; names the tensor.
    """
    named = dict(model.named_parameters())
    for name, sealed in model.seal.items():
        if digest(name, named[name]) != sealed:
            raise RuntimeError(f"{name} was frozen in this stage of LoPE, and changed")
