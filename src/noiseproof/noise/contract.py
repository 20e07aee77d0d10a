"""What a noise model is: it corrupts N labels, or what lies under them, and says how.

A model draws from `Draw`, which `NoiseModel.apply` has checked, and answers with a `Corruption`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError
from noiseproof.noise.matrices import Floats, Labels, check_labels, estimate_transition_from_labels

Extras = dict[str, npt.NDArray[Any]]

SALT = 0x6E6F6973  # keeps the noise stream apart from other users of the same seed


@dataclass(frozen=True, eq=False)
class Corruption:
    """What a noise model did to N rows of C classes."""

    labels: Labels  # (N,) after corruption
    mask: npt.NDArray[np.bool_]  # (N,) the label is wrong: it changed, or its input was replaced
    noise_rate: float  # realised share of rows in `mask`, not the requested one
    transition: Floats  # (C, C) realised; a class without rows has an identity row
    seed: int
    spec: str  # `parse_noise` turns it back into the model
    extras: Extras = field(default_factory=dict)  # arrays of N rows; see the models that add some


@dataclass(frozen=True, eq=False)
class Draw:
    """What a model draws from, already checked by `NoiseModel.apply`."""

    num_classes: int
    rng: np.random.Generator
    features: npt.NDArray[Any]  # (N, D); (N, 0) where the model needs none
    pool_size: int  # 0 where the model needs none
    texts: Sequence[tuple[str, ...]]  # N rows of texts; empty where the model needs none


@dataclass(frozen=True)
class NoiseModel(ABC):
    """A way in which labels or inputs get wrong; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    example: ClassVar[str]
    needs_features: ClassVar[bool] = False
    needs_pool: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = False
    needs_responses: ClassVar[bool] = False  # texts that are labels; they are given as `texts`
    on_labels: ClassVar[bool] = True  # the labels are classes, and they change

    @property
    def spec(self) -> str:
        """Canonical text: the name, the rate, and the settings that differ from their default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        rate, _ = values.pop("rate")
        changed = [f",{k}={written(v)}" for k, (v, default) in values.items() if v != default]
        return f"{self.name}:{written(rate)}" + "".join(changed)

    def apply(
        self,
        labels: npt.ArrayLike,
        num_classes: int,
        seed: int,
        *,
        features: npt.ArrayLike | None = None,
        pool_size: int | None = None,
        texts: Sequence[tuple[str, ...]] | None = None,
    ) -> Corruption:
        """Corrupt the labels (N,); the same seed gives the same answer, arguments stay as they are.

        Args:
            labels: true labels, integers in [0, num_classes), (N,).
            num_classes: number of classes C.
            seed: seed of this draw; the global random state is not touched.
            features: (N, D), only for models with `needs_features`.
            pool_size: number of foreign rows to draw from, only for models with `needs_pool`.
            texts: the texts of every row, only for models with `needs_texts`; its response, for
                models with `needs_responses`.

        >>> from noiseproof.noise import PairFlip
        >>> PairFlip(1.0).apply([0, 1, 2], num_classes=3, seed=0).labels.tolist()
        [1, 2, 0]
        """
        given = np.asarray(labels)
        check_labels(given, num_classes, least=2 if self.on_labels else 1)
        if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"seed must be an integer of at least 0, got {seed!r}")
        if self.needs_pool and (not isinstance(pool_size, Integral) or pool_size < 1):
            raise InputError(
                f"'{self.spec}' needs pool_size, the number of foreign rows to take inputs from "
                f"(at least 1), got {pool_size!r}"
            )
        if self.needs_features and features is None:
            raise InputError(f"'{self.spec}' needs features (N, D), such as embeddings")
        if (self.needs_texts or self.needs_responses) and (
            texts is None or len(texts) != len(given)
        ):
            raise InputError(f"'{self.spec}' needs texts, the texts of each of {len(given)} rows")
        matrix = np.empty((len(given), 0))
        if self.needs_features and features is not None:
            matrix = _check_features(np.asarray(features), len(given))
        rng = np.random.default_rng([SALT, int(seed)])
        draw = Draw(int(num_classes), rng, matrix, int(pool_size or 0), texts or ())
        clean = given.astype(np.int64)  # a copy
        noisy, extras = self._corrupt(clean.copy(), draw)
        mask = noisy != clean
        if "replacement" in extras:
            mask |= extras["replacement"] >= 0
        if "swapped" in extras:
            mask |= extras["swapped"]
        transition = np.ones((1, 1))
        if num_classes > 1:
            transition = estimate_transition_from_labels(clean, noisy, num_classes)
        rate = float(mask.mean())
        return Corruption(noisy, mask, rate, transition, int(seed), self.spec, extras)

    def for_classes(self, names: Sequence[str]) -> NoiseModel:
        """The model for labels whose classes have these names, where it was given some of them.

        Raises:
            InputError: It names a class that does not exist.
        """
        return self

    @abstractmethod
    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
        """Return the new labels (N,) and the extras."""


def _check_features(features: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    shape, kind = features.shape, features.dtype
    if len(shape) != 2 or shape[0] != count or shape[1] == 0 or kind.kind not in "fiu":
        raise InputError(f"features must be numbers of shape ({count}, D), got {kind} {shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise InputError(f"features must be finite, row {bad[0]} is not")
    return features


def settle(
    model: NoiseModel, setting: str, low: float = -np.inf, high: float = np.inf, whole: bool = False
) -> None:
    """Check one setting of a frozen model and store it as a plain int or float."""
    value = getattr(model, setting)
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    owner = f"{setting} of {type(model).__name__}"
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"{owner} must be a {'whole ' * whole}number, got {value!r}")
    if not low <= value <= high:  # also refuses NaN
        reach = f"be at least {low}" if high == np.inf else f"lie in [{low}, {high}]"
        raise InputError(f"{owner} must {reach}, got {value}")
    object.__setattr__(model, setting, int(value) if whole else float(value))


def written(value: object) -> str:
    """A setting as `parse_noise` reads it."""
    if isinstance(value, tuple):
        return ";".join(f"{a}>{b}" for a, b in value)
    return value if isinstance(value, str) else repr(value)
