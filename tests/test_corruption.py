"""Corrupting a table: what changes, what stays, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from noiseproof import corrupt
from noiseproof.data import FOREIGN, read_examples
from noiseproof.errors import InputError
from noiseproof.noise import Corruption
from noiseproof.tables import read_table, write_table
from tiny import table, train_settings


@pytest.fixture
def rows() -> pd.DataFrame:
    return table(60)[["text", "context", "label"]]


def test_labels_change_at_the_rate_and_the_right_ones_are_kept(rows: pd.DataFrame) -> None:
    before = rows.copy()
    noisy, corruption = corrupt(rows, "symmetric:0.5", seed=1)
    assert isinstance(corruption, Corruption)
    wrong = noisy["label"] != noisy["clean_label"]
    assert wrong.tolist() == corruption.mask.tolist()
    assert 0.2 < wrong.mean() == corruption.noise_rate < 0.8
    assert noisy["clean_label"].tolist() == before["label"].tolist()
    pd.testing.assert_frame_equal(rows, before)  # the caller's frame is left alone
    pd.testing.assert_frame_equal(noisy[["text", "context"]], before[["text", "context"]])


def test_one_seed_gives_one_corruption(rows: pd.DataFrame) -> None:
    one, again, other = (corrupt(rows, "pairflip:0.5", seed=s)[0]["label"] for s in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("kind", ["int64", "bool", "float64", "category", "string", "object"])
def test_labels_keep_the_type_of_their_column(kind: str) -> None:
    """Labels that turn into text no longer equal the right ones that stand beside them."""
    numbers = np.arange(40) % 2
    labels = pd.Series(numbers if kind[0] in "ibf" else np.array(["no", "yes"])[numbers])
    data = pd.DataFrame({"text": "a", "label": labels.astype(kind)})
    noisy, corruption = corrupt(data, "symmetric:0.5")
    assert noisy["label"].dtype == noisy["clean_label"].dtype == data["label"].dtype
    assert (noisy["label"] != noisy["clean_label"]).tolist() == corruption.mask.tolist()
    assert 0 < corruption.noise_rate < 1


def test_numbers_of_a_parquet_file_stay_numbers(tmp_path: Path) -> None:
    data = pd.DataFrame({"text": "a", "label": np.arange(30) % 3})
    data.to_parquet(tmp_path / "t.parquet")
    noisy, corruption = corrupt(str(tmp_path / "t.parquet"), "pairflip:0.5")
    write_table(noisy, tmp_path / "noisy.parquet")
    back = read_table(tmp_path / "noisy.parquet")
    assert back["label"].dtype == "int64"
    assert (back["label"] != back["clean_label"]).mean() == corruption.noise_rate > 0


def test_rows_that_are_not_hit_keep_their_cells() -> None:
    """Spaces around a name do not count, but they are the user's."""
    data = {"text": ["a"] * 40, "label": [" no", "no ", "yes", "yes"] * 10}
    noisy, corruption = corrupt(data, "symmetric:0.3")
    kept = ~corruption.mask
    assert 0 < kept.sum() < 40
    assert noisy["label"][kept].tolist() == noisy["clean_label"][kept].tolist()
    assert set(noisy["label"].str.strip()) == {"no", "yes"}


def test_a_class_without_rows_can_be_the_wrong_one() -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    data = datasets.Dataset.from_dict({"text": ["x"] * 60, "label": [0, 1] * 30}, features=features)
    noisy, _ = corrupt(data, "symmetric:1.0")
    assert set(noisy["label"]) == {"a", "b", "c"}
    assert set(noisy["clean_label"]) == {"a", "b"}


