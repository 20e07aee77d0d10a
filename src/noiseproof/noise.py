"""Noise models: make labels, or the inputs under them, wrong in a known way.

Every model is a frozen dataclass; `apply` answers with a `Corruption`: the new labels, which rows
were hit, and the realised rate and transition matrix. `parse_noise` reads the same models from
text such as `symmetric:0.4` or `pairflip:0.2,step=-1+openset:0.1`.

One seed decides one noise draw, apart from the seeds of initialisation and order. `Symmetric`,
`PairFlip`, `OpenSet` and `TextCorruption` hit, for one seed, nested sets of rows: those hit at rate
0.2 are also hit at 0.4, so that a sweep over rates compares like with like.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from noiseproof.errors import InputError, unknown_name
from noiseproof.textnoise import OPERATIONS, TextNoise, row_random

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
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
class _Draw:
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
        changed = [f",{k}={_text(v)}" for k, (v, default) in values.items() if v != default]
        return f"{self.name}:{_text(rate)}" + "".join(changed)

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

        >>> PairFlip(1.0).apply([0, 1, 2], num_classes=3, seed=0).labels.tolist()
        [1, 2, 0]
        """
        given = np.asarray(labels)
        _check_labels(given, num_classes, least=2 if self.on_labels else 1)
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
        draw = _Draw(int(num_classes), rng, matrix, int(pool_size or 0), texts or ())
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
    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        """Return the new labels (N,) and the extras."""


@dataclass(frozen=True)
class Symmetric(NoiseModel):
    """Uniform noise: with probability `rate`, each row on its own, a label is drawn anew.

    Source: folklore; the two conventions share a name in the literature.
    Formula: `symmetric` draws from the C - 1 other classes (off-diagonal rate / (C - 1));
        `symmetric-redraw` (`redraw=True`; the released code of CleaR, and DivideMix) draws from all
        C classes (off-diagonal rate / C).
    Realised rate: `rate`; with redraw rate * (1 - 1/C).
    """

    name: ClassVar[str] = "symmetric"
    example: ClassVar[str] = "symmetric:0.4"
    rate: float
    redraw: bool = False

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)

    @property
    def spec(self) -> str:
        """Canonical text."""
        return f"symmetric{'-redraw' if self.redraw else ''}:{_text(self.rate)}"

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        hit = draw.rng.random(len(labels)) < self.rate
        shift = draw.rng.integers(0 if self.redraw else 1, draw.num_classes, size=len(labels))
        return np.where(hit, (labels + shift) % draw.num_classes, labels), {}


