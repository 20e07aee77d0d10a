"""Text noise: which rows are hit, that they differ, and that nothing depends on their order."""

from __future__ import annotations

import numpy as np
import pytest

from noiseproof.errors import InputError
from noiseproof.noise import parse_noise
from noiseproof.textnoise import TextNoise, row_random

TEXTS = [(f"row {number} speaks of\tthe old  harbour", "and more") for number in range(2000)]


def corrupted(noise: TextNoise, purpose: str = "test") -> list[tuple[str, ...]]:
    return [noise.apply(texts, row_random(purpose, 0, row)) for row, texts in enumerate(TEXTS)]


def hit(noise: TextNoise, purpose: str = "test") -> np.ndarray:
    return np.array([a != b for a, b in zip(corrupted(noise, purpose), TEXTS, strict=True)])


def test_as_many_rows_differ_as_the_rate_says():
    assert abs(hit(TextNoise(0.1)).mean() - 0.1) < 4 * (0.1 * 0.9 / len(TEXTS)) ** 0.5


@pytest.mark.parametrize("unit", ["sample", "word", "char"])
def test_what_is_hit_at_one_rate_is_hit_at_a_higher_one(unit):
    low, high = hit(TextNoise(0.02, unit)), hit(TextNoise(0.5, unit))
    assert (high[low]).mean() > 0.95 and low.any()  # two swaps may undo each other


def test_other_purposes_hit_other_rows():
    assert not np.array_equal(hit(TextNoise(0.1)), hit(TextNoise(0.1), "another"))


def test_shuffling_keeps_words_and_white_space_in_their_places():
    for before, after in zip(
        TEXTS, corrupted(TextNoise(1.0, operations=("shuffle",))), strict=True
    ):
        assert before != after
        assert sorted(before[0].split()) == sorted(after[0].split())
        assert "\t" in after[0] and "  " in after[0]


@pytest.mark.parametrize("unit", ["sample", "word", "char"])
@pytest.mark.parametrize("text", ["x", "one", " ", "ab cd"])
def test_no_text_becomes_empty(unit, text):
    for row in range(50):
        assert TextNoise(1.0, unit).apply((text,), row_random("test", 1, row))[0]


def test_a_setting_out_of_range_is_named():
    with pytest.raises(InputError, match="unit of text noise must be one of"):
        TextNoise(0.1, unit="letter")


def test_the_noise_model_keeps_labels_and_says_which_texts_changed():
    noise = parse_noise("text:0.3,unit=sample,kind=insert;delete")
    assert noise is not None and parse_noise(noise.spec) == noise
    done = noise.apply([0, 1] * 1000, 2, 0, texts=TEXTS)
    assert done.noise_rate == 0 and done.labels.tolist() == [0, 1] * 1000
    assert 0.25 < done.extras["text_changed"].mean() < 0.35


@pytest.mark.parametrize("unit", ["sample", "word"])
def test_words_give_way_to_other_words_of_the_same_texts(unit):
    """The noise in data that LoPE's paper calls replacement; white space stays."""
    noise = parse_noise(f"text:0.4,unit={unit},kind=replace,strength=0.5")
    assert noise is not None and parse_noise(noise.spec) == noise
    texts = [(f"{a} {b}\tsaw  {c}",) for a in "kl" for b in "mnop" for c in "qrstu"] * 20
    done = noise.apply([0, 1] * 400, 2, 0, texts=texts)
    words = {word for (text,) in texts for word in text.split()}
    changed = 0
    for (before,), (after,) in zip(texts, done.extras["texts"], strict=True):
        pairs = list(zip(before.split(), after.split(), strict=True))
        assert {new for _, new in pairs} <= words and "\t" in after and "  " in after
        differ = sum(old != new for old, new in pairs)
        assert unit == "word" or differ in (0, 2)
        changed += differ
    assert abs(changed / (4 * 800) - 0.4 * (0.5 if unit == "sample" else 1)) < 0.04


def test_replacing_needs_words_and_whole_ones():
    with pytest.raises(InputError, match="must be two or more for replace"):
        TextNoise(1.0, operations=("replace",)).apply(("one",), row_random("test", 0, 0))
    with pytest.raises(InputError, match="must not name replace with unit=char"):
        parse_noise("text:0.1,unit=char,kind=replace")