@pytest.mark.parametrize("names", [("text", "context"), ("one, two", "other")])
def test_open_set_noise_replaces_all_texts_of_a_row_together(
    names: tuple[str, str], rows: pd.DataFrame, tmp_path: Path
) -> None:
    """A column may have a comma in its name; then it is one column."""
    first, second = names
    pool = pd.DataFrame({first: [f"p{n}" for n in range(9)], second: [f"q{n}" for n in range(9)]})
    write_table(pool, tmp_path / "pool.csv")
    data = rows.rename(columns={"text": first, "context": second})
    text = first if "," in first else f"{first}, {second}"
    noisy, corruption = corrupt(
        data, "openset:0.5", text=text, noise_pool=str(tmp_path / "pool.csv")
    )
    hit = corruption.mask
    assert 0 < hit.sum() < 60
    assert noisy[first][hit].str.startswith("p").all()
    assert noisy[first][~hit].tolist() == data[first][~hit].tolist()
    if "," in first:
        assert noisy[second].tolist() == data[second].tolist()
    else:
        assert [t[1:] for t in noisy[first][hit]] == [t[1:] for t in noisy[second][hit]]
    assert noisy["label"].tolist() == data["label"].tolist()


def test_only_noise_that_reads_texts_needs_a_text_column(
    rows: pd.DataFrame, tiny_model: Path, tmp_path: Path
) -> None:
    """Labels alone, as of images: a text column had to be made up."""
    labels = rows[["label"]]
    matrix = "[[0.5,0.5,0],[0,1,0],[0,0,1]]"
    for noise in ("symmetric:0.4", "pairflip:0.4", "annotators:0.4", f"transition:{matrix}"):
        noisy, corruption = corrupt(labels, noise, seed=3)
        assert list(noisy.columns) == ["label", "clean_label"]
        assert (noisy["label"] != noisy["clean_label"]).tolist() == corruption.mask.tolist()
        assert noisy["label"].tolist() == corrupt(rows, noise, seed=3)[0]["label"].tolist()
    write_table(rows, tmp_path / "pool.csv")
    for noise in ("instance:0.4", "openset:0.4", "pairflip:0.2+openset:0.1"):
        with pytest.raises(InputError, match=r"no column 'text' \(text\)"):
            corrupt(labels, noise, model=str(tiny_model), noise_pool=str(tmp_path / "pool.csv"))
        with pytest.raises(InputError, match=r"'label' cannot be both text and label"):
            corrupt(rows, noise, text="label", noise_pool=str(tmp_path / "pool.csv"))


@pytest.mark.parametrize("kind", ["str", "int64", "float64", "bool"])
@pytest.mark.parametrize("file", ["noisy.csv", "noisy.parquet"])
def test_foreign_rows_have_no_true_label(kind: str, file: str, tmp_path: Path) -> None:
    """Their label did not change, so they counted as right, and no metric saw the noise."""
    labels = np.arange(80) % 2
    data = pd.DataFrame({"text": "ours", "label": np.array(["no", "yes"])[labels]})
    if kind != "str":
        data["label"] = labels.astype(kind)
    write_table(pd.DataFrame({"text": ["theirs"]}), tmp_path / "pool.csv")
    pool = str(tmp_path / "pool.csv")
    noisy, corruption = corrupt(data, "pairflip:0.2+openset:0.2", noise_pool=pool)
    foreign = noisy["text"] == "theirs"
    assert 0 < foreign.sum() < corruption.mask.sum()
    assert (noisy["clean_label"] == FOREIGN).tolist() == foreign.tolist()
    assert noisy["label"].dtype == data["label"].dtype
    write_table(noisy, tmp_path / file)
    back = read_examples(tmp_path / file, text="text", label="label", clean_label="clean_label")
    assert back.clean_labels is not None
    assert (back.clean_labels == -1).tolist() == foreign.tolist()
    assert (back.labels != back.clean_labels).tolist() == corruption.mask.tolist()
    assert back.clean_labels[~foreign].tolist() == labels[~foreign].tolist()


def test_instance_noise_depends_on_the_texts_and_on_nothing_around_it(
    rows: pd.DataFrame, tiny_model: Path
) -> None:
    def labels(**changes: Any) -> list[str]:
        noisy, _ = corrupt(rows, "instance:0.5", **{"model": str(tiny_model), **changes})
        return noisy["label"].tolist()

    state = torch.get_rng_state()
    one = labels()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert labels() == one  # the new head of the classifier has no say
    assert labels(text="context") != one
    assert labels(text="text,context") != one
    assert one != rows["label"].tolist()