@dataclass(frozen=True)
class PairFlip(NoiseModel):
    """Asymmetric noise: with probability `rate` a label becomes its class's fixed partner.

    Source: Han et al., Co-teaching, NeurIPS 2018 (pair flip); `asymmetric` is another name for it.
    Formula: k -> (k + step) mod C; step=-1 is the released code of CleaR. `pairs=0>1;2>3`, or
        `pairs=cat>dog`, names the partners instead, by number (in the order of the sorted classes,
        from 0) or by name, as for look-alike classes, and leaves the other classes alone.
    Realised rate: `rate`; with pairs `rate` times the share of rows in the classes that flip.
    """

    name: ClassVar[str] = "pairflip"
    example: ClassVar[str] = "pairflip:0.4,step=-1"
    rate: float
    step: int = 1
    pairs: tuple[tuple[int | str, int | str], ...] = ()

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)
        _settle(self, "step", whole=True)
        try:
            pairs = tuple((_class(a), _class(b)) for a, b in self.pairs)
        except (TypeError, ValueError):
            raise InputError(
                "pairs of PairFlip must look like 0>1;2>3, cat>dog or ((0, 1), (2, 3)), got "
                f"{self.pairs!r}"
            ) from None
        object.__setattr__(self, "pairs", pairs)
        if self.step == 0:
            raise InputError("step of PairFlip must not be 0; 1 flips to the next class")
        if pairs and self.step != 1:
            raise InputError("PairFlip takes step or pairs, not both")
        if len(dict(pairs)) < len(pairs):
            raise InputError(f"pairs of PairFlip name a source class twice: {_text(pairs)}")
        for a, b in pairs:
            if a == b or any(isinstance(one, int) and one < 0 for one in (a, b)):
                raise InputError(f"pairs of PairFlip must join two different classes, got {a}>{b}")

    def for_classes(self, names: Sequence[str]) -> PairFlip:
        """Put the numbers of the classes in the place of their names."""
        known = ", ".join(f"{number}={name}" for number, name in enumerate(names[:20]))
        known += ", ..." * (len(names) > 20)

        def number(one: int | str) -> int:
            if isinstance(one, int) and one < len(names):
                return one
            if one not in names:
                raise InputError(f"'{self.spec}': there is no class {one}; classes: {known}")
            return names.index(str(one))

        return replace(self, pairs=tuple((number(a), number(b)) for a, b in self.pairs))

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        partner = np.arange(draw.num_classes)
        if not self.pairs:
            partner = (partner + self.step % draw.num_classes) % draw.num_classes
        for a, b in self.pairs:
            if isinstance(a, str) or isinstance(b, str):
                raise InputError(f"'{self.spec}': {a}>{b} names classes; for_classes numbers them")
            if max(a, b) >= draw.num_classes:
                raise InputError(f"'{self.spec}': {a}>{b} is outside of {draw.num_classes} classes")
            partner[a] = b
        if partner[0] == 0 and not self.pairs:
            raise InputError(
                f"'{self.spec}': step {self.step} maps {len(partner)} classes to themselves"
            )
        hit = draw.rng.random(len(labels)) < self.rate
        return np.where(hit, partner[labels], labels), {}


@dataclass(frozen=True)
class Transition(NoiseModel):
    """Class-conditional noise from any row-stochastic (C, C) matrix.

    Source: Patrini et al., CVPR 2017 (T); e.g. a confusion matrix measured on doubly labelled rows.
    Formula: the given label of a row of class k is drawn from row k of the matrix.
    Realised rate: sum over k of (share of class k) * (1 - matrix[k][k]).
    Text: `transition:FILE` (.json, .csv, .npy) or `transition:[[0.9,0.1],[0.2,0.8]]`.
    """

    name: ClassVar[str] = "transition"
    example: ClassVar[str] = "transition:matrix.json"
    matrix: tuple[tuple[float, ...], ...]
    source: str = ""

    def __post_init__(self) -> None:
        rows = _check_matrix(self.matrix, self.source or "Transition").tolist()
        object.__setattr__(self, "matrix", tuple(map(tuple, rows)))

    @property
    def spec(self) -> str:
        """Canonical text."""
        return f"transition:{self.source or json.dumps(self.matrix, separators=(',', ':'))}"

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        size = len(self.matrix)
        if size != draw.num_classes:
            raise InputError(
                f"{self.source or 'Transition'}: the matrix is {size} x {size}, the labels have "
                f"{draw.num_classes} classes"
            )
        cumulative = np.cumsum(self.matrix, axis=1)  # (C, C)
        draws = draw.rng.random(len(labels)) * cumulative[labels, -1]
        noisy = np.empty_like(labels)
        for label in np.unique(labels):
            rows = labels == label
            noisy[rows] = np.searchsorted(cumulative[label], draws[rows], side="right")
        return noisy, {}


