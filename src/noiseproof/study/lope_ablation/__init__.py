"""LoPE's ablation: which part of the method does the work, and would the compute alone do it?

Paper: Wang et al., NeurIPS 2025, arXiv:2505.23868, its tables 1 to 4, 6, 8 and figures 3, 4, on
classification in the place of instruction tuning, so orderings are tested and no value.
Runs: LoPE with other noise in the stage poison, with other numbers of experts, at other rates; what
has no poisoning expert; noisier data; data with one kind of noise while LoPE trains on another.
Inference modes come from the records of the same runs.
Compute: LoPE has two stages, so every run makes as many epochs as both together; HydraLoRA with
those of the second stage alone is the comparison that the paper prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from noiseproof.errors import InputError
from noiseproof.method import require
from noiseproof.report.blocks import Report
from noiseproof.report.runs import Found
from noiseproof.study.contract import Asked, Study, common
from noiseproof.study.lope_ablation.analysis import (
    BY_CHARACTER,
    DATA,
    EXPERTS,
    HYDRA,
    KINDS,
    LOPE,
    LORA,
    MAIN,
    MISMATCHED,
    RANKS,
    RATES,
    SHORT,
)
from noiseproof.study.lope_ablation.page import page

TEST_NOISE = "text:0.3"
EXPERT_LORA = 12  # rank at which LoRA has as many active parameters where width in = out


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    rows: int
    epochs: int
    seeds: tuple[int, ...]
    noise: tuple[str, ...]
    data_rates: tuple[float, ...]
    rates: tuple[float, ...]


SIZES = {
    "small": Size(300, 6, (0, 1), ("text:0.05",), (0.3,), (0.15,)),
    "default": Size(1500, 10, (0, 1, 2), ("text:0.05",), (0.1, 0.3), (0.035, 0.1, 0.15)),
    "full": Size(
        4000, 20, (0, 1, 2, 3, 4), ("text:0.05", "none", "symmetric:0.2"),
        (0.035, 0.08, 0.1, 0.2, 0.3), (0.035, 0.1, 0.15),
    ),
}  # fmt: skip


def lope(**settings: Any) -> dict[str, Any]:
    """LoPE with settings of its own."""
    return {"name": "LoPE", **settings}


METHODS: dict[str, dict[str, Any]] = {
    LOPE: lope(more_modes=True),
    KINDS["discrete"]: lope(emb_noise_mode="off"),
    KINDS["continuous"]: lope(noise_ops=[], target_noise_rate=0.0),
    KINDS["none"]: {"name": "LoPE:no-noise"},
    BY_CHARACTER: lope(noise_unit="char"),
    EXPERTS["3/2"]: lope(num_poison_experts=2),
    EXPERTS["2/2"]: lope(num_experts=2, num_poison_experts=2),
    EXPERTS["2/1"]: lope(num_experts=2),
    RANKS[2]: lope(rank=2),
    RANKS[8]: lope(rank=8),
    HYDRA: {"name": "LoPE:hydralora"},
    "HydraLoRA, 4 experts": {"name": "LoPE:hydralora", "num_experts": 4},
    "HydraLoRA, noise": {"name": "LoPE:hydralora-noise"},
    "HydraLoRA, NEFTune": {"name": "LoPE:hydralora-neftune"},
    LORA: {"name": "CrossEntropy", "tune": "lora", "rank": EXPERT_LORA},
}


class LopeAblation(Study):
    """Which part of LoPE does the work."""

    name: ClassVar[str] = "lope-ablation"
    title: ClassVar[str] = "LoPE, part by part"
    summary: ClassVar[str] = (
        "Which noise, experts and inference mode does LoPE need, and does it beat HydraLoRA with "
        "as much compute?"
    )

    def grid(self, asked: Asked) -> dict[str, Any]:
        """Parts: the variants, an epoch less, noise rates, noisier data, mismatched noise."""
        if asked.data is not None and asked.test is None:
            raise InputError(
                "the study measures test rows, clean and corrupted: give --test, a file or a share "
                "such as 0.2"
            )
        require(
            asked.epochs is None or asked.epochs >= 2,
            f"LoPE has two stages: epochs must be at least 2, got {asked.epochs}",
        )
        require(asked.task == "text", f"LoPE needs rows of text; got --task {asked.task}")
        require(not asked.parts, "the study has no parts to leave out; give none")
        size = SIZES[asked.size]
        values = common(self, asked, rows=size.rows, epochs=size.epochs, seeds=size.seeds,
                        noise=size.noise)  # fmt: skip
        values["job"] = values["job"] | {"test_noise": TEST_NOISE}
        noise, epochs = values["noise"], values["train"]["epochs"]
        rated = {f"LoPE, rate {rate:g}": lope(noise_rate=rate, emb_noise_alpha=rate)
                 for rate in size.rates}  # fmt: skip
        single = {f"LoPE trained on {own}": lope(noise_ops=[own], emb_noise_mode=shaken)
                  for _, own, shaken in MISMATCHED}  # fmt: skip
        parts: list[dict[str, Any]] = [
            {"name": MAIN, "methods": list(METHODS)},
            {"name": SHORT, "methods": [HYDRA], "train": {"epochs": epochs - 1}},
            {"name": RATES, "methods": list(rated), "noise": noise[:1]},
        ]
        scanned = [f"text:{rate:g}" for rate in size.data_rates]
        more = [one for one in scanned if one not in noise]
        if more:
            parts.append({"name": DATA, "methods": [LOPE, HYDRA, LORA], "noise": more})
        for kind, own, _ in MISMATCHED:
            parts.append(
                {
                    "name": f"data {kind}",
                    "methods": [f"LoPE trained on {own}", HYDRA],
                    "noise": [f"text:0.05,kind={kind}"],
                }
            )
        return values | {"baseline": HYDRA, "methods": METHODS | rated | single, "part": parts}

    def report(self, found: Found) -> Report:
        """The orderings, and what they rest on."""
        return page(found, self.title)
