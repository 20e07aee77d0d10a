"""PEFT under noise: what adapters memorise of wrong labels, and what wrong labels do to them.

Paper: the study of Kim, Kim & Lee, "CleaR", ACL 2024, arXiv:2411.00873, on which the method rests.
Claims: (1) the smaller the capacity, the less is memorised; (2) the learning of right labels is
disturbed more by wrong ones in adapters than in full fine-tuning.
Runs: full fine-tuning, the linear probe and the plain families of adapters under every noise, CleaR
on the same families; the same on the right rows alone with as many steps (the control of claim 2);
the families at other capacities; all on random labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from noiseproof.errors import InputError, unknown_name
from noiseproof.report.blocks import Report
from noiseproof.report.runs import Found
from noiseproof.study.contract import Asked, Study, common
from noiseproof.study.peft_under_noise.families import FAMILIES, FULL, PROBE, Family
from noiseproof.study.peft_under_noise.page import page

RANDOM_LABELS = "symmetric-redraw:1.0"
PROBED_ROWS = 32


@dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    rows: int
    epochs: int
    seeds: tuple[int, ...]
    noise: tuple[str, ...]
    capacities: tuple[int, ...]


SIZES = {
    "small": Size(300, 6, (0, 1), ("symmetric:0.4",), (1, 64)),
    "default": Size(
        2000, 10, (0, 1, 2), ("symmetric:0.4", "symmetric:0.2", "pairflip:0.4"), (1, 4, 16, 64)
    ),
    "full": Size(
        4000, 20, (0, 1, 2, 3, 4),
        ("symmetric:0.4", "none", "symmetric:0.2", "symmetric:0.6", "pairflip:0.4",
         "instance:0.4"),
        (1, 2, 4, 8, 16, 32, 64),
    ),
}  # fmt: skip


class PeftUnderNoise(Study):
    """What adapters memorise of wrong labels, and what wrong labels do to them."""

    name: ClassVar[str] = "peft-under-noise"
    title: ClassVar[str] = "PEFT under noise"
    summary: ClassVar[str] = (
        "Do smaller adapters memorise fewer wrong labels, and do wrong labels disturb adapters "
        "more than full fine-tuning?"
    )

    def grid(self, asked: Asked) -> dict[str, Any]:
        """Four parts: under noise, on right rows alone, over capacities, on random labels."""
        size = SIZES[asked.size]
        families = _chosen(asked.parts)
        values = common(self, asked, rows=size.rows, epochs=size.epochs, seeds=size.seeds,
                        noise=size.noise)  # fmt: skip
        noisy = [one for one in values["noise"] if one != "none"]
        known = noisy if asked.clean_label is None else values["noise"]
        if not known:
            raise InputError(
                "the study needs wrong labels that are known: give --noise such as symmetric:0.4, "
                "or --clean-label, the column of the true labels of noisy data"
            )
        plain = {FULL: _tuned(FULL), PROBE: _tuned(PROBE)}
        plain |= {family.name: _plain(family) for family in families}
        routed = {
            f"CleaR {family.name}": {"name": "CleaR", "peft": family.name} for family in families
        }
        resized = {
            f"{family.name} {family.word} {capacity}": _plain(family, capacity)
            for family in families
            if family.capacity
            for capacity in size.capacities
            if capacity != family.default_capacity()
        }
        parts: list[dict[str, Any]] = [
            {"name": "under noise", "methods": [*plain, *routed],
             "job": {"probe_gradients": PROBED_ROWS}},
            {"name": "right rows alone", "methods": [*plain], "noise": known,
             "job": {"only_clean_rows": True}},
            {"name": "random labels", "methods": [*plain], "noise": [RANDOM_LABELS]},
        ]  # fmt: skip
        if resized:
            parts.append({"name": "capacity", "methods": [*resized], "noise": known[:1]})
        if "none" in values["noise"] and asked.clean_label is None:  # nothing to probe there
            parts[0]["noise"] = noisy
            parts.append({"name": "no noise", "methods": [*plain, *routed], "noise": ["none"]})
        methods = plain | routed | resized
        return values | {"baseline": FULL, "methods": methods, "part": parts}

    def report(self, found: Found) -> Report:
        """Two verdicts, and what they rest on."""
        return page(found, self.title)


def _chosen(names: Sequence[str]) -> list[Family]:
    """The families that were asked for, all of them without a wish."""
    families = FAMILIES
    for name in names:
        if name not in families:
            raise InputError(unknown_name("family", name, list(families)))
    return [family for name, family in families.items() if not names or name in names]


def _tuned(part: str) -> dict[str, Any]:
    return {"name": "CrossEntropy", "tune": part}


def _plain(family: Family, capacity: int | None = None) -> dict[str, Any]:
    """Ordinary adapters."""
    settings: dict[str, Any] = {"name": "CleaR:plain", "peft": family.name}
    return settings if capacity is None else settings | {family.capacity: capacity}