@dataclass(frozen=True)
class InstanceDependent(NoiseModel):
    """Feature-dependent noise: similar rows of a class are confused with the same wrong class.

    Source: Xia et al., Part-dependent Label Noise, NeurIPS 2020, arXiv:2006.07836 (Algorithm 2).
    Formula: q_i ~ N(rate, std^2) truncated; W_k ~ N(0, 1)^(D x C) for each class k; the wrong class
        of row i is drawn from softmax(x_i W_k) without k, and taken with probability q_i.
    Realised rate: `rate`. Deviations, ours: columns of x are standardised; q is truncated to
        rate -/+ min(rate, 1 - rate) inside [0, 1], as plain truncation to [0, 1] lifts low rates
        (0.10 became 0.13, and 0 became 0.08).
    """

    name: ClassVar[str] = "instance"
    example: ClassVar[str] = "instance:0.4"
    needs_features: ClassVar[bool] = True
    rate: float
    std: float = 0.1

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)
        _settle(self, "std", 0, 1)

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        rng, features = draw.rng, draw.features
        mean = features.mean(axis=0, dtype=np.float64)  # (D,)
        scale = features.std(axis=0, dtype=np.float64)
        scale[(np.ptp(features, axis=0) == 0) | (scale == 0)] = 1.0  # constant columns say nothing
        hit = rng.random(len(labels)) < self._flip_rates(len(labels), rng)
        noisy = labels.copy()
        for label in np.unique(labels):  # one class at a time: never N x D x C
            weights = rng.standard_normal((features.shape[1], draw.num_classes))  # (D, C)
            rows = np.flatnonzero(labels == label)
            scores = (features[rows] - mean) / scale @ weights  # (n, C)
            scores[:, label] = -np.inf
            wrong = _choose(np.exp(scores - scores.max(axis=1, keepdims=True)), rng)
            noisy[rows] = np.where(hit[rows], wrong, label)
        return noisy, {}

    def _flip_rates(self, count: int, rng: np.random.Generator) -> Floats:
        """Draw q of every row by inverting the normal distribution function.  (count,)."""
        reach = min(self.rate, 1 - self.rate)
        if self.std == 0 or reach == 0:
            return np.full(count, self.rate)
        normal = NormalDist(self.rate, self.std)
        low, high = normal.cdf(self.rate - reach), normal.cdf(self.rate + reach)
        uniform = np.clip(rng.uniform(low, high, size=count), 1e-300, 1 - 1e-16)
        rates: Floats = np.array([normal.inv_cdf(u) for u in uniform.tolist()])
        return rates.clip(self.rate - reach, self.rate + reach)


@dataclass(frozen=True)
class OpenSet(NoiseModel):
    """Open-set noise: a row keeps its label, but its input comes from a foreign pool.

    Source: Wang et al., Iterative Learning with Open-set Noisy Labels, CVPR 2018.
    Formula: each row on its own with probability `rate`. `extras["replacement"]` (N,) holds the row
        of the pool, or -1; the caller replaces the inputs. No pool row repeats before all are used.
    Truth: no class is right for a foreign input. `mask` counts the row as wrong; its true label is
        -1 inside a run and `<foreign>` in a table.
    Realised rate: `rate`; the transition matrix stays the identity.
    """

    name: ClassVar[str] = "openset"
    example: ClassVar[str] = "openset:0.2"
    needs_pool: ClassVar[bool] = True
    rate: float

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        rows = np.flatnonzero(draw.rng.random(len(labels)) < self.rate)
        rounds = len(rows) // draw.pool_size + 1
        order = np.concatenate([draw.rng.permutation(draw.pool_size) for _ in range(rounds)])
        replacement = np.full(len(labels), -1, dtype=np.int64)
        replacement[rows] = order[: len(rows)]
        return labels, {"replacement": replacement}


