"""What is asked for: one fine-tuning, all its settings in one object that checks itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from noiseproof.encoding import no_second_view
from noiseproof.engine import TrainSettings, check_tracker
from noiseproof.errors import InputError, check_types, unknown_name
from noiseproof.method import Method, require
from noiseproof.methods import METHODS, CleaR
from noiseproof.noise import NoiseModel, parse_noise
from noiseproof.tables import has_splits
from noiseproof.tasks import RowSettings, find_task
from noiseproof.tuning import PROMPTS

NO_MODEL = "minilm"  # what stands where no model was named; each task has its own default
CORRUPTED = "corrupted"  # name of the test set that test_noise makes, or the start of several
OOD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
MERGEABLE = ("full", "head", "lora", "bitfit")
VALIDATION_KINDS = ("clean", "noisy")
HAVE_ENCODERS = ("text", "image")  # whose features can be bent
OPT_IN = ("only_clean_rows", "probe_gradients", "measure_distortion")
"""Settings of studies, off by default."""
LATER = {item.name for item in dataclasses.fields(RowSettings)} - {"text"} | {
    "test_ood",
    "test_noise",
    *OPT_IN,
}
"""Not in the specification at their default, so that they change no identifier of other runs."""


@dataclass(frozen=True)
class Job:
    """What to fine-tune, on what, and how.

    Attributes:
        data: Training rows: a CSV, TSV, JSONL or Parquet file, a saved datasets folder, a hub name;
            from Python also a DataFrame, a Dataset or a dict of columns.
        text: Column of texts, prompts or messages; "first,second" are two.
        label: Column of given labels or responses, maybe wrong.
        test: Test rows, read like data; or a share such as 0.2 that is split off before noise is
            injected, and counts by the true labels where they are known.
        test_ood: More test sets from elsewhere, read like test and each measured on its own:
            NAME=FILE, as often as wanted; from Python a mapping of names to rows.
        test_noise: Text noise such as text:0.3: the test rows are also measured with texts that it
            corrupted, as the set "corrupted" among those from elsewhere. May be given several
            times (a list in Python and in grids): one set each, named like "corrupted-text-0.3".
        validation: Validation rows: a file, or a share such as 0.1 that is split off the training
            rows (its labels are then as noisy as those).
        validation_labels: clean or noisy; must be said of a validation file, goes into the record.
        clean_label: Column of the true labels where they are known; used for metrics alone. A test
            file that has the column is measured against it.
        row_id: Column that names the rows; without it rows are numbered from 0.
        label_names: File of names of numbered classes: a JSON list, or one a line.
        drop_label: Leave out rows with this given label, such as abstentions.
        sample: Train on this many rows only, with the class shares of all.
        split: Split of a hub data set, of a saved dataset dictionary or of a NumPy archive.
        task: Kind of row: text, features, image or causal-lm.
        features: Features of a row: an array, a column of lists, or columns of numbers such as
            "e*" or "width,height".
        standardize: Shift and scale every feature to mean 0 and deviation 1 of the training rows.
        image: Images: a column of paths (relative to the table) or of files, or an array.
        image_size: Side of the square images; None is the processor's.
        augment: What is done to training images: none, or crop, flip and rand joined by "+".
        on_bad_image: error, or skip (images that cannot be read are left out and counted).
        image_workers: Processes that decode images; 0 decodes in this one.
        template: Text around the {prompt} of a language model; chat has its own.
        max_new_tokens: Longest response that is generated.
        choice_score: Choices are compared by the mean or the sum of the log-likelihoods of their
            tokens.
        answer_pattern: Regular expression that finds the answer in a generated response; with it
            test rows are also answered by generating.
        answer_rows: How many test rows at most are answered by generating.
        model: Pre-trained model: local folder, hub name, or minilm; features need none. From
            Python, images and features also take a torch module that gives logits.
        noise: Noise to inject into the training labels, such as symmetric:0.4, or none; the help of
            corrupt lists the kinds.
        noise_seed: Seed of the injected noise; None follows train.seed.
        noise_pool: Foreign rows for open-set noise: a file with the same columns, read like data.
        method: How to fine-tune.
        train: How to run the loop.
        merge: Merge adapters into the encoder: model/ needs no peft.
        only_clean_rows: For studies: train on the rows alone whose label is right, with as many
            steps as all rows would take. Needs the true labels.
        probe_gradients: For studies: rows on which the gradient share of wrong labels is measured
            after every epoch. Needs the true labels.
        measure_distortion: For studies: how far the encoder was bent, measured at the end. Needs
            the true labels and test rows.
    """

    data: Any
    text: str = "text"
    label: str = "label"
    test: Any = None
    test_ood: Any = None
    test_noise: str | tuple[str, ...] | None = None
    validation: Any = None
    validation_labels: str | None = None
    clean_label: str | None = None
    row_id: str | None = None
    label_names: str | None = None
    drop_label: str | None = None
    sample: int | None = None
    split: str = "train"
    task: str = "text"
    features: str = RowSettings.features
    standardize: bool = RowSettings.standardize
    image: str = RowSettings.image
    image_size: int | None = RowSettings.image_size
    augment: str = RowSettings.augment
    on_bad_image: str = RowSettings.on_bad_image
    image_workers: int = RowSettings.image_workers
    template: str = RowSettings.template
    max_new_tokens: int = RowSettings.max_new_tokens
    choice_score: str = RowSettings.choice_score
    answer_pattern: str | None = RowSettings.answer_pattern
    answer_rows: int = RowSettings.answer_rows
    model: Any = NO_MODEL
    noise: str = "none"
    noise_seed: int | None = None
    noise_pool: Any = None
    method: Method = field(default_factory=CleaR)
    train: TrainSettings = field(default_factory=TrainSettings)
    merge: bool = False
    only_clean_rows: bool = False
    probe_gradients: int = 0
    measure_distortion: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading the data."""
        object.__setattr__(self, "noise", _noise_spec(self.noise))
        object.__setattr__(self, "test_noise", _test_noise(self.test_noise))
        check_types(self, "")
        task, _ = find_task(self.task), self.rows  # which checks itself
        others = [name for name, method in METHODS.items() if self.task in method.tasks]
        require(
            self.task in self.method.tasks,
            f"{self.method.name} does not support task {self.task!r}, only "
            f"{', '.join(self.method.tasks)}; use one of {', '.join(others)}",
        )
        require(
            self.split == "train" or has_splits(self.data),
            f"split={self.split}: {self.data} is a file of rows, which has no splits; leave split "
            "out",
        )
        object.__setattr__(self, "method", task.fitted(self.method, self.model))
        views = getattr(self.method, "views", None) or 1
        require(views <= task.most_views, no_second_view(f"rows of task {self.task!r}"))
        if isinstance(self.model, str) and self.model == NO_MODEL:
            object.__setattr__(self, "model", task.default_model)
        require(self.model is not None, f"task {self.task!r} needs a model: give model")
        require(
            self.clean_label is None or self.clean_label != self.label,
            f"clean_label={self.clean_label} is the column of the given labels too; name the one "
            "of the true labels, or leave clean_label out",
        )
        require(self.noise.strip() != "", "noise must not be empty; none injects nothing")
        noise = parse_noise(self.noise)
        if noise is not None:
            task.check_noise(noise)
        require(
            self.noise_pool is None or (noise is not None and noise.needs_pool),
            f"noise_pool is for open-set noise alone, got noise={self.noise}; give noise such as "
            "openset:0.2, or leave noise_pool out",
        )
        require(
            noise is None or not noise.needs_pool or self.noise_pool is not None,
            f"noise {self.noise!r} replaces inputs and needs noise_pool, a file of foreign rows",
        )
        share = self.validation_share
        for name, part in (("validation", share), ("test", self.test_share)):
            require(
                part is None or 0 < part < 1,
                f"{name} must be a file or a share between 0 and 1, got {getattr(self, name)}",
            )
        _check_ood(self.test_ood)
        self._check_test_noise()
        from_file = self.validation is not None and share is None
        require(
            not from_file or self.validation_labels in VALIDATION_KINDS,
            "say whether the labels of the validation file are trusted: validation_labels must be "
            f"clean or noisy, got {self.validation_labels}",
        )
        require(
            self.validation is not None or self.validation_labels is None,
            "validation_labels says whether labels of validation rows are trusted, and there are "
            "none; give validation, or leave it out",
        )
        require(
            share is None or self.validation_labels in (None, "noisy"),
            "a validation share comes from the training rows, so its labels are noisy; "
            f"got validation_labels={self.validation_labels}",
        )
        require(
            self.train.select != "best" or self.validation is not None,
            "train.select=best needs validation rows; give validation, or use select=last",
        )
        require(
            self.train.select != "best" or self.train.evaluate == "epoch",
            "train.select=best compares the epochs, and train.evaluate=end measures the last one "
            "alone; use evaluate=epoch, or select=last",
        )
        require(
            not self.merge or self.method.merges,
            f"what {self.method.name} trains depends on the token and cannot be merged; leave "
            "merge out",
        )
        tune = getattr(self.method, "tune", getattr(self.method, "peft", "full"))
        require(
            not self.merge or tune in MERGEABLE,
            f"merge works with {', '.join(MERGEABLE)}; {tune} stays an adapter beside the encoder",
        )
        require(
            self.noise_seed is None or 0 <= self.noise_seed < 2**32,
            f"noise_seed must lie in [0, 2^32), got {self.noise_seed}",
        )
        require(
            not self.merge or getattr(self.method, "eval_gate", "all_on") == "all_on",
            f"merge would drop the gates that {self.method.name} uses at test; "
            "use eval_gate=all_on, or no merge",
        )
        require(
            self.probe_gradients == 0 or self.probe_gradients >= 2,
            f"probe_gradients must be 0 or at least 2 rows, got {self.probe_gradients}",
        )
        for name in OPT_IN:
            require(
                not getattr(self, name) or noise is not None or self.clean_label is not None,
                f"{name} needs to know which labels are wrong: give clean_label, the column of the "
                "true labels, or noise to inject",
            )
        self._check_distortion(tune)
        self.method.stages(self.train.epochs)
        check_tracker(self.train.tracker)

    def _check_test_noise(self) -> None:
        if self.test_noise is None:
            return
        sets = self.corrupted_sets
        require(bool(sets), "test_noise must be text noise such as text:0.3, got an empty list")
        for name, spec in sets.items():
            noise = parse_noise(spec)
            require(
                noise is not None and noise.needs_texts and not noise.on_labels,
                f"test_noise must be text noise such as text:0.3, got {spec!r}",
            )
            require(
                name not in (self.test_ood or {}),
                f"test_noise makes a set named {name!r}; give the one in test_ood another name",
            )
        require(self.test is not None, "test_noise corrupts the test rows; give test")

    def _check_distortion(self, tune: str) -> None:
        if not self.measure_distortion:
            return
        require(
            self.test is not None, "measure_distortion compares features of test rows; give test"
        )
        require(
            self.task in HAVE_ENCODERS,
            f"measure_distortion looks at an encoder, as {', '.join(HAVE_ENCODERS)} have one; "
            f"got task {self.task!r}",
        )
        require(
            tune not in PROMPTS,
            f"measure_distortion cannot see {tune}, which stands outside the encoder; use full, "
            "head, lora, adapter or bitfit",
        )

    @property
    def corrupted_sets(self) -> dict[str, str]:
        """The test sets that ``test_noise`` makes: name -> noise. One alone has the short name."""
        if isinstance(self.test_noise, tuple):
            return {f"{CORRUPTED}-{_in_name(spec)}": spec for spec in self.test_noise}
        return {} if self.test_noise is None else {CORRUPTED: self.test_noise}

    @property
    def rows(self) -> RowSettings:
        """Where the rows lie and how they are read."""
        return RowSettings.of(dataclasses.asdict(self.train) | vars(self))

    @property
    def column(self) -> str:
        """The columns of the inputs."""
        return str(getattr(self, find_task(self.task).column))

    @property
    def validation_share(self) -> float | None:
        """The share to split off, when ``validation`` is one."""
        return _share(self.validation)

    @property
    def test_share(self) -> float | None:
        """The share to split off, when ``test`` is one."""
        return _share(self.test)

    @property
    def validation_kind(self) -> str:
        """clean, noisy or none."""
        if self.validation is None:
            return "none"
        return "noisy" if self.validation_share is not None else str(self.validation_labels)

    def spec(self) -> dict[str, Any]:
        """All settings as JSON values; tables given as objects stand as their kind.

        What came after the first version is left out at its default, so that the identifiers of
        runs from before stay as they are.
        """
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in LATER and value == item.default:
                continue
            if isinstance(value, Method):
                value = value.to_dict()
            elif isinstance(value, TrainSettings):
                value = dataclasses.asdict(value)
            elif item.name == "test_noise" and isinstance(value, tuple):
                value = list(value)
            elif item.name == "test_ood":
                value = {name: _plain(source) for name, source in value.items()}
            else:
                value = _plain(value)
            values[item.name] = value
        return values


