"""The noise models, each a frozen dataclass that knows its source and its formula."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from noiseproof.errors import InputError
from noiseproof.noise.contract import Draw, Extras, NoiseModel, settle, written
from noiseproof.noise.matrices import Floats, Labels, check_matrix
from noiseproof.textnoise import OPERATIONS, TextNoise, row_random


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
        settle(self, "rate", 0, 1)

    @property
    def spec(self) -> str:
        """Canonical text."""
        return f"symmetric{'-redraw' if self.redraw else ''}:{written(self.rate)}"

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        settle(self, "rate", 0, 1)
        settle(self, "step", -1_000_000, 1_000_000, whole=True)
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
            raise InputError(f"pairs of PairFlip name a source class twice: {written(pairs)}")
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

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        rows = check_matrix(self.matrix, self.source or "Transition").tolist()
        object.__setattr__(self, "matrix", tuple(map(tuple, rows)))

    @property
    def spec(self) -> str:
        """Canonical text."""
        return f"transition:{self.source or json.dumps(self.matrix, separators=(',', ':'))}"

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        settle(self, "rate", 0, 1)
        settle(self, "std", 0, 1)

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        settle(self, "rate", 0, 1)

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        on its own. `kind=insert;delete` leaves out the others; `kind=replace` puts words of all
        these texts in the place of others; `charset=keyboard` inserts neighbours on a keyboard.
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
        settle(self, "rate", 0, 1)
        settle(self, "strength", 0, 1)
        settle(self, "window", 0, 1_000_000, whole=True)
        for setting in ("unit", "kind", "charset"):
            object.__setattr__(self, setting, str(getattr(self, setting)))
        self._noise()

    def _noise(self, words: tuple[str, ...] = ()) -> TextNoise:
        kinds = OPERATIONS if self.kind == "all" else tuple(self.kind.split(";"))
        return TextNoise(
            self.rate, self.unit, kinds, self.strength, self.window, self.charset, words
        )

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
        noise = self._noise()
        if "replace" in noise.operations:
            words = {word for texts in draw.texts for text in texts for word in text.split()}
            noise = self._noise(tuple(sorted(words)))
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
        settle(self, "rate", 0, 1)

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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
        settle(self, "rate", 0, 1)
        settle(self, "workers", 1, 100_000, whole=True)
        settle(self, "spread", 0, 1)
        if self.spread == 1:
            raise InputError("spread of Annotators must be below 1, got 1.0")
        settle(self, "votes", 1, min(self.workers, 1000), whole=True)

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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

    def _corrupt(self, labels: Labels, draw: Draw) -> tuple[Labels, Extras]:
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


def _class(value: object) -> int | str:
    """The number or the name of a class."""
    if isinstance(value, str) and value.strip():
        name = value.strip()
        return int(name) if name.lstrip("-").isdigit() else name
    if isinstance(value, int | np.integer):
        return int(value)
    raise TypeError(value)


def _choose(weights: Floats, rng: np.random.Generator) -> Labels:
    """Choose one column per row in proportion to the weights.  (n, C) -> (n,)."""
    cumulative = weights.cumsum(axis=1)
    draws = rng.random(len(weights)) * cumulative[:, -1]
    columns: Labels = (draws[:, None] >= cumulative).sum(axis=1)
    return columns