@dataclass(frozen=True)
class TextCorruption(NoiseModel):
    """Text noise: labels stay, words are shuffled and characters inserted and deleted.

    Source: the noise that LoPE's paper adds to data (Wang et al., 2025, arXiv:2505.23868) names the
        three kinds and a rate; units and strengths are ours.
    Formula: `unit=sample`: a row is hit with probability `rate` and gets one kind, all its texts
        alike: words shuffled in windows of `window` (0: the whole text), or a share `strength` of
        its characters inserted or deleted. `unit=word`, `unit=char`: every word or character is hit
        on its own. `kind=insert;delete` leaves out the others; `charset=keyboard` inserts
        neighbours on a keyboard.
    Truth: the label stays right, so `mask` does not count the row.
    Realised rate: 0 wrong labels; the share of rows whose texts changed is `text_rate` in the
        record, about `rate` for unit=sample.
    Extras: `texts` (N,) a tuple of new texts for each row, `text_changed` (N,) where they differ.
    """

    name: ClassVar[str] = "text"
    example: ClassVar[str] = "text:0.05,unit=word"
    needs_texts: ClassVar[bool] = True
    on_labels: ClassVar[bool] = False
    rate: float
    unit: str = "sample"
    kind: str = "all"
    strength: float = 0.1
    window: int = 4
    charset: str = "ascii"

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)
        _settle(self, "strength", 0, 1)
        _settle(self, "window", 0, whole=True)
        for setting in ("unit", "kind", "charset"):
            object.__setattr__(self, setting, str(getattr(self, setting)))
        self._noise()

    def _noise(self) -> TextNoise:
        kinds = OPERATIONS if self.kind == "all" else tuple(self.kind.split(";"))
        return TextNoise(self.rate, self.unit, kinds, self.strength, self.window, self.charset)

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        noise = self._noise()
        seed = int(draw.rng.integers(2**63))  # one draw, so that rows do not depend on each other
        texts = np.empty(len(labels), dtype=object)
        for row, given in enumerate(draw.texts):
            texts[row] = noise.apply(given, row_random("data-noise", seed, row))
        changed = np.array([new != old for new, old in zip(texts, draw.texts, strict=True)])
        return labels, {"texts": texts, "text_changed": changed}


@dataclass(frozen=True)
class Swap(NoiseModel):
    """Responses that belong to other prompts: right in form, wrong in content.

    Source: ours.
    Formula: a share `rate` of the rows passes its responses round in a random order, each to the
        next of these rows whose response differs. For one seed the rows hit at one rate are among
        those hit at every higher one.
    Realised rate: rows whose response differs; `rate`, but for rounding and rows all alike.
    Extras: `responses` (N,) the new ones, `swapped` (N,) where they differ.
    """

    name: ClassVar[str] = "swap"
    example: ClassVar[str] = "swap:0.3"
    needs_responses: ClassVar[bool] = True
    on_labels: ClassVar[bool] = False
    rate: float

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        given = np.array([response for (response,) in draw.texts], dtype=object)
        count = round(self.rate * len(given))
        round_of = draw.rng.permutation(len(given))[: count if count > 1 else 0]
        new = given.copy()
        for place, row in enumerate(round_of):
            followers = (round_of[(place + step) % count] for step in range(1, count))
            new[row] = next((given[r] for r in followers if given[r] != given[row]), given[row])
        return labels, {"responses": new, "swapped": new != given}


@dataclass(frozen=True)
class Annotators(NoiseModel):
    """A crowd: every worker has an own error rate and own confusions.

    Source: ours, after Dawid & Skene, 1979 (one confusion matrix per worker).
    Formula: error rates e_w ~ Beta with mean `rate` and variance spread * rate * (1 - rate), then
        moved so that their mean over the workers is `rate`; wrong classes of worker w and class k
        by a flat Dirichlet. A row goes to `votes` different workers; the majority wins, ties fall
        at random.
    Realised rate: `rate` for one vote; as a rule lower for more.
    Extras: `annotator` (N,) the first voter, `voters` and `votes` (N, votes) who said what.
    """

    name: ClassVar[str] = "annotators"
    example: ClassVar[str] = "annotators:0.3,workers=10"
    rate: float
    workers: int = 10
    spread: float = 0.5
    votes: int = 1

    def __post_init__(self) -> None:
        _settle(self, "rate", 0, 1)
        _settle(self, "workers", 1, whole=True)
        _settle(self, "spread", 0, 1)
        if self.spread == 1:
            raise InputError("spread of Annotators must be below 1, got 1.0")
        _settle(self, "votes", 1, self.workers, whole=True)

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        rng, num_classes = draw.rng, draw.num_classes
        errors = self._error_rates(rng)  # (W,)
        voters = np.empty((len(labels), self.votes), dtype=np.int64)
        for vote in range(self.votes):  # different workers: count on past those already taken
            worker = rng.integers(self.workers - vote, size=len(labels))
            for taken in np.sort(voters[:, :vote], axis=1).T:
                worker += worker >= taken
            voters[:, vote] = worker
        hit = rng.random(voters.shape) < errors[voters]
        votes = np.repeat(labels[:, None], self.votes, axis=1)
        for label in range(num_classes):
            confusion = rng.dirichlet(np.ones(num_classes - 1), size=self.workers)  # (W, C - 1)
            rows, columns = np.nonzero(hit & (labels == label)[:, None])
            wrong = _choose(confusion[voters[rows, columns]], rng)
            votes[rows, columns] = wrong + (wrong >= label)
        agreement = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)  # (N, votes)
        winner = (agreement + rng.random(votes.shape) / 2).argmax(axis=1)
        noisy = votes[np.arange(len(labels)), winner]
        return noisy, {"annotator": voters[:, 0].copy(), "voters": voters, "votes": votes}

    def _error_rates(self, rng: np.random.Generator) -> Floats:
        """One error rate per worker, with mean exactly `rate`.  (workers,)."""
        if self.spread == 0 or self.rate in (0, 1):
            return np.full(self.workers, self.rate)
        mass = (1 - self.spread) / self.spread
        errors: Floats = rng.beta(self.rate * mass, (1 - self.rate) * mass, size=self.workers)
        mean = float(errors.mean())
        if mean > self.rate:  # shrink the errors, else the hits, so that all stay in [0, 1]
            errors *= self.rate / mean
        else:
            errors = 1 - (1 - errors) * ((1 - self.rate) / (1 - mean))
        return errors