class JobSettings(TypedDict, total=False):
    """The fields of a `Job` but for data and method, as keywords for type checkers and editors."""

    text: str
    label: str
    test: Any
    test_ood: Any
    test_noise: str | NoiseModel | Sequence[str | NoiseModel] | None
    validation: Any
    validation_labels: str | None
    clean_label: str | None
    row_id: str | None
    label_names: str | Path | None
    drop_label: str | None
    sample: int | None
    split: str
    task: str
    features: str
    standardize: bool
    image: str
    image_size: int | None
    augment: str
    on_bad_image: str
    image_workers: int
    template: str
    max_new_tokens: int
    choice_score: str
    answer_pattern: str | None
    answer_rows: int
    model: Any
    noise: str | NoiseModel
    noise_seed: int | None
    noise_pool: Any
    train: TrainSettings
    merge: bool
    only_clean_rows: bool
    probe_gradients: int
    measure_distortion: bool


def check_names(owner: str, settings: Mapping[str, Any], method: Method | None = None) -> None:
    """Refuse keywords that are no fields of a `Job`, and say what was meant.

    Raises:
        InputError: One line with the nearest names, or with the object whose setting it is.
    """
    for name in settings:
        if name in JobSettings.__annotations__:
            continue
        value = f"{settings[name]!r:.20}"
        meant = []
        if name in {item.name for item in dataclasses.fields(TrainSettings)}:
            meant.append(f"train=TrainSettings({name}={value})")
        if method is not None and name in {item.name for item in dataclasses.fields(method)}:
            meant.append(f"method={method.name}({name}={value})")
        if meant:
            raise InputError(f"{owner}: unknown setting {name!r}; write {' or '.join(meant)}")
        line = unknown_name("setting", name, JobSettings.__annotations__, "help(noiseproof.Job)")
        raise InputError(f"{owner}: {line}")


