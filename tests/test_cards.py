"""Cards: what is said of methods and settings is read from the code, and it is complete."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from noiseproof import cards
from noiseproof.engine import TrainSettings
from noiseproof.job import Job
from noiseproof.method import Method
from noiseproof.methods import METHODS, CleaR, CrossEntropy
from noiseproof.mixture import LossMixture


@dataclass(frozen=True)
class Inner:
    """Inner settings.

    Attributes:
        depth: How deep.
    """

    depth: int = 3


@dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
        kind: The kind of all.
        size: Overridden below.
        rate: Speed, in
            units: of the day, over
            three lines.
    """

    kind: ClassVar[str] = "x"
    size: int
    rate: float | None = None


@dataclass(frozen=True)
class Outer(Base):
    """One line that says it.

    Idea: the rest of the card.

    Attributes:
        size: Rows.
        inner: Not shown as itself.
    """

    inner: Inner = field(default_factory=Inner)
    bare: bool = False


def test_meanings_come_from_the_class_and_its_bases_and_the_nearest_wins() -> None:
    assert cards.field_meanings(Outer) == {
        "kind": "The kind of all.",
        "size": "Rows.",
        "rate": "Speed, in units: of the day, over three lines.",
        "inner": "Not shown as itself.",
    }


def test_settings_are_listed_in_order_with_nested_ones_behind_dots() -> None:
    assert [dataclasses.astuple(setting) for setting in cards.settings(Outer)] == [
        ("size", "int", "required", "Rows."),
        ("rate", "float | None", "None", "Speed, in units: of the day, over three lines."),
        ("inner.depth", "int", "3", "How deep."),
        ("bare", "bool", "False", ""),
    ]


def test_the_values_of_a_preset_stand_in_the_place_of_the_defaults() -> None:
    preset = Outer(size=7, inner=Inner(depth=5))
    shown = {one.name: one.default for one in cards.settings(Outer, preset=preset)}
    assert shown == {"size": "7", "rate": "None", "inner.depth": "5", "bare": "False"}


def test_a_card_ends_before_the_attributes() -> None:
    outer: Any = Outer
    assert cards.summary(outer) == "One line that says it."
    assert cards.card(outer) == "One line that says it.\n\nIdea: the rest of the card."


def test_a_method_alone_in_its_file_has_the_card_of_the_file() -> None:
    module = inspect.getmodule(CleaR)
    assert module is not None
    assert cards.card(CleaR) == inspect.cleandoc(module.__doc__ or "").strip()
    assert cards.card(CrossEntropy).startswith("Plain fine-tuning")
    assert "Attributes" not in cards.card(CrossEntropy)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_a_summary_and_a_card_with_its_source_and_idea(
    method: type[Method],
) -> None:
    summary, card = cards.summary(method), cards.card(method)
    assert summary.endswith(".") and 20 < len(summary) < 100
    lines = card.splitlines()
    for part in ("Paper: ", "Idea: ", "Cost: "):
        found = [line for line in lines if line.startswith(part)]
        assert len(found) == 1 and len(found[0]) > len(part) + 3, (method.name, part)
    source = next(line for line in lines if line.startswith("Paper: "))
    assert any(digit.isdigit() for digit in card) or "none" in source
    assert max(map(len, lines)) <= 100


KINDS: dict[str, type[Any]] = {**METHODS, "Job": Job, "Train": TrainSettings, "Mix": LossMixture}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_setting_has_a_meaning_and_no_meaning_is_left_over(kind: type[Any]) -> None:
    listed = cards.settings(kind)
    assert [setting.name for setting in listed if len(setting.meaning) < 6] == []
    names = [setting.name for setting in listed]
    assert len(names) == len(set(names))
    known = {item.name for item in dataclasses.fields(kind)}
    known |= {"name", "tasks", "writes", "merges", "later"} if issubclass(kind, Method) else set()
    assert set(cards.field_meanings(kind)) - known == set()


def test_settings_of_the_mixture_are_told_with_the_method() -> None:
    names = [setting.name for setting in cards.settings(CleaR)]
    wanted = [f"mixture.{item.name}" for item in dataclasses.fields(LossMixture)]
    assert [name for name in names if name.startswith("mixture.")] == wanted
    assert "mixture" not in names


def test_defaults_are_those_of_the_code() -> None:
    shown = {setting.name: setting.default for setting in cards.settings(CleaR)}
    assert shown["gamma"] == str(CleaR().gamma)
    assert shown["mixture.scope"] == CleaR().mixture.scope
    for name, method in METHODS.items():
        values = method().to_dict()
        for setting in cards.settings(method):
            outer, _, inner = setting.name.partition(".")
            if inner:  # a nested default is that of the method, not of the nested class
                assert setting.default == str(values[outer][inner]), (name, setting.name)
    shown = {setting.name: setting.default for setting in cards.settings(METHODS["TURN"])}
    assert shown["mixture.scope"] == "per_class"