@dataclass(frozen=True)
class Mixture(NoiseModel):
    """Several noise models in a row, each working on the labels that the one before left.

    Text: parts joined by `+`, as in `pairflip:0.2+openset:0.1`.
    Realised rate: rows with another label than at first, or another input; a label may flip back.
    """

    name: ClassVar[str] = "mixture"
    example: ClassVar[str] = "pairflip:0.2+openset:0.1"
    parts: tuple[NoiseModel, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        plain = [isinstance(p, NoiseModel) and not isinstance(p, Mixture) for p in self.parts]
        if len(plain) < 2 or not all(plain):
            raise InputError("Mixture needs at least two noise models, none of them a Mixture")
        for kind in (OpenSet, TextCorruption, Annotators):  # their extras describe one draw
            if sum(isinstance(part, kind) for part in self.parts) > 1:
                raise InputError(f"noise '{self.spec}': '{kind.name}' may occur only once")
        for need in ("needs_features", "needs_pool", "needs_texts"):  # of the parts, here
            object.__setattr__(self, need, any(getattr(part, need) for part in self.parts))
        swaps = any(part.needs_responses for part in self.parts)
        if swaps:
            raise InputError(f"noise '{self.spec}': 'swap' stands alone, without '+'")
        object.__setattr__(self, "on_labels", any(part.on_labels for part in self.parts))

    @property
    def spec(self) -> str:
        """Canonical text."""
        return "+".join(part.spec for part in self.parts)

    def for_classes(self, names: Sequence[str]) -> Mixture:
        """Each part for these classes."""
        return Mixture(tuple(part.for_classes(names) for part in self.parts))

    def _corrupt(self, labels: Labels, draw: _Draw) -> tuple[Labels, Extras]:
        extras: Extras = {}
        for part in self.parts:  # one generator for all, so that the parts are independent
            labels, added = part._corrupt(labels, draw)
            extras |= added
        return labels, extras


NOISE_MODELS: dict[str, type[NoiseModel]] = {
    kind.name: kind
    for kind in (
        Symmetric,
        PairFlip,
        Transition,
        InstanceDependent,
        OpenSet,
        TextCorruption,
        Swap,
        Annotators,
    )
}
_NAMES: dict[str, tuple[type[NoiseModel], dict[str, Any]]] = {
    **{name: (kind, {}) for name, kind in NOISE_MODELS.items()},
    "symmetric-redraw": (Symmetric, {"redraw": True}),
    "asymmetric": (PairFlip, {}),
}
_ALSO = {"pair-flip": "pairflip", "open-set": "openset", "idn": "instance"}  # as others write them


def parse_noise(text: str | NoiseModel) -> NoiseModel | None:
    """Read a noise model from `name:rate[,key=value...]`, parts joined by `+`; None for `none`.

    What is a model already is given back.

    >>> parse_noise("pairflip:0.4,step=-1")
    PairFlip(rate=0.4, step=-1, pairs=())
    >>> parse_noise("pairflip:0.2 + openset:0.1").spec
    'pairflip:0.2+openset:0.1'
    """
    if isinstance(text, NoiseModel):
        return text
    if not isinstance(text, str):
        raise InputError(
            f"noise must be a text such as symmetric:0.4, or a noise model, got {text!r:.60}"
        )
    if text.strip().lower() in ("", "none"):
        return None
    # only a + before a name joins parts, so that file names may hold one
    parts = re.split(r"\+(?=\s*[A-Za-z_-]+\s*(?::|$))", text.strip())
    models = tuple(_parse_part(part.strip()) for part in parts)
    return models[0] if len(models) == 1 else Mixture(models)


def _parse_part(text: str) -> NoiseModel:
    given, _, settings = (piece.strip() for piece in text.partition(":"))
    name = given.lower().replace("_", "-")
    name = _ALSO.get(name, name)
    if name == "none":
        raise InputError(f"noise '{text}': none takes no rate and stands alone")
    if name not in _NAMES:
        raise InputError(unknown_name("noise model", given, [*_NAMES, "none"]))
    kind, preset = _NAMES[name]
    try:
        return kind(**preset | _parse_settings(kind, settings))
    except InputError as error:
        raise InputError(f"noise '{text}': {error}; for example {kind.example}") from None


def _parse_settings(kind: type[NoiseModel], text: str) -> dict[str, Any]:
    if kind is Transition:
        return _parse_matrix(text)
    first, *settings = text.split(",")
    if not first.strip() or "=" in first:
        raise InputError("the rate is missing")
    known = [f.name for f in fields(kind) if f.name != "rate"]
    values: dict[str, Any] = {"rate": _rate(first.strip())}
    for setting in settings:
        key, equals, value = (piece.strip() for piece in setting.partition("="))
        if not equals and first.strip() == "0" and key.isdigit():
            raise InputError(f"'0,{key}' is no number; write 0.{key}")
        if key not in known:
            raise InputError(f"unknown setting '{key}', known: {', '.join(known) or 'none'}")
        if key in values:
            raise InputError(f"setting '{key}' is given twice")
        values[key] = _setting(key, value)
    return values


def _rate(text: str) -> int | float | str:
    share = _plain(text.removesuffix("%"))
    if text.endswith("%") and not isinstance(share, str):
        raise InputError(f"the rate is a share of the rows, got {text}; write {share / 100:g}")
    return _plain(text)


def _setting(key: str, value: str) -> Any:
    if key == "pairs":
        return [pair.split(">") for pair in value.split(";")]
    if key == "redraw":
        if value.lower() not in ("true", "false"):
            raise InputError(f"redraw must be true or false, got '{value}'")
        return value.lower() == "true"
    return _plain(value)


def _parse_matrix(text: str) -> dict[str, Any]:
    if not text:
        raise InputError("the matrix file is missing")
    if not text.startswith("["):
        return {"matrix": load_transition(text), "source": text}
    try:
        return {"matrix": json.loads(text)}
    except json.JSONDecodeError:
        raise InputError("the matrix is not valid JSON") from None


def _plain(text: str) -> int | float | str:
    """A number where the text is one; the model itself refuses what is left."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def estimate_transition_from_labels(
    clean: npt.ArrayLike, given: npt.ArrayLike, num_classes: int
) -> Floats:
    """Count how true classes became given classes.  (N,), (N,) -> (C, C), rows sum to 1.

    A class without rows gets an identity row.

    >>> estimate_transition_from_labels([0, 0, 1], [0, 1, 1], num_classes=3).tolist()
    [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    clean, given = np.asarray(clean), np.asarray(given)
    _check_labels(clean, num_classes)
    _check_labels(given, num_classes)
    if len(clean) != len(given):
        raise InputError(f"{len(clean)} clean labels do not pair with {len(given)} given labels")
    counts: Floats = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean, given), 1)
    counts[np.diag_indices(num_classes)] += counts.sum(axis=1) == 0
    counts /= counts.sum(axis=1, keepdims=True)
    return counts


