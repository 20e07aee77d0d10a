"""The work of the study: pre-train, take features, tune on them; what is done is used again.

In --out: ``pretraining/RATE/SEED`` (runs), ``features/RATE/SEED/*.npz`` with ``spectra.json``, and
``transfer/...`` (runs on these files; beside each record ``spectrum.json`` of what they reshape).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from noiseproof.arrays import read_npz, write_npz
from noiseproof.distortion import encoder_features
from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError
from noiseproof.finetune import run_job
from noiseproof.job import Job
from noiseproof.method import Method
from noiseproof.methods import CrossEntropy, NMTune
from noiseproof.methods.nmtune import ReshapedClassifier
from noiseproof.prediction import Predictor, load
from noiseproof.record import RunRecord, write_atomic
from noiseproof.spectrum import PREPROCESS, principal_angles, spectrum
from noiseproof.study.noisy_pretraining.network import fresh
from noiseproof.study.noisy_pretraining.pictures import (
    CORRUPTIONS,
    Pictures,
    corrupted,
    nested_noise,
)
from noiseproof.study.spectrum.seeing import reshaped_features

PRESETS = NMTune.presets()
METHODS: dict[str, Method] = {
    "LP": PRESETS["lp"],
    "MLP": PRESETS["mlp"],
    "NMTune code": PRESETS["code"],
    "NMTune paper": PRESETS["paper"],
}
ANGLES = (1, 5, 10)  # dimensions of the leading subspaces


@dataclass(frozen=True)
class Scale:
    """How much of the study is run.

    Attributes:
        rows: Pictures to pre-train on.
        transfer_rows: Pictures to tune on, at the fraction 1.
        test_rows: Pictures of every test set.
        epochs: Of pre-training.
        tune_epochs: Of tuning.
        seeds: Each with its own pictures, wrong labels, initial weights and order.
        rates: Shares of wrong labels in pre-training.
        fractions: Shares of the transfer rows that are tuned on.
        tasks: ``new`` (classes that pre-training has not seen) and ``old`` (its own, right labels).
    """

    rows: int
    transfer_rows: int
    test_rows: int
    epochs: int
    tune_epochs: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3)
    fractions: tuple[float, ...] = (1.0,)
    tasks: tuple[str, ...] = ("new", "old")


@dataclass(frozen=True)
class Data:
    """All pictures of one seed.

    Attributes:
        pretrain: With true labels.
        pretrain_test: Of the same classes.
        train: Rows to tune on, by task.
        test: Test rows, by task.
    """

    pretrain: Pictures
    pretrain_test: Pictures
    train: dict[str, Pictures]
    test: dict[str, Pictures]


def split(train: Pictures, test: Pictures, scale: Scale, seed: int) -> Data:
    """Two thirds of the classes are for pre-training, the others for transfer.

    Rows that are pre-trained on are not tuned on.

    Raises:
        InputError: There are fewer than four classes.
    """
    count = len(train.names)
    if count < 4:
        raise InputError(
            f"the study needs four classes or more, two to pre-train on and two for transfer; got "
            f"{count}"
        )
    known = range(min(count - 2, round(count * 2 / 3)))
    new = range(known.stop, count)
    old = train.of_classes(known)
    order = np.random.default_rng([seed, 80]).permutation(len(old))
    spare = min(scale.transfer_rows, len(old) // 3)
    pretrain = old.take(order[spare:]).few(scale.rows, seed)
    old_test = test.of_classes(known).few(scale.test_rows, seed)
    return Data(
        pretrain,
        old_test,
        {"old": old.take(order[:spare]).few(scale.transfer_rows, seed),
         "new": train.of_classes(new).few(scale.transfer_rows, seed)},
        {"old": old_test, "new": test.of_classes(new).few(scale.test_rows, seed)},
    )  # fmt: skip


@dataclass
class Work:
    """The study in one folder.

    Attributes:
        out: The folder.
        scale: How much.
        device: auto or cpu.
        say: Takes a line on what is going on.
        source: What the pictures are called.
    """

    out: Path
    scale: Scale
    device: str
    say: Callable[[str], None]
    source: str

    def all(self, seed: int, data: Data) -> None:
        """Everything of one seed."""
        for rate in self.scale.rates:
            network = self._pretrain(seed, rate, data)
            self._features(seed, rate, data, network)
        self._spectra(seed)
        for cell in self.cells(seed):
            self._transfer(*cell)

    def cells(self, seed: int) -> Iterator[tuple[int, float, str, float, str]]:
        """Seed, rate, task, fraction and method of every tuning."""
        for rate in self.scale.rates:
            for task in self.scale.tasks:
                for fraction in self.scale.fractions:
                    for method in METHODS:
                        yield seed, rate, task, fraction, method

    # --- steps -----------------------------------------------------------------------------------

    def _pretrain(self, seed: int, rate: float, data: Data) -> Predictor:
        folder = self.out / "pretraining" / shown(rate) / str(seed)
        rows, classes = data.pretrain, len(data.pretrain.names)
        module = fresh(classes, seed)
        if finished(folder):
            return load(folder, model=module)
        self.say(f"pre-training with {rate:.0%} wrong labels, seed {seed}")
        noisy = nested_noise(rows.labels, classes, self.scale.rates, seed)[rate]
        job = Job(
            data=_table(rows, noisy),
            test=_table(data.pretrain_test, data.pretrain_test.labels),
            task="image",
            clean_label="clean_label",
            image_size=rows.pixels.shape[1],
            augment="crop",
            model=module,
            method=CrossEntropy(tune="full", learning_rate=2e-3),
            train=self._training(seed, self.scale.epochs, 32),
        )
        labels = self._labels("pre-training", seed, rate, "CrossEntropy", self.source)
        result = run_job(job, out=folder, overwrite=folder.exists(), labels=labels)
        return result.predictor

    def _features(self, seed: int, rate: float, data: Data, network: Predictor) -> None:
        folder = self.features(seed, rate)
        if (folder / "done").exists():
            return
        self.say(f"features of the network with {rate:.0%} wrong labels, seed {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        for task in self.scale.tasks:
            train, test = data.train[task], data.test[task]
            table = self._encoded(network, train.pixels)
            for fraction in self.scale.fractions:
                rows = train.some(round(fraction * len(train)), seed)
                _write(folder / f"{task}-train-{shown(fraction)}.npz", table[rows],
                       train.labels[rows], train.names)  # fmt: skip
            sets = {"test": test.pixels}
            sets |= {name: corrupted(test.pixels, name, seed) for name in CORRUPTIONS}
            for name, pixels in sets.items():
                features = self._encoded(network, pixels)
                _write(folder / f"{task}-{name}.npz", features, test.labels, test.names)
        write_atomic(folder / "done", "")

    def _spectra(self, seed: int) -> None:
        """Spectra of the test features of every network, and its angles to the clean one.

        In every form of preparation, of which ``code`` is the one that the page reads.
        """
        clean = self.scale.rates[0]
        for rate in self.scale.rates:
            file = self.features(seed, rate) / "spectra.json"
            if file.exists():
                continue
            found: dict[str, Any] = {}
            for task in self.scale.tasks:
                mine, theirs = (read_npz(self.features(seed, one) / f"{task}-test.npz")["features"]
                                for one in (rate, clean))  # fmt: skip
                spectra = {name: spectrum(mine, name) for name in PREPROCESS}
                most = min(spectrum(theirs).rank, spectra["code"].rank)
                turned = {k: principal_angles(theirs, mine, k, preprocess="code").tolist()
                          for k in ANGLES if k <= most}  # fmt: skip
                found[task] = {
                    **spectra["code"].to_dict(),
                    "spectra": {name: one.to_dict() for name, one in spectra.items()},
                    "angles": turned,
                }
            write_atomic(file, json.dumps(found, indent=1) + "\n")

    def _transfer(self, seed: int, rate: float, task: str, fraction: float, method: str) -> None:
        name = method.replace(" ", "-")
        folder = self.out / "transfer" / shown(rate) / task / shown(fraction) / name / str(seed)
        if finished(folder) and (folder / "spectrum.json").exists():
            return
        self.say(f"{method} on {fraction:.0%} of the {task} classes, {rate:.0%} wrong, seed {seed}")
        place = self.features(seed, rate)
        job = Job(
            data=str(place / f"{task}-train-{shown(fraction)}.npz"),
            test=str(place / f"{task}-test.npz"),
            test_ood={name: str(place / f"{task}-{name}.npz") for name in CORRUPTIONS},
            task="features",
            standardize=False,
            method=METHODS[method],
            train=self._training(seed, self.scale.tune_epochs, 64),
        )
        labels = self._labels(task, seed, rate, method, shown(fraction))
        result = run_job(job, out=folder, overwrite=folder.exists(), labels=labels)
        features = read_npz(place / f"{task}-test.npz")["features"]
        encoded = result.predictor.task.encode(result.predictor.task.inputs_of(features))
        model = result.predictor.model
        assert isinstance(model, ReshapedClassifier)  # so are all of METHODS
        found = spectrum(reshaped_features(model, encoded, job.train))
        write_atomic(folder / "spectrum.json", json.dumps(found.to_dict(), indent=1) + "\n")

    # --- parts -----------------------------------------------------------------------------------

    def features(self, seed: int, rate: float) -> Path:
        """Folder of the features of a network."""
        return self.out / "features" / shown(rate) / str(seed)

    def _encoded(self, network: Predictor, pixels: np.ndarray) -> np.ndarray:
        inputs, _ = network.task.ready(network.task.inputs_of(pixels))
        settings = TrainSettings(device=self.device, precision="fp32")
        return encoder_features(network.model, network.task.encode(inputs), settings).numpy()

    def _training(self, seed: int, epochs: int, rows: int) -> TrainSettings:
        return TrainSettings(epochs=epochs, batch_size=rows, schedule="cosine", seed=seed,
                             evaluate="end", device=self.device, precision="fp32",
                             weight_decay=1e-4)  # fmt: skip

    def _labels(self, part: str, seed: int, rate: float, method: str, data: str) -> dict[str, str]:
        return {"grid": "noisy pre-training", "part": part, "data": data, "model": "small network",
                "noise": shown(rate), "validation": "none", "method": method,
                "seed": str(seed)}  # fmt: skip


def shown(share: float) -> str:
    """A share as it stands in names.

    >>> shown(0.05), shown(1.0)
    ('5%', '100%')
    """
    return f"{100 * share:g}%"


def finished(folder: Path) -> bool:
    """Whether a run is done."""
    return (folder / "record.json").exists() and RunRecord.read(folder).status == "done"


def _table(rows: Pictures, labels: np.ndarray) -> dict[str, Any]:
    names = np.array(rows.names)
    return {"image": rows.pixels, "label": names[labels].tolist(),
            "clean_label": names[rows.labels].tolist()}  # fmt: skip


def _write(path: Path, features: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    write_npz(path, {"features": features, "label": np.array(names)[labels]})