BAD = [
    ({"noise": "none"}, r"nothing to do; give for example symmetric:0\.4"),
    ({"noise": "symmetric:-1"}, r"must lie in \[0, 1\], got -1"),
    ({"seed": -1}, r"seed must lie in \[0, 2\^32\), got -1"),
    ({"seed": 2**32}, r"seed must lie in \[0, 2\^32\), got 4294967296"),
    ({"noise": "openset:0.4"}, r"replaces inputs; give noise_pool, a file of foreign rows"),
    ({"clean_label": "context"}, r"a column 'context' already; name another one"),
    ({"clean_label": "label"}, r"a column 'label' already"),
    ({"label": "lable"}, r"no column 'lable' \(label\); did you mean 'label'"),
    ({"noise": "openset:0.4", "noise_pool": "none.csv"}, r"none\.csv does not exist"),
    ({"noise": "instance:0.4", "model": "./none"}, r"cannot load model './none'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_corrupted_is_told(
    changes: dict[str, Any], message: str, rows: pd.DataFrame
) -> None:
    with pytest.raises(InputError, match=message):
        corrupt(rows, **{"noise": "symmetric:0.4", **changes})


def test_the_noise_of_the_command_is_the_noise_of_fit(rows: pd.DataFrame, tiny_model: Path) -> None:
    """`corrupt` then `fit` must train on the labels that `fit --noise` would train on."""
    noisy, _ = corrupt(rows, "symmetric:0.4", seed=5)
    quick = noiseproof.TrainSettings(epochs=1, device="cpu", precision="fp32")
    result = noiseproof.fit(
        rows,
        noise="symmetric:0.4",
        noise_seed=5,
        method="CrossEntropy",
        model=str(tiny_model),
        train=quick,
    )
    assert result.samples["label"].tolist() == noisy["label"].tolist()


def test_open_set_noise_counts_as_wrong_inside_a_run_and_from_a_file(
    rows: pd.DataFrame, tiny_model: Path, tmp_path: Path
) -> None:
    """`fit --noise` and `corrupt` then `fit` must measure the same rows against the same truth."""
    write_table(pd.DataFrame({"text": ["stone", "iron", "clay"] * 5}), tmp_path / "pool.csv")
    noise, pool = "pairflip:0.2+openset:0.3", str(tmp_path / "pool.csv")
    noisy, corruption = corrupt(rows, noise, seed=5, noise_pool=pool)
    write_table(noisy, tmp_path / "noisy.csv")
    common: dict[str, Any] = {
        "method": "CrossEntropy",
        "model": str(tiny_model),
        "train": noiseproof.TrainSettings(epochs=1, device="cpu", precision="fp32"),
    }
    inside = noiseproof.fit(rows, noise=noise, noise_seed=5, noise_pool=pool, **common)
    after = noiseproof.fit(str(tmp_path / "noisy.csv"), clean_label="clean_label", **common)
    for result in (inside, after):
        assert result.record.noise["noise_rate"] == corruption.noise_rate
        wrong = result.samples["label"] != result.samples["clean_label"]
        assert wrong.tolist() == corruption.mask.tolist()
        foreign = corruption.extras["replacement"] >= 0
        assert result.samples["clean_label"].isna().tolist() == foreign.tolist()
    assert inside.record.metrics == after.record.metrics
    assert inside.record.metrics["detection_auroc"] is not None


def test_foreign_texts_come_into_a_column_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow copies a column for every cell that changes: hours for a million rows."""
    rows = pd.DataFrame({"text": [f"ours {n}" for n in range(40)], "label": ["a", "b"] * 20})
    write_table(rows, tmp_path / "rows.csv")
    write_table(pd.DataFrame({"text": ["theirs", "others"]}), tmp_path / "pool.csv")

    def refuse(self: Any, key: Any, value: Any) -> None:
        raise AssertionError("a single cell was changed")

    monkeypatch.setattr(pd.arrays.ArrowExtensionArray, "__setitem__", refuse)
    pool = str(tmp_path / "pool.csv")
    noisy, done = corrupt(str(tmp_path / "rows.csv"), "openset:0.5", noise_pool=pool, seed=1)
    chosen = done.extras["replacement"]
    texts = [["theirs", "others"][n] if n >= 0 else f"ours {k}" for k, n in enumerate(chosen)]
    assert noisy["text"].tolist() == texts
    assert (chosen >= 0).sum() == done.mask.sum() > 10


def test_text_noise_changes_texts_and_leaves_labels(tmp_path: Path) -> None:
    """Both columns of a pair; the label stays right, so nothing counts as a wrong label."""
    rows = table(60, seed=1).drop(columns="clean_label")
    noisy, done = noiseproof.corrupt(rows, "text:0.5", text="text,context", seed=3)
    assert noisy["label"].tolist() == rows["label"].tolist() and done.noise_rate == 0
    changed = (noisy[["text", "context"]] != rows[["text", "context"]]).any(axis=1).to_numpy()
    assert np.array_equal(changed, done.extras["text_changed"]) and 0.3 < changed.mean() < 0.7


def test_text_noise_needs_texts() -> None:
    """A matrix of features has no characters to delete."""
    rows = {"features": [[0.1, 0.2], [0.3, 0.4]], "label": ["a", "b"]}
    with pytest.raises(InputError, match="text noise needs rows of texts, these are"):
        noiseproof.corrupt(rows, "text:0.5", task="features")


def test_a_run_trains_on_corrupted_texts_and_says_how_many(tiny_model: Path) -> None:
    """`fit --noise text:0.4`: the same rows and texts as `corrupt` with the same seed."""
    rows = table(60, seed=1).drop(columns="clean_label")
    method = noiseproof.CrossEntropy()
    run = noiseproof.fit(
        rows,
        model=str(tiny_model),
        method=method,
        noise="text:0.4",
        noise_seed=5,
        train=train_settings(epochs=1),
    )
    _, done = noiseproof.corrupt(rows, "text:0.4", seed=5)
    assert run.record.noise["text_rate"] == done.extras["text_changed"].mean() > 0.2
    assert run.record.noise["noise_rate"] == 0.0


def test_responses_change_places_or_suffer_with_their_prompts(tmp_path: Path) -> None:
    """A label that is a text gets wrong as a text; the right one stays beside it."""
    given = {"prompt": [f"ask {n}" for n in range(20)], "response": [f"say {n}" for n in range(20)]}
    settings: dict[str, Any] = {"task": "causal-lm", "text": "prompt", "label": "response"}
    frame, found = corrupt(given, "swap:0.5", clean_label="truth", **settings)
    assert frame["truth"].tolist() == given["response"]
    assert ((frame["response"] != frame["truth"]) == found.mask).all() and found.mask.sum() == 10
    assert frame["prompt"].tolist() == given["prompt"]
    frame, _ = corrupt(given, "text:0.9", clean_label="truth", **settings)
    assert (frame["prompt"] != pd.Series(given["prompt"])).sum() > 10
    assert (frame["response"] != frame["truth"]).sum() > 10
    for noise, message in (("symmetric:0.2", "swap:RATE"), ("swap:0.2", "symmetric")):
        task = "causal-lm" if noise.startswith("sym") else "text"
        with pytest.raises(InputError, match=message):
            corrupt(given, noise, **settings | {"task": task})
    chats = {"messages": [[{"role": "user", "content": "a"}]] * 3, "response": ["x", "y", "z"]}
    with pytest.raises(InputError, match="must hold texts"):
        corrupt(chats, "text:0.2", task="causal-lm", text="messages", label="response")
    frame, _ = corrupt(chats, "swap:1", task="causal-lm", text="messages", label="response")
    assert sorted(frame["response"]) == ["x", "y", "z"]