def save_transition(path: str | Path, matrix: npt.ArrayLike) -> None:
    """Write a transition matrix as JSON, a list of rows; `load_transition` reads it unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_transition(f"{folder}/matrix.json", [[0.9, 0.1], [0.2, 0.8]])
    ...     parse_noise(f"transition:{folder}/matrix.json").matrix
    ((0.9, 0.1), (0.2, 0.8))
    """
    rows = [json.dumps(row) for row in _check_matrix(matrix, "the transition matrix").tolist()]
    Path(path).write_text("[\n  " + ",\n  ".join(rows) + "\n]\n", encoding="utf-8")


def load_transition(path: str | Path) -> Floats:
    """Read a row-stochastic (C, C) matrix from .json (a list of rows), .csv (no header) or .npy."""
    path = Path(path)
    if path.suffix.lower() not in (".json", ".csv", ".npy"):
        raise InputError(f"{path}: a transition matrix is a .json, .csv or .npy file")
    try:
        if path.suffix.lower() == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".csv":
            matrix = np.loadtxt(path, delimiter=",", ndmin=2)
        else:
            matrix = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: is not a matrix of numbers ({error})") from None
    return _check_matrix(matrix, str(path))


def _check_matrix(matrix: object, where: str) -> Floats:
    try:
        array = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: is not a matrix of numbers with rows of one length") from None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < 2:
        raise InputError(f"{where}: must be C x C with C >= 2, got shape {array.shape}")
    bad = np.argwhere(~(array >= 0))
    if len(bad):
        row, column = bad[0]
        cell = f"row {row + 1}, column {column + 1} of the matrix"
        raise InputError(f"{where}: {cell} must be at least 0, got {array[row, column]}")
    sums = array.sum(axis=1)
    if (wrong := np.flatnonzero(~(np.abs(sums - 1) <= 1e-6))).size:
        raise InputError(
            f"{where}: row {wrong[0] + 1} of the matrix must sum to 1, got {sums[wrong[0]]:.6g}"
        )
    return array


