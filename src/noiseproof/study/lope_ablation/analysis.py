"""What the records say of the orderings that the paper reports.

A value belongs to a seed, data, model and noise; differences are taken between runs that share all
four, or, for inference modes, within one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from noiseproof.report.runs import Found, Run, as_number
from noiseproof.study.estimates import Estimate, Values, Verdict, estimate

LOPE, HYDRA, LORA = "LoPE", "HydraLoRA", "LoRA"
MAIN, SHORT, RATES, DATA = "variants", "one epoch less", "noise rate", "noisier data"
KINDS = {"hybrid": LOPE, "discrete": "LoPE, discrete noise", "continuous": "LoPE, continuous noise",
         "none": "LoPE, no noise"}  # fmt: skip
EXPERTS = {"3/1": LOPE, "3/2": "LoPE, 3 + 2 experts", "2/2": "LoPE, 2 + 2 experts",
           "2/1": "LoPE, 2 + 1 experts"}  # fmt: skip
BY_CHARACTER = "LoPE, noise by characters"
RANKS = {rank: f"LoPE, rank {rank}" for rank in (2, 8)}
MISMATCHED = (("insert", "shuffle", "relative"), ("shuffle", "delete", "off"),
              ("replace", "insert", "off"))  # fmt: skip
"""Noise of the data, of the stage poison, and of its embeddings."""
SETS = {"test": "test_accuracy", "corrupted": "ood_corrupted_accuracy"}
Of = Callable[["Records", str], Values]


class Records:
    """All runs of the study, by part and method."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def values(self, method: str, of: Callable[[Run], float | None], part: str = MAIN) -> Values:
        """A number by seed, data, model and noise, of the runs of a part that have it."""
        table = {}
        for run in self.found.runs:
            if (run.names.get("method"), run.names.get("part")) == (method, part):
                value = of(run)
                if value is not None:
                    table[key_of(run)] = value
        return table

    def accuracy(self, method: str, name: str = "test", part: str = MAIN) -> Values:
        """Accuracy of the deployed models on one of `SETS`."""
        return self.values(method, lambda run: set_accuracy(run, name), part)

    def mode(self, mode: str, name: str = "test") -> Values:
        """Accuracy of LoPE where it answers in one of `MODES`."""
        return self.values(LOPE, lambda run: mode_accuracy(run, mode, name))

    def over_data(self, method: str, name: str = "test") -> dict[str, Values]:
        """Accuracy by noise of the data, texts corrupted alone: ``text:RATE`` and none."""
        table: dict[str, Values] = {}
        for part in (MAIN, DATA):
            for key, value in self.accuracy(method, name, part).items():
                *_, noise = key.split("\t")
                if data_rate(noise) is not None:
                    table.setdefault(noise, {})[key] = value
        return dict(sorted(table.items(), key=lambda item: data_rate(item[0]) or 0.0))


def key_of(run: Run) -> str:
    """What pairs a run with others."""
    return "\t".join(run.names[name] for name in ("seed", "data", "model", "noise"))


def set_accuracy(run: Run, name: str) -> float | None:
    """Accuracy of the deployed model on one of `SETS`."""
    if name == "test":
        return run.metric(SETS[name])
    return as_number(run.record.ood.get("corrupted", {}).get("accuracy"))


def mode_accuracy(run: Run, mode: str, name: str) -> float | None:
    """Accuracy on one of `SETS` in an inference mode."""
    return as_number(run.record.modes.get(mode, {}).get(SETS[name]))


def data_rate(noise: str) -> float | None:
    """Rate of text noise without other settings, 0 of none; None of any other noise.

    >>> data_rate("text:0.05"), data_rate("none"), data_rate("text:0.05,kind=insert")
    (0.05, 0.0, None)
    """
    if noise == "none":
        return 0.0
    name, _, rate = noise.partition(":")
    try:
        return float(rate) if name == "text" else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Ordering:
    """A claim that one thing is above another.

    Attributes:
        name: In words.
        source: Where the paper says so, and by how much; empty where it does not.
        better: What should be above.
        worse: What should be below.
        short: Name in a chart, where the other is long.
    """

    name: str
    source: str
    better: Of
    worse: Of
    short: str = ""

    def tested(self, records: Records, name: str = "test") -> Estimate | None:
        """The paired difference on one of `SETS`; None where nothing can be compared."""
        better, worse = self.better(records, name), self.worse(records, name)
        return estimate(better, worse) if better.keys() & worse.keys() else None

    def verdict(self, records: Records) -> Verdict:
        """By the test set as it is: holds, contradicted, open, or no claim."""
        found = self.tested(records)
        return "no claim" if found is None else found.verdict


def of(method: str, part: str = MAIN) -> Of:
    """Accuracy of a method."""
    return lambda records, name: records.accuracy(method, name, part)


def answering(mode: str) -> Of:
    """Accuracy of LoPE in an inference mode."""
    return lambda records, name: records.mode(mode, name)


def at_rate(rate: str) -> Of:
    """Accuracy of LoPE at another noise rate than its own."""
    return of(f"LoPE, rate {rate}", RATES)


