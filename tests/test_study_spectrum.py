"""Spectra of models and runs side by side: the record, the page and the command."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.finetune import fit
from noiseproof.methods import METHODS, CrossEntropy
from noiseproof.spectrum import spectrum
from noiseproof.study import Asked, find_study
from noiseproof.study.spectrum import Spectra
from noiseproof.study.spectrum.page import as_table, told
from rows import image_model, image_rows
from tiny import table, train_settings

STUDY = find_study("spectrum")
assert isinstance(STUDY, Spectra)


def called(*words: object) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


def record(folder: Path) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads((folder / "spectrum.json").read_text())["models"]
    return models


def measured(folder: Path, **asked: Any) -> list[dict[str, Any]]:
    STUDY.measure(Asked(device="cpu", size="small", **asked), folder)
    return record(folder)


# --- rows of features, with known answers --------------------------------------------------------


def test_features_are_compared_as_they_are_given(tmp_path: Path) -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4, whatever a model would have standardised."""
    np.savez(tmp_path / "rows.npz", features=np.diag([3.0, 1.0]), label=np.array([0, 1]))
    (one,) = measured(tmp_path / "out", data=str(tmp_path / "rows.npz"), task="features",
                      preprocess="none")  # fmt: skip
    assert one["name"] == "features as given" and one["s"] == pytest.approx([3.0, 1.0])
    assert one["sve"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert one["lsvr"] == pytest.approx(-math.log(0.75))
    assert one["angles"] is None  # there are no five directions


def test_rows_are_drawn_alike_and_only_where_there_are_more(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(400, 6))
    np.savez(tmp_path / "rows.npz", emb=features)
    asked = {"data": str(tmp_path / "rows.npz"), "task": "features", "column": "emb"}
    one, two = (measured(tmp_path / name, **asked)[0] for name in ("one", "two"))
    assert one["M"] == 300 and one == two
    other = measured(tmp_path / "three", **asked, seeds=(1,))[0]
    assert other["M"] == 300 and other["s"] != one["s"]
    whole = measured(tmp_path / "four", **asked, sample=400)[0]
    assert whole["s"] == pytest.approx(spectrum(features.astype(np.float32)).to_dict()["s"])


# --- models and runs -----------------------------------------------------------------------------


def test_models_and_runs_stand_side_by_side(tiny_model: Path, tmp_path: Path) -> None:
    """A probe has the spectrum of its model, a fine-tuned run another; NMTune shows two."""
    rows = table(24, wrong=0.25)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    methods = {"probe": CrossEntropy(tune="head"), "full": CrossEntropy(),
               "lora": CrossEntropy(tune="lora"), "nmtune": METHODS["NMTune"]()}  # fmt: skip
    for name, method in methods.items():
        fit(rows, model=str(tiny_model), method=method, out=tmp_path / name,
            train=train_settings(epochs=1))  # fmt: skip
    runs = [str(tmp_path / name) for name in methods]
    code, said = called("study", "spectrum", tmp_path / "rows.csv", "--device", "cpu",
                        "--model", tiny_model, *runs, "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, said
    found = {one["name"]: one for one in record(tmp_path / "out")}
    assert list(found) == [str(tiny_model), *runs, f"{runs[-1]}, reshaped"]
    plain = found[str(tiny_model)]
    assert plain["M"] == 24 and plain["D"] == 32
    for run, moves in zip(runs, (False, True, True, False), strict=True):
        same = found[run]["s"] == pytest.approx(plain["s"], rel=1e-4)
        assert same is not moves, run
    assert max(found[runs[0]]["angles"]) < 0.01 < max(found[runs[1]]["angles"])
    assert found[f"{runs[-1]}, reshaped"]["s"] != pytest.approx(plain["s"], rel=1e-2)
    html = (tmp_path / "out/study.html").read_text(encoding="utf-8")
    assert "Share of each singular value" in html and "Singular value entropy" in html
    before = (tmp_path / "out/study.md").read_bytes()
    code, said = called("study", "spectrum", "--pages", "--out", tmp_path / "out")
    assert code == 0 and (tmp_path / "out/study.md").read_bytes() == before


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_are_seen_through_any_architecture(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", image=image_rows(20)["image"])
    (one,) = measured(tmp_path / "out", data=str(tmp_path / "rows.npz"), task="image",
                      models=(image_model(name),))  # fmt: skip
    assert one["M"] == 20 and one["rank"] > 1 and 0 < one["lsvr"] <= one["sve"]


# --- the page ------------------------------------------------------------------------------------


def model(name: str, width: int, sve: float, lsvr: float) -> dict[str, Any]:
    return {"name": name, "M": 9, "D": width, "sve": sve, "lsvr": lsvr}


def test_only_models_with_equally_many_features_are_compared() -> None:
    found = told([model("a", 8, 1.5, 0.5), model("b", 8, 1.25, 0.75), model("c", 4, 9.0, 9.0)])
    assert found == [
        "Singular value entropy with 8 features, from low to high: b 1.25, a 1.50.",
        "Largest singular value ratio with 8 features, from low to high: a 0.50, b 0.75.",
        "c (4 features): entropy 9.00, largest ratio 9.00.",
    ]


def test_the_table_has_a_row_per_model() -> None:
    more = {"rank": 8, "p1": 0.6, "topk": 0.9, "skewness": 0.0, "kurtosis": 3.0}
    one = model("a", 8, 1.5, 0.5) | more | {"preprocess": "l2", "angles": [0.1, 0.4]}
    rows = list(csv.DictReader(io.StringIO(as_table({"models": [one]}))))
    assert [(row["name"], row["sve"], row["largest_angle"]) for row in rows] == [
        ("a", "1.5", "0.4")
    ]


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    for asked, words in (
        ({"noise": ("symmetric:0.2",)}, "trains nothing; leave --noise out"),
        ({"models": ("minilm", "minilm")}, "stands twice"),
        ({"preprocess": "pca"}, "preprocess must be one of"),
    ):
        with pytest.raises(InputError, match=words):
            STUDY.measure(Asked(device="cpu", **asked), tmp_path)
    with pytest.raises(InputError, match="demo are texts"):
        Asked(task="image")
    with pytest.raises(InputError, match="name texts with text"):
        Asked(column="body")
    with pytest.raises(InputError, match="leave --pages out"):
        STUDY.pages(tmp_path)
    np.savez(tmp_path / "rows.npz", features=np.eye(4))
    rows = {"data": str(tmp_path / "rows.npz"), "task": "features"}
    with pytest.raises(InputError, match="features have no encoder to load, got 'bert'"):
        measured(tmp_path / "out", **rows, models=("bert",))
