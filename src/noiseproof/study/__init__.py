"""Studies: a grid of runs, and what their records say about a claim, on one page.

A study is a file here and a line in `STUDIES`: which runs it needs (`Study.grid`, run by the
benchmark) and what it makes of their records (`Study.report`, written by the report). A `Survey`
is no grid: it measures what it needs itself.
"""

from __future__ import annotations

from noiseproof.errors import InputError, unknown_name
from noiseproof.study.contract import SIZES, Asked, Study, Survey
from noiseproof.study.lope_ablation import LopeAblation
from noiseproof.study.noisy_pretraining import NoisyPretraining
from noiseproof.study.peft_under_noise import PeftUnderNoise
from noiseproof.study.probe_vs_finetune import ProbeVsFinetune
from noiseproof.study.running import plan, write_pages
from noiseproof.study.spectrum import Spectra

STUDIES: dict[str, Study | Survey] = {
    study.name: study
    for study in (
        PeftUnderNoise(),
        ProbeVsFinetune(),
        LopeAblation(),
        NoisyPretraining(),
        Spectra(),
    )
}

__all__ = ["SIZES", "STUDIES", "Asked", "Study", "Survey", "find_study", "plan", "write_pages"]


def find_study(name: str) -> Study | Survey:
    """The study of a name.

    Raises:
        InputError: There is none; names the nearest.
    """
    if name not in STUDIES:
        raise InputError(unknown_name("study", name, list(STUDIES)))
    return STUDIES[name]