def _plain(value: Any) -> Any:
    """A JSON value; what is none stands as its kind."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | int | float | bool | None):
        return value
    return f"<{type(value).__name__}>"


def _noise_spec(value: Any) -> Any:
    """What a noise model is written as; a text and None stay, anything else is refused."""
    if value is None or isinstance(value, str):
        return value
    model = parse_noise(value)
    return model and model.spec


def _test_noise(value: Any) -> Any:
    """One text, or several in a tuple: a list of one is that one, of two alike one counts."""
    if not isinstance(value, list | tuple):
        return _noise_spec(value)
    specs = tuple(dict.fromkeys(map(_noise_spec, value)))
    return specs[0] if len(specs) == 1 else specs


def _in_name(spec: str) -> str:
    """A specification of noise as part of the name of a set.

    >>> _in_name("text:0.3,unit=char")
    'text-0.3-unit-char'
    """
    return re.sub(r"[^\w.]+", "-", spec).strip("-")


def _check_ood(sets: Any) -> None:
    require(
        sets is None or (isinstance(sets, Mapping) and len(sets) > 0),
        f"test_ood must be a mapping of names to rows, got {type(sets).__name__}",
    )
    for name, source in (sets or {}).items():
        require(
            isinstance(name, str) and OOD_NAME.fullmatch(name) is not None,
            f"a name in test_ood may have letters, digits, '.', '_' and '-', got {name!r}",
        )
        require(
            _share(source) is None and source is not None,
            f"test_ood {name!r} must be rows of its own, such as a file; got {source!r}",
        )


def _share(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | float) else None
    except ValueError:
        return None
