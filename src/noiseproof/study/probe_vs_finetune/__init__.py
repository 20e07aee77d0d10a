"""Probe or fine-tune: from which rate of wrong labels on is a linear probe the better choice?

Paper: the study behind Ahn, Kim, Ko & Yun, "Fine-tuning Pre-trained Models for Robustness under
Noisy Labels" (TURN), IJCAI 2024, arXiv:2310.17668; rates and measures are ours.
Claims: fine-tuning is better under light noise and the probe under heavy noise; wrong labels bend
the features of the encoder; losses of a probe separate right from wrong labels better.
Runs: probes and full fine-tuning, with cross-entropy and GCE, probing before fine-tuning, and TURN,
at every rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from noiseproof.errors import InputError, unknown_name
from noiseproof.report.blocks import Report
from noiseproof.report.runs import Found
from noiseproof.study.contract import Asked, Study, common
from noiseproof.study.probe_vs_finetune.analysis import APPROACHES, BASELINE
from noiseproof.study.probe_vs_finetune.page import page

RATES = ("0", "0.2", "0.4", "0.6", "0.8", "0.9")
NO_NOISE = "symmetric:0"  # unlike none, it says that the given labels are right


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    rows: int
    epochs: int
    seeds: tuple[int, ...]


SIZES = {
    "small": Size(300, 6, (0, 1)),
    "default": Size(2000, 10, (0, 1, 2)),
    "full": Size(4000, 20, (0, 1, 2, 3, 4)),
}


class ProbeVsFinetune(Study):
    """Where probe and fine-tuning cross, and why."""

    name: ClassVar[str] = "probe-vs-finetune"
    title: ClassVar[str] = "Probe or fine-tune"
    summary: ClassVar[str] = (
        "From which rate of wrong labels on is a linear probe better than fine-tuning, and what "
        "becomes of the features?"
    )

    def grid(self, asked: Asked) -> dict[str, Any]:
        """Every approach at every rate."""
        size = SIZES[asked.size]
        noise = [f"symmetric:{rate}" for rate in RATES]
        if asked.clean_label is not None:
            noise = ["none"]
        values = common(self, asked, rows=size.rows, epochs=size.epochs, seeds=size.seeds,
                        noise=noise)  # fmt: skip
        if asked.clean_label is None:
            values["noise"] = [NO_NOISE if one == "none" else one for one in values["noise"]]
        if asked.data is not None and asked.test is None:
            raise InputError(
                "the study compares on test rows with right labels: give --test, a file or a share"
            )
        chosen = _chosen(asked.parts)
        job = values["job"] | {"measure_distortion": True}
        baseline = BASELINE if BASELINE in chosen else next(iter(chosen))
        return values | {"job": job, "methods": chosen, "baseline": baseline}

    def report(self, found: Found) -> Report:
        """One figure per question."""
        return page(found, self.title)


def _chosen(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The approaches that were asked for, all of them without a wish."""
    for name in names:
        if name not in APPROACHES:
            raise InputError(unknown_name("approach", name, list(APPROACHES)))
    return {name: dict(one.method) for name, one in APPROACHES.items() if name in (names or [name])}