def _check_labels(labels: npt.NDArray[Any], num_classes: int, least: int = 2) -> None:
    if not isinstance(num_classes, Integral) or num_classes < least:
        raise InputError(f"num_classes must be an integer of at least {least}, got {num_classes!r}")
    if labels.ndim != 1 or not labels.size:
        raise InputError(f"labels must have shape (N,) with N >= 1, got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be integers, got {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        row = outside[0]
        raise InputError(f"labels must lie in [0, {num_classes}), got {labels[row]} in row {row}")


def _check_features(features: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    shape, kind = features.shape, features.dtype
    if len(shape) != 2 or shape[0] != count or shape[1] == 0 or kind.kind not in "fiu":
        raise InputError(f"features must be numbers of shape ({count}, D), got {kind} {shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise InputError(f"features must be finite, row {bad[0]} is not")
    return features


def _settle(
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


def _class(value: object) -> int | str:
    """The number or the name of a class."""
    if isinstance(value, str) and value.strip():
        name = value.strip()
        return int(name) if name.lstrip("-").isdigit() else name
    if isinstance(value, int | np.integer):
        return int(value)
    raise TypeError(value)


def _text(value: object) -> str:
    """A setting as `parse_noise` reads it."""
    if isinstance(value, tuple):
        return ";".join(f"{a}>{b}" for a, b in value)
    return value if isinstance(value, str) else repr(value)


def _choose(weights: Floats, rng: np.random.Generator) -> Labels:
    """Choose one column per row in proportion to the weights.  (n, C) -> (n,)."""
    cumulative = weights.cumsum(axis=1)
    draws = rng.random(len(weights)) * cumulative[:, -1]
    columns: Labels = (draws[:, None] >= cumulative).sum(axis=1)
    return columns