def gap(highest: bool) -> Of:
    """LoPE minus HydraLoRA at the highest or the lowest noise of the data, by seed."""

    def found(records: Records, name: str) -> Values:
        own, other = records.over_data(LOPE, name), records.over_data(HYDRA, name)
        noises = [noise for noise in own if noise in other and data_rate(noise)]
        if len(noises) < 2:
            return {}
        noise = noises[-1 if highest else 0]
        return {
            key.rpartition("\t")[0] + "\tboth": value - other[noise][key]
            for key, value in own[noise].items()
            if key in other[noise]
        }

    return found


def mismatched(kind: str, own: str) -> Ordering:
    """LoPE is above HydraLoRA though it trained on another kind of noise than the data have."""
    part = f"data {kind}"
    return Ordering(
        f"data with {kind}, LoPE trained on {own}: LoPE > HydraLoRA", "Table 3, all kinds",
        of(f"LoPE trained on {own}", part), of(HYDRA, part),
        f"{kind}, by {own}",
    )  # fmt: skip


ORDERINGS: dict[str, tuple[Ordering, ...]] = {
    "Noise": (
        Ordering("hybrid > discrete", "Table 2: +0.7", of(LOPE), of(KINDS["discrete"])),
        Ordering("discrete > continuous", "Table 2: +1.2", of(KINDS["discrete"]),
                 of(KINDS["continuous"])),
        Ordering("continuous > none", "Table 2: +0.8", of(KINDS["continuous"]), of(KINDS["none"])),
        Ordering("hybrid by rows > by characters", "", of(LOPE), of(BY_CHARACTER),
                 "rows > characters"),
    ),
    "Inference": (
        Ordering("compensate > none", "Table 6: +1.9", answering("compensate"), answering("none")),
        Ordering("mask > none", "", answering("mask"), answering("none")),
        Ordering("renorm > none", "", answering("renorm"), answering("none")),
        Ordering("compensate > mask", "", answering("compensate"), answering("mask")),
        Ordering("mass kept > sum to one", "", answering("compensate, mass kept"),
                 answering("compensate, sum to one")),
        Ordering("sign +1 > sign -1", "", answering("compensate"),
                 answering("compensate, sign -1")),
        Ordering("3 compensated > 2", "Figure 3, no value", answering("compensate"),
                 answering("compensate, 2 of 3")),
        Ordering("2 compensated > 1", "Figure 3, no value", answering("compensate, 2 of 3"),
                 answering("compensate, 1 of 3")),
        Ordering("1 compensated > 0", "Figure 3, no value", answering("compensate, 1 of 3"),
                 answering("compensate, 0 of 3")),
    ),
    "Experts": (
        Ordering("3 + 1 > 3 + 2", "+0.4", of(LOPE), of(EXPERTS["3/2"])),
        Ordering("3 + 2 > 2 + 2", "+2.0", of(EXPERTS["3/2"]), of(EXPERTS["2/2"])),
        Ordering("3 + 1 > 2 + 1", "+0.8", of(LOPE), of(EXPERTS["2/1"])),
        Ordering("rank 8 > rank 4", "Table 1: +0.7", of(RANKS[8]), of(LOPE)),
        Ordering("rank 4 > rank 2", "Table 1: +1.8", of(LOPE), of(RANKS[2])),
    ),
    "Rate": (
        Ordering("5 % > 3.5 %", "Figure 4, no value", of(LOPE), at_rate("0.035")),
        Ordering("5 % > 10 %", "Figure 4, no value", of(LOPE), at_rate("0.1")),
        Ordering("5 % > 15 %", "Figure 4, no value", of(LOPE), at_rate("0.15")),
    ),
    "Compute": (
        Ordering("LoPE > HydraLoRA, one epoch less", "Table 1: +1.6", of(LOPE), of(HYDRA, SHORT),
                 "LoPE > Hydra, less"),
        Ordering("LoPE > HydraLoRA, as many epochs", "", of(LOPE), of(HYDRA),
                 "LoPE > Hydra"),
        Ordering("LoPE > HydraLoRA, 4 experts", "", of(LOPE), of("HydraLoRA, 4 experts"),
                 "LoPE > Hydra, 4"),
        Ordering("LoPE > HydraLoRA, NEFTune", "", of(LOPE), of("HydraLoRA, NEFTune"),
                 "LoPE > Hydra, NEFTune"),
        Ordering("LoPE > LoRA", "Table 1: +5.4", of(LOPE), of(LORA)),
        Ordering("HydraLoRA > LoRA", "Table 1: +3.8", of(HYDRA), of(LORA)),
        Ordering("HydraLoRA > HydraLoRA, noise", "Table 4: +1.9", of(HYDRA),
                 of("HydraLoRA, noise"), "Hydra > Hydra, noise"),
        Ordering("HydraLoRA, one epoch less > LoPE, no noise", "Tables 1, 2: +1.2",
                 of(HYDRA, SHORT), of(KINDS["none"]), "Hydra, less > no noise"),
    ),
    "Noisier data": (
        Ordering("LoPE minus HydraLoRA: more at the highest rate than at the lowest",
                 "Table 8: +1.1", gap(highest=True), gap(highest=False)),
    ),
    "Other noise": tuple(mismatched(kind, own) for kind, own, _ in MISMATCHED),
}  # fmt: skip
"""By question. The numbers of the paper are points of the mean of PIQA and SIQA, LLaMA-2-7B.

The default keeps the mass of the normal experts, so that compensate with sign 0 is mask, as it is
with none of them compensated; sign 0 has no ordering of its own.
"""
