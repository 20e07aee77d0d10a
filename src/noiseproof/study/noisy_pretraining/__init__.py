"""Noisy pre-training: what wrong labels in pre-training do to features and to tuning on them.

Paper: the study of Chen et al., "Understanding and Mitigating the Label Noise in Pre-training on
Downstream Tasks", ICLR 2024, arXiv:2309.17002, at a scale that runs on two cores. Their networks
are ResNet-50 on ImageNet; ours is a small convolutional one on pictures drawn by code or given.
Claims: (1) wrong labels in pre-training flatten the spectrum: SVE and LSVR of test features rise;
(2) accuracy on shifted rows (OOD) falls with them; (3) NMTune does better than its control, an MLP.
Steps: pre-train one network per rate and seed on two thirds of the classes, the wrong labels of a
rate among those of the next, all else equal; take features of rows of the other classes, and of
rows of the same classes that were kept apart; tune LP, MLP and both presets of NMTune on them
with right labels; test on rows like these (ID) and on four corruptions of the same rows (OOD).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from noiseproof.data import read_examples, stratified_split
from noiseproof.engine import derive_seed
from noiseproof.errors import InputError
from noiseproof.record import make_writable, write_atomic
from noiseproof.report.writing import as_html, as_markdown
from noiseproof.study.contract import Asked, Survey
from noiseproof.study.noisy_pretraining.page import page
from noiseproof.study.noisy_pretraining.pictures import SHAPES, Pictures, draw
from noiseproof.study.noisy_pretraining.records import Records, as_rows
from noiseproof.study.noisy_pretraining.working import Data, Scale, Work, split
from noiseproof.tasks.base import RowSettings
from noiseproof.tasks.images import ImageClassification, Pixels, own_processor

SIZES = {
    "small": Scale(800, 240, 240, 12, 10, (0, 1), (0.0, 0.1, 0.3), tasks=("new",)),
    "default": Scale(4000, 1200, 1200, 15, 20, (0, 1, 2, 3, 4), fractions=(0.1, 1.0)),
    "full": Scale(24000, 4000, 4000, 30, 30, (0, 1, 2, 3, 4), fractions=(0.1, 0.25, 0.5, 1.0)),
}
SIDE = 24  # of drawn pictures
OWN_SIDE = 32  # that the pictures of users are brought to
TEST_SHARE = 0.2


class NoisyPretraining(Survey):
    """What wrong labels in pre-training do to features and to what is tuned on them."""

    name: ClassVar[str] = "noisy-pretraining"
    title: ClassVar[str] = "Noisy pre-training"
    summary: ClassVar[str] = (
        "Do wrong labels in pre-training flatten the spectrum of features and cost accuracy on "
        "shifted rows, and does NMTune repair it?"
    )

    def measure(self, asked: Asked, folder: Path) -> None:
        """Pre-train, tune, test; goes on where it stopped."""
        scale = scaled(asked)
        make_writable(folder)
        source = "drawn pictures" if asked.data is None else asked.data_name
        own = None if asked.data is None else _read(asked)
        _same_study(folder, asked, scale, own)
        work = Work(folder, scale, asked.device, _say, source)
        for seed in scale.seeds:
            work.all(seed, _data(own, scale, seed))

    def pages(self, folder: Path) -> list[Path]:
        """Write ``study.html``, ``study.md`` and ``study.csv`` from the runs in a folder."""
        records = Records(folder)
        report = page(records, self.title)
        texts = {
            "study.html": as_html(report),
            "study.md": as_markdown(report),
            "study.csv": as_rows(records),
        }
        for name, text in texts.items():
            write_atomic(folder / name, text)
        return [folder / name for name in texts]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def scaled(asked: Asked) -> Scale:
    """The size, with what was asked for in its place.

    Raises:
        InputError: Something was asked for that the study has no use for.
    """
    if asked.task not in ("image", "text") or (asked.task == "text" and asked.data is not None):
        raise InputError(
            "noisy-pretraining trains a small network on images; give DATA with --task image (a "
            "table with a column of images, or a NumPy archive with the arrays image and label), "
            "or no DATA: then it draws its pictures"
        )
    if asked.parts or asked.noise or asked.clean_label:
        raise InputError(
            "noisy-pretraining makes its own wrong labels at its own rates and compares all its "
            "methods; leave --parts, --noise and --clean-label out"
        )
    scale = SIZES[asked.size]
    changes: dict[str, Any] = {
        "seeds": asked.seeds,
        "rows": asked.sample,
        "epochs": asked.epochs,
    }
    return dataclasses.replace(scale, **{name: value for name, value in changes.items() if value})


def _data(own: tuple[Pictures, Pictures] | None, scale: Scale, seed: int) -> Data:
    """The pictures of a seed: drawn anew, or the user's."""
    if own is not None:
        return split(*own, scale, seed)
    share = len(SHAPES) / (len(SHAPES) * 2 // 3)  # all classes for one of pre-training
    rows = round(share * (scale.rows + scale.transfer_rows)) + 3 * scale.transfer_rows
    train = draw(rows, derive_seed(seed, "pictures"), SIDE)
    return split(train, draw(4 * scale.test_rows, derive_seed(seed, "test"), SIDE), scale, seed)


def _read(asked: Asked) -> tuple[Pictures, Pictures]:
    """The user's pictures, training and test rows; a share of the rows is the test if none is."""
    settings = RowSettings(image=asked.column or "image", image_size=OWN_SIDE)
    reader = ImageClassification.reader(settings)
    task = ImageClassification(own_processor(OWN_SIDE))
    train = read_examples(asked.data, text=reader, label=asked.label)
    share = _share(asked.test)
    if share is not None:
        rest, part = stratified_split(train.labels, share, derive_seed(0, "test"))
        parts = [train.select(rest), train.select(part)]
    else:
        test = read_examples(asked.test, text=reader, label=asked.label, split="test", role="test",
                             label_names=train.label_names)  # fmt: skip
        parts = [train, test]
    found = []
    for rows in parts:
        pixels, _ = task.ready(rows.inputs)
        assert isinstance(pixels, Pixels)
        every = pixels.block(np.arange(len(pixels)))
        found.append(Pictures(every, rows.labels, tuple(train.label_names)))
    return found[0], found[1]


def _share(test: str | None) -> float | None:
    if test is None:
        return TEST_SHARE
    try:
        return float(test)
    except ValueError:
        return None


def _same_study(
    out: Path, asked: Asked, scale: Scale, own: tuple[Pictures, Pictures] | None
) -> None:
    """Refuse to go on with other settings or pictures in the same folder."""
    digest = hashlib.sha256()
    for part in own or ():
        digest.update(part.pixels.tobytes() + part.labels.tobytes())
    told = {"scale": dataclasses.asdict(scale), "pictures": digest.hexdigest()[:16],
            "data": asked.data}  # fmt: skip
    text = json.dumps(told, indent=1) + "\n"
    file = out / "study.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != json.loads(text):
        raise InputError(
            f"{out} holds this study with another size, other seeds or other pictures; choose "
            "another --out"
        )
    write_atomic(file, text)
