"""Spectra: how many directions the features of models use, on the same rows, side by side.

Paper: the measures of Chen et al., "Understanding and Mitigating the Label Noise in Pre-training on
Downstream Tasks" (NMTune), ICLR 2024, arXiv:2309.17002, as `noiseproof.spectrum` reads them.
Models: pre-trained ones, and finished runs; of a run of NMTune also the features that it reshapes.
Rows of features are compared as they are given. Nothing is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from noiseproof.errors import InputError
from noiseproof.method import require
from noiseproof.record import versions, write_atomic
from noiseproof.report.writing import as_html, as_markdown
from noiseproof.spectrum import entry_moments, principal_angles, spectrum
from noiseproof.study.contract import Asked, Survey
from noiseproof.study.spectrum.page import as_table, page
from noiseproof.study.spectrum.seeing import features_of, read_rows

ROWS: dict[str, int | None] = {"small": 300, "default": 2000, "full": None}
DIRECTIONS = 5  # leading directions that are compared with those of the first model
RECORD = "spectrum.json"
UNUSED = ("test", "clean_label", "noise", "parts", "epochs", "batch_size")


class Spectra(Survey):
    """Spectra, singular value entropy and largest singular value ratio of any models."""

    name: ClassVar[str] = "spectrum"
    title: ClassVar[str] = "Spectra of features"
    summary: ClassVar[str] = (
        "How many directions do the features of some models and runs use, on the same rows?"
    )

    def measure(self, asked: Asked, folder: Path) -> None:
        """Write ``spectrum.json``: a spectrum per model, and how the rows were chosen."""
        for name in UNUSED:
            require(
                not getattr(asked, name),
                f"study {self.name} trains nothing; leave --{name.replace('_', '-')} out",
            )
        require(len(set(asked.models)) == len(asked.models), "a model stands twice in --model")
        seed = asked.seeds[0] if asked.seeds else 0
        rows = read_rows(asked, asked.sample or ROWS[asked.size], seed)
        found: list[dict[str, Any]] = []
        first = None
        for model in asked.models:
            for name, table in features_of(model, rows, asked).items():
                seen = spectrum(table, asked.preprocess)
                first = table if first is None else first
                found.append(
                    {
                        "name": name,
                        **seen.to_dict(),
                        **entry_moments(table),
                        "angles": _angles(first, table, asked.preprocess),
                    }
                )
        values = {
            "data": asked.data_name,
            "task": asked.task,
            "rows": len(rows),
            "seed": seed,
            "preprocess": asked.preprocess,
            "models": found,
            "versions": versions(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RECORD, json.dumps(values) + "\n")

    def pages(self, folder: Path) -> list[Path]:
        """Write ``study.html``, ``study.md`` and ``study.csv``, one row per model."""
        path = folder / RECORD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"there is no {path} yet; leave --pages out") from error
        report = page(values, self.title)
        texts = {"html": as_html(report), "md": as_markdown(report), "csv": as_table(values)}
        for suffix, text in texts.items():
            write_atomic(folder / f"study.{suffix}", text)
        return [folder / f"study.{suffix}" for suffix in texts]


def _angles(first: Any, table: Any, preprocess: str) -> list[float] | None:
    """Angles to the leading directions of the first model; None where a rank is too small."""
    try:
        return [float(angle) for angle in principal_angles(first, table, DIRECTIONS, preprocess)]
    except InputError:
        return None
